"""The references that speed is measured against compute what our methods compute: same loss, same gradients."""

import pytest
import torch

from xscale_lightning.data.scale_view import View
from xscale_lightning.masking import random_mask
from xscale_lightning.masking_gaps import jitter

METHODS = ("mae", "cross_scale_mae", "s2mae", "ijepa", "latent_mim", "sa_ijepa", "sa_latent_mim")


@pytest.fixture
def pair(load):
    """Our method and its reference at a tiny size, in float64 and with the same weights."""

    def make(method: str):
        size = load("sizes").SIZES["smallest"][method]
        torch.manual_seed(0)
        ours = load("ours").build(size).double().train()
        reference = load("references").build_reference(size).double().train()
        if size.paired:
            reference.host.load_state_dict(ours.host.state_dict())
            reference.teacher.load_state_dict(ours.host.target.state_dict())
        else:
            reference.load_state_dict(ours.state_dict())
        for parameter in ours.parameters():  # targets begin equal to the student: move them apart
            if not parameter.requires_grad:
                parameter.data.add_(0.01)
        for parameter in reference.parameters():
            if not parameter.requires_grad:
                parameter.data.add_(0.01)
        batch = {name: x.double() for name, x in load("ours").synthetic_batch(size).items()}
        return size, ours, reference, batch

    return make


def same_masks(size, ours, batch):
    """Our loss, and the same draws for the reference."""
    images, count = batch["image"], len(batch["image"])
    if size.method == "cross_scale_mae":
        second, noise = torch.randn_like(images), torch.rand(2, count, size.tokens)
        masks = [random_mask(part, size.mask_ratio) for part in noise]
        return ours.loss(View(images), View(second), *masks).loss, (noise[0], second, noise[1])
    if size.method in ("mae", "s2mae"):
        noise = torch.rand(count, size.tokens)
        return ours.loss(images, *random_mask(noise, size.mask_ratio)).loss, (noise,)
    torch.manual_seed(3)
    loss = ours.step(batch).loss
    torch.manual_seed(3)
    if size.host == "ijepa":
        blocks = (ours.host if size.paired else ours).masks.draw(count, size.side, size.side)
        return loss, (blocks.kept[0], list(blocks.targets))
    offsets = jitter(torch.rand(count, 2, size.tokens), size.gap)
    return loss, (offsets, *random_mask(torch.rand(count, size.tokens), size.mask_ratio))


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_computes_our_loss_and_gradients(pair, method):
    size, ours, reference, batch = pair(method)
    loss, draws = same_masks(size, ours, batch)
    expected = reference.loss(batch, *draws)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-11)
    loss.backward()
    expected.backward()
    inner = reference.host if size.paired else reference
    wanted = {name: p.grad for name, p in inner.named_parameters() if p.requires_grad}
    host = ours.host if size.paired else ours
    found = {name: p.grad for name, p in host.named_parameters() if p.requires_grad}
    assert found.keys() == wanted.keys() and any(g is not None and g.abs().max() > 0 for g in found.values())
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-10, msg=name)


@pytest.mark.parametrize("method", METHODS)
def test_a_reference_draws_its_own_masks_and_moves_its_targets(load, method):
    size = load("sizes").SIZES["smallest"][method]
    batch = load("ours").synthetic_batch(size)
    model = load("references").build_reference(size)
    step = load("references").ReferenceStep(model, batch, torch.device("cpu"))
    frozen = [p for p in model.parameters() if not p.requires_grad]
    before = [p.clone() for p in frozen]
    losses = [step.step() for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    assert bool(frozen) == (size.host in ("ijepa", "latent_mim"))
    assert all((a != b).any() for a, b in zip(before, frozen, strict=True) if a.ndim > 1 and a.abs().sum())
    assert step.ready["image"].shape == batch["image"].shape
    if size.paired:
        assert step.ready["image_hr"].shape == batch["image_hr"].shape


def test_the_loader_cuts_pairs_alike(load):
    parts = load("references.parts")
    finer = torch.randn(2, 24, 24).cumsum(1).cumsum(2)  # smooth, so that resampling says little
    coarse = torch.nn.functional.avg_pool2d(finer, 2)
    torch.manual_seed(1)
    kernel = parts.Interpolation.BILINEAR
    views = parts.crop_and_flip([coarse, finer], 12, (0.3, 0.3), kernel, (True, True))
    assert views[0].shape == (2, 12, 12) and views[1].shape == (2, 24, 24)
    close = torch.corrcoef(torch.stack([views[0].flatten(), torch.nn.functional.avg_pool2d(views[1], 2).flatten()]))
    assert close[0, 1] > 0.9


def test_the_affinity_needs_two_teachers_that_are_one_with_equal_momentum(load):
    """The published code moves both by the same rule from the same start, so they stay equal: ours keeps one."""
    size = load("sizes").SIZES["smallest"]["sa_ijepa"]
    step = load("references").ReferenceStep(
        load("references").build_reference(size), load("ours").synthetic_batch(size), torch.device("cpu")
    )
    step.step()
    step.step()
    ours = dict(step.model.host.target.named_parameters())
    for name, parameter in step.model.teacher.named_parameters():
        torch.testing.assert_close(parameter, ours[name])
