"""How large a pixel is on the ground."""

import math
from typing import Any

from xscale_lightning.errors import UserError


def check_gsd(gsd: float | None) -> None:
    """Refuse a ground sample distance that no image can have; None is one that is not given.

    Raises:
        UserError: it is not above 0 and finite.
    """
    if gsd is not None and not 0 < gsd < math.inf:
        raise UserError(f"data.gsd: {gsd} is not possible; give metres per pixel, above 0.")


def metres_per_pixel(source: Any) -> float | None:
    """Geometric mean of pixel width and height on the ground in metres, at the centre of the file."""
    if not source.crs:
        return None
    dx, dy = source.transform.a, abs(source.transform.e)
    if source.crs.is_geographic:
        along, across = metres_per_degree((source.bounds.top + source.bounds.bottom) / 2)
        return math.sqrt(dx * along * dy * across)
    metres = source.crs.linear_units_factor[1] * math.sqrt(dx * dy)
    if source.crs.to_dict().get("proj") in ("merc", "webmerc"):  # Mercator stretches lengths by 1 / cos(latitude)
        from rasterio.warp import transform_bounds

        _, south, _, north = transform_bounds(source.crs, "EPSG:4326", *source.bounds)
        metres *= math.cos(math.radians((south + north) / 2))
    return metres


def metres_per_degree(latitude: float) -> tuple[float, float]:
    """Length in metres of one degree of longitude and of latitude on the WGS 84 ellipsoid at a latitude in degrees.

    Series expansion of the ellipsoid's radii of curvature, exact to about a centimetre.
    """
    phi = math.radians(latitude)
    longitude = 111412.84 * math.cos(phi) - 93.5 * math.cos(3 * phi) + 0.118 * math.cos(5 * phi)
    return longitude, 111132.92 - 559.82 * math.cos(2 * phi) + 1.175 * math.cos(4 * phi)
