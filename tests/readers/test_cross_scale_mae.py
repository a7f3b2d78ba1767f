import argparse

import pytest
import torch

from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.readers.common import open_published
from xscale_lightning.readers.cross_scale_mae import build_published, load_published, to_published


def make(block_norm: str = "post", backbone: BackboneConfig | None = None, **options) -> CrossScaleMAE:
    torch.manual_seed(0)
    backbone = backbone or BackboneConfig("vit_tiny_patch8", dim=48, num_heads=4, depth=2, image_size=32)
    sizes = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4, "predictor_dim": 16}
    recipe = Recipe(preset="published", block_norm=block_norm, norm_eps=1e-5 if block_norm == "post" else 1e-6)
    return CrossScaleMAE(recipe=recipe, bands=generic(4), backbone=backbone, **{**sizes, **options})


@pytest.mark.parametrize(("naming", "block_norm"), [("timm", "pre"), ("xformers", "post")])
def test_there_and_back(naming, block_norm, tmp_path):
    module = make(block_norm)
    state = to_published(module, naming)
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {f"module.{n}": v for n, v in state.items()}, "args": argparse.Namespace(lr=1)}, path)
    again = build_published(open_published(path), generic(4), num_heads=4, decoder_heads=4)
    assert again.recipe.block_norm == block_norm and again.predictor.positions == 16
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in module.state_dict().items())
    batch = {"image": torch.randn(2, 4, 32, 32)}
    assert torch.equal(module.features(batch), again.features(batch))


def test_nothing_is_loaded_unless_everything_fits():
    module = make()
    state, before = to_published(module, "xformers"), {n: v.clone() for n, v in module.state_dict().items()}
    doubled = {n: v * 2 if v.is_floating_point() and "pos_embed" not in n else v for n, v in state.items()}
    for change, message in (
        ({"strange": torch.zeros(1)}, "unknown, first strange"),
        ({"cls_token": None}, "missing, first backbone.cls_token"),
        ({"mask_token": torch.zeros(1, 1, 8)}, r"decoder.mask_token is \[1, 1, 8\] there and \[1, 1, 32\] here"),
        ({"decoder_pos_embed": state["decoder_pos_embed"] + 0.1}, "sin-cos"),
        ({"encoder.encoders.0.wrap_att.sublayer.layer.in_proj_container.k_proj.bias": None}, "lacks"),
    ):
        changed = {n: v for n, v in {**doubled, **change}.items() if v is not None}
        with pytest.raises(UserError, match=message):
            load_published(module, changed)
        assert all(torch.equal(v, module.state_dict()[n]) for n, v in before.items())


def test_a_plain_mae_checkpoint_is_refused():
    state = {n: v for n, v in to_published(make()).items() if not n.startswith("predictor")}
    with pytest.raises(UserError, match="no published Cross-Scale MAE"):
        build_published(state)


@pytest.mark.parametrize(("given", "asked"), [({}, "num_heads"), ({"num_heads": 4}, "decoder_heads")])
def test_heads_of_a_width_that_was_not_published_must_be_given(given, asked):
    with pytest.raises(UserError, match=rf"no published model is (48|32) wide.*give {asked} "):
        build_published(to_published(make()), generic(4), **given)


def test_published_widths_have_their_heads():
    backbone = BackboneConfig("vit_tiny_patch8", dim=128, num_heads=4, depth=1, image_size=32)
    module = make(backbone=backbone, decoder_dim=256)
    again = build_published(to_published(module), generic(4), block_norm="post")
    heads = [blocks[0].attn.num_heads for blocks in (again.backbone.blocks, again.decoder.blocks)]
    assert heads == [8, 8]  # not one per 64 channels


def test_files_that_could_run_code_are_not_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return (print, ("ran",))

    torch.save({"model": Evil()}, tmp_path / "evil.pth")
    for path in (tmp_path / "evil.pth", tmp_path / "none.pth"):
        with pytest.raises(UserError, match=r"not opened|does not exist"):
            open_published(path)
