import pytest
import torch
from torch import nn

from xscale_lightning.ema import EMA


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).double()


def moved(module: nn.Module) -> nn.Module:
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p))
        module[1].running_mean.add_(3.0)
        module[1].num_batches_tracked.add_(7)
    return module


def test_the_target_starts_equal_frozen_and_apart():
    net = student()
    target = EMA(net)
    for ours, theirs in zip(target.module.state_dict().values(), net.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs) and ours.data_ptr() != theirs.data_ptr()
    assert not any(p.requires_grad for p in target.parameters()) and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize("momentum", [0.0, 0.9, 0.996, 1.0])
def test_formula(momentum):
    net = student()
    target = EMA(net)
    before = [p.clone() for p in target.module.parameters()]
    target.update(moved(net), momentum)
    for old, now, new in zip(before, target.module.parameters(), net.parameters(), strict=True):
        torch.testing.assert_close(now, momentum * old + (1 - momentum) * new.detach(), rtol=1e-12, atol=1e-14)


def test_buffers_are_copied():
    net = student()
    target = EMA(net)
    target.update(moved(net), 0.9)
    for ours, theirs in zip(target.module.buffers(), net.buffers(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_skipped_step_moves_nothing(shape):
    net = student()
    target, reference = EMA(net), EMA(net)
    before = [p.clone() for p in target.module.parameters()]
    target.update(moved(net), 0.5, skip=torch.ones(shape))
    assert all(torch.equal(a, b) for a, b in zip(before, target.module.parameters(), strict=True))
    target.update(net, 0.5, skip=torch.zeros(shape))
    reference.update(net, 0.5)
    for a, b in zip(target.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    assert not torch.equal(next(target.parameters()), before[0])


def test_it_stays_in_evaluation_mode_and_gives_no_gradients():
    net = student()
    holder = nn.ModuleList([net, EMA(net)])
    holder.train()
    target = holder[1]
    assert net.training and not any(module.training for module in target.modules())
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    assert not target(x).requires_grad
    torch.testing.assert_close(target(x), net.eval()(x).detach())
