from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from xscale_lightning.data.bands import generic
from xscale_lightning.data.scale_view import ScaleView, View
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError, describe
from xscale_lightning.masking import random_mask
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import PRESETS, Recipe
from xscale_lightning.models.registry import BackboneConfig

SMALL = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4, "predictor_dim": 32}
TERMS = ("reconstruction", "cross_prediction", "contrastive")


def make(size: int = 32, backbone: dict | None = None, **options) -> CrossScaleMAE:
    torch.manual_seed(0)
    config = BackboneConfig("vit_tiny_patch8", depth=2, image_size=size, **(backbone or {}))
    return CrossScaleMAE(bands=generic(3), backbone=config, **{**SMALL, **options}).double()


def views(module: CrossScaleMAE, size: int = 32, second: int | None = None, batch: int = 3):
    """View A, a view B of `second` pixels from a known box, and a mask for each."""
    generator = torch.Generator().manual_seed(1)
    sizes = (size, second or size)
    images = [torch.randn(batch, 3, n, n, generator=generator, dtype=torch.float64) for n in sizes]
    gsd = torch.full((batch,), 10.0, dtype=torch.float64)
    box = torch.tensor([[4.0, 8.0, 16.0, 20.0]]).expand(batch, 4)
    masks = [random_mask(torch.rand(batch, (n // 8) ** 2, generator=generator), 0.5) for n in sizes]
    return View(images[0], gsd), View(images[1], gsd / 2, box), masks[0], masks[1]


@pytest.mark.parametrize("recipe", [Recipe(), Recipe(encoder_norm=False)])
@pytest.mark.parametrize("position", ["sincos", "gsd"])
@pytest.mark.parametrize("second", [32, 16])
def test_one_pass_gives_the_losses_of_two_passes(second, position, recipe):
    module = make(backbone={"position": position, "reference_gsd": 3.0}, recipe=recipe)
    first, other, mask, other_mask = views(module, second=second)
    output = module.loss(first, other, mask, other_mask)
    features = []
    for name, view, (kept, hidden) in (("a", first, mask), ("b", other, other_mask)):
        tokens = module.backbone(view.images, gsd=view.gsd, keep=kept)
        features.append(tokens.patches.mean(1))
        alone = module._reconstruction(view.images, module.decoder.decode(tokens, view.gsd)[:, 1:], hidden)
        torch.testing.assert_close(output.logs[f"reconstruction_{name}"], alone, rtol=1e-10, atol=0)
    torch.testing.assert_close(output.logs["contrastive"], module._contrastive(*features), rtol=1e-10, atol=0)


def test_total_is_the_weighted_sum():
    module = make(reconstruction_weight=2.0, prediction_weight=3.0, contrastive_weight=0.5)
    output = module.loss(*views(module))
    expected = sum(w * output.logs[n] for w, n in zip((2.0, 3.0, 0.5), TERMS, strict=True))
    torch.testing.assert_close(output.loss, expected)
    mean = (output.logs["reconstruction_a"] + output.logs["reconstruction_b"]) / 2
    torch.testing.assert_close(output.logs["reconstruction"], mean)
    summed = make(recipe=Recipe(reconstruction="sum"))
    torch.testing.assert_close(summed.loss(*views(summed)).logs["reconstruction"], 2 * mean)


@pytest.mark.parametrize("stop", [True, False])
def test_stop_gradient_shields_the_target(stop):
    module = make(recipe=Recipe(stop_gradient=stop), reconstruction_weight=0.0, contrastive_weight=0.0)
    first, *rest = views(module)
    first.images.requires_grad_()
    loss = module.loss(first, *rest).loss
    (gradient,) = torch.autograd.grad(loss, first.images, allow_unused=True)
    assert (gradient is None or not gradient.any()) == stop


def test_ground_alignment_compares_the_same_place():
    module = make(size=64)
    module.predictor.forward = lambda x: x  # q(y) = y
    centres = (torch.arange(8, dtype=torch.float64) + 0.5) * 8  # of A's tokens, pixels
    rows, columns = torch.meshgrid(centres, centres, indexing="ij")
    target = torch.stack([rows, columns], -1).reshape(1, 64, 2)  # every token of A says where it is
    box = torch.tensor([[8.0, 12.0, 28.0, 24.0]])  # no wider than B's grid: plain bilinear interpolation
    steps = (torch.arange(4, dtype=torch.float64) + 0.5) / 4
    rows, columns = torch.meshgrid(8 + 28 * steps, 12 + 24 * steps, indexing="ij")
    source = torch.stack([rows, columns], -1).reshape(1, 16, 2)  # where the tokens of B are
    tokens = [module.backbone.embed(torch.zeros(1, 3, n, n, dtype=torch.float64)) for n in (64, 32)]
    view = View(torch.zeros(1, 3, 32, 32, dtype=torch.float64), boxes=box)
    assert module._cross_prediction(source, target, tokens, view) < 1e-9
    assert module._cross_prediction(source + 1, target, tokens, view) == pytest.approx(1, abs=1e-4)


def test_masks_are_shared_only_when_asked():
    seen = []

    class Watched(CrossScaleMAE):
        def loss(self, first, second, first_mask, second_mask):
            seen.append(torch.equal(first_mask[0], second_mask[0]))
            return super().loss(first, second, first_mask, second_mask)

    for shared in (True, False):
        module = Watched(bands=generic(3), backbone=BackboneConfig("vit_tiny_patch8", depth=1), **SMALL,
                         recipe=Recipe(shared_mask=shared))  # fmt: skip
        module.step({"image": torch.randn(4, 3, 64, 64)})
    assert seen == [True, False]


def test_gsd_positions_hear_of_each_views_scale():
    module = make(backbone={"position": "gsd"})
    first, second, *masks = views(module)
    before = module.loss(first, second, *masks).logs
    after = module.loss(first, View(second.images, second.gsd * 2, second.boxes), *masks).logs
    torch.testing.assert_close(before["reconstruction_a"], after["reconstruction_a"], rtol=1e-9, atol=0)
    assert abs(before["reconstruction_b"] - after["reconstruction_b"]) > 1e-6


def test_positions_at_the_reference_gsd_are_plain_ones_in_encoder_and_decoder():
    plain, scaled = make(), make(backbone={"position": "gsd", "reference_gsd": 3.0})
    first, second, *masks = views(plain)
    gsd = torch.full((3,), 3.0, dtype=torch.float64)
    ours = scaled.loss(View(first.images, gsd), View(second.images, gsd, second.boxes), *masks).logs
    expected = plain.loss(first, second, *masks).logs
    assert all(abs(ours[name] - expected[name]) < 1e-5 for name in expected)  # plain tables are rounded to float32


def test_a_last_validation_batch_of_one_image_has_no_contrast():
    module = make()
    batch = {"image": torch.randn(1, 3, 32, 32, dtype=torch.float64)}
    assert set(module.evaluate(batch, 0).logs) >= {"reconstruction", "cross_prediction"}
    assert "contrastive" not in module.evaluate(batch, 0).logs
    with pytest.raises(UserError, match="at least 2 images"):
        module.train().step(batch)


def test_pictures_show_view_a():
    module = make(recipe=Recipe(preset="published"))
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    result = module.evaluate({"image": images}, 0).reconstruction()
    torch.testing.assert_close(result.target, module.prepare({"image": images})["image"])
    assert result.prediction.shape == result.visible.shape == images.shape
    assert result.visible.double().mean() == 0.25


@pytest.mark.parametrize(("block_norm", "eps"), [("pre", 1e-6), ("post", 1e-5)])
def test_published_blocks_of_each_kind_have_their_epsilon(block_norm, eps):
    assert Recipe(preset="published", block_norm=block_norm).resolve().norm_eps == eps
    assert Recipe(preset="published", block_norm=block_norm, norm_eps=1e-3).resolve().norm_eps == 1e-3


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_set_every_switch_and_single_ones_override(preset):
    recipe = Recipe(preset=preset).resolve()
    assert recipe == PRESETS[preset] and all(getattr(recipe, f.name) is not None for f in fields(recipe))
    changed = Recipe(preset=preset, shared_mask=True, norm_eps=1e-3).resolve()
    assert changed.shared_mask and changed.norm_eps == 1e-3 and changed.align == recipe.align
    module = make(recipe=changed)
    assert module.hparams["backbone"]["norm_eps"] == 1e-3 == module.backbone.blocks[0].norm1.eps
    assert module.decoder.blocks[0].norm1.eps == 1e-3
    assert module.backbone.blocks[0].post_norm == module.decoder.blocks[0].post_norm == (preset == "published")
    trained = {n for n, p in module.named_parameters() if p.requires_grad}
    assert ("backbone.norm.weight" in trained) == (preset != "published")


@pytest.mark.parametrize(
    ("options", "backbone", "message"),
    [
        ({"mask_ratio": 1.0}, {}, "mask_ratio"),
        ({"contrastive_weight": -1.0}, {}, "contrastive_weight must be finite"),
        ({"contrastive_weight": float("nan")}, {}, "contrastive_weight must be finite"),
        ({"temperature": 0.0}, {}, "temperature"),
        ({"temperature": float("inf")}, {}, "temperature"),
        ({"decoder_heads": 5}, {}, "heads"),
        ({"decoder_heads": 0}, {}, "decoder_heads must be at least 1"),
        ({"decoder_dim": 30, "decoder_heads": 3}, {}, "decoder_dim 30"),
        ({"predictor_dim": 0}, {}, "predictor_dim must be at least 1"),
        ({"recipe": Recipe(preset="published")}, {"patch_size": 64}, "bn_position counts the patches"),
        ({}, {"block_norm": "post"}, "recipe.block_norm"),
        ({"recipe": Recipe(preset="paper")}, {"final_norm": False}, "recipe.encoder_norm"),
    ],
)
def test_impossible_arguments_are_refused(options, backbone, message):
    with pytest.raises(UserError, match=message):
        make(backbone=backbone, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recipe": Recipe(predictor_norm="bn_position")}, "bn_position is made for 16 patches"),
        ({"scale_view": ScaleView(sizes=[4])}, "smaller than a patch"),
        ({"scale_view": ScaleView(scale=(0.01, 0.5), ratio=(1, 1))}, "a crop of 6.4 pixels, smaller than a patch of 8"),
        ({"scale_view": ScaleView(scale=(0.05, 0.5), ratio=(0.25, 4))}, "a crop of 7.16 pixels, smaller"),
        ({"scale_view": ScaleView(sizes=[36])}, "does not divide"),
        ({"scale_view": ScaleView(sizes=[8]), "mask_ratio": 0.75}, "has none to hide"),
        ({"scale_view": ScaleView(sizes=[32]), "recipe": Recipe(align="index")}, "align"),
        ({"scale_view": ScaleView(sizes=[32]), "recipe": Recipe(shared_mask=True)}, "shared_mask"),
    ],
)
def test_impossible_views_are_refused_at_set_up(options, message):
    with pytest.raises(UserError, match=message):
        make(**options).check_size(64, 64)


def test_batches_of_one_are_refused_at_set_up():
    data = SimpleNamespace(bands=generic(3), image_size=(32, 32), batch_size=1)
    with pytest.raises(UserError, match="at least 2 images per process"):
        make().check_data(data, fitting=True)
    make().check_data(data, fitting=False)


def test_a_loader_of_single_images_is_refused_before_the_first_step(tmp_path):
    images = [{"image": torch.randn(3, 32, 32)} for _ in range(2)]
    trainer = Trainer(max_steps=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
                      enable_model_summary=False, accelerator="cpu", default_root_dir=tmp_path)  # fmt: skip
    with pytest.raises(UserError, match="training loader's batch size 1: the contrastive loss needs at least 2"):
        trainer.fit(make().float(), DataLoader(images, batch_size=1))


@pytest.mark.parametrize(
    ("options", "native", "reason"),
    [
        ({"size": 64, "recipe": Recipe(preset="published")}, 32, "made for 64 patches and a view has 16"),
        ({"mask_ratio": 0.9, "scale_view": ScaleView(ratio=(1, 1))}, 16, "leaves none"),
    ],
)
def test_the_size_of_validation_images_is_checked_beside_that_of_the_views(options, native, reason):
    module = make(views=Views(size=64), **options)
    data = SimpleNamespace(bands=generic(3), image_size=(native, native), batch_size=8)
    with pytest.raises(
        UserError, match=f"data.image_size {native} x {native}.* views.size 64: .*\n.*{reason}"
    ) as caught:
        module.check_data(data, fitting=True)
    assert describe(caught.value) == str(caught.value)  # what the command line says
    module.check_data(SimpleNamespace(bands=generic(3), image_size=64, batch_size=8), fitting=True)


def test_timm_backbones_cannot_have_the_published_norms():
    timms = BackboneConfig("timm:vit_tiny_patch16_224")
    with pytest.raises(UserError, match="timm backbones are pre-norm with a final norm: use recipe"):
        Recipe(preset="published").resolve().apply(timms)
    assert Recipe().resolve().apply(timms) == timms


@pytest.mark.parametrize(
    "switch",
    [
        {"preset": "x"},
        {"reconstruction": "avg"},
        {"block_norm": "mid"},
        {"predictor_norm": "bn"},
        {"crop_per": "image"},
        {"align": "place"},
        {"norm_eps": 0.0},
    ],
)
def test_values_that_a_switch_does_not_have_are_refused(switch):
    with pytest.raises(UserError, match=f"recipe.{next(iter(switch))}"):
        Recipe(**switch)


def test_another_grid_is_refused_by_the_predictor():
    module = make(recipe=Recipe(preset="published"))
    with pytest.raises(UserError, match="made for 16 patches"):
        module.loss(*views(module, size=64))
