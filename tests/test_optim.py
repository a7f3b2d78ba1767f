import pytest
import torch
from torch import nn

from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig, Plan, apply_plan, build_adamw, build_optimizer, parameter_groups
from xscale_lightning.schedules import cosine


@pytest.fixture(scope="module")
def mae() -> MAE:
    backbone = BackboneConfig("vit_tiny_patch8", depth=3, position="learned", image_size=32)
    return MAE(bands=generic(2), backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)


def settings_of(groups: list[dict]) -> dict[str, tuple[bool, float]]:
    return {name: (group["decay"], group["lr_scale"]) for group in groups for name in group["names"]}


def test_every_trainable_parameter_is_in_one_group(mae):
    groups = parameter_groups(mae)
    grouped = [p for group in groups for p in group["params"]]
    assert {id(p) for p in grouped} == {id(p) for p in mae.parameters()}
    assert len(grouped) == len(list(mae.parameters())) and len(groups) == 2
    for group in groups:
        assert [id(dict(mae.named_parameters())[name]) for name in group["names"]] == [id(p) for p in group["params"]]


def test_vectors_are_not_decayed_and_tokens_and_tables_are(mae):
    settings = settings_of(parameter_groups(mae))
    for name, parameter in mae.named_parameters():
        assert settings[name] == (parameter.ndim > 1, 1.0), name
    for name in (
        "backbone.cls_token",
        "decoder.mask_token",
        "backbone.positions.table",
        "backbone.patch_embed.proj.weight",
    ):
        assert settings[name][0], name
    for name in ("backbone.norm.weight", "backbone.blocks.0.attn.qkv.bias", "decoder.pred.bias"):
        assert not settings[name][0], name


def test_frozen_parameters_are_left_out():
    layer = nn.Linear(3, 3)
    layer.weight.requires_grad_(False)
    assert settings_of(parameter_groups(layer)) == {"bias": (False, 1.0)}


def test_layer_decay_scales_by_depth(mae):
    settings = settings_of(parameter_groups(mae, 0.5, mae.backbone.layer_index, mae.backbone.depth))
    scale = {name: value for name, (_, value) in settings.items()}
    assert scale["backbone.cls_token"] == scale["backbone.patch_embed.proj.weight"] == 0.5**4
    assert scale["backbone.positions.table"] == 0.5**4
    assert [scale[f"backbone.blocks.{i}.mlp.fc1.weight"] for i in range(3)] == [0.5**3, 0.5**2, 0.5]
    assert (
        scale["backbone.norm.bias"] == scale["decoder.blocks.0.mlp.fc1.weight"] == scale["decoder.pred.weight"] == 1.0
    )


def test_learning_rate_is_per_256_samples():
    assert OptimizerConfig(lr=1.5e-4).resolve_lr(4096) == pytest.approx(2.4e-3)
    assert OptimizerConfig(lr=1.5e-4).resolve_lr(64) == pytest.approx(3.75e-5)
    assert OptimizerConfig(lr=1.5e-4, scale_lr=False).resolve_lr(4096) == 1.5e-4


def test_plan_gives_learning_rate_and_weight_decay_per_step():
    config = OptimizerConfig(warmup_lr=0.1, min_lr=0.2, weight_decay=0.04, final_weight_decay=0.4)
    plan = Plan(total_steps=20, warmup_steps=5, peak_lr=1.0, config=config)
    assert [plan.lr(step) for step in (0, 1, 5, 20)] == pytest.approx([0.1, 0.28, 1.0, 0.2])
    assert [plan.weight_decay(step) for step in (0, 10, 20)] == pytest.approx([0.04, 0.22, 0.4])
    assert plan.weight_decay(3) == cosine(3, 20, 0.04, 0.4)
    constant = Plan(20, 5, 1.0, OptimizerConfig(weight_decay=0.05))
    assert {constant.weight_decay(step) for step in range(21)} == {0.05}


def test_the_plan_reaches_every_group(mae):
    groups = parameter_groups(mae, 0.5, mae.backbone.layer_index, mae.backbone.depth)
    config = OptimizerConfig(weight_decay=0.1, beta1=0.8, beta2=0.9, eps=1e-6)
    optimizer = build_adamw(groups, config)
    apply_plan(optimizer, Plan(10, 0, 2.0, config), step=0)
    for group, ours in zip(optimizer.param_groups, groups, strict=True):
        assert group["lr"] == 2.0 * ours["lr_scale"]
        assert group["weight_decay"] == (0.1 if ours["decay"] else 0.0)
        assert (group["betas"], group["eps"]) == ((0.8, 0.9), 1e-6)


def test_one_step_is_that_of_adamw_by_hand():
    layer = nn.Linear(2, 1).double()
    before = {name: p.detach().clone() for name, p in layer.named_parameters()}
    config = OptimizerConfig(weight_decay=0.1)
    optimizer = build_adamw(parameter_groups(layer), config)
    apply_plan(optimizer, Plan(10, 0, 0.01, config), step=0)
    layer(torch.tensor([[1.0, -2.0]], dtype=torch.float64)).sum().backward()
    optimizer.step()
    for name, p in layer.named_parameters():
        decay = 0.1 if name == "weight" else 0.0
        expected = before[name] * (1 - 0.01 * decay) - 0.01 * p.grad / (p.grad.abs() + 1e-8)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("lr", -1e-3),
        ("lr", float("inf")),
        ("lr", float("nan")),
        ("weight_decay", -0.1),
        ("beta1", 1.0),
        ("beta2", -0.5),
        ("min_lr", -1.0),
        ("warmup_lr", -1.0),
        ("warmup_epochs", -1.0),
        ("layer_decay", 0.0),
        ("layer_decay", 1.5),
        ("eps", -1e-8),
        ("final_weight_decay", -0.1),
        ("min_lr", float("nan")),
    ],
)
def test_values_that_cannot_train_are_named(name, value):
    with pytest.raises(UserError, match=rf"optimizer\.{name} must .*, got {value}"):
        OptimizerConfig(**{name: value})


def test_a_floor_is_a_share_of_the_peak():
    plan = Plan(100, 20, 0.8, OptimizerConfig(floor=0.25, min_lr=0.1, warmup_lr=0.3))
    assert plan.lr(0) == pytest.approx(0.3) and plan.lr(20) == pytest.approx(0.8) and plan.lr(100) == pytest.approx(0.2)
    assert Plan(100, 20, 0.8, OptimizerConfig(floor=0.25)).lr(0) == pytest.approx(0.2)
    with pytest.raises(UserError, match=r"optimizer\.floor must be in \[0, 1\], got 1.5"):
        OptimizerConfig(floor=1.5)


def test_parameters_named_by_a_method_are_not_decayed(mae):
    settings = settings_of(parameter_groups(mae, undecayed=("embed", "token")))
    for name in ("backbone.patch_embed.proj.weight", "decoder.embed.weight", "decoder.mask_token"):
        assert not settings[name][0]
    assert settings["decoder.pred.weight"][0]


def test_a_decay_per_epoch_takes_the_cosines_place():
    plan = Plan(100, 4, 1.0, OptimizerConfig(epoch_decay=0.5, min_lr=0.1), steps_per_epoch=10)
    assert [plan.lr(step) for step in (2, 4, 13, 14, 24, 99)] == pytest.approx([0.5, 1.0, 1.0, 0.5, 0.25, 0.1])
    with pytest.raises(UserError, match=r"optimizer\.epoch_decay must be in \(0, 1\], got 0"):
        OptimizerConfig(epoch_decay=0.0)


@pytest.mark.parametrize(("kind", "name"), [("adamw", "AdamW"), ("sgd", "SGD"), ("lars", "Lars")])
def test_kinds_of_optimizers_take_the_plan(kind, name):
    layer = nn.Linear(2, 1)
    config = OptimizerConfig(kind=kind, beta1=0.8, weight_decay=0.1)
    optimizer = build_optimizer(parameter_groups(layer), config)
    assert type(optimizer).__name__ == name
    apply_plan(optimizer, Plan(10, 0, 0.5, config), step=0)
    assert {group["lr"] for group in optimizer.param_groups} == {0.5}
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1]
    assert kind == "adamw" or optimizer.param_groups[0]["momentum"] == 0.8
    before = layer.weight.detach().clone()
    layer(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(before, layer.weight)
