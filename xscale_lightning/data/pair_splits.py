"""Splits of pairs that share no ground, also where the same place was imaged several times."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from xscale_lightning.data.blocks import BlockMap, split_blocks
from xscale_lightning.data.geotiff import Grid
from xscale_lightning.errors import UserError

_SPLITS = ("train", "val", "test")


def split_groups(
    grids: Sequence[Grid],
    groups: Sequence[int],
    whole: bool,
    size: tuple[int, int],
    fractions: tuple[float, float, float],
    block: int | None = None,
    seed: int = 0,
) -> list[BlockMap]:
    """Deal the scenes' blocks out so that no two splits share ground.

    Scenes of one group that cover exactly the same grid (a time series) get the same blocks. Where scenes
    overlap otherwise, all groups go to one split each as a whole.

    Args:
        grids: one per scene.
        groups: number of each scene's group; see `overlapping_groups`.
        whole: whether every group goes to one split as a whole (groups the user named).
        size: (height, width) of a patch.
        fractions: shares for train, val and test.
        block: side of a block in pixels; None chooses it.
        seed: of the dealing.

    Raises:
        UserError: if there are too few blocks or groups for the splits.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for i, group in enumerate(groups):
        members[group].append(i)
    if not whole and all(len({_place(grids[i]) for i in part}) == 1 for part in members.values()):
        firsts = [part[0] for part in members.values()]
        dealt = split_blocks([grids[i] for i in firsts], size, fractions, block, seed)
        return [
            replace(dealt[number], snap=grids[i].snap)
            for i, number in zip(range(len(grids)), _positions(groups), strict=True)
        ]
    return _deal_whole(grids, groups, members, fractions, seed)


def _place(grid: Grid) -> tuple[float, ...]:
    return (round(grid.left / grid.dx, 3), round(grid.top / grid.dy, 3), grid.width, grid.height, grid.snap)


def _positions(groups: Sequence[int]) -> list[int]:
    order = {group: position for position, group in enumerate(dict.fromkeys(groups))}
    return [order[group] for group in groups]


def _deal_whole(
    grids: Sequence[Grid],
    groups: Sequence[int],
    members: dict[int, list[int]],
    fractions: tuple[float, float, float],
    seed: int,
) -> list[BlockMap]:
    """Give every group to one split: in random order to the split that lacks most of its share of the area."""
    wanted = [name for name, fraction in zip(_SPLITS, fractions, strict=True) if fraction > 0]
    if len(members) < len(wanted):
        raise UserError(
            f"data.fractions: the pairs make {len(members)} separate group(s), as images that share ground must stay "
            f"together; too few for {', '.join(wanted)}. Set the other fractions to 0, or add pairs of other places."
        )
    area = {g: sum(grids[i].height * grids[i].width for i in part) for g, part in members.items()}
    order = [list(members)[i] for i in np.random.default_rng(seed).permutation(len(members))]
    total, filled, owner = sum(area.values()), [0.0, 0.0, 0.0], {}
    for place, group in enumerate(order):
        empty = [s for s in range(3) if fractions[s] > 0 and filled[s] == 0]
        if len(order) - place <= len(empty):  # every split gets at least one group
            split = empty[0]
        else:
            split = max(range(3), key=lambda s: fractions[s] * total - filled[s] if fractions[s] > 0 else -np.inf)
        owner[group] = split
        filled[split] += area[group]
    return [
        BlockMap(np.array([0, grid.height]), np.array([0, grid.width]), np.array([[owner[group]]], np.int8), grid.snap)
        for grid, group in zip(grids, groups, strict=True)
    ]
