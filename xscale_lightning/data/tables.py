"""Tables of embeddings: Parquet with one fixed-size list per row, and GeoParquet where footprints are known."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from xscale_lightning.errors import UserError
from xscale_lightning.files import told, whole

GEO_VERSION = "1.1.0"  # of the GeoParquet specification
Corners = Sequence[tuple[float, float]]


def require_parquet() -> None:
    """Refuse to begin what could not be written in the end.

    Raises:
        UserError: pyarrow is not installed.
    """
    try:
        import pyarrow.parquet  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise UserError(
            "Parquet files need pyarrow, which is not installed: pip install 'xscale-lightning[parquet]' "
            "(or pyarrow); a feature map alone, --map FILE.tif, needs nothing more."
        ) from error


def write_parquet(
    path: Path,
    embeddings: np.ndarray,
    columns: Mapping[str, Sequence[Any] | np.ndarray],
    footprints: Sequence[bytes] | None = None,
    crs: str | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a table, whole or not at all.

    Args:
        path: the file.
        embeddings: `[N, D]` float32; column `embedding`, a fixed-size list.
        columns: further columns of N values; a 2-D array becomes a column of fixed-size lists.
        footprints: polygon of every row as WKB (see `polygon`); column `geometry`.
        crs: coordinate reference system of the footprints; None leaves GeoParquet's default, longitude and latitude.
        metadata: plain values for the file's own metadata, under `xscale`.

    Raises:
        UserError: pyarrow is missing, or the file cannot be written.
    """
    require_parquet()
    import pyarrow as pa  # type: ignore[import-not-found]
    import pyarrow.parquet as pq  # type: ignore[import-not-found]

    def as_list(values: np.ndarray) -> Any:
        flat = pa.array(np.ascontiguousarray(values).reshape(-1))
        return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])

    arrays = {
        name: as_list(v) if isinstance(v, np.ndarray) and v.ndim == 2 else pa.array(v) for name, v in columns.items()
    }
    arrays["embedding"] = as_list(embeddings)
    extra = {b"xscale": json.dumps(dict(metadata or {})).encode()}
    if footprints is not None:
        arrays["geometry"] = pa.array(footprints, pa.binary())
        extra[b"geo"] = json.dumps(_geo(footprints, crs)).encode()
    table = pa.table(arrays).replace_schema_metadata(extra)
    with told(path), whole(path) as part:
        pq.write_table(table, part, compression="zstd")


def _geo(footprints: Sequence[bytes], crs: str | None) -> dict[str, Any]:
    import pyproj
    import shapely

    column: dict[str, Any] = {"encoding": "WKB", "geometry_types": ["Polygon"]}
    if len(footprints):
        column["bbox"] = [float(v) for v in shapely.total_bounds(shapely.from_wkb(list(footprints)))]
    if crs is not None:
        column["crs"] = pyproj.CRS.from_user_input(crs).to_json_dict()
    return {"version": GEO_VERSION, "primary_column": "geometry", "columns": {"geometry": column}}


def polygon(left: float, top: float, right: float, bottom: float, crs: str, to: str) -> bytes:
    """WKB of a rectangle whose sides follow the axes of `crs`, in the coordinates of `to`, x before y.

    Its corners alone are moved: between them a side of a footprint of some kilometres bends by centimetres.
    """
    import shapely

    corners = [(left, top), (left, bottom), (right, bottom), (right, top)]
    if to != crs:
        xs, ys = _transformer(crs, to).transform(*zip(*corners, strict=True))
        corners = list(zip(xs, ys, strict=True))
    return shapely.to_wkb(shapely.Polygon(corners))


_TRANSFORMERS: dict[tuple[str, str], Any] = {}


def _transformer(crs: str, to: str) -> Any:
    if (crs, to) not in _TRANSFORMERS:
        import pyproj

        _TRANSFORMERS[crs, to] = pyproj.Transformer.from_crs(crs, to, always_xy=True)
    return _TRANSFORMERS[crs, to]


def check_crs(text: str, argument: str) -> str:
    """A coordinate reference system in a form that compares.

    Raises:
        UserError: it is none.
    """
    import pyproj
    from pyproj.exceptions import CRSError

    try:
        found = pyproj.CRS.from_user_input(text)
    except CRSError:
        raise UserError(
            f"{argument} '{text}' is no coordinate reference system; give EPSG:4326, for example."
        ) from None
    return found.to_string()
