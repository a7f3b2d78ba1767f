"""What the header of a raster cannot mean: told before a pixel is read, in bounded time and memory."""

import os
from typing import Any

import numpy as np

MAX_BANDS = 4096  # the time GDAL takes for a file grows with the square of their number
MAX_BLOCK = 1 << 32  # bytes of one tile or strip: GDAL decodes it whole
_END = 1 << 12  # bytes in which the end of a PNG is looked for
_LOOKED_AT = 256  # blocks of a file, spread evenly: what a dead writer left out lies together


def implausible(source: Any, content: bytes | str) -> tuple[str, str] | None:
    """Why an open raster cannot be used: the kind of damage (`inspection.Kind`), and the reason.

    Args:
        source: as rasterio opens it.
        content: of the file, or its path.
    """
    size, end = _size_and_end(content)
    if source.count > MAX_BANDS:
        return "bands", f"it has {source.count} bands; at most {MAX_BANDS} can be read"
    dtype = np.result_type(*source.dtypes)
    if np.issubdtype(dtype, np.complexfloating):
        return "dtype", f"its values are complex numbers ({dtype}); write amplitude or real part as another file"
    pixels = source.width * source.height * source.count
    packed = source.driver == "GTiff" and source.compression is None
    if packed and pixels > 8 * size and not _holes(source)[0]:  # a byte may hold eight pixels
        shape = f"{source.count} x {source.height} x {source.width}"
        return "truncated", f"its header says {shape} pixels, and its {size} bytes cannot hold them"
    if packed and (problem := _too_few_bits(source)):
        return "truncated", problem
    if source.driver == "PNG" and b"IEND" not in end:  # GDAL reads what is left as noise, without a word
        return "truncated", "it has no end (chunk IEND)"
    height, width = source.block_shapes[0]
    if height * width * dtype.itemsize > MAX_BLOCK:
        return "unreadable", f"one of its tiles has {height} x {width} pixels, too many to decode at once"
    return None


def _too_few_bits(source: Any) -> str:
    """Why the header's bits per value cannot be true: the first block has twice the bytes they need; "" if it has not.

    A flipped bit makes 1 bit of 16, and a picture of zeros and ones of an image.
    """
    bits = source.tags(1, ns="IMAGE_STRUCTURE").get("NBITS")  # only where it is no whole type
    stored = source.get_tag_item("BLOCK_SIZE_0_0", "TIFF", bidx=1)
    if bits is None or stored is None:
        return ""
    height, width = source.block_shapes[0]
    bands = source.count if _by_pixel(source) else 1
    needed = height * -(-width * bands * int(bits) // 8)
    if int(stored) < 2 * needed:
        return ""
    return f"its header says {bits} bits per value, and its first tile or strip has {stored} bytes where {needed} do"


def _by_pixel(source: Any) -> bool:
    return str(getattr(source.interleaving, "value", "")).lower() == "pixel"


def turned(source: Any) -> str:
    """Why a raster cannot be read as a scene: it is not north-up; "" where it is."""
    transform = source.transform
    if transform.b or transform.d or transform.a <= 0 or transform.e == 0 or (source.crs and transform.e > 0):
        return "its rows do not run west to east and north to south; warp it to a north-up grid"
    return ""


def _size_and_end(content: bytes | str) -> tuple[int, bytes]:
    if isinstance(content, bytes):
        return len(content), content[-_END:]
    if not os.path.isfile(content):  # a folder, or a name that GDAL alone understands
        return _END, b"IEND"
    with open(content, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - _END))
        return size, file.read()


def unwritten(source: Any) -> str:
    """Why pixels of a GeoTIFF would read as zeros that nobody wrote; "" where none do.

    A program that dies while it writes a file leaves tiles without content, and GDAL fills them in silence. Where the
    file declares a no-data value, they have that, which is no damage.
    """
    if source.driver != "GTiff" or any(value is not None for value in source.nodatavals):
        return ""
    missing, blocks = _holes(source)
    return f"{missing} of {blocks} tiles or strips looked at were never written" if missing else ""


def _holes(source: Any) -> tuple[int, int]:
    """How many blocks of a GeoTIFF have no place in the file, and how many were looked at."""
    height, width = source.block_shapes[0]
    rows, cols = -(-source.height // height), -(-source.width // width)
    bands = 1 if _by_pixel(source) else source.count
    total = rows * cols * bands
    count = min(total, _LOOKED_AT)
    places = np.unique(np.linspace(0, total - 1, count).astype(np.int64)).tolist()
    missing = 0
    for place in places:
        band, block = divmod(place, rows * cols)
        row, col = divmod(block, cols)
        missing += source.get_tag_item(f"BLOCK_OFFSET_{col}_{row}", "TIFF", bidx=band + 1) is None
    return missing, len(places)
