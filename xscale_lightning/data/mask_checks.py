"""Looks at one file of class values: does it fit its image, and is every value a class?"""

from collections.abc import Callable
from typing import Any

import numpy as np

from xscale_lightning.data.damage import without_path
from xscale_lightning.data.geotiff import UnreadableFile, open_raster
from xscale_lightning.data.inspection import Finding, check_file, strips
from xscale_lightning.errors import UserError

Classes = Callable[[np.ndarray, np.ndarray], Any]
"""Takes values and their validity; raises `UserError` where a value is no class."""


def check_classes(finding: Finding, image: str | None, classes: Classes) -> Finding:
    """Fill in the finding of a mask.

    Args:
        finding: names the file.
        image: file that it must have the size of, if there is one.
        classes: what turns its values into classes.
    """
    if check_file(finding).kind is not None:
        return finding
    problem = ""
    try:
        with open_raster(finding.path) as mask:
            size = _size_of(image)
            if size is not None and size != (mask.height, mask.width):
                finding.kind = "size"
                finding.detail = f"{mask.height} x {mask.width} pixels, and its image {size[0]} x {size[1]}"
                return finding
            for window in strips(mask):
                classes(mask.read(1, window=window), mask.read_masks(1, window=window) > 0)
    except (UserError, UnreadableFile) as error:
        problem = str(error)
    if problem:
        finding.kind, finding.detail = "classes", without_path(problem, finding.path)
    return finding


def _size_of(image: str | None) -> tuple[int, int] | None:
    """Height and width of the image; None where it cannot be opened, which is told of the image itself."""
    if image is None:
        return None
    try:
        with open_raster(image) as source:
            return source.height, source.width
    except UnreadableFile:
        return None
