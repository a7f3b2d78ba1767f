"""Exports, safetensors, JSON and YAML that lie, climb or never end."""

import json
import os
import shutil
import struct
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

from xscale_lightning import exports
from xscale_lightning.commands.export import run_facts
from xscale_lightning.commands.parser import load_yaml
from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.init_from import load_encoder
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.opening import check_yaml, load_safetensors, read_json, read_yaml
from xscale_lightning.pretrained import Origin, Pretrained, load_backbone


def refused(read) -> str:
    with pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert len(text.splitlines()) <= 2 and len(text) < 500
    return text


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    torch.manual_seed(0)
    config = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2, position="gsd")
    bands = generic(2)
    source = Pretrained(config.build(2), bands, config, "standardize", Origin("x.ckpt", "mae", 16, "0"))
    folder = tmp_path_factory.mktemp("export") / "out"
    exports.write_export(source, folder, lambda config: "card")
    return folder


@pytest.fixture
def copied(exported, tmp_path) -> Path:
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def write_header(path: Path, header: object, data: bytes = b"", length: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def entry(dtype: object = "F32", shape: object = (2,), offsets: object = (0, 8)) -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


@pytest.mark.parametrize(
    ("header", "data", "length"),
    [
        ({}, b"", 2**60),
        ({}, b"", 2**31),
        ({}, b"", 2**64 - 1),
        (b"[" * 100_000, b"", None),
        (b'{"a":' * 5_000 + b"1" + b"}" * 5_000, b"", None),
        (b"\xff\xfe", b"", None),
        ([1, 2], b"", None),
        ({"a": entry()}, b"", None),
        ({"a": entry(offsets=(0, 4))}, bytes(4), None),
        ({"a": entry(offsets=(4, 12))}, bytes(12), None),
        ({"a": entry(), "b": entry()}, bytes(8), None),
        ({"a": entry(offsets=(8, 0))}, bytes(8), None),
        ({"a": entry(shape=(10**15,))}, bytes(8), None),
        ({"a": entry(shape=(2**62, 4))}, bytes(8), None),
        ({"a": entry(shape=(-2,))}, bytes(8), None),
        ({"a": entry(shape=(2.0,))}, bytes(8), None),
        ({"a": entry(shape="ab")}, bytes(8), None),
        ({"a": entry(dtype="F1024")}, bytes(8), None),
        ({"a": entry(dtype=7)}, bytes(8), None),
        ({"a": {"dtype": "F32"}}, bytes(8), None),
        ({"a": 5}, bytes(8), None),
        ({"a": entry()}, bytes(9), None),
        ({"__metadata__": 5, "a": entry()}, bytes(8), None),
    ],
)
def test_headers_that_lie(tmp_path, header, data, length):
    path = write_header(tmp_path / "x.safetensors", header, data, length)
    assert "cannot be read" in refused(lambda: load_safetensors(path, "x"))
    refused(lambda: load_encoder(path))


def test_a_header_that_is_true_is_read(tmp_path):
    path = write_header(tmp_path / "x.safetensors", {"a": entry()}, struct.pack("<ff", 1, 2))
    assert load_safetensors(path, "x")["a"].tolist() == [1.0, 2.0]
    refused(lambda: load_safetensors(tmp_path / "absent.safetensors", "x"))
    refused(lambda: load_safetensors(tmp_path, "x"))


@pytest.mark.parametrize("name", ["config.json", "bands.json", "model.safetensors"])
def test_links_out_of_the_folder_are_not_followed(copied, tmp_path, name):
    elsewhere = tmp_path / "elsewhere"
    shutil.move(copied / name, elsewhere)
    os.symlink(elsewhere, copied / name)
    assert "outside of the folder" in refused(lambda: load_backbone(copied))
    (copied / name).unlink()
    os.symlink("/etc/passwd", copied / name)
    assert "outside of the folder" in refused(lambda: load_backbone(copied))
    (copied / name).unlink()
    shutil.move(elsewhere, copied / "inside")
    os.symlink("inside", copied / name)
    assert len(load_backbone(copied).bands) == 2


def test_the_cache_of_a_hub_may_link_to_its_own_files(copied, tmp_path):
    snapshot, blobs = tmp_path / "hub" / "snapshots" / "abc", tmp_path / "hub" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for file in list(copied.iterdir()):
        shutil.move(file, blobs / file.name)
        os.symlink(Path("../../blobs") / file.name, snapshot / file.name)
    assert len(load_backbone(snapshot).bands) == 2


def change(folder: Path, edit) -> Path:
    """Change an export as an earlier version, without sums, or a stranger would have written it."""
    config = json.loads((folder / "config.json").read_text())
    config["xscale"].pop("sha256")
    edit(config["xscale"])
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    "edit",
    [
        lambda own: own["backbone"].update(depth=10**9),
        lambda own: own["backbone"].update(dim=10**9),
        lambda own: own["backbone"].update(dim=2048, num_heads=2),
        lambda own: own["backbone"].update(depth="x"),
        lambda own: own["backbone"].update(position="../../etc/passwd"),
        lambda own: own["backbone"].update(name="../../etc/passwd"),
        lambda own: own["backbone"].update(name="timm:local-dir:../../etc", pretrained=True),
        lambda own: own["backbone"].update(weights="../../etc/passwd"),
        lambda own: own["backbone"].update(mlp_ratio=float("inf")),
        lambda own: own["backbone"].update(wavelengths=[[[1]]]),
        lambda own: own.update(backbone=[1]),
        lambda own: own.update(scaling={"class_path": "os.system"}),
        lambda own: own.update(image_size=-5),
        lambda own: own.update(image_size="x"),
        lambda own: own.update(format="x"),
    ],
)
def test_configurations_of_an_export_that_lie(copied, edit):
    refused(lambda: load_backbone(change(copied, edit)))


def test_an_export_of_an_earlier_version_is_read(copied):
    assert len(load_backbone(change(copied, lambda own: None)).bands) == 2


@pytest.mark.parametrize("bands", [[], {}, {"bands": 5}, {"sensor": "x", "unit": "y", "bands": [{"name": 1}]}, "x"])
def test_band_records_that_lie(copied, bands):
    change(copied, lambda own: None)
    (copied / "bands.json").write_text(json.dumps(bands))
    refused(lambda: load_backbone(copied))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a":' * 200 + "1" + "}" * 200,
        '{"a": 1, "a": 2}',
        '{"a": NaN}',
        '{"a": 1' + "0" * 5000 + "}",
        "\x00",
        "",
    ],
)
def test_json_that_no_program_of_ours_writes(tmp_path, copied, text):
    (tmp_path / "x.json").write_text(text)
    refused(lambda: read_json(tmp_path / "x.json", "x"))
    for name in ("config.json", "bands.json"):
        whole = (copied / name).read_bytes()
        (copied / name).write_text(text)
        refused(lambda: load_backbone(copied))
        (copied / name).write_bytes(whole)
    with (tmp_path / "large.json").open("wb") as file:
        file.truncate(10**9)
    assert "far more" in refused(lambda: read_json(tmp_path / "large.json", "x"))


LAUGHS = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{i}: &a{i} {{<<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 60))
ENDLESS = [
    LAUGHS,
    MERGES,
    "a: &a [*a]",
    "[" * 50_000,
    "- " * 50_000 + "x",
    "\n".join(" " * i + "a:" for i in range(500)),
    "{a: " * 500,
]


@pytest.mark.parametrize("text", ENDLESS, ids=range(len(ENDLESS)))
def test_yaml_without_end(tmp_path, text):
    (tmp_path / "x.yaml").write_text(text)
    for read in (lambda: load_yaml(text), lambda: read_yaml(tmp_path / "x.yaml", "x")):
        refused(read)


@pytest.mark.parametrize(
    "tag",
    [
        "!!python/object/apply:os.mkdir [TRACE]",
        "!!python/object/new:os.mkdir [TRACE]",
        "!!python/name:os.system",
        "!!python/module:antigravity",
        "!!python/object:types.SimpleNamespace {}",
        "!include TRACE",
    ],
)
def test_yaml_with_object_tags(tmp_path, tag):
    trace, path = tmp_path / "trace", tmp_path / "config.yaml"
    text = f"data: {tag.replace('TRACE', str(trace))}"
    path.write_text(text)
    with pytest.raises((yaml.YAMLError, UserError)):  # parsers tell YAML's errors as the user's
        load_yaml(text)
    refused(lambda: read_yaml(path, "x"))
    assert not trace.exists()


def test_plain_yaml_passes():
    text = "a: &a {x: 1, y: [1, 2]}\nb: *a\nc: {<<: *a, z: 3}\n"
    check_yaml(text)
    assert load_yaml(text)["c"] == {"x": 1, "y": [1, 2], "z": 3}
    for file in Path(__file__).parents[2].glob("configs/**/*.yaml"):
        check_yaml(file.read_text())


def test_what_lies_beside_a_checkpoint_is_not_trusted_either(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "xscale_lightning.checkpoints.read_metadata",
        lambda path: ({"global_step": 1}, {"class_path": "antigravity.Method", "init_args": {}}),
    )
    (tmp_path / "x.ckpt").write_bytes(b"x")
    assert run_facts(tmp_path / "x.ckpt")["paper"] == ""
    (tmp_path / "config.yaml").write_text(LAUGHS)
    refused(lambda: run_facts(tmp_path / "x.ckpt"))
    (tmp_path / "config.yaml").write_text("data: {init_args: [1]}")
    (tmp_path / "results.json").write_text("[" * 100_000)
    refused(lambda: run_facts(tmp_path / "x.ckpt"))


def test_safetensors_of_the_library_are_read(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.zeros(0), "c": torch.ones((), dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "x.safetensors", {"format": "pt"})
    found = load_safetensors(tmp_path / "x.safetensors", "x")
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)
