"""Export folders of strangers, of more kinds: each a function `(export, folder) -> folder`."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

Maker = Callable[[Path, Path], Path]


def fifo(name: str) -> Maker:
    """An export with a pipe that nobody writes into."""

    def make(export: Path, folder: Path) -> Path:
        copied = Path(shutil.copytree(export, folder / "export"))
        (copied / name).unlink()
        os.mkfifo(copied / name)
        return copied

    return make


def linked(name: str, target: str) -> Maker:
    """An export with a link."""

    def make(export: Path, folder: Path) -> Path:
        copied = Path(shutil.copytree(export, folder / "export"))
        (copied / name).unlink()
        os.symlink(target, copied / name)
        return copied

    return make


def header(change: Callable[[str], str]) -> Maker:
    """An export of an earlier version, without sums, whose weights have another header."""

    def make(export: Path, folder: Path) -> Path:
        copied = Path(shutil.copytree(export, folder / "export"))
        config = json.loads((copied / "config.json").read_text())
        config["xscale"].pop("sha256")
        (copied / "config.json").write_text(json.dumps(config))
        whole = (copied / "model.safetensors").read_bytes()
        size = int.from_bytes(whole[:8], "little")
        text = change(whole[8 : 8 + size].decode()).encode()
        (copied / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + whole[8 + size :])
        return copied

    return make


def folder_for_file(export: Path, folder: Path) -> Path:
    """An export whose weights are a folder."""
    copied = Path(shutil.copytree(export, folder / "export"))
    (copied / "model.safetensors").unlink()
    (copied / "model.safetensors").mkdir()
    return copied


TWICE = '{"cls_token":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
MILLION = '{"a0":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}' + "".join(
    f',"a{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(1, 300_000)
)
EXPORTS: dict[str, Maker] = {
    **{f"pipe as {name}": fifo(name) for name in ("config.json", "bands.json", "model.safetensors")},
    **{
        f"{target} as {name}": linked(name, target)
        for name in ("config.json", "bands.json", "model.safetensors")
        for target in ("/dev/zero", "/dev/stdin", "model.safetensors", ".")
    },
    "folder as model.safetensors": folder_for_file,
    "a tensor twice": header(lambda text: text.replace("{", TWICE, 1)),
    "an offset twice": header(lambda text: text.replace('"data_offsets"', '"data_offsets":[0,4],"data_offsets"', 1)),
    "negative offsets": header(lambda text: text.replace('"data_offsets":[0', '"data_offsets":[-4', 1)),
    "offsets that are no numbers": header(lambda text: text.replace('"data_offsets":[0', '"data_offsets":[false', 1)),
    "a million tensors": header(lambda text: MILLION + "}"),
    "a name over three lines": header(lambda text: text.replace('"cls_token"', '"a\\n\\n\\nb"', 1)),
    "metadata that is no text": header(lambda text: text.replace("{", '{"__metadata__":{"a":{"b":1}},', 1)),
}  # fmt: skip
