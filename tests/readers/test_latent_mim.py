"""Published LatentMIM checkpoints: there and back, strictly."""

import copy

import pytest
import torch

from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.readers.common import open_published
from xscale_lightning.readers.latent_mim import TABLE, build_published, load_published, to_published

SIZES = {"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": 4, "head_dim": 40, "head_layers": 2}
HEADS = {"num_heads": 3, "decoder_heads": 4}


def make(bands=3, position="stretched", **options) -> LatentMIM:
    torch.manual_seed(0)
    backbone = BackboneConfig("vit_tiny_patch8", dim=48, depth=2, num_heads=3, position=position)
    module = LatentMIM(bands=generic(bands), backbone=backbone, **{**SIZES, **options})
    for p in module.target.parameters():
        p.add_(0.1)  # not the student's
    return module


def test_there_and_back(tmp_path):
    module, path = make(), tmp_path / "checkpoint.pth"
    state = to_published(module, side=6)
    torch.save({"model": {f"module.{n}": v for n, v in state.items()}, "epoch": 799}, path)
    again, report = build_published(open_published(path), **HEADS)
    assert len(report.matched) == len(module.state_dict()) and not (report.missing or report.unexpected)
    assert all(torch.equal(a, again.state_dict()[n]) for n, a in module.state_dict().items())
    batch = {"image": torch.rand(2, 3, 40, 48)}
    assert torch.equal(module.features(batch), again.features(batch))
    assert module.evaluate(batch, 0).loss == again.evaluate(batch, 0).loss


def test_names_and_layout_are_the_published_ones():
    module = make(bands=4)
    state = to_published(module, side=6)
    assert state[f"encoder.{TABLE}"].shape == (37, 48) and state[f"decoder.{TABLE}"].shape == (37, 32)
    assert state[f"encoder.{TABLE}"][0].abs().sum() == 0
    patch = torch.randn(4, 8, 8)
    ours = module.backbone.patch_embed(patch[None])[0, 0]
    flat = patch.permute(1, 2, 0).flatten()  # row, column, channel
    theirs = state["encoder.embed.proj.weight"] @ flat + state["encoder.embed.proj.bias"]
    torch.testing.assert_close(ours, theirs)
    assert "target_encoder.head.linear1.weight" in state and "decoder.blocks.1.cross_attn.kv_proj.bias" in state
    again, _ = build_published(state, bands=generic(4), **HEADS)
    assert len(again.bands) == 4 and again.backbone.patch_size == 8
    with pytest.raises(UserError, match="patches have 256 values, no square of 3 bands"):
        build_published(state, **HEADS)


def test_the_teacher_of_spatial_affinity_is_read_too():
    module = make()
    teacher = copy.deepcopy(module.target.module)
    for p in teacher.parameters():
        p.add_(0.1)
    state = to_published(module, 6, teacher, 12)
    assert state[f"hr_gram_teacher.{TABLE}"].shape == (145, 48)
    with pytest.raises(UserError, match=r"unknown, first hr_gram_teacher\."):
        load_published(make(), state)
    other = make()
    mine = copy.deepcopy(other.target.module)
    load_published(other, state, mine)
    assert all(torch.equal(a, mine.state_dict()[n]) for n, a in teacher.state_dict().items())
    assert load_published(make(), state, strict=False).unexpected


def test_what_does_not_fit_is_refused_and_changes_nothing():
    module = make()
    before = {n: v.clone() for n, v in module.state_dict().items()}
    state = to_published(make(), side=6)
    for n, v in state.items():
        state[n] = v if TABLE in n else v + 1
    wrong = {
        "1 missing, first decoder.head.bias": {n: v for n, v in state.items() if n != "decoder.head.bias"},
        r"1 unknown, first encoder\.strange": {**state, "encoder.strange": torch.zeros(1)},
        r"1 unknown, first fc\.weight": {**state, "fc.weight": torch.zeros(1)},
        r"encoder\.pos_embed\.pos_embeds is not LatentMIM's fixed table": {
            **state,
            f"encoder.{TABLE}": torch.zeros(37, 48),
        },
        "1 of another shape, first decoder.embed.bias": {**state, "decoder.embed.bias": torch.zeros(31)},
    }
    for message, broken in wrong.items():
        with pytest.raises(UserError, match=message):
            load_published(module, broken)
    assert all(torch.equal(before[n], v) for n, v in module.state_dict().items())
    without = {n: v for n, v in state.items() if not n.startswith("target_encoder.")}
    report = load_published(module, without, strict=False)
    assert report.missing and all(n.startswith("target.") for n in report.missing)
    with pytest.raises(
        UserError, match=r"no pretraining checkpoint of LatentMIM: it lacks 'encoder.embed.proj.weight'"
    ):
        build_published({"cls_token": torch.zeros(1)})


def test_other_positions_have_no_published_counterpart():
    with pytest.raises(UserError, match=r"set backbone\.position to stretched"):
        to_published(make(position="sincos"))
    with pytest.raises(UserError, match=r"the module's is not|to stretched"):
        load_published(make(position="learned"), to_published(make(), 6))
