import math

import pytest
import torch

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.geometry import effective_rank, mean_cosine, uniformity


def test_orthonormal_rows() -> None:
    rows = torch.eye(8, 12)
    assert effective_rank(rows) == pytest.approx(8)
    assert mean_cosine(rows) == pytest.approx(0, abs=1e-12)
    assert uniformity(rows) == pytest.approx(-4)  # every squared distance is 2: log exp(-2 * 2)


def test_equal_rows() -> None:
    rows = torch.tensor([[1.0, 2.0, -3.0]]).repeat(6, 1)
    assert effective_rank(rows) == pytest.approx(1, abs=1e-5)
    assert mean_cosine(rows) == pytest.approx(1)
    assert uniformity(rows) == pytest.approx(0, abs=1e-9)


def test_known_spectrum() -> None:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(20, 3, generator=generator, dtype=torch.float64)).Q
    right = torch.linalg.qr(torch.randn(7, 3, generator=generator, dtype=torch.float64)).Q
    singular = torch.tensor([6.0, 3.0, 1.0], dtype=torch.float64)
    entropy = -sum(p * math.log(p) for p in (0.6, 0.3, 0.1))
    assert effective_rank(left @ singular.diag() @ right.T) == pytest.approx(math.exp(entropy))


def test_two_rows_by_hand_and_length_does_not_matter() -> None:
    rows = torch.tensor([[1.0, 0.0], [5 * math.cos(1.0), 5 * math.sin(1.0)]])
    assert mean_cosine(rows) == pytest.approx(math.cos(1.0))
    assert uniformity(rows) == pytest.approx(-2 * (2 - 2 * math.cos(1.0)))
    assert uniformity(rows, t=1.0) == pytest.approx(-(2 - 2 * math.cos(1.0)))


def test_mean_over_pairs() -> None:
    rows = torch.randn(30, 5, generator=torch.Generator().manual_seed(1))
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    i, j = torch.triu_indices(30, 30, 1)
    cosine = (unit[i] * unit[j]).sum(1)
    assert mean_cosine(rows) == pytest.approx(cosine.mean().item())
    assert uniformity(rows) == pytest.approx(torch.exp(-2 * (2 - 2 * cosine)).mean().log().item())


def test_broken_features() -> None:
    assert math.isnan(effective_rank(torch.full((4, 3), math.nan)))
    assert math.isnan(effective_rank(torch.zeros(4, 3)))
    with pytest.raises(UserError, match="N >= 2"):
        uniformity(torch.ones(1, 3))
    with pytest.raises(UserError, match="features"):
        mean_cosine(torch.ones(3))
