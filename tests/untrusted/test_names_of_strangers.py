"""Names in a stranger's file that would import a module, read another file, or ask a network: none is followed."""

import copy
import json
import os
import shutil
import socket
import sys
from pathlib import Path

import pytest
import torch

from xscale_lightning import checkpoints, cli, exports
from xscale_lightning.commands.arguments import import_method
from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError, describe
from xscale_lightning.init_from import load_encoder
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.pretrained import Origin, Pretrained, load_backbone

MODULE = "a_module_of_a_stranger"
NAMES = {
    "a module": {"name": f"{MODULE}:net"},
    "a hub": {"name": "timm:hf-hub:stranger/net", "pretrained": True},
    "a hub in capitals": {"name": "timm:HF_HUB:stranger/net"},
    "a folder in capitals": {"name": "timm:Local-Dir:/etc"},
    "a folder after a space": {"name": "timm: local-dir:/etc"},
    "a folder above": {"name": "timm:../../etc"},
    "a long name": {"name": "timm:" + "a" * 10_000},
    "a name that steers the terminal": {"name": "timm:\x1b[2Jx"},
}
TEXTS = {
    "options in a text": f"{{name: '{MODULE}:net'}}",
    "a class in a text": f"{{class_path: {MODULE}.Net}}",
    "a file": "{folder}/options.yaml",
    "a file of the machine": "/etc/passwd",
}


@pytest.fixture(autouse=True)
def traps(tmp_path, monkeypatch):
    """A module that leaves a trace if it is imported, and a network that must not be asked."""
    (tmp_path / f"{MODULE}.py").write_text("raise SystemExit('imported')\n")
    (tmp_path / "options.yaml").write_text(f"name: {MODULE}:net\ndepth: 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given: pytest.fail(f"asked for {given[0]}"))
    monkeypatch.setattr(socket.socket, "connect", lambda *given: pytest.fail("opened a connection"))
    yield
    assert MODULE not in sys.modules


def refused(read) -> None:
    with pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert len(text.splitlines()) <= 2 and len(text) < 600 and text.replace("\n", "").isprintable()


def changed(good: Path, folder: Path, change) -> Path:
    content = copy.deepcopy(torch.load(good, weights_only=True))
    change(content["xscale"]["init_args"])
    torch.save(content, folder / "x.ckpt")
    return folder / "x.ckpt"


@pytest.mark.parametrize("kind", NAMES)
def test_names_of_backbones(good, tmp_path, kind):
    path = changed(good, tmp_path, lambda arguments: arguments["backbone"].update(NAMES[kind]))
    for read in (checkpoints.load_method, load_backbone, load_encoder):
        refused(lambda read=read: read(path))
    export = Path(shutil.copytree(good.parent / "export", tmp_path / "export"))
    config = json.loads((export / "config.json").read_text())
    config["xscale"].pop("sha256")
    config["xscale"]["backbone"].update(NAMES[kind])
    (export / "config.json").write_text(json.dumps(config))
    for read in (load_backbone, load_encoder):
        refused(lambda read=read: read(export))


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("option", ["backbone", "optimizer", "views"])
def test_texts_for_groups_of_options(good, tmp_path, kind, option):
    text = TEXTS[kind].format(folder=tmp_path) if kind == "a file" else TEXTS[kind]
    path = changed(good, tmp_path, lambda arguments: arguments.update({option: text}))
    refused(lambda: checkpoints.load_method(path))


def test_weights_at_hand_are_not_fetched(tmp_path):
    """An export that asks for timm's own weights, which are its own: nobody is asked for them."""
    config = BackboneConfig("timm:test_vit")
    export, bands = tmp_path / "export", generic(3)
    source = Pretrained(config.build(3), bands, config, "standardize", Origin("x", "mae", 160, "0"))
    exports.write_export(source, export, lambda config: "card")
    content = json.loads((export / "config.json").read_text())
    content["xscale"].pop("sha256")
    content["xscale"]["backbone"]["pretrained"] = True
    (export / "config.json").write_text(json.dumps(content))
    assert load_backbone(export).encoder.depth == config.build(3).depth


def test_a_backbone_of_ones_own_is_named_by_its_user(good, tmp_path):
    (tmp_path / "my_backbones_of_a_test.py").write_text(
        "from xscale_lightning.models.registry import create_backbone, register_backbone\n\n"
        "@register_backbone('mine_of_a_test')\ndef mine(in_chans, config):\n"
        "    return create_backbone('vit_tiny_patch8', in_chans, depth=1, dim=16, num_heads=2)\n"
    )
    name = "my_backbones_of_a_test:mine_of_a_test"
    path = changed(good, tmp_path, lambda arguments: arguments["backbone"].update(name=name))
    refused(lambda: checkpoints.load_method(path))
    import_method(name)
    assert checkpoints.load_method(path).backbone.depth == 1


def test_errors_that_are_not_ours_neither_steer_the_terminal_nor_fill_it():
    for error in (KeyError("\x1b[2J" + "a" * 10**6), OSError(36, "File name too long", "\x1b]0;x\x07" + "b" * 10**6)):
        text = describe(error)
        assert len(text) < 2_000 and text.replace("\n", "").isprintable()
    assert os.strerror(36) in describe(OSError(36, os.strerror(36), "b" * 10**6))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"model: {class_path: os.system}\n", "os.system"),
        (b"model: os.system\n", "os.system"),
        (b"\xff\xfe\x00\x01", "no text"),
        (b"trainer: {max_epochs: " + b"9" * 5_000 + b"}\n", "cannot be read"),
    ],
)
def test_configurations_that_are_none(tmp_path, capsys, content, message):
    (tmp_path / "x.yaml").write_bytes(content)
    code = cli.main(["fit", "--config", str(tmp_path / "x.yaml"), "--output", str(tmp_path / "runs")])
    text = capsys.readouterr().err
    assert code == 2 and message in text and len(text.strip().splitlines()) <= 2
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kind", ["pipe", "device", "terabyte"])
def test_configurations_without_end(tmp_path, capsys, kind):
    path = tmp_path / "x.yaml"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        with path.open("wb") as file:
            file.truncate(2**40)
    for words in (["stats", "--config", str(path)], ["doctor", "--config", str(path)],
                  ["pack", "out", "--data", str(path)], ["bench", str(path)], ["sweep", str(path)]):  # fmt: skip
        assert cli.main(words) == 2, words
        assert len(capsys.readouterr().err.strip().splitlines()) <= 2
