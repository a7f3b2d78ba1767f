"""Bytes of real files are flipped, cut and moved: each loads to the bit as it was, or is refused by a `UserError`."""

import json
import os
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from xscale_lightning import checkpoints, exports
from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.opening import load_safetensors
from xscale_lightning.pretrained import load_backbone

EXPORTED = ["config.json", "bands.json", "model.safetensors"]
FUZZ = settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder with `good.ckpt`, the export `good` and `good.safetensors`."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("fuzz")
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=8, num_heads=2, position="gsd")
    module = MAE(bands=generic(2), backbone=backbone, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(folder / "good.ckpt")
    exports.write_export(load_backbone(folder / "good.ckpt"), folder / "good", lambda config: "card")
    save_file(dict(module.state_dict()), folder / "good.safetensors")
    return folder


damage = st.one_of(
    st.tuples(st.just("flip"), st.floats(0, 1), st.integers(0, 7)),
    st.tuples(st.just("set"), st.floats(0, 1), st.integers(0, 255)),
    st.tuples(st.just("cut"), st.floats(0, 1), st.integers(0, 64)),
    st.tuples(st.just("drop"), st.floats(0, 1), st.integers(1, 64)),
    st.tuples(st.just("fill"), st.floats(0, 1), st.integers(1, 64)),
)


def damaged(content: bytes, steps: list[tuple[str, float, int]]) -> bytes:
    data = bytearray(content)
    for kind, where, how in steps:
        place = min(int(where * len(data)), len(data) - 1) if data else 0
        if kind == "flip" and data:
            data[place] ^= 1 << how
        elif kind == "set" and data:
            data[place] = how
        elif kind == "cut":
            del data[max(0, len(data) - how if where < 0.5 else place) :]
        elif kind == "drop":
            del data[place : place + how]
        elif kind == "fill":
            data[place : place + how] = bytes(how)
    return bytes(data)


def same(ours: dict, theirs: dict) -> bool:
    def equal(a: object, b: object) -> bool:
        if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
            return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
        return type(a) is type(b) and a == b

    return ours.keys() == theirs.keys() and all(equal(ours[key], theirs[key]) for key in ours)


@pytest.fixture(scope="module")
def watched():
    """Raises where anything is run that a file could ask for."""
    calls: list[str] = []
    active = [True]

    def hook(event: str, arguments: tuple) -> None:
        if active[0] and event in ("os.system", "subprocess.Popen", "os.exec", "os.mkdir", "socket.connect"):
            calls.append(event)

    sys.addaudithook(hook)
    yield calls
    active[0] = False


@FUZZ
@given(steps=st.lists(damage, min_size=1, max_size=3))
def test_checkpoints(files, tmp_path_factory, watched, steps):
    path = files / "fuzzed.ckpt"
    path.unlink(missing_ok=True)
    path.write_bytes(damaged((files / "good.ckpt").read_bytes(), steps))
    calls = len(watched)
    try:
        found = checkpoints.read(path)
    except UserError as error:
        assert len(str(error).splitlines()) <= 2
    else:
        assert same(found["state_dict"], checkpoints.read(files / "good.ckpt")["state_dict"])
        assert found["xscale"] == checkpoints.read(files / "good.ckpt")["xscale"]
    assert len(watched) == calls


@FUZZ
@given(
    name=st.sampled_from(["config.json", "bands.json", "model.safetensors"]),
    steps=st.lists(damage, min_size=1, max_size=2),
)
def test_exports(files, watched, name, steps):
    folder = files / "fuzzed"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(files / "good", folder)
    (folder / name).write_bytes(damaged((files / "good" / name).read_bytes(), steps))
    calls = len(watched)
    good = load_backbone(files / "good")
    try:
        found = load_backbone(folder)
    except UserError as error:
        assert len(str(error).splitlines()) <= 2
    else:
        assert same(dict(found.encoder.state_dict()), dict(good.encoder.state_dict()))
        assert found.bands == good.bands and found.scaling == good.scaling and found.config == good.config
    assert len(watched) == calls


@FUZZ
@given(steps=st.lists(damage, min_size=1, max_size=2))
def test_safetensors(files, watched, steps):
    """The format has no sums, so numbers may differ; names, shapes and types are those of the header or refused."""
    whole = (files / "good.safetensors").read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    path = files / "fuzzed.safetensors"
    path.write_bytes(damaged(whole[:header], steps) + whole[header:])
    calls = len(watched)
    try:
        found = load_safetensors(path, "x")
    except UserError as error:
        assert len(str(error).splitlines()) <= 2
    else:
        assert sum(tensor.numel() * tensor.element_size() for tensor in found.values()) <= len(whole)
    assert len(watched) == calls


def test_every_cut_of_a_checkpoint_is_refused(files):
    whole = (files / "good.ckpt").read_bytes()
    path = files / "cut.ckpt"
    for length in sorted(random.Random(0).sample(range(len(whole)), 40)):
        path.unlink(missing_ok=True)
        path.write_bytes(whole[:length])
        with pytest.raises(UserError):
            checkpoints.read(path)


def test_every_number_of_an_export_is_watched(files, tmp_path):
    folder = Path(shutil.copytree(files / "good", tmp_path / "copy"))
    bands = json.loads((folder / "bands.json").read_text())
    bands["bands"][0]["mean"] += 1
    (folder / "bands.json").write_text(json.dumps(bands))
    with pytest.raises(UserError, match=r"its bands\.json is not as it was written"):
        load_backbone(folder)
    shutil.copy(files / "good" / "bands.json", folder)
    data = bytearray((folder / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (folder / "model.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"its model\.safetensors is not as it was written"):
        load_backbone(folder)
    assert os.listdir(folder)
