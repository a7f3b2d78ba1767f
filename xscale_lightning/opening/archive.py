"""torch's files: the archive is checked byte by byte, its pickle is followed with stand-ins, then torch loads it."""

import functools
import io
import os
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch

from xscale_lightning.errors import UserError
from xscale_lightning.opening.directory import check_end, check_extra
from xscale_lightning.opening.limits import check_extent
from xscale_lightning.opening.pickles import MAX_LENGTH, Reader
from xscale_lightning.opening.values import Refused

CHUNK = 1 << 20
REPEATED = 8  # times the bytes of a file that its tensors may have together: tied weights are there twice
OLD_MAGIC = 0x1950A86A20F9469CFC6C  # first value of files of torch before 1.6
REMEDY = "it could run code."


def load_torch(
    path: str | os.PathLike[str],
    what: str = "checkpoint",
    map_location: Any = "cpu",
    mmap: bool = False,
    also: tuple[type, ...] = (),
) -> Any:
    """What `torch.save` has written, of weights and plain values alone.

    Args:
        path: the file.
        what: words for it in messages.
        map_location: as `torch.load` has it.
        mmap: read tensors when they are used.
        also: classes whose objects hold plain values; only files of published models have any.

    Raises:
        UserError: no such file, damaged, claiming more than it holds, or with content that could run code.
    """
    file, label = Path(path), f"{what} {str(path)!r}"
    if not file.is_file():
        raise UserError(f"{label} does not exist: give the path of a .ckpt file.")
    names = tuple(f"{cls.__module__}.{cls.__qualname__}" for cls in (*also, *_allowed_by_user()))
    try:
        state = os.stat(file)
        known = (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns)
        zipped = _check(str(file.absolute()), known, names)
        with torch.serialization.safe_globals(list(also)):
            return torch.load(file, map_location=map_location, weights_only=True, mmap=mmap and zipped)
    except Refused as error:
        refusal = _refusal(label, error)
    except pickle.UnpicklingError:
        refusal = f"{label} holds more than weights, so it is not opened: {REMEDY}"
    except Exception as error:  # torch raises many types for damaged files
        refusal = f"{label} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    raise UserError(refusal)


def read_record(path: str | os.PathLike[str], what: str = "checkpoint") -> Any:
    """The plain values of what `torch.save` has written, with stand-ins for tensors, whose bytes are not read.

    It takes milliseconds, however large the file is. That the tensors are whole is for `load_torch` to say.

    Raises:
        UserError: no archive of torch's, or its list of records or its plain values are damaged.
    """
    label = f"{what} {str(path)!r}"
    try:
        length = os.stat(path).st_size
        check_end(os.fspath(path), length)
        with zipfile.ZipFile(path) as archive:
            return _read_archive(archive, length, (), sums=False)
    except Refused as error:
        refusal = _refusal(label, error)
    except Exception as error:  # zipfile raises many types for damaged archives
        refusal = f"{label} cannot be read: {(str(error).splitlines() or [type(error).__name__])[0][:200]}"
    raise UserError(refusal)


def _refusal(label: str, error: Refused) -> str:
    if error.code:
        return f"{label} holds more than weights, so it is not opened: {error}, and {REMEDY}"
    return f"{label} is damaged or no checkpoint: {error}."


def _allowed_by_user() -> list[type]:
    """Classes that the user's own program has declared safe for `torch.load`."""
    return [cls for cls in torch.serialization.get_safe_globals() if isinstance(cls, type)]


@functools.lru_cache(maxsize=16)
def _check(path: str, known: tuple[int, ...], names: tuple[str, ...]) -> bool:
    """Check a file of the size and time of change in `known`; returns whether it is an archive.

    Raises:
        Refused: it is not to be opened.
    """
    length = known[2]
    if not zipfile.is_zipfile(path):
        _check_old(path, length, names)
        return False
    check_end(path, length)
    try:
        with zipfile.ZipFile(path) as archive:
            _read_archive(archive, length, names)
    except (Refused, OSError):
        raise
    except Exception as error:  # zipfile raises many types for damaged archives
        raise Refused(f"its archive is damaged ({(str(error) or type(error).__name__)[:80]})") from error
    return True


def _read_archive(archive: zipfile.ZipFile, length: int, names: tuple[str, ...], sums: bool = True) -> Any:
    """Plain values of an archive, with stand-ins for tensors; without `sums` the bytes of tensors are not read."""
    records = archive.infolist()
    if not records:
        raise Refused("its archive has no records")
    if any("/code/" in record.filename or record.filename.endswith("/constants.pkl") for record in records):
        raise Refused("it is a TorchScript archive, which is a program", code=True)
    found, lower = dict[str, zipfile.ZipInfo](), set[str]()
    for record in records:
        if record.compress_type != zipfile.ZIP_STORED or record.flag_bits & 1:
            raise Refused("its records are packed, which torch's never are")
        if record.file_size != record.compress_size:
            raise Refused("a record claims another size than it has")
        parts = record.filename.split("/")
        if ".." in parts or "" in parts or "\\" in record.filename or "\0" in record.orig_filename:
            raise Refused(f"the record {record.filename[:60]!r} has a name that torch's have not")
        if record.filename.lower() in lower:  # torch looks them up without regard to case
            raise Refused(f"the record {record.filename[:60]!r} is there twice")
        if record.filename != record.orig_filename or not record.filename.isascii():
            raise Refused(f"the record {record.filename[:60]!r} has a name that torch's have not")
        check_extra(record.extra, record.filename)
        lower.add(record.filename.lower())
        found[record.filename] = record
    roots = {name.split("/")[0] for name in found}
    if len(roots) != 1 or archive.comment:
        raise Refused("its archive is not laid out as torch's are")
    root = roots.pop()
    if f"{root}/data.pkl" not in found:
        raise Refused("torch writes another format")
    _check_places(archive, records, length)
    for record in records if sums else ():  # of all records: torch does not look at them where it maps a file
        with archive.open(record) as opened:
            while opened.read(CHUNK):
                pass
    if found[f"{root}/data.pkl"].file_size > MAX_LENGTH:
        raise Refused("its pickle is far larger than that of any model")

    def storage_bytes(key: str) -> int:
        return found[f"{root}/data/{key}"].file_size

    reader = Reader(storage_bytes, names)
    content = io.BytesIO(archive.read(f"{root}/data.pkl"))
    value = reader.read(content)
    _check_content(reader, value, length)
    return value


def _check_places(archive: zipfile.ZipFile, records: list[zipfile.ZipInfo], length: int) -> None:
    """Records lie one after the other, from the first byte on, and within the file."""
    place = 0
    for number, record in enumerate(sorted(records, key=lambda record: record.header_offset)):
        if record.header_offset < place or (number == 0 and record.header_offset != 0):
            raise Refused("its records lie over one another")
        place = record.header_offset + 30 + len(record.orig_filename.encode()) + record.file_size
    if place > archive.start_dir or archive.start_dir > length:
        raise Refused("a record claims more bytes than the file has")


def _check_old(path: str, length: int, names: tuple[str, ...]) -> None:
    """A file of torch before 1.6: five pickles, and the numbers of every storage after them."""
    with open(path, "rb") as file:
        content = io.BytesIO(file.read(min(length, MAX_LENGTH)))
    plain = Reader(None, names)
    try:
        if plain.read(content) != OLD_MAGIC:
            raise Refused("torch writes another format")
    except Refused as error:
        raise error if error.code else Refused("torch writes another format") from None
    plain.read(content)
    plain.read(content)
    reader = Reader(None, names)
    value = reader.read(content)
    keys = plain.read(content)
    if not isinstance(keys, list) or set(keys) != set(reader.claims) or len(set(keys)) != len(keys):
        raise Refused("its list of storages is damaged")
    claimed = sum(8 + claim.numbers * claim.item for claim in reader.claims.values())
    if content.tell() + claimed != length:
        raise Refused(f"its storages claim {claimed} bytes, and {length - content.tell()} are there")
    with open(path, "rb") as file:
        file.seek(content.tell())
        for key in keys:
            claim = reader.claims[key]
            if int.from_bytes(file.read(8), "little", signed=True) != claim.numbers:
                raise Refused(f"storage {str(key)[:40]!r} claims two sizes")
            file.seek(claim.numbers * claim.item, os.SEEK_CUR)
    _check_content(reader, value, length)


def _check_content(reader: Reader, value: Any, length: int) -> None:
    try:
        check_extent(value, "it")
    except UserError:
        raise Refused("its content is nested too deeply, or repeats itself without end") from None
    if reader.total > REPEATED * length:
        raise Refused(f"its tensors claim {reader.total} bytes, and the file has {length}")
