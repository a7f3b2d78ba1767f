"""`SSLModule` through a real Trainer: what every method inherits."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from xscale_lightning.data.bands import BandSelection, generic
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.data.synthetic import SyntheticData
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError, describe
from xscale_lightning.methods.base import SSLModule, StepOutput
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import S2MAE
from xscale_lightning.models.attention import choose_backend
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig
from xscale_lightning.schedules import Schedule

SMALL = BackboneConfig("vit_tiny_patch8", depth=1)
STILL = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, rot90=False)
RGB = BandSelection("sentinel2_rgb")


@pytest.fixture(autouse=True)
def seed(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")


class Distilled(SSLModule):
    """Least code that uses a target network and a declared float; its loss becomes infinite when told so."""

    def __init__(self, momentum: float = 0.9, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.head = nn.Linear(self.backbone.num_features, 4)
        self.target = self.make_target(self.head, Schedule("linear", momentum, 1.0))
        self.declare("temperature", Schedule("cosine", 0.04, 0.07))
        self.infinite_at: int | None = None

    def step(self, batch: dict) -> StepOutput:
        pooled = self.backbone.pool(self.backbone(batch["image"]))
        loss = (self.head(pooled) - self.target(pooled.detach()) - self.value("temperature")).square().mean()
        if self.infinite_at is not None and self.trainer.fit_loop.epoch_loop.total_batch_idx == self.infinite_at:
            loss = loss * float("inf")
        return StepOutput(loss, {"distance": loss})


class Recorder(Callback):
    """What every batch and every optimizer step did."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.targets: list[Tensor] = []
        self.students: list[Tensor] = []
        self.settings: list[tuple[float, ...]] = []
        self.logged: list[dict[str, float]] = []
        self.micro: list[bool] = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.losses.append(outputs["loss"].item())
        group = trainer.optimizers[0].param_groups
        self.settings.append((trainer.global_step, *(g["lr"] for g in group), *(g["weight_decay"] for g in group)))
        self.logged.append({k: float(v) for k, v in trainer.logged_metrics.items()})
        if isinstance(pl_module, Distilled):
            self.targets.append(pl_module.target.module.weight.clone())
            self.students.append(pl_module.head.weight.detach().clone())


def fit(module: SSLModule, *callbacks: Callback, data: Any = None, **options: Any) -> Recorder:
    data = data or SyntheticData(RGB, 16, 16, length=16, batch_size=4)
    recorder, ckpt_path = Recorder(), options.pop("ckpt_path", None)
    if not {"max_steps", "max_epochs"} & set(options):
        options["max_epochs"] = 1
    quiet = ("enable_checkpointing", "enable_progress_bar", "enable_model_summary", "logger")
    trainer = Trainer(
        **{"accelerator": "cpu", "devices": 1, "limit_val_batches": 0, "log_every_n_steps": 1, **options},
        callbacks=[*callbacks, recorder],
        **dict.fromkeys(quiet, False),
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return recorder


def make(cls: type[SSLModule] = Distilled, bands: BandSelection = RGB, **options: Any) -> Any:
    torch.manual_seed(0)
    defaults = {"backbone": SMALL, "views": STILL, "optimizer": OptimizerConfig(lr=0.1, warmup_epochs=0.5)}
    return cls(bands=bands.resolve(), **{**defaults, **options})


def small_mae(**options: Any) -> MAE:
    return make(MAE, decoder_dim=16, decoder_depth=1, decoder_heads=2, **options)


# ---- targets and schedules ----------------------------------------------------------------------------------------


def test_the_target_moves_once_per_optimizer_step_after_it():
    module = make()
    before = module.target.module.weight.clone()
    log = fit(module, data=SyntheticData(RGB, 16, 16, length=32, batch_size=4), accumulate_grad_batches=4)
    assert [row[0] for row in log.settings] == [0, 0, 0, 1, 1, 1, 1, 2]
    assert all(torch.equal(target, before) for target in log.targets[:3])
    expected = before
    for batch, step in ((3, 0), (7, 1)):
        momentum = 0.9 + 0.1 * step / 2
        expected = momentum * expected + (1 - momentum) * log.students[batch]
        torch.testing.assert_close(log.targets[batch], expected, rtol=1e-6, atol=1e-8)
    assert torch.equal(log.targets[3], log.targets[6]) and not torch.equal(log.targets[3], log.targets[7])


def test_a_step_that_the_gradient_scaler_skips_moves_no_target():
    module = make(optimizer=OptimizerConfig(lr=0.1))
    module.infinite_at = 1
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    log = fit(module, plugins=[MixedPrecision("16-mixed", "cpu", scaler)])
    assert not torch.equal(log.targets[0], log.targets[2]) and not torch.equal(log.students[0], log.students[2])
    assert torch.equal(log.students[0], log.students[1]), "the scaler was to skip this step"
    assert torch.equal(log.targets[0], log.targets[1])
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_optimizer_uses_the_plan_at_every_step(accumulate):
    config = OptimizerConfig(
        lr=0.2,
        warmup_lr=1e-4,
        min_lr=1e-3,
        warmup_epochs=0.5,
        weight_decay=0.1,
        final_weight_decay=0.3,
        layer_decay=0.5,
    )
    module = make(optimizer=config)
    data = SyntheticData(RGB, 16, 16, length=32, batch_size=4)
    log = fit(module, data=data, accumulate_grad_batches=accumulate, max_epochs=2)
    plan, groups = module.plan, module.trainer.optimizers[0].param_groups
    assert (plan.total_steps, plan.warmup_steps) == (16 // accumulate, 4 // accumulate)
    assert plan.peak_lr == pytest.approx(0.2 * 4 * accumulate / 256)
    assert len({group["lr_scale"] for group in groups}) == 3
    for step, *values in log.settings[accumulate - 1 :: accumulate]:
        lr = [plan.lr(step - 1) * group["lr_scale"] for group in groups]
        decay = [plan.weight_decay(step - 1) * group["decay"] for group in groups]
        assert values == pytest.approx(lr + decay, rel=1e-12)


def test_schedules_and_terms_are_logged():
    module = make(optimizer=OptimizerConfig(lr=0.2, warmup_epochs=0.5, weight_decay=0.1, final_weight_decay=0.3))
    log = fit(module)
    assert len(log.logged) == 4
    for step, row in enumerate(log.logged):
        assert row["schedule/lr"] == pytest.approx(module.plan.lr(step))
        assert row["schedule/weight_decay"] == pytest.approx(module.plan.weight_decay(step))
        assert row["schedule/ema_momentum"] == pytest.approx(0.9 + 0.1 * step / 4)
        assert row["schedule/temperature"] == pytest.approx(Schedule("cosine", 0.04, 0.07)(step, 4))
        assert row["train/loss"] == row["train/distance"] == pytest.approx(log.losses[step])


def test_the_resolved_learning_rate_is_said(caplog):
    with caplog.at_level("INFO"):
        fit(make(optimizer=OptimizerConfig(lr=0.32)), accumulate_grad_batches=2)
    assert "learning rate 0.32 x 8 / 256 = 0.01 (8 samples per step), 2 steps" in caplog.text
    backend, why = choose_backend(torch.device("cpu"), torch.float32)
    assert f"attention for whole images of 5 tokens: {backend} ({why})" in caplog.text


def test_max_steps_without_epochs_is_the_length_of_the_schedules():
    module = make(optimizer=OptimizerConfig(lr=0.1, warmup_epochs=1))
    log = fit(module, max_steps=6)
    assert [row[0] for row in log.settings] == [1, 2, 3, 4, 5, 6]
    assert (module.plan.total_steps, module.plan.warmup_steps) == (6, 4)


@pytest.mark.parametrize("options", [{"max_epochs": -1}, {"max_steps": -1, "max_epochs": -1}])
def test_a_run_without_end_is_refused(options):
    with pytest.raises(UserError, match=r"set trainer\.max_epochs or trainer\.max_steps"):
        fit(make(), **options)


# ---- the sealed way -----------------------------------------------------------------------------------------------


def test_features_of_raw_images_are_those_of_normalised_ones():
    bands = generic(3).with_statistics([10.0, 20.0, 30.0], [2.0, 4.0, 8.0])
    module = MAE(bands=bands, backbone=SMALL, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    module.train()
    raw = 20 + 5 * torch.randn(2, 3, 16, 24)
    normalised = torch.stack([(raw[:, c] - m) / s for c, (m, s) in enumerate(((10, 2), (20, 4), (30, 8)))], 1)
    tokens = module.backbone(normalised)
    batch = {"image": raw, "gsd": torch.full((2,), 10.0)}
    torch.testing.assert_close(module.features(batch), tokens.x[:, 1:].mean(1).detach(), rtol=1e-5, atol=1e-6)
    expected = tokens.x[:, 1:].detach().view(2, 2, 3, -1).permute(0, 3, 1, 2)
    torch.testing.assert_close(module.patch_features(batch), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(module.denormalise(normalised, raw), raw)
    assert module.training and module.backbone.blocks[0].training, "features left the module in another mode"
    assert not module.features(batch).requires_grad


def test_features_have_no_dropout_and_draw_nothing():
    module = make(
        MAE, backbone=BackboneConfig("vit_tiny_patch8", depth=3, drop_path=0.9), decoder_dim=16, decoder_heads=2
    )
    module.train()
    batch = {"image": torch.randn(4, 3, 16, 16), "gsd": torch.ones(4)}
    state = torch.get_rng_state()
    assert torch.equal(module.features(batch), module.features(batch))
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluation_is_seeded_and_leaves_no_trace():
    module = small_mae()
    module.train()
    batch = {"image": torch.randn(4, 3, 16, 16), "gsd": torch.ones(4)}
    state = torch.get_rng_state()
    first, same, other = (module.evaluate(batch, seed=s).loss for s in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other) and not first.requires_grad
    assert torch.equal(torch.get_rng_state(), state) and module.training
    assert all(p.grad is None for p in module.parameters())


def test_a_batch_with_other_bands_is_refused():
    with pytest.raises(UserError, match=r"the batch has 4 bands and the model was made for 3 \(B04, B03, B02\)"):
        small_mae().features({"image": torch.zeros(1, 4, 16, 16)})


class Spoiled(SyntheticData):
    """Synthetic images times `factor`, or with one value that is not a number."""

    def __init__(self, factor: float, **kwargs: Any) -> None:
        super().__init__(RGB, 16, 16, length=8, batch_size=4, **kwargs)
        self.factor = factor

    def on_after_batch_transfer(self, batch, dataloader_idx):
        if self.factor == self.factor:
            return {**batch, "image": batch["image"] * self.factor}
        image = batch["image"].clone()
        image[0, 1, 3, 3] = self.factor
        return {**batch, "image": image}


@pytest.mark.parametrize("factor", [1.0, 1.2])
def test_statistics_that_fit_are_not_complained_about(factor):
    assert len(fit(small_mae(), data=Spoiled(factor)).losses) == 2


@pytest.mark.parametrize(
    ("factor", "message"),
    [
        (100.0, r"mean [\d.]+ and std [\d.]+ of band B04 do not fit the data[\s\S]*set data\.bands\.mean"),
        (1e-4, r"of band B04 do not fit the data"),
        (float("nan"), r"band B03 of the first batch has values that are not finite"),
    ],
)
def test_statistics_that_cannot_fit_stop_the_first_batch(factor, message):
    with pytest.raises(UserError, match=message) as error:
        fit(small_mae(), data=Spoiled(factor))
    assert len(str(error.value).splitlines()) <= 2


def test_byte_statistics_on_sixteen_bit_data_stop_the_run():
    byte = generic(3).with_statistics([110.0, 113.0, 104.0], [51.0, 50.0, 51.0])
    module = MAE(bands=byte, backbone=SMALL, views=STILL, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    sixteen_bit = {"image": 2000 + 800 * torch.randn(4, 3, 16, 16), "gsd": torch.ones(4)}
    with pytest.raises(UserError, match=r"mean 110 and std 51 of band"):
        module.prepare(sixteen_bit, augment=True)
    module.prepare({"image": 110 + 50 * torch.randn(4, 3, 16, 16), "gsd": torch.ones(4)}, augment=True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            lambda: SyntheticData(BandSelection("sentinel2_rgb", ["B02", "B03"]), 16, 16, batch_size=4),
            "the model's bands are not",
        ),
        (
            lambda: SyntheticData(BandSelection("naip", ["R", "G", "B"]), 16, 16, batch_size=4),
            "the model's bands are not",
        ),
        (lambda: SyntheticData(RGB, 20, 16, batch_size=4), "patch size 8 does not divide the image of 20 x 16"),
    ],
)
def test_data_the_model_cannot_take_is_refused_before_the_first_batch(data, message):
    with pytest.raises(UserError, match=message):
        fit(small_mae(), data=data())


@pytest.mark.parametrize("method", [MAE, S2MAE])
def test_the_size_of_validation_images_is_checked_beside_that_of_the_views(method):
    cubes = method is S2MAE
    name = "spectral_vit_tiny_cube3_patch8" if cubes else "vit_tiny_patch8"
    backbone = BackboneConfig(name, depth=1, dim=24, num_heads=2, image_size=32, class_token=not cubes)
    sizes: dict[str, Any] = {"decoder_dim": 24, "decoder_depth": 1, "decoder_heads": 2, "mask_ratio": 0.5}
    module = method(backbone=backbone, views=Views(size=32), **sizes)
    for side in (36, (36, 36)):
        with pytest.raises(
            UserError, match=r"data.image_size 36 x 36, .*views.size 32: .*\npatch size 8 does not"
        ) as e:
            module.check_data(SimpleNamespace(image_size=side), fitting=True)
        assert describe(e.value) == str(e.value)  # what the command line says
    with pytest.raises(UserError, match="patch size 8 does not divide the image of 36 x 36"):
        module.check_data(SimpleNamespace(image_size=36), fitting=False)
    for side in (32, 40, (0, 0)):  # the last: not known before the data is downloaded
        module.check_data(SimpleNamespace(image_size=side), fitting=True)
        assert module.num_tokens == 16 + (not cubes)  # of the views
    with pytest.raises(UserError, match="has none to hide"):
        module.check_data(SimpleNamespace(image_size=8), fitting=True)


# ---- cost, determinism, checkpoint --------------------------------------------------------------------------------


def analytic_flops(module: MAE, batch: int, size: int) -> float:
    """Matrix products of MAE, forward: 2 per multiply-add; the backward pass costs twice that of the forward."""

    def transformer(length: int, dim: int, depth: int) -> float:
        return depth * (2 * length * 12 * dim**2 + 4 * length**2 * dim)

    dim, patch, bands = module.backbone.num_features, 8, len(module.bands)
    total = (size // patch) ** 2
    seen = int(total * 0.25)
    width, values = module.decoder.embed.out_features, patch**2 * bands
    encoder = 2 * seen * values * dim + transformer(seen + 1, dim, len(module.backbone.blocks))
    decoder = 2 * (seen + 1) * dim * width + transformer(total + 1, width, len(module.decoder.blocks))
    return 3 * batch * (encoder + decoder + 2 * (total - seen) * width * values)


def test_flops_agree_with_a_count_by_hand_and_leave_no_trace():
    module = make(
        MAE, backbone=BackboneConfig("vit_tiny_patch8", depth=2), decoder_dim=64, decoder_depth=2, decoder_heads=4
    )
    assert module.flops_per_batch == 0
    fit(module, data=SyntheticData(RGB, 64, 64, length=4, batch_size=4))
    module.train()
    for p in module.parameters():
        p.grad = torch.ones_like(p)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    buffers, rng = [b.clone() for b in module.buffers()], torch.get_rng_state()
    backends = [layer.backend for layer in module.modules() if hasattr(layer, "backend")]
    assert module.flops_per_batch == pytest.approx(analytic_flops(module, 4, 64), rel=0.1)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert all(torch.equal(a, b) for a, b in zip(buffers, module.buffers(), strict=True))
    assert all(bool((p.grad == 1).all()) for p in module.parameters())
    assert torch.equal(torch.get_rng_state(), rng) and module.training
    assert [layer.backend for layer in module.modules() if hasattr(layer, "backend")] == backends


class Gambler(Callback):
    """A callback of somebody who draws random numbers wherever Lightning lets them."""

    def draw(self, *_: Any, **__: Any) -> None:
        torch.rand(7)

    on_train_start = on_train_epoch_start = on_train_batch_start = on_train_batch_end = on_train_epoch_end = draw


def test_a_run_is_a_function_of_its_seed():
    def losses(*callbacks: Callback) -> list[float]:
        torch.manual_seed(11)
        return fit(small_mae(views=Views()), *callbacks, max_epochs=2).losses

    first = losses()
    assert len(set(first)) == 8
    assert losses() == first
    os.environ["PL_GLOBAL_SEED"] = "1"
    assert losses() != first


def test_a_callback_that_draws_random_numbers_changes_no_loss():
    """Two epochs: the shuffling of the second must not depend on what others have drawn in the first."""

    def losses(*callbacks: Callback) -> list[float]:
        torch.manual_seed(11)
        return fit(small_mae(views=Views()), *callbacks, max_epochs=2).losses

    assert losses(Gambler()) == losses()


def test_random_draws_differ_between_batches():
    class Draws(MAE):
        drawn: list[float]

        def step(self, batch: dict) -> StepOutput:
            self.drawn.append(torch.rand(()).item())
            return super().step(batch)

    module = make(Draws, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    module.drawn = []
    fit(module, max_epochs=2, accumulate_grad_batches=2)
    assert len(set(module.drawn)) == 8


def test_the_checkpoint_is_plain_and_says_what_it_is(tmp_path):
    module = small_mae(mask_ratio=0.5)
    fit(module)
    module.trainer.save_checkpoint(tmp_path / "x.ckpt")
    checkpoint = torch.load(tmp_path / "x.ckpt", weights_only=True)
    saved = checkpoint["xscale"]
    assert saved["class_path"] == "xscale_lightning.methods.mae.MAE" and saved["format"] == 1
    assert saved["init_args"]["mask_ratio"] == 0.5 and saved["init_args"]["backbone"]["depth"] == 1
    assert [band["name"] for band in saved["bands"]["bands"]] == ["B04", "B03", "B02"]
    assert set(saved["versions"]) == {"xscale_lightning", "torch"}

    def types(value: Any) -> set[type]:
        if isinstance(value, dict):
            return {dict} | {t for item in value.values() for t in types(item)} | {type(key) for key in value}
        if isinstance(value, (list, tuple)):
            return {type(value)} | {t for item in value for t in types(item)}
        return {type(value)}

    assert types(saved) <= {dict, list, str, int, float, bool, type(None)}
    assert set(checkpoint["state_dict"]) == {name for name, _ in module.named_parameters()}


class Seen(Callback):
    """Which images every epoch saw, by their sum; optionally a checkpoint after the first epoch."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.sums: dict[int, list[float]] = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.sums.setdefault(trainer.current_epoch, []).append(batch["image"].double().sum().item())

    def on_train_epoch_end(self, trainer, pl_module):
        if self.path and trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("kind", [SyntheticData, SampleScene])
def test_a_resumed_run_sees_the_images_of_the_run_that_never_stopped(kind, workers, tmp_path):
    """Also with worker processes, which read ahead before a resumed run knows its epoch."""
    size = {"image_height": 16, "image_width": 16, "length": 12}
    if kind is SampleScene:
        size = {"image_size": 16, "samples_per_epoch": 12}

    def run(path: Path | None = None, **options: Any) -> dict[int, list[float]]:
        torch.manual_seed(7)
        seen, data = Seen(path), kind(RGB, batch_size=4, num_workers=workers, **size)
        fit(small_mae(), seen, data=data, max_epochs=3, **options)
        return seen.sums

    straight = run(tmp_path / "first.ckpt")
    resumed = run(ckpt_path=tmp_path / "first.ckpt")
    assert resumed == {epoch: straight[epoch] for epoch in (1, 2)}
    assert straight[0] != straight[1] != straight[2]
