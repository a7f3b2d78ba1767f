"""Damages that may or may not be seen in the pixels: flipped bits, absurd headers, wrong endings, what is no file.

Each maker writes one file; `OUTCOMES` says which kinds `xscale doctor --data` may tell of it. None among them: the
file can be read, and what it holds may be used.
"""

import io
import os
import struct
from pathlib import Path

import numpy as np
from make_damage import BANDS, SIDE, good, write
from PIL import Image

Kinds = set[str | None]
SPOILT: Kinds = {"unreadable", "no image", "truncated", "no data", "empty"}
UNLIKE: Kinds = {"bands", "dtype", "crs", "size", "gsd", "statistics", "constant", "not finite"}


def flip(path: Path, rng: np.random.Generator, first: int, last: int, count: int) -> None:
    """Flip bits of bytes between two places."""
    content = bytearray(path.read_bytes())
    last = min(last, len(content))
    for place in rng.integers(min(first, last - 1), last, count):
        content[place] ^= 1 << int(rng.integers(8))
    path.write_bytes(bytes(content))


def header(path, rng):
    write(path, good(rng))
    flip(path, rng, 0, 8, int(rng.integers(1, 4)))


def directory(path, rng):
    write(path, good(rng))
    flip(path, rng, 8, 400, int(rng.integers(1, 6)))


def offsets(path, rng):
    write(path, good(rng, side=64), tiled=True, blockxsize=16, blockysize=16)
    set_tag(path, 324, rng.integers(0, 2**32, BANDS * 16 if rng.random() < 0.5 else 16))


def squeezed(path, rng):
    write(path, good(rng), compress="deflate")
    size = path.stat().st_size
    flip(path, rng, size - 900, size, 8)


def anywhere(path, rng):
    write(path, good(rng), compress=str(rng.choice(["none", "lzw", "deflate"])))
    flip(path, rng, 0, 10**6, int(rng.integers(1, 40)))


def zeros(path, rng):
    path.write_bytes(bytes(int(rng.integers(1, 5000))))


def noise(path, rng):
    path.write_bytes(rng.bytes(2000))


def folder(path, rng):
    path.mkdir()


def ring(path, rng):
    path.symlink_to(path)


def pipe(path, rng):
    os.mkfifo(path)


def device(path, rng):
    path.symlink_to("/dev/zero")


def wide(path, rng):
    write(path, good(rng))
    set_tag(path, 256, [4_000_000_000])
    set_tag(path, 257, [4_000_000_000])


def tall(path, rng):
    """One strip of a thousand million rows."""
    write(path, good(rng))
    set_tag(path, 257, [1_000_000_000])
    set_tag(path, 278, [1_000_000_000])


def sparse(path, rng):
    """A writer that died: half the tiles were never written, and read as zeros."""
    write(path, good(rng, side=64), tiled=True, blockxsize=16, blockysize=16)
    keep = np.repeat([1, 0], 8)
    for tag in (324, 325):
        values = get_tag(path, tag)
        set_tag(path, tag, values * np.resize(keep, len(values)))


def vast(path, rng):
    """A million pixels each way, of which none was written: a file of some hundred kB."""
    import rasterio

    profile = {"tiled": True, "blockxsize": 8192, "blockysize": 8192, "SPARSE_OK": True, "BIGTIFF": "YES"}
    with rasterio.open(path, "w", "GTiff", 10**6, 10**6, BANDS, dtype="uint16", crs="EPSG:32632", **profile):
        pass


def thousands(path, rng):
    """The header of a file of 65535 bands of one pixel; writing it with GDAL takes minutes."""
    tags = [(256, 4, 1), (257, 4, 1), (258, 3, 8), (259, 3, 1), (262, 3, 1), (273, 4, 200), (277, 3, 65535),
            (278, 4, 1), (279, 4, 65535), (284, 3, 1)]  # fmt: skip
    content = struct.pack("<2sHIH", b"II", 42, 8, len(tags))
    content += b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in tags)
    path.write_bytes(content.ljust(200, b"\0") + rng.bytes(65535))


def complex_numbers(path, rng):
    write(path, good(rng, dtype="float32") * np.complex64(1 + 1j))


def int8(path, rng):
    write(path, rng.integers(-100, 100, (BANDS, SIDE, SIDE)).astype("int8"))


def odd_nodata(path, rng):
    write(path, good(rng, dtype="float32"), nodata=float(rng.choice([np.nan, np.inf, -1e30])))


def no_place(path, rng):
    import rasterio

    with rasterio.open(path, "w", "GTiff", SIDE, SIDE, BANDS, dtype="uint16") as file:
        file.write(good(rng))


def no_crs(path, rng):
    write(path, good(rng), crs=None)


def turned(path, rng):
    import rasterio
    from rasterio.transform import Affine

    place = Affine.rotation(30) * Affine.scale(10, -10)
    with rasterio.open(
        path, "w", "GTiff", SIDE, SIDE, BANDS, dtype="uint16", crs="EPSG:32632", transform=place
    ) as file:
        file.write(good(rng))


def picture(format: str) -> bytes:
    text = io.BytesIO()
    pixels = np.random.default_rng(0).integers(50, 200, (SIDE, SIDE, 3)).astype("uint8")
    Image.fromarray(pixels).save(text, format)
    return text.getvalue()


def cut_jpeg(path, rng):
    path.write_bytes(picture("jpeg")[: -int(rng.integers(40, 500))])


def cut_png(path, rng):
    path.write_bytes(picture("png")[: -int(rng.integers(40, 500))])


def archive(path, rng):
    path.write_bytes(b"PK\x03\x04" + rng.bytes(500))


OUTCOMES: dict[str, tuple] = {
    # Flipped bits of pixels themselves can be seen by nobody.
    "header": (header, SPOILT | UNLIKE | {None}), "directory": (directory, SPOILT | UNLIKE | {None}),
    "offsets": (offsets, SPOILT | {"size"}), "squeezed": (squeezed, {"truncated", "statistics", None}),
    "anywhere": (anywhere, SPOILT | UNLIKE | {None}), "zeros": (zeros, {"no image"}), "noise": (noise, {"no image"}),
    "folder": (folder, {"unreadable", "absent"}), "ring": (ring, {"missing"}), "pipe": (pipe, {"unreadable"}),
    "device": (device, {"unreadable"}), "wide": (wide, SPOILT), "tall": (tall, SPOILT),
    "sparse": (sparse, {"truncated"}), "vast": (vast, {"truncated", "no image"}), "thousands": (thousands, {"bands"}),
    "complex": (complex_numbers, {"dtype"}), "int8": (int8, {"dtype"}), "odd nodata": (odd_nodata, {"dtype"}),
    "no place": (no_place, {"crs"}), "no crs": (no_crs, {"crs"}), "turned": (turned, {"crs", "gsd", None}),
    "cut jpeg": (cut_jpeg, {"truncated", "no image"}), "cut png": (cut_png, {"truncated", "no image"}),
    "archive": (archive, {"no image"}),
}  # fmt: skip


def entry(content: bytes, tag: int) -> tuple[int, int, int]:
    """Place of a tag in the first directory of a little-endian TIFF; its type and the number of its values."""
    (start,) = struct.unpack_from("<I", content, 4)
    (count,) = struct.unpack_from("<H", content, start)
    for place in range(start + 2, start + 2 + 12 * count, 12):
        found, kind, number = struct.unpack_from("<HHI", content, place)
        if found == tag:
            return place, kind, number
    raise LookupError(tag)


def get_tag(path: Path, tag: int) -> np.ndarray:
    content = path.read_bytes()
    place, kind, number = entry(content, tag)
    dtype = np.dtype("<u2" if kind == 3 else "<u4")
    start = place + 8 if number * dtype.itemsize <= 4 else struct.unpack_from("<I", content, place + 8)[0]
    return np.frombuffer(content, dtype, number, start)


def set_tag(path: Path, tag: int, values) -> None:
    """Overwrite the values of a tag; one of another size than it has becomes 32 bits in its place."""
    content = bytearray(path.read_bytes())
    place, kind, number = entry(content, tag)
    if number == 1:
        struct.pack_into("<HII", content, place + 2, 4, 1, int(values[0]))
    else:
        (start,) = struct.unpack_from("<I", content, place + 8)
        dtype = np.dtype("<u2" if kind == 3 else "<u4")
        raw = np.resize(np.asarray(values), number).astype(dtype).tobytes()
        content[start : start + len(raw)] = raw
    path.write_bytes(bytes(content))
