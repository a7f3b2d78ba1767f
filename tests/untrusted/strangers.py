"""Checkpoints of strangers, of more kinds: each a function `(good, folder) -> path`."""

import copy
import itertools
import json
import shutil
import struct
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

Maker = Callable[[Path, Path], Path]
RECORDS = 60_000
TRACE = "made-by-a-stranger"  # the folder that a file makes if anything in it is run


def rewritten(good: Path, target: Path, change: Callable[[str, bytes], list[tuple[Any, bytes]]]) -> Path:
    """The archive `good` with its records changed: `change(name, data)` gives the names and data to write."""
    with zipfile.ZipFile(good) as old, zipfile.ZipFile(target, "w") as new:
        for record in old.infolist():
            for name, data in change(record.filename, old.read(record)):
                new.writestr(name, data)
    return target


def pickled(stream: bytes) -> Maker:
    """A checkpoint with another pickle."""

    def make(good: Path, folder: Path) -> Path:
        return rewritten(good, folder / "x.ckpt", lambda n, d: [(n, stream if n.endswith("/data.pkl") else d)])

    return make


def changed(change: Callable[[dict[str, Any]], None]) -> Maker:
    """A checkpoint with other content."""

    def make(good: Path, folder: Path) -> Path:
        content = copy.deepcopy(torch.load(good, weights_only=True))
        change(content)
        torch.save(content, folder / "x.ckpt")
        return folder / "x.ckpt"

    return make


def argument(name: str, value: Any) -> Maker:
    """A checkpoint whose record has this argument of the method."""
    return changed(lambda content: content["xscale"]["init_args"].update({name: value}))


EVIL = b"\x80\x02cos\nmkdir\nX" + struct.pack("<I", len(TRACE)) + TRACE.encode() + b"\x85R."


def entry(name: bytes, data: bytes, place: int) -> bytes:
    """A record of a list of records."""
    return struct.pack(
        "<IHHHHHHIIIHHHHHII", 0x02014B50, 20, 20, 0, 0, 0, 33, zlib.crc32(data), len(data), len(data), len(name),
        0, 0, 0, 0, 0, place,
    ) + name  # fmt: skip


def end_64(count: int, size: int, place: int) -> bytes:
    """End record of 64 bits."""
    return b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, count, count, size, place)


def two_lists(good: Path, folder: Path) -> Path:
    """One list of records for Python, and another, with another pickle, for torch."""
    with zipfile.ZipFile(good) as old:
        records = [(record.filename.encode(), old.read(record)) for record in old.infolist()]
    root = records[0][0].split(b"/")[0]
    body, shown, hidden = b"", b"", b""
    for name, data in [*records, (root + b"/data/99", EVIL)]:
        place = len(body)
        body += struct.pack(
            "<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 33, zlib.crc32(data), *[len(data)] * 2, len(name), 0
        )
        body += name + data
        shown += entry(name, data, place)
        other = {root + b"/data.pkl": root + b"/data/99", root + b"/data/99": root + b"/data.pkl"}.get(name, name)
        hidden += entry(other, data, place)
    count = len(records) + 1
    first = end_64(count, len(hidden), len(body))
    where = len(body) + len(hidden)
    second = end_64(count, len(shown), where + len(first))
    locator = struct.pack("<IIQI", 0x07064B50, 0, where, 1)
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    (folder / "x.ckpt").write_bytes(body + hidden + first + shown + second + locator + end)
    return folder / "x.ckpt"


def other_case(good: Path, folder: Path) -> Path:
    """A second pickle, whose name differs in case alone: torch takes either."""

    def change(name: str, data: bytes) -> list[tuple[Any, bytes]]:
        if not name.endswith("/data.pkl"):
            return [(name, data)]
        return [(name.replace("data.pkl", "DATA.PKL"), EVIL), (name, data)]

    return rewritten(good, folder / "x.ckpt", change)


def other_name(good: Path, folder: Path) -> Path:
    """A record whose extra field gives it another name (0x7075) for readers that know this field."""

    def change(name: str, data: bytes) -> list[tuple[Any, bytes]]:
        record = zipfile.ZipInfo(name)
        text = b"\x01" + struct.pack("<I", zlib.crc32(name.encode())) + b"x/data.pkl"
        record.extra = struct.pack("<HH", 0x7075, len(text)) + text
        return [(record, data)]

    return rewritten(good, folder / "x.ckpt", change)


def descriptors(good: Path, folder: Path) -> Path:
    """Records say that sizes follow them, and the sizes that follow are wrong."""

    def change(name: str, data: bytes) -> list[tuple[Any, bytes]]:
        return [(name, data + b"PK\x07\x08" + struct.pack("<III", 0, 2**31, 2**31))]

    path = rewritten(good, folder / "x.ckpt", change)
    whole = bytearray(path.read_bytes())
    for sign, field in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = whole.find(sign)
        while place >= 0:
            whole[place + field] |= 8
            place = whole.find(sign, place + 4)
    path.write_bytes(whole)
    return path


def huge_extra(good: Path, folder: Path) -> Path:
    """Local headers claim an extra field of 64 kB, so their data begin elsewhere."""
    path = Path(shutil.copy(good, folder / "x.ckpt"))
    whole = bytearray(path.read_bytes())
    place = whole.find(b"PK\x03\x04", 4)
    whole[place + 28 : place + 30] = b"\xff\xff"
    path.write_bytes(whole)
    return path


def many_records(good: Path, folder: Path) -> Path:
    """More records than any model has."""
    listed = entry(b"x/data/0", b"", 0) * RECORDS
    end = b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, 0)
    local = struct.pack("<IHHHHHIIIHH", 0x04034B50, 20, 0, 0, 0, 33, 0, 0, 0, 8, 0) + b"x/data/0"
    tail = end_64(RECORDS, len(listed), len(local)) + struct.pack("<IIQI", 0x07064B50, 0, len(local) + len(listed), 1)
    (folder / "x.ckpt").write_bytes(local + listed + tail + end)
    return folder / "x.ckpt"


def named(module: str, name: str, arguments: bytes = b")") -> bytes:
    """The pickle that calls something by its name."""
    return b"\x80\x02c" + f"{module}\n{name}\n".encode() + arguments + b"R."


CALLS = {
    name: named(*name.rsplit(".", 1))
    for name in (
        "torch._utils._rebuild_sparse_tensor", "torch._utils._rebuild_qtensor", "torch._utils._rebuild_nested_tensor",
        "torch._utils._rebuild_meta_tensor_no_storage", "torch._utils._rebuild_device_tensor_from_numpy",
        "torch._utils._rebuild_wrapper_subclass", "torch._tensor._rebuild_from_type_v2", "torch.load",
        "torch.storage._load_from_bytes", "torch.classes.load_library", "torch.ops.load_library", "torch.hub.load",
        "numpy.core.multiarray._reconstruct", "numpy.core.multiarray.scalar", "builtins.getattr",
        "operator.methodcaller",
        "functools.reduce", "collections.namedtuple", "types.CodeType", "copyreg._reconstructor",
        "importlib.import_module",
        "subprocess.Popen", "torch.utils.collect_env.run", "torch.jit._pickle.restore_type_tag",
    )
}  # fmt: skip
TENSOR_3 = b"\x80\x02ctorch._utils\n_rebuild_tensor_v3\n("
TENSOR = b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n"
FLOATS = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
STORAGE = FLOATS + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"


def stored(first: bytes) -> bytes:
    """A reference to something outside of the pickle."""
    return b"\x80\x02" + first + b"Q."


def two_types(good: Path, folder: Path) -> Path:
    """A storage that is of bytes where it is named first, and of doubles where it is cut."""
    torch.save({"state_dict": {"a": torch.zeros(4, dtype=torch.float64)}}, folder / "plain.ckpt")

    def storage(kind: str, numbers: int) -> bytes:
        return (
            b"(X\x07\x00\x00\x00storagectorch\n" + kind.encode() + b"\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuK"
            + bytes([numbers]) + b"tQ"
        )  # fmt: skip

    def tensor(kind: str, numbers: int) -> bytes:
        rest = b"K\x00K" + bytes([numbers]) + b"\x85K\x01\x85\x89ccollections\nOrderedDict\n)RtR"
        return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage(kind, numbers) + rest

    stream = b"\x80\x02}X\x0a\x00\x00\x00state_dict}(X\x01\x00\x00\x00a" + tensor("DoubleStorage", 4)
    stream += b"X\x01\x00\x00\x00b" + tensor("ByteStorage", 32) + b"us."
    return pickled(stream)(folder / "plain.ckpt", folder)


class Shadowed:
    """Pickles as a dictionary with an attribute in the place of one of its methods."""

    def __init__(self, state: dict[str, Any], name: str) -> None:
        self.made = OrderedDict, ([list(item) for item in state.items()],), {name: 5}

    def __reduce__(self) -> Any:
        return self.made


def shadowed(name: str) -> Maker:
    """A checkpoint whose state dict has such an attribute."""
    return changed(lambda content: content.update(state_dict=Shadowed(content["state_dict"], name)))


ARCHIVES: dict[str, Maker] = {
    "two lists of records": two_lists,
    "names in another case": other_case,
    "names in extra fields": other_name,
    "descriptors with wrong sizes": descriptors,
    "huge extra field": huge_extra,
    "many records": many_records,
}
PICKLES: dict[str, Maker] = {
    **{f"calls {name}": pickled(stream) for name, stream in CALLS.items()},
    "NEWOBJ_EX": pickled(b"\x80\x04cos\nmkdir\n)}\x92."),
    "EXT4": pickled(b"\x80\x02\x84\x01\x00\x00\x00."),
    "PERSID": pickled(b"\x80\x02Pstorage\n."),
    "NEXT_BUFFER": pickled(b"\x80\x05\x97\x98."),
    "BYTEARRAY8": pickled(b"\x80\x05\x96\xff\xff\xff\xff\xff\xff\xff\x7f."),
    "tensor of nothing": pickled(TENSOR + b")R."),
    "tensor of one thing": pickled(TENSOR + b"N\x85R."),
    "tensor of a dict": pickled(TENSOR + b"(}K\x00)){}tR."),
    "hooks": pickled(TENSOR + b"(" + STORAGE + b"K\x00))\x89cos\nmkdir\ntR."),
    "tensor of a long list": pickled(TENSOR + b"(" + STORAGE + b"K\x00(" + b"K\x01" * 200_000 + b"t)\x89}tR."),
    "type that is none": pickled(TENSOR_3 + STORAGE + b"K\x00))\x89}ctorch\nload\ntR."),
    "type that is a storage": pickled(TENSOR_3 + STORAGE + b"K\x00))\x89}ctorch\nFloatStorage\ntR."),
    "type that is called": pickled(named("torch", "float32")),
    "number as a reference": pickled(stored(b"K\x01")),
    "module as a reference": pickled(stored(b"(X\x06\x00\x00\x00modulecos\nmkdir\nX\x01\x00\x00\x000K\x00K\x01t")),
    "bytes as a reference": pickled(b"\x80\x03C\x07storageQ."),
    "key that climbs": pickled(stored(FLOATS + b"X\x0e\x00\x00\x00../../data.pklX\x03\x00\x00\x00cpuK\x01t")),
    "key of another type": pickled(stored(FLOATS + b"K\x00X\x03\x00\x00\x00cpuK\x01t")),
    "location that is none": pickled(stored(FLOATS + b"X\x01\x00\x00\x000K\x00K\x01t")),
    "one storage of two types": two_types,
    "a number of ten megabytes": pickled(b"\x80\x02\x8b" + struct.pack("<I", 10**7) + b"\x7f" * 10**7 + b"."),
    "three million instructions": pickled(b"\x80\x02" + b"N0" * 1_500_000 + b"}."),
    "a device without end": pickled(b"\x80\x02ctorch\ndevice\nX\x40\x42\x0f\x00" + b"c" * 1_000_000 + b"\x85R."),
}  # fmt: skip
LETTERS = "abcdefghijklmnopqrstuvwxyz"
LAUGHS = f"[&a [x,x],{','.join(f'&{b} [*{a},*{a}]' for a, b in itertools.pairwise(LETTERS))}]"
POPEN = {"class_path": "subprocess.Popen", "init_args": {"args": ["mkdir", TRACE]}}
RECORDED: dict[str, Maker] = {
    "Popen as a backbone": argument("backbone", POPEN),
    "Popen as an optimizer": argument("optimizer", POPEN),
    "Popen as views": argument("views", POPEN),
    "Popen as an argument": argument("callback", POPEN),
    "Popen in a text": argument("backbone", json.dumps(POPEN)),
    "a device as a configuration": argument("backbone", "/dev/zero"),
    "a number that is a device": argument("decoder_dim", "/dev/zero"),
    "laughs in a text": argument("backbone", LAUGHS),
    "laughs as a number": argument("decoder_dim", LAUGHS),
    "a tag in a text": argument("backbone", f"!!python/object/apply:os.mkdir [{TRACE}]"),
    "a million arguments": changed(
        lambda content: content["xscale"]["init_args"].update({f"a{i}": i for i in range(10**6)})
    ),
    "a million entries": changed(lambda content: content["xscale"].update({f"a{i}": i for i in range(10**6)})),
    "a long text": argument("method_name", "a" * 10**6),
    "letters of another alphabet": changed(
        lambda content: content["xscale"].update(class_path="xscale_lightning.methods.m\u0430e.MAE")
    ),
    "a class over three lines": changed(
        lambda content: content["xscale"].update(class_path="xscale_lightning.a\n\n\nb.MAE")
    ),
    "a class that steers the terminal": changed(
        lambda content: content["xscale"].update(class_path="xscale_lightning.\x1b[2Jb.MAE")
    ),
    "text from right to left": argument("\u202eevil", "\u202e\x1b]0;x\x07"),
    "half of a letter": argument("norm_pix_loss", "\ud800"),
    "weights over three lines": changed(lambda content: content["state_dict"].update({"a\n\n\nb": torch.zeros(1)})),
    "weights with a long name": changed(lambda content: content["state_dict"].update({"a" * 10**6: torch.zeros(1)})),
    "items that are no method": shadowed("items"),
    "keys that are no method": shadowed("keys"),
}  # fmt: skip
LONG = ("three million instructions", "a million arguments", "a million entries")
CHECKPOINTS = {**ARCHIVES, **PICKLES, **RECORDED}
