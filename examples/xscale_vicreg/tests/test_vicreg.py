"""The method keeps the contract, its formulas have their closed forms, and it learns."""

import pytest
import torch
from xscale_vicreg import VICReg
from xscale_vicreg.method import covariance, variance

from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.testing import check_method, make_batch


@pytest.mark.slow
def test_the_contract():
    check_method(VICReg, dim=32)


def test_formulas_in_closed_form():
    z = torch.tensor([[1.0, 2.0], [-1.0, -2.0], [1.0, 2.0], [-1.0, -2.0]], dtype=torch.float64)
    assert covariance(z).item() == pytest.approx((8 / 3) ** 2)  # Cov = 8/3 twice, over D = 2
    assert covariance(torch.eye(2, dtype=torch.float64).repeat(3, 1) * 2 - 1).item() == pytest.approx(1.44)
    assert variance(torch.ones(4, 2)).item() == pytest.approx(1 - 1e-2)
    assert variance(10 * z).item() == 0


def test_it_learns_and_does_not_collapse():
    """On one batch: views come nearer to each other while the projections keep their spread."""
    torch.manual_seed(0)
    small = BackboneConfig("region_vit_tiny_patch8", depth=1, dim=48)
    module = VICReg(bands=generic(3), backbone=small, dim=32).train()
    batch = module.prepare(make_batch(module.bands, (32, 32), 16))
    optimizer = torch.optim.AdamW(module.parameters(), lr=2e-3)
    losses, outputs = [], []
    for _ in range(30):
        output = module.step(batch)
        optimizer.zero_grad()
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
        outputs.append(output.logs)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    assert outputs[-1]["variance"] < 0.9 * outputs[0]["variance"]


def test_a_projection_without_width_is_refused():
    with pytest.raises(UserError, match="dim"):
        VICReg(dim=1)
