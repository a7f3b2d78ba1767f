"""Looks at one image file, or one sample, as a whole: is it damaged, and what would tell it apart from the others?"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from xscale_lightning.data.damage import without_path
from xscale_lightning.data.image_files import open_content
from xscale_lightning.data.soundness import implausible, turned, unwritten

Kind = Literal[
    "missing", "unreadable", "empty", "no image", "truncated", "no data", "not finite", "constant",
    "bands", "dtype", "crs", "size", "gsd", "statistics", "classes", "sample", "checksum",
]  # fmt: skip
Role = Literal["image", "mask"]
PICTURES = (".jpg", ".jpeg", ".png")
_STRIP = 1 << 24  # pixels that are read in one go


@dataclass
class Finding:
    """What is known of one file; `kind` is None where nothing is wrong with it."""

    path: str
    role: Role = "image"
    group: str = "image"
    """Files of one group are compared with one another."""
    kind: Kind | None = None
    detail: str = ""
    bands: int | None = None
    dtype: str | None = None
    crs: str | None = None
    size: str | None = None
    gsd: float | None = None
    mean: float | None = None
    missing: float | None = None
    """Share of the pixels that have no data or are not finite."""

    def plain(self) -> dict[str, Any]:
        """As a line of a report."""
        return asdict(self)


@dataclass
class Totals:
    """Sums over the strips of a file."""

    count: int = 0
    valid: int = 0
    finite: int = 0
    total: float = 0.0
    first: np.ndarray | None = None
    constant: bool = True

    def add(self, pixels: np.ndarray, mask: np.ndarray | None) -> None:
        """Take in a strip `[C, h, w]` with the validity of its pixels."""
        finite = np.isfinite(pixels) if np.issubdtype(pixels.dtype, np.floating) else None
        usable = np.ones(pixels.shape, bool) if mask is None else mask
        self.count += pixels.size
        self.finite += pixels.size if finite is None else int(finite.sum())
        usable = usable if finite is None else usable & finite
        self.valid += int(usable.sum())
        self.total += float(pixels[usable].sum(dtype=np.float64)) if usable.any() else 0.0
        first = pixels[:, :1, :1] if self.first is None else self.first
        self.constant = self.constant and bool((pixels == first).all())
        self.first = first


def check_file(
    finding: Finding,
    read: Callable[[], bytes] | None = None,
    limit: float = 0.5,
    nodata: float | None = None,
    scene: bool = False,
) -> Finding:
    """Fill in a finding; every pixel is read once, strip by strip, unless the header cannot be true.

    Args:
        finding: names the file and its role.
        read: gives the content of the file, where it lies in an archive.
        limit: largest share of pixels without data or not finite.
        nodata: value that means no data in files that declare none.
        scene: whether it must be a north-up raster.
    """
    try:
        content = None if read is None else read()
        if content is None and (problem := _cannot_be_opened(finding.path)):
            finding.kind, finding.detail = problem
        elif content is not None and not content:
            finding.kind, finding.detail = "empty", "the file is empty (0 bytes)"
        elif finding.path.lower().endswith(PICTURES):
            _check_picture(finding, content, limit)
        else:
            _check_raster(finding, content, limit, nodata, scene)
    except Exception as error:  # libraries raise whatever they like for damaged files: the finding is what counts
        finding.kind, finding.detail = finding.kind or "unreadable", without_path(str(error), finding.path)
    return finding


def _cannot_be_opened(path: str) -> tuple[Kind, str] | None:
    if not os.path.exists(path):
        return "missing", "a link to nothing" if os.path.islink(path) else "there is no such file"
    if not os.path.isfile(path):
        return "unreadable", "it is no file"
    if not os.access(path, os.R_OK):
        return "unreadable", "it may not be read (permissions)"
    return ("empty", "the file is empty (0 bytes)") if os.path.getsize(path) == 0 else None


def _check_raster(finding: Finding, content: bytes | None, limit: float, nodata: float | None, scene: bool) -> None:
    from rasterio.errors import RasterioError

    from xscale_lightning.data.geotiff import UnreadableFile, open_raster

    with contextlib.ExitStack() as stack:
        try:
            opened = open_raster(finding.path) if content is None else open_content(finding.path, content)
            source = stack.enter_context(opened)
        except (RasterioError, UnreadableFile) as error:
            text = error.reason if isinstance(error, UnreadableFile) else str(error.__cause__ or error)
            finding.kind, finding.detail = "no image", without_path(text, finding.path)
            return
        try:
            totals = _read(finding, source, content, nodata, scene)
        except RasterioError as error:
            finding.kind, finding.detail = "truncated", without_path(str(error.__cause__ or error), finding.path)
            return
    if totals is not None:
        judge(finding, totals, limit)


def _read(finding: Finding, source: Any, content: bytes | None, nodata: float | None, scene: bool) -> Totals | None:
    """Take down what a raster says of itself, and read its pixels; None, with a kind, where the header is at fault."""
    from rasterio.enums import MaskFlags

    from xscale_lightning.data.ground import metres_per_pixel

    finding.bands, finding.dtype = source.count, str(np.result_type(*source.dtypes))
    finding.crs = source.crs.to_string() if source.crs else None
    finding.size, finding.gsd = f"{source.height} x {source.width}", metres_per_pixel(source)
    problem = implausible(source, finding.path if content is None else content)
    if problem is None and nodata is None and (holes := unwritten(source)):
        problem = "truncated", f"{holes}, and it declares no no-data value"
    if problem is None and scene and (reason := turned(source)):
        problem = "crs", reason
    if problem is not None:
        finding.kind, finding.detail = problem  # type: ignore[assignment]
        return None
    totals = Totals()
    masked = any(MaskFlags.all_valid not in flags for flags in source.mask_flag_enums)
    for window in strips(source):
        pixels = source.read(window=window)
        totals.add(pixels, source.read_masks(window=window) > 0 if masked else None)
    return totals


def strips(source: Any) -> Iterator[Any]:
    """Windows of a raster that cover it, none of which takes much memory."""
    from rasterio.windows import Window

    height, width = source.block_shapes[0]
    rows = max(1, _STRIP // max(1, source.width * source.count), height)
    cols = (
        source.width
        if rows * source.width * source.count <= 4 * _STRIP
        else max(width, _STRIP // (rows * source.count))
    )
    for row in range(0, source.height, rows):
        for col in range(0, source.width, cols):
            size = min(cols, source.width - col), min(rows, source.height - row)
            yield Window(col, row, *size)  # type: ignore[call-arg]


def _check_picture(finding: Finding, content: bytes | None, limit: float) -> None:
    import io

    from PIL import Image, UnidentifiedImageError

    try:
        picture = Image.open(finding.path if content is None else io.BytesIO(content))
    except UnidentifiedImageError:
        finding.kind, finding.detail = "no image", "no jpg or png"
        return
    with picture:
        try:
            pixels = np.asarray(picture)
        except (OSError, SyntaxError) as error:
            finding.kind, finding.detail = "truncated", without_path(str(error), finding.path)
            return
    pixels = pixels.reshape(*pixels.shape[:2], -1).transpose(2, 0, 1)
    finding.bands, finding.dtype = len(pixels), str(pixels.dtype)
    finding.size = f"{pixels.shape[1]} x {pixels.shape[2]}"
    totals = Totals()
    totals.add(pixels, None)
    judge(finding, totals, limit)


def judge(finding: Finding, totals: Totals, limit: float) -> None:
    """Say what the pixels of one file show."""
    finding.missing = 1.0 - totals.valid / totals.count if totals.count else 1.0
    finding.mean = totals.total / totals.valid if totals.valid else None
    if finding.role == "mask":  # one class everywhere is no damage
        return
    unfinite = 1.0 - totals.finite / totals.count if totals.count else 0.0
    if unfinite > limit:
        finding.kind, finding.detail = "not finite", f"{unfinite:.0%} of its pixels are NaN or infinite"
    elif not totals.valid:
        finding.kind, finding.detail = "no data", "no pixel has data"
    elif finding.missing > limit:
        finding.kind, finding.detail = "no data", f"{finding.missing:.0%} of its pixels have no data"
    elif totals.constant and totals.first is not None and totals.count > totals.first.size:
        values = sorted({float(value) for value in totals.first.ravel()})
        finding.kind = "constant"
        finding.detail = f"every pixel has the value {values[0]:g}" + " (another per band)" * (len(values) > 1)


def check_sample(finding: Finding, sample: Any, limit: float = 0.5) -> Finding:
    """The same for a sample that a dataset has read: `image` and, of pairs, `image2` and `image_hr`."""
    for key in ("image", "image2", "image_hr"):
        if key in sample and finding.kind is None:
            pixels = np.asarray(sample[key])
            totals = Totals()
            totals.add(pixels.reshape(-1, *pixels.shape[-2:]), None)
            if key == "image":
                finding.bands, finding.dtype = len(pixels), str(pixels.dtype)
                finding.size = f"{pixels.shape[-2]} x {pixels.shape[-1]}"
            judge(finding, totals, limit)
    return finding
