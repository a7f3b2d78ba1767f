"""Every option of Cross-Scale MAE reaches the loss: logged terms against their definitions, at unusual values."""

import pytest
import torch
from torch.nn import functional

from xscale_lightning.data.bands import generic
from xscale_lightning.data.scale_view import View
from xscale_lightning.losses import nt_xent
from xscale_lightning.masking import random_mask
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokenizers import patchify
from xscale_lightning.models.tokens import gather

SMALL = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4, "predictor_dim": 32}


def make(method: type[CrossScaleMAE] = CrossScaleMAE, **options) -> CrossScaleMAE:
    torch.manual_seed(0)
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, image_size=32)
    return method(bands=generic(3), backbone=backbone, **SMALL, **options).double()


def inputs():
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(2, 3, 3, 32, 32, generator=generator, dtype=torch.float64)
    box = torch.tensor([[4.0, 8.0, 16.0, 20.0]]).expand(3, 4)
    masks = [random_mask(torch.rand(3, 16, generator=generator), 0.5) for _ in "ab"]
    return View(images[0]), View(images[1], boxes=box), *masks


@pytest.mark.parametrize("positive", [True, False])
@pytest.mark.parametrize("temperature", [0.1, 0.7])
def test_contrastive_term_has_its_temperature_and_positive(temperature, positive):
    module = make(temperature=temperature, recipe=Recipe(positive_in_denominator=positive))
    first, second, *masks = inputs()
    pairs = zip((first, second), masks, strict=True)
    features = [module.backbone(view.images, keep=kept).patches.mean(1) for view, (kept, _) in pairs]
    ours = module.loss(first, second, *masks).logs["contrastive"]
    torch.testing.assert_close(ours, nt_xent(*features, temperature, positive), rtol=1e-10, atol=0)
    other = nt_xent(*features, temperature, not positive)
    assert abs(ours - other) > 1e-3


def test_features_are_pooled_in_float32():
    seen = []

    class Watched(CrossScaleMAE):
        def _contrastive(self, a, b):
            seen.extend([a.dtype, b.dtype])
            return super()._contrastive(a, b)

    module = make(Watched, recipe=Recipe(encoder_norm=False)).bfloat16()
    first, second, *masks = inputs()
    module.loss(View(first.images.bfloat16()), View(second.images.bfloat16(), boxes=second.boxes), *masks)
    assert seen == [torch.float32, torch.float32]


@pytest.mark.parametrize("norm_pix", [True, False])
def test_reconstruction_target_is_standardised_when_asked(norm_pix):
    module = make(norm_pix_loss=norm_pix)
    first, second, mask, other = inputs()
    target = patchify(first.images, 8)
    if norm_pix:
        target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    pixels = module.decoder(module.backbone(first.images, keep=mask[0]))
    expected = (gather(pixels, mask[1]) - gather(target, mask[1])).square().mean()
    torch.testing.assert_close(module.loss(first, second, mask, other).logs["reconstruction_a"], expected)


def test_index_alignment_ignores_where_the_view_lies():
    module, ground = make(recipe=Recipe(align="index")), make(recipe=Recipe(align="ground"))
    first, second, mask, other = inputs()
    pairs = ((first, mask), (second, other))
    y_a, y_b = (module.decoder.decode(module.backbone(view.images, keep=kept))[:, 1:] for view, (kept, _) in pairs)
    ours = module.loss(first, second, mask, other).logs["cross_prediction"]
    torch.testing.assert_close(ours, functional.mse_loss(module.predictor(y_b), y_a), rtol=1e-10, atol=0)
    assert abs(ours - ground.loss(first, second, mask, other).logs["cross_prediction"]) > 1e-6


@pytest.mark.parametrize("crop_per", ["batch", "sample"])
def test_a_step_makes_the_second_view_as_the_recipe_says_and_knows_its_scale(crop_per):
    seen = []

    class Watched(CrossScaleMAE):
        def loss(self, first, second, first_mask, second_mask):
            seen.extend([first, second])
            return super().loss(first, second, first_mask, second_mask)

    gsd = torch.tensor([3.0, 10.0, 20.0, 30.0], dtype=torch.float64)
    make(Watched, recipe=Recipe(crop_per=crop_per)).step({"image": torch.randn(4, 3, 32, 32).double(), "gsd": gsd})
    first, second = seen
    assert torch.equal(first.gsd, gsd) and first.boxes is None
    distinct = {tuple(box) for box in second.boxes.tolist()}
    assert len(distinct) == (1 if crop_per == "batch" else 4)
    expected = gsd * (second.boxes[:, 2] * second.boxes[:, 3]).sqrt().double() / 32
    torch.testing.assert_close(second.gsd, expected, rtol=1e-6, atol=0)
    assert (second.gsd < 0.9 * gsd).all()
