"""Whether two images make a pair, and at which ratio a set of pairs is delivered."""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from xscale_lightning.data.footprint import MAX_DENOMINATOR, Footprint, Misfit, footprint, same_reference
from xscale_lightning.data.geotiff import Grid, Source
from xscale_lightning.data.scene_files import SceneBands
from xscale_lightning.errors import UserError


@dataclass(frozen=True)
class PairImage:
    """The chosen bands of one image, before anything of it is read."""

    bands: SceneBands
    """All bands of the files."""
    sources: list[Source]
    """Where to read the chosen ones."""
    grid: Grid
    """The image's own grid."""

    @property
    def crs(self) -> str | None:
        """Coordinate reference system; None if the file says none."""
        return self.sources[0].raster.crs

    @property
    def path(self) -> str:
        """The (first) file."""
        return self.sources[0].raster.path


def pair_footprint(mr: PairImage, hr: PairImage, least: float, size: tuple[int, int]) -> Footprint:
    """The ground that two images share.

    Args:
        mr: the coarse image.
        hr: the fine image.
        least: share of the smaller image that both must show.
        size: (height, width) of a patch in MR pixels.

    Raises:
        Misfit: if they share too little; says how much and how far their edges are apart.
    """
    part = footprint(mr.grid, hr.grid, same_reference(mr.sources[0].raster, hr.sources[0].raster))
    if part.shared < least:
        raise Misfit(
            f"it shares only {part.shared:.1%} of the ground with {mr.path} (edges up to "
            f"{part.disagreement * mr.grid.gsd:.6g} m or {part.disagreement:.3g} MR pixels apart); "
            "data.min_shared sets the limit"
        )
    if part.grid.height < size[0] or part.grid.width < size[1]:
        raise Misfit(
            f"it shares {part.grid.height}x{part.grid.width} MR pixels with {mr.path}, "
            f"less than data.image_size ({size[0]}x{size[1]})"
        )
    return part


def settle_ratio(
    parts: Sequence[Footprint], wanted: Fraction | None, size: tuple[int, int], resample: bool
) -> Fraction:
    """HR pixels along one MR pixel in a batch: the wanted ratio, else that of the first pair.

    Args:
        parts: footprints of all pairs.
        wanted: the user's ratio, or None.
        size: (height, width) of a patch in MR pixels.
        resample: whether HR may be resampled.

    Raises:
        UserError: if a patch would not be whole HR pixels, or what may not be resampled would have to be.
    """
    ratio = wanted or Fraction(float(parts[0].placement.step_x)).limit_denominator(MAX_DENOMINATOR)
    for side in size:
        if (side * ratio).denominator != 1:
            raise UserError(
                f"data.image_size: {side} MR pixels are {float(side * ratio):g} HR pixels at the ratio {ratio}; "
                f"give a multiple of {ratio.denominator}, or a whole data.ratio with data.resample: true."
            )
    for place in () if resample else (part.placement for part in parts):
        if place.exact and place.step_x == place.step_y == ratio:
            continue
        if max(abs(float(step) - ratio) for step in (place.step_x, place.step_y)) > 1e-3:
            problem = (
                f"HR has {float(place.step_x):.6g} pixels along one MR pixel, and {float(ratio):.6g} are asked for"
            )
        else:
            off = max(abs(float(edge) - round(float(edge))) for edge in (place.row, place.col))
            problem = f"HR's pixel edges lie {off:.3g} HR pixels beside MR's"
        raise UserError(
            f"data.resample: {problem}, so crops of the same ground need resampling; set data.resample: true, "
            "or bring the files to nested grids."
        )
    return ratio
