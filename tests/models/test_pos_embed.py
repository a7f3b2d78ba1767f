"""Positions against closed forms."""

import math

import pytest
import torch

from xscale_lightning.errors import UserError
from xscale_lightning.models.pos_embed import GSDPositions, LearnedPositions, SinCosPositions, resize_table, sincos_2d


def test_sincos_is_the_formula_with_columns_first():
    dim, height, width = 16, 3, 5
    steps = [torch.arange(n, dtype=torch.float64) for n in (height, width)]
    table = sincos_2d(dim, *steps)
    for row in range(height):
        for column in range(width):
            expected = []
            for coordinate in (column, row):
                angles = [coordinate / 10000 ** (k / 4) for k in range(4)]
                expected += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
            got = table[row * width + column]
            assert (got - torch.tensor(expected, dtype=torch.float64)).abs().max() < 1e-12


def test_tables_are_the_formula_rounded_to_float32_as_published_ones():
    single = SinCosPositions(8)((4, 4), like=torch.zeros(1))
    double = SinCosPositions(8)((4, 4), like=torch.zeros(1, dtype=torch.float64))
    exact = sincos_2d(8, *(torch.arange(4, dtype=torch.float64),) * 2)
    assert torch.equal(single, exact.float()[None]) and torch.equal(double, single.double())


def test_gsd_positions_scale_with_metres_per_pixel():
    positions = GSDPositions(16, reference_gsd=10.0)
    like = torch.zeros(1, dtype=torch.float64)
    table = positions((3, 4), like, gsd=torch.tensor([10.0, 20.0, 5.0]))
    plain = sincos_2d(16, *(torch.arange(n, dtype=torch.float64) for n in (6, 8))).reshape(6, 8, 16)
    assert (table[0].reshape(3, 4, 16) - plain[:3, :4]).abs().max() < 1e-12
    assert (table[1].reshape(3, 4, 16) - plain[::2, ::2]).abs().max() < 1e-12  # 20 m: every second position of 10 m
    assert (table[2].reshape(3, 4, 16)[::2, ::2] - plain[:2, :2]).abs().max() < 1e-12
    with pytest.raises(UserError, match="gsd"):
        positions((3, 4), like)


def test_learned_table_resizes_and_keeps_a_linear_ramp():
    positions = LearnedPositions(4, (6, 6))
    ramp = torch.arange(6.0)[:, None].expand(6, 6).reshape(1, 36, 1).expand(1, 36, 4)
    positions.table.data.copy_(ramp)
    same = positions((6, 6), like=torch.zeros(1))
    assert torch.equal(same, ramp)
    larger = positions((12, 6), like=torch.zeros(1)).reshape(12, 6, 4)
    centre = (torch.arange(12.0) + 0.5) / 2 - 0.5
    assert (larger[4:8, :, 0] - centre[4:8, None]).abs().max() < 1e-5
    assert resize_table(ramp, (6, 6), (3, 9)).shape == (1, 27, 4)


def test_width_must_be_a_multiple_of_four():
    with pytest.raises(UserError, match="multiple of 4"):
        sincos_2d(6, torch.arange(2.0), torch.arange(2.0))
