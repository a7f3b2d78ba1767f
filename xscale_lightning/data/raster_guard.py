"""What a raster file may lead GDAL to, looked at before it is opened.

GDAL goes by the content of a file, whatever its name says: a `scene.tif` of a stranger can be a list of addresses to
fetch, or a virtual raster of other files. Text of any other kind is no image here. A virtual raster may name files of
this machine, which are looked at in the same way; what lies beside an image must be plain files.
"""

import functools
import html
import os
import re
import stat
from pathlib import Path

BESIDE = (".aux.xml", ".ovr", ".msk", ".aux")  # names that begin with the whole name of the file
SIBLINGS = (".tfw", ".tifw", ".wld", ".tab", ".hdr", ".aux", ".rpb", ".imd")  # with its name without the ending
RATIO = 10_000  # times the bytes of a file that its pixels may take; no sensor's image can be packed that far
SMALL = 1 << 26  # bytes of pixels that need no looking at
MAX_TEXT = 16_000_000  # bytes of a virtual raster, or of what a viewer writes beside an image
MAX_DEPTH = 4  # virtual rasters of virtual rasters
HEAD = 4096
SOURCE = re.compile(r"<(?:SourceFilename|SourceDataset)\b([^>]*)>([^<]*)<")
ELSEWHERE = re.compile(r"\s*(?:/vsi|[A-Za-z][\w+.-]*:|[<{\[])")  # a file system, a scheme or driver, XML or JSON
OVERVIEWS = re.compile(r"OVERVIEW_FILE[^>]*>([^<]*)<")


def look(path: str) -> tuple[int, str]:
    """The bytes that hold the pixels of a raster, and what is wrong with it ("": nothing)."""
    try:
        state = os.stat(path)
    except (OSError, ValueError) as error:
        return 0, f"cannot be opened ({getattr(error, 'strerror', None) or 'no file has such a name'})"
    if not stat.S_ISREG(state.st_mode):
        return 0, "it is no file but a folder, a pipe or a device"
    if problem := _beside(path):
        return 0, problem
    return _look(os.path.abspath(path), (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns), 0)


def claims_too_much(width: int, height: int, bands: int, item: int, length: int) -> str:
    """What to say of an image of more pixels than its file of `length` bytes can hold; "" if it may be."""
    claimed = width * height * bands * item
    if claimed <= max(SMALL, RATIO * length):
        return ""
    return f"it claims {width} x {height} pixels of {bands} bands, and its file has {length} bytes"


@functools.lru_cache(maxsize=65536)
def _look(path: str, known: tuple[int, ...], depth: int) -> tuple[int, str]:
    with open(path, "rb") as file:
        head = file.read(HEAD)
    if b"<VRTDataset" in head:
        return _virtual(path, known[2], depth)
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] in (b"<", b"{", b"["):
        return 0, "it holds text, such as addresses of images, and no image"
    return known[2], ""


def _beside(path: str) -> str:
    stem = os.path.splitext(path)[0]
    for name in (*(path + end for end in BESIDE), *(stem + end for end in SIBLINGS)):
        try:
            mode = os.stat(name).st_mode
        except OSError:
            continue
        if not stat.S_ISREG(mode):
            return f"'{os.path.basename(name)}' beside it is no file but a folder, a pipe or a device"
    notes = f"{path}.aux.xml"
    if os.path.isfile(notes):
        if os.path.getsize(notes) > MAX_TEXT:
            return f"'{os.path.basename(notes)}' beside it is far too long"
        for given in OVERVIEWS.findall(Path(notes).read_text(errors="replace")):
            name = html.unescape(given).strip().removeprefix(":::BASE:::")
            if not name or os.path.basename(name) != name or ELSEWHERE.match(name):
                return f"'{os.path.basename(notes)}' beside it names an image elsewhere ({name[:60]!r})"
    return ""


def _virtual(path: str, length: int, depth: int) -> tuple[int, str]:
    """Bytes of the files of a virtual raster, and what is wrong with it."""
    if length > MAX_TEXT or depth > MAX_DEPTH:
        return 0, "it is a virtual raster that is too long, or of itself"
    text = Path(path).read_text(errors="replace")
    for word in ("VRTRawRasterBand", "PixelFunctionLanguage", "VRTProcessedDataset", "<!"):
        if word in text:
            return 0, f"it is a virtual raster with {word!r}, which is not opened"
    found = SOURCE.findall(text)
    if not found:
        return 0, "it is a virtual raster that names no files"
    total = 0
    for options, given in found:
        name = html.unescape(given).strip()
        if ELSEWHERE.match(name):
            return 0, f"it is a virtual raster of {name[:60]!r}, which is no file of this machine"
        relative = re.search(r"relativeToVRT\s*=\s*[\"']1", options)
        place = os.path.abspath(os.path.join(os.path.dirname(path), name) if relative else name)
        try:
            state = os.stat(place)
        except (OSError, ValueError):
            return 0, f"it is a virtual raster of {name[:60]!r}, which is not there"
        problem = _beside(place) if stat.S_ISREG(state.st_mode) else "it is no file but a folder, a pipe or a device"
        if problem:
            return 0, f"it is a virtual raster of {name[:60]!r}: {problem}"
        inside, problem = _look(place, (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns), depth + 1)
        if problem:
            return 0, f"it is a virtual raster of {name[:60]!r}: {problem}"
        total += inside
    return total, ""
