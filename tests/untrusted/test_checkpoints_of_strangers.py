"""Checkpoints that want to run code, to fill the memory, or to read other files: each is refused in a line or two."""

import copy
import io
import os
import pickle
import struct
import sys
import types
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from xscale_lightning import checkpoints
from xscale_lightning.callbacks.saving import CheckpointFiles
from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.init_from import load_encoder
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.opening import load_torch
from xscale_lightning.pretrained import load_backbone
from xscale_lightning.readers.common import open_published


class Call:
    """Pickles as a call."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self):
        return self.call


class Stateful:
    """Pickles as an object of an installed class, with a state."""

    def __reduce__(self):
        return types.SimpleNamespace, (), {"a": 1}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A checkpoint as a run writes it, of a few kilobytes."""
    torch.manual_seed(0)
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=8, num_heads=2)
    module = MAE(bands=generic(2), backbone=backbone, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    path = tmp_path_factory.mktemp("good") / "good.ckpt"
    trainer.save_checkpoint(path)
    return path


def content(path: Path) -> dict[str, Any]:
    return copy.deepcopy(torch.load(path, weights_only=True))


def readers(path: Path) -> list[Any]:
    return [
        lambda: checkpoints.load_method(path),
        lambda: load_backbone(path),
        lambda: open_published(path),
        lambda: load_encoder(path),
        lambda: CheckpointFiles().load_checkpoint(path, weights_only=True),
    ]


def refused(path: Path, reads: list[Any] | None = None) -> str:
    text = ""
    for read in reads or readers(path):
        with pytest.raises(UserError) as caught:
            read()
        text = str(caught.value)
        assert len(text.splitlines()) <= 2 and len(text) < 500
    return text


def rewritten(good: Path, target: Path, change: Any, **options: Any) -> Path:
    """The archive `good` with its records changed: `change(name, data)` gives the names and data to write."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(target, "w", **options) as new:
        for record in old.infolist():
            for name, data in change(record.filename, old.read(record)):
                new.writestr(name, data)
    return target


EVIL = {
    "system": lambda trace: Call(os.system, f"touch {trace}"),
    "mkdir": lambda trace: Call(os.mkdir, str(trace)),
    "eval": lambda trace: Call(eval, f"open({str(trace)!r}, 'w')"),
    "getattr": lambda trace: Call(getattr, "", "join"),
    "import": lambda trace: Call(__import__, "antigravity"),
    "loads": lambda trace: Call(pickle.loads, pickle.dumps(Call(os.mkdir, str(trace)))),
    "apply": lambda trace: Call(torch.load, str(trace)),
    "state": lambda trace: Stateful(),
    "setstate": lambda trace: Call(torch._utils._set_obj_state, torch.zeros(1), {"a": 1}),
    "bytearray": lambda trace: Call(bytearray, 10**15),
    "hook": lambda trace: Call(
        torch._utils._rebuild_wrapper_subclass, str, torch.float32, (10**9,), (1,), 0, None, "cpu", False
    ),
    "partial": lambda trace: Call(__import__("functools").partial, os.mkdir, str(trace)),
}
PLACES = {
    "top": lambda evil: {"state_dict": {}, "x": evil},
    "state_dict": lambda evil: {"state_dict": OrderedDict(a=torch.zeros(2), b=evil)},
    "optimizer": lambda evil: {"state_dict": {}, "optimizer_states": [{"state": {0: {"exp_avg": [(1, evil)]}}}]},
    "key": lambda evil: {"state_dict": {}, evil: 1},
    "callbacks": lambda evil: {"state_dict": {}, "callbacks": {"x": {"y": [[[evil]]]}}},
}


@pytest.mark.parametrize("kind", EVIL)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_is_run(tmp_path, kind, zipped):
    for place, around in PLACES.items():
        trace, path = tmp_path / "trace", tmp_path / f"{place}.ckpt"
        torch.save(around(EVIL[kind](trace)), path, _use_new_zipfile_serialization=zipped)
        text = refused(path)
        assert "could run code" in text and not trace.exists()


def test_bare_pickles_and_programs_are_refused(tmp_path, good):
    bare = tmp_path / "bare.ckpt"
    bare.write_bytes(pickle.dumps(Call(os.mkdir, str(tmp_path / "trace"))))
    assert "could run code" in refused(bare)
    program = tmp_path / "program.ckpt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), program)
    assert "TorchScript" in refused(program)
    assert not (tmp_path / "trace").exists()
    old = tmp_path / "old.ckpt"
    torch.save(content(good), old, _use_new_zipfile_serialization=False)
    assert checkpoints.load_method(old).bands == generic(2)  # torch's old format is no harm by itself


def opcodes(path: Path, good: Path, pickled: bytes) -> Path:
    def change(name: str, data: bytes) -> list:
        return [(name, pickled if name.endswith("/data.pkl") else data)]

    return rewritten(good, path, change)


@pytest.mark.parametrize(
    "pickled",
    [
        b"\x80\x02cos\nmkdir\nX\x01\x00\x00\x00a\x85R.",
        b"\x80\x02ios\nmkdir\n.",
        b"\x80\x02(cos\nmkdir\nX\x01\x00\x00\x00ao.",
        b"\x80\x02\x82\x01.",
        b"\x80\x04\x8c\x02os\x8c\x05mkdir\x93\x8c\x01a\x85R.",
        b"\x80\x02}r\xff\xff\xff\x7f.",  # a memo of 2^31 places
        b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x7f.",  # bytes of 2^63
        b"\x80\x02" + b"]" * 20_000 + b"a" * 19_999 + b".",  # nested
        b"\x80\x02]q\x00h\x00a.",  # a list that holds itself
        b"\x80\x02]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(100)) + b".",  # laughs
        b"\x80\x02)" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(100)) + b"}(.",
        b"\x80\x02}" + b")" + b"".join(b"q%ch%ch%c\x86" % (i, i, i) for i in range(100)) + b"K\x01s.",  # hashed
        b"\x80\x02.",
        b"",
        b"\x80\x02N" + b"0" * 50 + b".",
    ],
    ids=range(15),
)
def test_pickles_that_no_pickler_writes(tmp_path, good, pickled):
    refused(opcodes(tmp_path / "x.ckpt", good, pickled))


def tensor_pickle(numbers: int, size: str, stride: str, offset: int = 0) -> bytes:
    """A checkpoint of one float tensor, as its pickle claims it."""
    return (
        b"(dp0\nVstate_dict\np1\n(dp2\nVw\np3\nctorch._utils\n_rebuild_tensor_v2\np4\n"
        b"((Vstorage\nctorch\nFloatStorage\nV0\nVcpu\n" + f"L{numbers}L\ntQ".encode()
        + f"I{offset}\n{size}{stride}I00\nccollections\nOrderedDict\n(tRtRss.".encode()
    )  # fmt: skip


@pytest.mark.parametrize(
    ("numbers", "size", "stride", "offset"),
    [
        (10**15, "(L1000000000000000L\nt", "(I1\nt", 0),
        (4, "(L1000000000000000L\nt", "(I1\nt", 0),
        (4, "(L1000000000000000L\nt", "(I0\nt", 0),
        (4, "(I4\nt", "(L1000000000L\nt", 0),
        (4, "(I4\nt", "(I1\nt", 3),
        (4, "(I-4\nt", "(I1\nt", 0),
        (4, "(I4\nt", "(I-1\nt", 3),
        (4, "(F1e15\nt", "(I1\nt", 0),
        (4, "(Fnan\nt", "(I1\nt", 0),
        (4, "(Finf\nt", "(I1\nt", 0),
        (-4, "(I4\nt", "(I1\nt", 0),
        (4, "(L9223372036854775807L\nL9223372036854775807L\nt", "(I1\nI1\nt", 0),
        (4, "(I2\nI2\nt", "(I1\nt", 0),
        (2**63, "(I4\nt", "(I1\nt", 0),
    ],
)
def test_tensors_larger_than_their_file(tmp_path, numbers, size, stride, offset):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"w": torch.ones(4)}}, path)
    assert "damaged" in refused(opcodes(tmp_path / "y.ckpt", path, tensor_pickle(numbers, size, stride, offset)))


def test_the_pickle_of_those_tests_is_read_where_it_is_true(tmp_path):
    path = tmp_path / "x.ckpt"
    torch.save({"state_dict": {"w": torch.arange(4.0)}}, path)
    whole = opcodes(tmp_path / "y.ckpt", path, tensor_pickle(4, "(I2\nI2\nt", "(I2\nI1\nt"))
    with pytest.raises(UserError, match="holds more than weights"):  # by torch, which reads no pickles of text
        load_torch(whole)


def test_archives_that_torch_does_not_write(tmp_path, good):
    with zipfile.ZipFile(good) as archive:
        root = archive.namelist()[0].split("/")[0]
    tensor = next(name for name in zipfile.ZipFile(good).namelist() if "/data/" in name)

    def same(name: str, data: bytes) -> list:
        return [(name, data)]

    made = {
        "packed": rewritten(good, tmp_path / "packed.ckpt", same, compression=zipfile.ZIP_DEFLATED),
        "bomb": rewritten(
            good,
            tmp_path / "bomb.ckpt",
            lambda name, data: [(name, bytes(50_000_000) if name == tensor else data)],
            compression=zipfile.ZIP_DEFLATED,
        ),
        "climbs": rewritten(good, tmp_path / "climbs.ckpt", lambda n, d: [(n, d), (f"{root}/../../{n[-3:]}", d)]),
        "absolute": rewritten(good, tmp_path / "absolute.ckpt", lambda n, d: [("/" + n, d)]),
        "roots": rewritten(good, tmp_path / "roots.ckpt", lambda n, d: [(n, d), ("other/" + n, d)]),
    }
    with pytest.warns(UserWarning, match="Duplicate name"):
        made["twice"] = rewritten(good, tmp_path / "twice.ckpt", lambda n, d: [(n, d), (n, d)])
    for kind, path in made.items():
        assert path.stat().st_size < 2_000_000, kind
        assert "damaged" in refused(path), kind
    torch.save(content(good), tmp_path / "again.ckpt")
    assert checkpoints.load_method(tmp_path / "again.ckpt")


def test_claims_of_sizes_in_an_archive(tmp_path, good):
    whole = bytearray(good.read_bytes())
    central = whole.index(b"PK\x01\x02")
    for field, value in ((20, 2**31), (24, 2**31), (42, 2**31), (10, 8), (28, 65535)):
        broken = bytearray(whole)
        broken[central + field : central + field + (4 if field not in (10, 28) else 2)] = struct.pack(
            "<I" if field not in (10, 28) else "<H", value
        )
        path = tmp_path / f"{field}.ckpt"
        path.write_bytes(broken)
        refused(path)
    for name, data in {"front": b"MZ" * 100 + whole, "half": whole[: len(whole) // 2], "none": b""}.items():
        (tmp_path / f"{name}.ckpt").write_bytes(data)
        refused(tmp_path / f"{name}.ckpt")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x.update(class_path="antigravity.Method"), "no announced plug-in"),
        (lambda x: x.update(class_path="this.s"), "no announced plug-in"),
        (lambda x: x.update(class_path="os.system"), "no method"),
        (lambda x: x.update(class_path="builtins.eval"), "no method"),
        (lambda x: x.update(class_path=7), "class_path"),
        (lambda x: x.update(class_path=None), "class_path"),
        (lambda x: x.update(init_args=[1]), "init_args"),
        (lambda x: x.update(bands=[1, 2]), "bands"),
        (lambda x: x["bands"].update(bands=[{"name": "a", "mean": "x"}] * 2), "mean"),
        (lambda x: x["bands"].update(bands=[{"name": "a", "mean": float("nan"), "std": 1.0}] * 2), "mean"),
        (lambda x: x["bands"].update(bands=[]), "bands"),
        (lambda x: x["bands"].update(bands=["a", "b"]), "band"),
        (lambda x: x.update(versions=[1]), "versions"),
        (lambda x: x.update(stage="first"), "stage"),
        (lambda x: x["init_args"]["backbone"].update(depth=10**9), "depth"),
        (lambda x: x["init_args"]["backbone"].update(dim=10**9), "dim"),
        (lambda x: x["init_args"]["backbone"].update(dim=4096), "tensor"),
        (lambda x: x["init_args"]["backbone"].update(mlp_ratio=1e12), "mlp_ratio"),
        (lambda x: x["init_args"].update(decoder_depth=10**8), "decoder_depth"),
        (lambda x: x["init_args"].update(decoder_dim=2**40), "decoder_dim"),
        (lambda x: x["init_args"].update(no_such=1), "no_such"),
        (lambda x: x["init_args"].update(backbone={"class_path": "antigravity.Net"}), "no announced plug-in"),
        (lambda x: x["init_args"]["backbone"].update(name="timm:local-dir:/etc"), "outside"),
        (lambda x: x["init_args"].update(backbone="x"), "rebuilt"),
        (lambda x: x["init_args"].update(norm_pix_loss=torch.zeros(1)), "norm_pix_loss"),
        (lambda x: x.clear(), "class_path"),
    ],
)
def test_records_that_lie(tmp_path, good, change, message):
    whole = content(good)
    change(whole["xscale"])
    torch.save(whole, tmp_path / "x.ckpt")
    before = set(sys.modules)
    text = refused(tmp_path / "x.ckpt", [lambda: checkpoints.load_method(tmp_path / "x.ckpt")])
    assert message in text
    assert not {"antigravity", "this"} & (set(sys.modules) - before)


@pytest.mark.parametrize("value", [7, "x", [1], None, {"host": "antigravity.Method"}])
def test_a_host_method_is_one_of_those_known(tmp_path, good, value):
    whole = content(good)
    host = value["host"] if isinstance(value, dict) else "mae"
    arguments = {"host": host, "host_args": None if isinstance(value, dict) else value}
    whole["xscale"].update(
        class_path="xscale_lightning.methods.spatial_affinity.SpatialAffinity",
        init_args={**whole["xscale"]["init_args"], **arguments},
    )
    torch.save(whole, tmp_path / "x.ckpt")
    refused(tmp_path / "x.ckpt", [lambda: checkpoints.load_method(tmp_path / "x.ckpt")])
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("name", ["state_dict", "loops", "callbacks", "optimizer_states", "global_step", "epoch"])
@pytest.mark.parametrize("value", ["x", [1], {1: 2}, -1, True, 1.5])
def test_parts_of_other_types(tmp_path, good, name, value):
    whole = content(good)
    if type(value) is type(whole.get(name)) and not (isinstance(value, int) and value < 0) and name != "state_dict":
        return
    whole[name] = value
    torch.save(whole, tmp_path / "x.ckpt")
    assert name in refused(tmp_path / "x.ckpt", [lambda: checkpoints.load_method(tmp_path / "x.ckpt")])


def test_weights_that_name_more_blocks_than_they_have(tmp_path):
    state = {"patch_embed.proj.weight": torch.zeros(768, 3, 16, 16), "blocks.0.mlp.fc1.weight": torch.zeros(3072, 1)}
    state |= {f"blocks.{i}.x": torch.zeros(1) for i in range(1000)}
    torch.save(state, tmp_path / "x.pth")
    assert "blocks" in refused(tmp_path / "x.pth", [lambda: load_encoder(tmp_path / "x.pth")])
    for shape in ((), (4,), (0, 0, 0, 0), (4, 3, 16)):
        torch.save({**state, "patch_embed.proj.weight": torch.zeros(shape)}, tmp_path / "x.pth")
        refused(tmp_path / "x.pth", [lambda: load_encoder(tmp_path / "x.pth")])


def test_content_of_a_stream_is_never_left_over(good):
    """The buffer that a pickle is read from may go on after it: what follows is not part of it."""
    from xscale_lightning.opening.pickles import Reader

    reader = Reader(None)
    stream = io.BytesIO(pickle.dumps([1], 2) + pickle.dumps({"a": 2}, 2))
    assert reader.read(stream) == [1] and reader.read(stream) == {"a": 2}
