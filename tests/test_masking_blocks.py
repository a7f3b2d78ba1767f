"""I-JEPA's blocks: what is covered, how often, of which sizes; the published sampler with its defects; tiny grids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xscale_lightning.errors import UserError
from xscale_lightning.masking_blocks import BlockMasks, Blocks

SAMPLERS = ("packed", "balanced", "legacy")


def sequences(blocks: Blocks) -> list[list[int]]:
    """Visible places of every sequence, in the order (context, image), each checked to belong to its image."""
    count = blocks.targets.shape[1]
    rows = blocks.context.split(list(blocks.lengths))
    found = [rows[i] for i in blocks.order.tolist()]
    assert all(bool((row // blocks.places == i % count).all()) for i, row in enumerate(found))
    return [(row % blocks.places).tolist() for row in found]


def coverage(masks: BlockMasks, grid: tuple[int, int], batch: int, batches: int) -> tuple[torch.Tensor, torch.Tensor]:
    """How often each place is in a context, and in a target block, `[H, W]` shares."""
    seen, wanted = torch.zeros(grid[0] * grid[1]), torch.zeros(grid[0] * grid[1])
    for seed in range(batches):
        torch.manual_seed(seed)
        blocks = masks.draw(batch, *grid)
        seen += (blocks.context % blocks.places).bincount(minlength=len(seen))
        wanted += blocks.targets.flatten().bincount(minlength=len(seen))
    return (seen / (batch * batches)).view(grid), (wanted / (batch * batches)).view(grid)


@settings(deadline=None, max_examples=60)
@given(
    height=st.integers(5, 20),
    width=st.integers(5, 20),
    batch=st.integers(1, 6),
    contexts=st.integers(1, 2),
    targets=st.integers(1, 4),
    sampler=st.sampled_from(SAMPLERS[:2]),
    seed=st.integers(0, 1000),
)
def test_blocks_on_any_grid(height, width, batch, contexts, targets, sampler, seed):
    torch.manual_seed(seed)
    masks = BlockMasks(sampler, contexts=contexts, targets=targets)
    blocks = masks.draw(batch, height, width)
    assert blocks.targets.shape[:2] == (targets, batch) and blocks.places == height * width
    found = sequences(blocks)
    assert len(found) == contexts * batch and list(blocks.lengths) == sorted(blocks.lengths)
    assert min(blocks.lengths) >= masks.least(height, width)
    assert all(row == sorted(set(row)) and row[0] >= 0 and row[-1] < height * width for row in found)
    sizes = set()
    for block in blocks.targets.flatten(0, 1):
        rows, columns = block // width, block % width
        h, w = (int(x.max() - x.min()) + 1 for x in (rows, columns))
        assert len(set(block.tolist())) == h * w == len(block)  # a whole rectangle
        sizes.add((h, w))
    assert len(sizes) == 1  # one size for the batch
    if sampler == "balanced":
        assert blocks.kept is not None and torch.equal(blocks.kept.flatten(0, 1), torch.tensor(found))


def test_contexts_do_not_see_their_targets():
    torch.manual_seed(0)
    for sampler in SAMPLERS:
        blocks = BlockMasks(sampler, contexts=2).draw(32, 16, 16)
        for i, row in enumerate(sequences(blocks)):
            assert not set(row) & set(blocks.targets[:, i % 32].flatten().tolist())


def test_the_published_sampler_has_its_defects():
    seen, wanted = coverage(BlockMasks("legacy"), (16, 16), 64, 12)
    for share in (seen, wanted):
        assert share[15].sum() == 0 and share[:, 15].sum() == 0  # never sampled
    assert seen[:3].mean() > 4 * seen[11:14].mean()  # the first tokens are kept, the last are cut off
    torch.manual_seed(0)
    one = BlockMasks("legacy", targets=1)
    rows = sequences(one.draw(1, 16, 16))[0]  # a batch of one is not cut: 15 x 15 at the corner without the target
    assert all(place % 16 < 15 and place // 16 < 15 for place in rows) and len(rows) > 225 - 55


def test_the_published_target_shapes_are_six():
    shapes = set()
    for seed in range(200):
        torch.manual_seed(seed)
        block = BlockMasks("legacy").draw(1, 16, 16).targets[0, 0]
        shapes.add((int((block // 16).max() - (block // 16).min()) + 1, len((block % 16).unique())))
    assert shapes == {(5, 7), (6, 6), (6, 7), (7, 6), (8, 6), (9, 6)}


@pytest.mark.parametrize("sampler", SAMPLERS[:2])
def test_ours_reach_everything_alike(sampler):
    seen, wanted = coverage(BlockMasks(sampler), (16, 16), 64, 40)
    for share in (seen, wanted):
        for flipped in (share.flip(0), share.flip(1), share.flip(0, 1)):
            torch.testing.assert_close(share, flipped, atol=0.06, rtol=0)
    assert seen.min() > 0.05 and wanted.min() > 0.005
    assert (seen[0].mean() / seen[8].mean()) > 1  # the rim is hidden less often: targets lie inside the image


def test_packed_contexts_do_not_depend_on_the_batch():
    """Every image keeps all that its own blocks leave: the mean does not fall with the size of the batch."""

    def mean(sampler: str, batch: int) -> float:
        torch.manual_seed(0)
        draws = [BlockMasks(sampler).draw(batch, 16, 16) for _ in range(256 // batch)]
        return sum(len(d.context) for d in draws) / 256

    assert abs(mean("packed", 4) - mean("packed", 64)) < 8
    assert mean("balanced", 64) < mean("balanced", 4) - 15 and mean("packed", 64) > mean("balanced", 64) + 20


def test_the_same_seed_gives_the_same_blocks():
    draws = []
    for _ in range(2):
        torch.manual_seed(3)
        draws.append(BlockMasks().draw(8, 12, 9))
    assert torch.equal(draws[0].context, draws[1].context) and draws[0].lengths == draws[1].lengths
    assert torch.equal(draws[0].targets, draws[1].targets)


def test_given_lists_come_back():
    lists = [torch.tensor(row) for row in ([3, 1], [0, 2, 5], [4], [1, 2])]  # two contexts of two images
    blocks = Blocks.of(lists, torch.tensor([[[0], [4]]]), 6)
    assert sequences(blocks) == [row.tolist() for row in lists] and blocks.kept is None
    assert blocks.runs == [(1, 1), (2, 2), (1, 3)] and blocks.flat_targets.tolist() == [[[0], [10]]]
    equal = Blocks.of([torch.tensor([1, 2]), torch.tensor([4, 0])], torch.tensor([[[0], [4]]]), 6)
    assert equal.kept is not None and equal.kept.tolist() == [[[1, 2], [4, 0]]]


@pytest.mark.parametrize("sampler", SAMPLERS[:2])
def test_a_target_is_let_in_where_nothing_else_is_left(sampler):
    """Four targets that cover nearly all of a small grid: the context still has its tokens."""
    masks = BlockMasks(sampler, target_scale=(0.5, 0.6), context_scale=(0.9, 1.0))
    torch.manual_seed(0)
    blocks = masks.draw(16, 6, 6)
    assert min(blocks.lengths) >= masks.least(6, 6) == 5


@pytest.mark.parametrize(
    ("options", "grid", "message"),
    [
        ({}, (1, 1), "on a grid of 1 x 1 tokens a target block of 1 tokens leaves less than 1 for the context"),
        ({"sampler": "legacy"}, (1, 9), "the legacy sampler places no block on a grid of 1 x 9"),
        (
            {"sampler": "legacy"},
            (8, 8),
            "can have 9 tokens, and the legacy sampler wants more than min_keep 10 .*: lower it to less than 9",
        ),
        (
            {"sampler": "legacy"},
            (2, 2),
            "can have 0 tokens, .* more than min_keep 10 in every block: take larger images",
        ),
        ({"target_scale": (0.9, 1.0), "target_ratio": (1.0, 1.0)}, (8, 8), "a target block of 64 tokens leaves less"),
    ],
)
def test_grids_on_which_nothing_can_be_placed(options, grid, message):
    for call in (BlockMasks(**options).check, lambda *size: BlockMasks(**options).draw(2, *size)):
        with pytest.raises(UserError, match=message):
            call(*grid)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": 0}, "masks.targets must be in .1, 1024., got 0"),
        ({"contexts": -1}, "masks.contexts must be in .1, 1024., got -1"),
        ({"target_scale": (0.3, 0.2)}, "masks.target_scale must be two shares"),
        ({"context_scale": (0.5, 1.5)}, "masks.context_scale must be two shares"),
        ({"target_ratio": (0.0, 1.0)}, "masks.target_ratio must be two ratios"),
        ({"min_keep": -1}, "masks.min_keep must not be negative"),
    ],
)
def test_values_that_make_no_blocks(options, message):
    with pytest.raises(UserError, match=message):
        BlockMasks(**options)
