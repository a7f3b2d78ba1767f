"""SpectralGPT-style checkpoints: there and back, other sizes, and a report of every tensor."""

from dataclasses import replace

import pytest
import torch

from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.s2mae import PAPER, S2MAE
from xscale_lightning.models.pos_embed import resize_table
from xscale_lightning.readers.common import open_published
from xscale_lightning.readers.spectralgpt import build_published, load_published, to_published

SIZES = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4}


def make(bands: int = 12, **options) -> S2MAE:
    torch.manual_seed(0)
    backbone = replace(PAPER, dim=48, num_heads=4, depth=2, **{"image_size": 32, **options})
    return S2MAE(bands=generic(bands), backbone=backbone, **SIZES)


def test_there_and_back(tmp_path):
    module = make()
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {f"module.{n}": v for n, v in to_published(module).items()}, "epoch": 99}, path)
    again, report = build_published(open_published(path), num_heads=4, decoder_heads=4)
    assert len(again.bands) == 12 and not (report.missing or report.unexpected or report.resized)
    assert len(report.matched) == len(module.state_dict())
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in module.state_dict().items())
    batch = {"image": torch.rand(2, 12, 32, 32)}
    assert torch.equal(module.features(batch), again.features(batch))


@pytest.mark.parametrize(("size", "heads"), [("tiny", 3), ("small", 6), ("base", 12), ("large", 16), ("huge", 16)])
def test_heads_are_those_of_the_published_sizes(size, heads):
    with torch.device("meta"):
        module = S2MAE(bands=generic(12), backbone=replace(PAPER, name=f"spectral_vit_{size}_cube3_patch8", depth=1))
        state = to_published(module)
    built, _ = build_published({n: torch.zeros(v.shape) for n, v in state.items()})
    assert built.backbone.blocks[0].attn.num_heads == heads == module.backbone.blocks[0].attn.num_heads
    with pytest.raises(UserError, match=r"48 wide, which is no published size: give num_heads"):
        build_published(to_published(make()))


def test_every_norm_has_the_epsilon_asked_for():
    built, _ = build_published(to_published(make()), num_heads=4, decoder_heads=4, norm_eps=1e-5)
    norms = [m for m in built.modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 2 * 4 + 2 and {m.eps for m in norms} == {1e-5}


def test_names_are_the_published_ones():
    state = to_published(make())
    assert {n for n in state if "." not in n} == {
        *("pos_embed_spatial", "pos_embed_temporal", "mask_token"),
        *("decoder_pos_embed_spatial", "decoder_pos_embed_temporal"),
    }
    assert state["blocks.1.attn.k.weight"].shape == (48, 48) and state["patch_embed.proj.weight"].shape == (
        48,
        1,
        3,
        8,
        8,
    )
    qkv = make().state_dict()["backbone.blocks.1.attn.qkv.weight"]
    assert torch.equal(torch.cat([state[f"blocks.1.attn.{n}.weight"] for n in "qkv"]), qkv)


def test_other_sizes_are_resized_and_said():
    source, target = make(), make(bands=24, image_size=48)
    state = to_published(source)
    with pytest.raises(UserError, match=r"4 of another shape, first backbone.positions.spatial.table is"):
        load_published(target, state)
    report = load_published(target, state, tables="resize")
    assert len(report.resized) == 4 and "4 resized (backbone.positions" in str(report)
    expected = resize_table(state["pos_embed_spatial"], (4, 4), (6, 6))
    torch.testing.assert_close(target.backbone.positions.spatial.table.detach(), expected)
    assert torch.equal(target.backbone.positions.spectral.table[0, -1], state["pos_embed_temporal"][0, -1])
    built, report = build_published(state, generic(24), num_heads=4, decoder_heads=4)
    assert sorted(report.resized) == ["backbone.positions.spectral.table", "decoder.positions.spectral.table"]
    assert built.backbone.positions.spectral.table.shape == (1, 8, 48)


def test_an_encoder_alone_needs_leave():
    module, state = make(), to_published(make())
    encoder = {n: v * 2 for n, v in state.items() if not n.startswith(("decoder", "mask_token"))}
    encoder["head.weight"] = torch.zeros(10, 48)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    with pytest.raises(UserError, match=r"1 unknown, first head.weight; 3[0-9] missing, first decoder.mask_token"):
        load_published(module, encoder)
    assert all(torch.equal(v, module.state_dict()[n]) for n, v in before.items()), "half loaded"
    report = load_published(module, encoder, strict=False)
    assert report.unexpected == ["head.weight"] and all(n.startswith("decoder.") for n in report.missing)
    assert torch.equal(module.backbone.norm.weight, before["backbone.norm.weight"] * 2)
    assert torch.equal(module.decoder.norm.weight, before["decoder.norm.weight"])


def test_wrong_checkpoints():
    state = to_published(make())
    with pytest.raises(UserError, match="no pretraining checkpoint of SpectralGPT: it lacks 'pos_embed_temporal'"):
        build_published({n: v for n, v in state.items() if n != "pos_embed_temporal"})
    with pytest.raises(UserError, match=r"lacks 'blocks.0.attn.k.bias'"):
        load_published(make(), {n: v for n, v in state.items() if n != "blocks.0.attn.k.bias"})
    with pytest.raises(UserError, match=r"no counterpart of 'backbone.cls_token'"):
        to_published(make(class_token=True))
