"""Bands of scenes that cannot teach anything: without data in every scene, or with one value everywhere."""

import logging
from collections.abc import Sequence

from xscale_lightning.data.band_names import listed
from xscale_lightning.data.damage import is_constant
from xscale_lightning.data.geotiff import UnreadableFile
from xscale_lightning.data.scene import Scene
from xscale_lightning.errors import UserError

logger = logging.getLogger(__name__)
_ROWS = 64  # looked at in one go; the first rows settle nearly every band


def check_bands(scenes: Sequence[Scene], names: Sequence[str], root: str) -> None:
    """Refuse bands without any data and warn of constant ones; only where all scenes are held in memory.

    Args:
        scenes: opened scenes with the same bands.
        names: of these bands.
        root: folder of the scenes, for messages.

    Raises:
        UserError: naming the bands that hold no data in any scene.
    """
    values = {c: single_value(scenes, c) for c in range(len(names))}
    empty = [names[c] for c, value in values.items() if value == ()]
    if empty and len(empty) < len(names):  # if all are, a limit on no data says more than a list of bands
        raise UserError(
            f"data.bands: {listed(empty)} hold{'s' * (len(empty) == 1)} no data in any scene of '{root}'; "
            "leave them out with data.bands.names (EnMAP: sensor enmap_202)."
        )
    constant = {names[c]: value[0] for c, value in values.items() if value}
    if constant:
        shown = ", ".join(f"{value:g}" for value in sorted(set(constant.values()))[:3])
        logger.warning(
            "%s: one value (%s) in all scenes of '%s'. Leave such bands out with data.bands.names, "
            "or set data.nodata if the value means no data.",
            listed(list(constant)),
            shown,
            root,
        )


def single_value(scenes: Sequence[Scene], channel: int) -> tuple[float, ...] | None:
    """The only value of a band as a tuple of one, () if it has no valid pixel at all, None if its values differ.

    None too where a scene is not held in memory, so that nothing is read for this.
    """
    found: tuple[float, ...] = ()
    for scene in scenes:
        if scene.held is None:
            return None
        pixels, valid = scene.held
        for row in range(0, pixels.shape[1], _ROWS):
            part = pixels[channel, row : row + _ROWS]
            part = part if valid is None else part[valid[channel, row : row + _ROWS]]
            if not part.size:
                continue
            low, high = float(part.min()), float(part.max())
            if low != high or (found and found[0] != low):
                return None
            found = (low,)
    return found


def refuse_blank(scene: Scene, keep_constant: bool) -> None:
    """Refuse a scene that teaches nothing: without any data, or with one value in all its pixels.

    Of a scene that is not held in memory only what was read of it can tell; its patches are looked at one by one.

    Raises:
        UnreadableFile: naming its first file.
    """
    if scene.held is None:
        return
    pixels, valid = scene.held
    path = scene.sources[0].raster.path
    if valid is not None and not valid.any():
        raise UnreadableFile(path, "no pixel has data, and data.max_nodata allows less")
    if not keep_constant and is_constant(pixels):
        value = float(pixels.flat[0])
        raise UnreadableFile(path, f"every pixel has the value {value:g} (data.keep_constant: true takes it)")
