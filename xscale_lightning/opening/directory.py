"""The end of an archive, where its list of records is: readers of zip files go different ways to find it.

Python takes the list that ends just before the end record, torch the one that the record points at. A file in which the
two are not the same shows one content to whoever checks it and another to whoever loads it.
"""

import struct
from pathlib import Path

from xscale_lightning.opening.values import Refused

END, END_64, LOCATOR, ENTRY = 22, 56, 20, 46  # bytes of the fixed parts
MAX_RECORDS = 50_000  # a checkpoint has three for every parameter
BYTES_PER_RECORD = 1_000  # a name and its extra field
ZIP_64, PADDING = 0x0001, 0x4246  # kinds of extra fields: sizes of 64 bits, and torch's own alignment


def check_end(path: str | Path, length: int) -> None:
    """Refuse an archive whose end record lies elsewhere, or points elsewhere, than at the list just before it.

    Raises:
        Refused: it does, or it lists more records than any model has.
    """
    with open(path, "rb") as file:
        file.seek(max(0, length - END - LOCATOR - END_64))
        tail = file.read()
    if len(tail) < END or tail[-END : 4 - END] != b"PK\x05\x06" or tail[-2:] != b"\0\0":
        raise Refused("its archive is not laid out as torch's are")
    count, size, place = struct.unpack("<HII", tail[-12:-2])
    stop = length - END
    locator, record = tail[-END - LOCATOR : -END], tail[: -END - LOCATOR]
    if locator[:4] == b"PK\x06\x07":
        _, disk, where, disks = struct.unpack("<IIQI", locator)
        stop -= LOCATOR + END_64
        if (disk, disks) != (0, 1) or where != stop or record[:4] != b"PK\x06\x06":
            raise Refused("the list of its records is in two places")
        head, *_, count, size, place = struct.unpack("<QHHIIQQQQ", record[4:])
        if head != END_64 - 12:
            raise Refused("the list of its records is in two places")
    if place + size != stop:
        raise Refused("the list of its records is in two places")
    if count > MAX_RECORDS or size > MAX_RECORDS * BYTES_PER_RECORD or size < count * ENTRY:
        raise Refused(f"its archive has {count} records in a list of {size} bytes")


def check_extra(extra: bytes, name: str) -> None:
    """Refuse extra fields that give a record another name or other sizes for some readers.

    Raises:
        Refused: there are fields besides those that torch writes.
    """
    while extra:
        if len(extra) < 4:
            raise Refused(f"the record {name[:60]!r} has a damaged extra field")
        kind, size = struct.unpack("<HH", extra[:4])
        if kind not in (ZIP_64, PADDING) or size > len(extra) - 4:
            raise Refused(f"the record {name[:60]!r} has an extra field that torch's have not")
        extra = extra[4 + size :]
