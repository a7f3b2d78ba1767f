"""Decoders, freezing, mixing: shapes, gradients, and cases that can be done by hand."""

import pytest
import torch

from xscale_lightning.errors import UserError
from xscale_lightning.models.registry import create_backbone
from xscale_lightning.tasks.decoders import DenseHead, GroupMix, even_depths, tokens_at
from xscale_lightning.tasks.freezing import freeze, quieten
from xscale_lightning.tasks.mixing import Mixing, smooth_one_hot

SMALL = {"dim": 24, "depth": 4, "num_heads": 2}


@pytest.fixture(scope="module")
def vit():
    return create_backbone("vit_tiny_patch8", 3, **SMALL)


@pytest.fixture(scope="module")
def cubes():
    return create_backbone("spectral_vit_tiny_cube3_patch8", 6, class_token=False, **SMALL)


@pytest.mark.parametrize("name", ["linear", "fpn", "upernet"])
def test_decoders_give_a_class_to_every_pixel(name, vit):
    head = DenseHead(name, vit, 1, 5, 32, 0.1)
    images = torch.randn(1, 3, 24, 40)  # batches of one train as well
    logits = head(head.maps(tokens_at(vit, images, None, head.depths)), (24, 40))
    assert logits.shape == (1, 5, 24, 40)
    logits.sum().backward()
    assert all(p.grad is not None for p in head.parameters())


def test_tokens_at_depths_are_those_of_the_blocks(vit):
    images = torch.randn(2, 3, 16, 16)
    found = tokens_at(vit.eval(), images, None, [1, 4])
    with torch.no_grad():
        first = vit.blocks[0](vit.embed(images).x)
    torch.testing.assert_close(found[0].x, first)
    torch.testing.assert_close(found[1].x, vit(images).x)
    assert not any(block._forward_hooks for block in vit.blocks)


def test_even_depths():
    assert even_depths(12) == [3, 6, 9, 12] and even_depths(4) == [1, 2, 3, 4] and even_depths(2) == [1, 1, 2, 2]


def test_spectral_groups_begin_with_their_mean(cubes):
    tokens = cubes(torch.randn(2, 6, 16, 16))
    mix = GroupMix(2)
    expected = tokens.patches.unflatten(1, (2, 2, 2)).mean(1).permute(0, 3, 1, 2)
    torch.testing.assert_close(mix(tokens), expected)
    mix(tokens).sum().backward()
    assert mix.weight.grad is not None


@pytest.mark.parametrize(("tune", "trained"), [("full", {0, 1, 2, 3, 4, 5}), ("last_k", {4, 5}), ("frozen", set())])
def test_what_is_trained(tune, trained):
    vit = create_backbone("vit_tiny_patch8", 3, drop_path=0.5, **SMALL)
    freeze(vit, tune, 1)
    assert {vit.layer_index(name) for name, p in vit.named_parameters() if p.requires_grad} == trained
    vit.train()
    quieten(vit, tune)
    assert [block.training for block in vit.blocks] == [tune == "full"] * 3 + [tune != "frozen"]


def test_last_k_is_checked(vit):
    with pytest.raises(UserError, match=r"model\.last_k must be in \[1, 4\] for this encoder, got 5"):
        freeze(vit, "last_k", 5)


def test_smoothing():
    assert smooth_one_hot(torch.tensor([1]), 4, 0.2)[0].tolist() == pytest.approx([0.05, 0.85, 0.05, 0.05])


@pytest.mark.parametrize("mixing", [Mixing(mixup=0.8), Mixing(cutmix=1.0), Mixing(mixup=0.8, cutmix=1.0)])
def test_labels_are_mixed_as_the_images_are(mixing):
    torch.manual_seed(1)
    labels = torch.arange(4)
    images = labels.float().view(4, 1, 1, 1).expand(4, 2, 16, 16).clone()
    mixed, target = mixing(images, smooth_one_hot(labels, 4, 0.0))
    torch.testing.assert_close(target.sum(1), torch.ones(4))
    torch.testing.assert_close((target * labels).sum(1), mixed.mean((1, 2, 3)), atol=1e-5, rtol=0)
    assert not torch.equal(mixed, images)


def test_mixing_can_be_off_and_is_checked():
    images, target = torch.randn(2, 1, 4, 4), torch.eye(2)
    for mixing in (Mixing(), Mixing(mixup=1.0, probability=0.0)):
        assert mixing(images, target)[0] is images
    with pytest.raises(UserError, match=r"mixing\.mixup must be 0 or more"):
        Mixing(mixup=-1.0)
    with pytest.raises(UserError, match=r"mixing.switch must be in \[0, 1\]"):
        Mixing(switch=2.0)
