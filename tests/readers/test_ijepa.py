"""Published I-JEPA checkpoints: there and back, through a file as published, and what does not fit."""

import pytest
import torch

from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.registry import BackboneConfig, create_backbone
from xscale_lightning.readers.common import open_published
from xscale_lightning.readers.ijepa import build_published, load_encoder, load_published, to_published

SIZES = {"dim": 48, "depth": 2, "num_heads": 3, "patch_size": 8, "class_token": False}


def make(**options) -> IJEPA:
    torch.manual_seed(0)
    model = IJEPA(bands=generic(5), backbone=BackboneConfig(**SIZES), predictor=PredictorConfig(24, 3), **options)
    for p in model.target.parameters():
        p.data.add_(0.1)
    return model


def test_there_and_back_through_a_published_file(tmp_path):
    module = make()
    state = to_published(module, 6)
    networks: dict = {"epoch": 300, "loss": 0.2, "opt": {"state": {}, "param_groups": []}, "scaler": {"scale": 1.0}}
    for name, value in state.items():
        network, _, rest = name.partition(".")
        networks.setdefault(network, {})[f"module.{rest}"] = value
    torch.save(networks, tmp_path / "jepa-latest.pth.tar")
    opened = open_published(tmp_path / "jepa-latest.pth.tar")
    assert opened.keys() == state.keys()
    again = build_published(opened, num_heads=3)
    assert again.state_dict().keys() == module.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in module.state_dict().items())
    batch = {"image": torch.rand(2, 5, 32, 48)}
    assert torch.equal(module.features(batch), again.features(batch))


def test_names_are_the_published_ones():
    state = to_published(make(), 6)
    assert state["encoder.pos_embed"].shape == (1, 36, 48) and state["predictor.predictor_pos_embed"].shape == (
        1,
        36,
        24,
    )
    for name in ("encoder.patch_embed.proj.weight", "target_encoder.blocks.1.attn.qkv.bias", "predictor.mask_token"):
        assert name in state
    assert "predictor.predictor_blocks.2.mlp.fc2.weight" in state and "predictor.predictor_proj.bias" in state


@pytest.mark.parametrize("network", ["encoder", "target_encoder"])
def test_one_encoder_alone(network):
    module = make()
    encoder = create_backbone("vit_tiny_patch8", 5, **SIZES)
    load_encoder(encoder, to_published(module, 6), network)
    source = module.backbone if network == "encoder" else module.target.module
    images = torch.rand(2, 5, 24, 24)
    assert torch.equal(encoder(images).x, source(images).x)


def test_what_does_not_fit_is_refused_whole():
    module, state = make(), to_published(make(), 6)
    before = {n: v.clone() for n, v in module.state_dict().items()}
    changed = dict(state)
    changed["encoder.pos_embed"] = state["encoder.pos_embed"].roll(1, 1)
    for wrong, message in (
        (changed, "encoder.pos_embed is not the fixed sin-cos table"),
        ({n: v for n, v in state.items() if n != "predictor.mask_token"}, "1 missing, first predictor.mask_token"),
        ({**state, "encoder.cls_token": torch.zeros(1, 1, 48)}, "1 unknown, first encoder.cls_token"),
        ({**state, "encoder.norm.bias": torch.zeros(7)}, r"backbone.norm.bias is \[7\] there and \[48\] here"),
    ):
        with pytest.raises(UserError, match=message):
            load_published(module, wrong)
    assert all(torch.equal(v, before[n]) for n, v in module.state_dict().items())
    with pytest.raises(UserError, match=r"no pretraining checkpoint of I-JEPA: it lacks .encoder\.patch_embed"):
        build_published({"cls_token": torch.zeros(1)})


def test_widths_of_the_mlps_are_those_of_the_file():
    """The giant encoder's are 48 / 11 times its width, its predictor's 4 times; 122 / 28 * 28 is just below 122."""
    torch.manual_seed(0)
    backbone = BackboneConfig(**{**SIZES, "dim": 28, "num_heads": 2, "mlp_ratio": 122.5 / 28})
    state = to_published(IJEPA(bands=generic(5), backbone=backbone, predictor=PredictorConfig(24, 1)), 6)
    assert len(state["encoder.blocks.0.mlp.fc1.bias"]) == 122
    assert len(state["predictor.predictor_blocks.0.mlp.fc1.bias"]) == 96
    again = build_published(state, num_heads=2)
    assert all(torch.equal(value, state[name]) for name, value in to_published(again, 6).items())
