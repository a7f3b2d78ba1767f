"""Which HR image belongs to which MR image: by name, or by where they lie."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np

from xscale_lightning.data.geotiff import Grid
from xscale_lightning.errors import UserError

Pair = tuple[str, str]
_BINS = 64  # at most so many cells of the search grid along a side of one scene


def check_pattern(pattern: str | None) -> re.Pattern[str] | None:
    """Compile the regular expression that finds the common part of two names.

    Raises:
        UserError: if it is no regular expression, or has no group.
    """
    if pattern is None:
        return None
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"data.key: '{pattern}' is no regular expression ({error}); mend it.") from None
    if not compiled.groups:
        raise UserError(f"data.key: '{pattern}' has no group; put brackets around what both names share.")
    return compiled


def key_of(name: str, pattern: re.Pattern[str] | None) -> str:
    """Part of a scene's name (its path below the folder) that its partner has too; "" where the pattern finds none."""
    name = name.replace("\\", "/")
    if pattern is None:
        return name
    found = pattern.search(name)
    return "" if found is None else "/".join(part or "" for part in found.groups())


def match_by_name(
    mr: Iterable[str], hr: Iterable[str], pattern: re.Pattern[str] | None
) -> tuple[list[Pair], list[str], list[str]]:
    """Pair scenes of the same key.

    Returns:
        the pairs (MR name, HR name); MR scenes without a partner; and HR scenes without one.

    Raises:
        UserError: if two HR scenes have the same key, so that the partner would be a guess.
    """
    by_key: dict[str, list[str]] = defaultdict(list)
    hr_names = list(hr)
    for name in hr_names:
        by_key[key_of(name, pattern)].append(name)
    pairs, missing = [], []
    for name in mr:
        key = key_of(name, pattern)
        partners = by_key.get(key, []) if key else []
        if len(partners) > 1:
            raise UserError(
                f"data.key: HR images {partners[0]} and {partners[1]} both fit MR image {name} (key '{key}'); "
                "make data.key tell them apart, or narrow data.files_hr."
            )
        pairs += [(name, partner) for partner in partners]
        if not partners:
            missing.append(name)
    used = {partner for _, partner in pairs}
    return pairs, missing, [name for name in hr_names if name not in used]


def overlap(a: Grid, b: Grid) -> float:
    """Area that two grids share, in squares of the CRS unit; 0 if none."""
    width = min(a.left + a.width * a.dx, b.left + b.width * b.dx) - max(a.left, b.left)
    height = min(a.top, b.top) - max(a.top - a.height * a.dy, b.top - b.height * b.dy)
    return max(0.0, width) * max(0.0, height)


def smallest_gap(mr: Iterable[Grid], hr: Iterable[Grid]) -> float:
    """Metres between the two nearest footprints of one MR and one HR scene; 0 where they touch or overlap."""
    b = np.array([(g.left, g.top - g.height * g.dy, g.left + g.width * g.dx, g.top) for g in hr])
    least = np.inf
    for grid in mr:
        left, bottom, right, top = (
            grid.left,
            grid.top - grid.height * grid.dy,
            grid.left + grid.width * grid.dx,
            grid.top,
        )
        across = np.maximum(0, np.maximum(b[:, 0] - right, left - b[:, 2]))
        along = np.maximum(0, np.maximum(b[:, 1] - top, bottom - b[:, 3]))
        least = min(least, float(np.hypot(across, along).min()) * grid.gsd / np.sqrt(grid.dx * grid.dy))
    return float(least)


def match_by_place(
    mr: Mapping[str, Grid],
    hr: Mapping[str, Grid],
    crs: Mapping[str, str],
    crs_hr: Mapping[str, str],
    suits: Callable[[str, str], bool] = lambda mr, hr: True,
) -> tuple[list[Pair], list[str], list[str]]:
    """Pair every MR scene with every HR scene of the same CRS that shares ground with it.

    Args:
        mr: grids of the MR scenes by name.
        hr: grids of the HR scenes by name.
        crs: coordinate system of each MR scene.
        crs_hr: coordinate system of each HR scene.
        suits: says whether two scenes (MR name, HR name) that share ground may make a pair.

    Returns:
        the pairs (MR name, HR name); MR scenes without a partner; and HR scenes without one.
    """
    index = _Index(list(hr.values()), [crs_hr[name] for name in hr])
    names = list(hr)
    touching = ((name, names[i]) for name, grid in mr.items() for i in index.touching(grid, crs[name]))
    pairs = [pair for pair in touching if suits(*pair)]
    paired, used = {name for name, _ in pairs}, {name for _, name in pairs}
    return pairs, [name for name in mr if name not in paired], [name for name in names if name not in used]


def overlapping_groups(grids: Sequence[Grid], crs: Sequence[str | None], keys: Sequence[str]) -> list[int]:
    """Group number of every scene: scenes that share ground, directly or through others, or share a key, are one group.

    Args:
        grids: one per scene.
        crs: of each scene; scenes without one share no ground that we know of.
        keys: names of groups that are known already; "" for none.
    """
    parent = list(range(len(grids)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = parent[parent[i]]
            i = parent[i]
        return i

    first: dict[str, int] = {}
    for i, key in enumerate(keys):
        if key:
            parent[root(i)] = root(first.setdefault(key, i))
    index = _Index(grids, crs)
    for i, (grid, system) in enumerate(zip(grids, crs, strict=True)):
        for j in index.touching(grid, system) if system else ():
            parent[root(i)] = root(j)
    numbers: dict[int, int] = {}
    return [numbers.setdefault(root(i), len(numbers)) for i in range(len(grids))]


class _Index:
    """Finds the grids that share ground with one, without comparing all with all."""

    def __init__(self, grids: Sequence[Grid], crs: Sequence[str | None]) -> None:
        self.grids, self.crs = grids, crs
        sides = [side for g in grids for side in (g.width * g.dx, g.height * g.dy)]
        # Cells of the middle scene's side, but not so small that the largest one would fill too many of them.
        self.cell = max(sorted(sides)[len(sides) // 2], max(sides) / _BINS) if sides else 1.0
        self.bins: dict[tuple[int, int], list[int]] = defaultdict(list)
        for i, grid in enumerate(grids):
            for place in self._cells(grid):
                self.bins[place].append(i)

    def _cells(self, grid: Grid) -> Iterable[tuple[int, int]]:
        x0, x1 = grid.left // self.cell, (grid.left + grid.width * grid.dx) // self.cell
        y0, y1 = (grid.top - grid.height * grid.dy) // self.cell, grid.top // self.cell
        return ((x, y) for x in range(int(x0), int(x1) + 1) for y in range(int(y0), int(y1) + 1))

    def touching(self, grid: Grid, crs: str | None) -> list[int]:
        near = {i for place in self._cells(grid) for i in self.bins.get(place, ())}
        least = 1e-6 * grid.dx * grid.dy  # rounding of coordinates is no shared ground
        return sorted(i for i in near if self.crs[i] == crs and overlap(grid, self.grids[i]) > least)
