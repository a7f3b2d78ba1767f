"""The finite guard: nothing moves in a skipped step, on no process, under no method; it is told, saved and replayed."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from lightning.pytorch import Callback, Trainer

from xscale_lightning import cli
from xscale_lightning.callbacks.guard import FiniteGuard
from xscale_lightning.callbacks.guard_flags import peaks_of
from xscale_lightning.callbacks.probe import Measurement
from xscale_lightning.callbacks.replay import read_record, replay
from xscale_lightning.callbacks.spikes import SpikeDetector
from xscale_lightning.data.synthetic import SyntheticData
from xscale_lightning.errors import UserError
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import PAPER, S2MAE
from xscale_lightning.methods.spatial_affinity import SpatialAffinity
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig

TINY = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2)
SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
SPECTRAL = replace(
    PAPER, name="spectral_vit_tiny_cube3_patch8", depth=1, dim=16, num_heads=2, pad="edge", image_size=32
)
METHODS = {
    "mae": (MAE, {"backbone": TINY, **SMALL}),
    "cross_scale_mae": (CrossScaleMAE, {"backbone": TINY, "predictor_dim": 16, **SMALL}),
    "s2mae": (S2MAE, {"backbone": SPECTRAL, **SMALL}),
    "ijepa": (IJEPA, {"backbone": replace(TINY, class_token=False), "predictor": PredictorConfig(48, 1)}),
    "latent_mim": (
        LatentMIM,
        {"backbone": replace(TINY, position="stretched"), "head_dim": 32, "mask_ratio": 0.5, **SMALL},
    ),
    "spatial_affinity": (
        SpatialAffinity,
        {"host": "mae", "host_args": SMALL, "teacher": "own", "source": "interpolated", "backbone": TINY},
    ),
}


class Poison(Callback):
    """Makes the loss (or a gradient alone) of given batches NaN, and notes the whole state around every step."""

    def __init__(self, batches, where="loss") -> None:
        self.batches, self.where, self.states = set(batches), where, []

    def on_train_start(self, trainer, module) -> None:
        step = module.step

        def poisoned(batch):
            output = step(batch)
            bad = trainer.fit_loop.epoch_loop.total_batch_idx in self.batches
            if bad and self.where == "loss":
                output.loss = output.loss * math.nan
            return output

        module.step = poisoned
        self.note(trainer, module)

    def on_after_backward(self, trainer, module) -> None:
        if self.where == "gradient" and trainer.fit_loop.epoch_loop.total_batch_idx in self.batches:
            next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[0] = math.inf

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.note(trainer, module)

    def note(self, trainer, module) -> None:
        optimizer = trainer.optimizers[0].state_dict()["state"]
        self.states.append(copy.deepcopy((dict(module.state_dict()), optimizer)))


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    return all(same(x, y) for x, y in zip(a, b, strict=True)) if isinstance(a, (list, tuple)) else a == b


def train(tmp_path, method, poison, guard, steps=5, data=None, **options):
    data = data or SyntheticData(length=32, batch_size=4, num_workers=0, image_height=32, image_width=32)
    trainer = Trainer(
        max_steps=steps, accelerator="cpu", devices=1, enable_progress_bar=False, enable_model_summary=False,
        limit_val_batches=0, num_sanity_val_steps=0, default_root_dir=tmp_path, logger=options.pop("logger", False),
        enable_checkpointing=False, callbacks=[guard, poison], **options,
    )  # fmt: skip
    torch.manual_seed(0)
    cls, arguments = METHODS[method]
    module = cls(bands=data.bands, **{"optimizer": OptimizerConfig(lr=0.1), **arguments})
    trainer.fit(module, datamodule=data)
    assert all(p.isfinite().all() for p in module.state_dict().values())
    return trainer, module


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("where", ["loss", "gradient"])
def test_a_skipped_update_leaves_everything_as_it_was(tmp_path, method, where):
    poison, guard = Poison([2], where), FiniteGuard()
    trainer, module = train(tmp_path, method, poison, guard, gradient_clip_val=1.0)
    moved = [not same(a, b) for a, b in zip(poison.states, poison.states[1:], strict=False)]
    assert moved == [True, True, False, True, True]
    assert (guard.skipped, guard.in_row, guard.updates, trainer.global_step) == (1, 0, 4, 5)
    target = module.target_encoder
    if target is not None:
        assert target.moves == 4


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "options",
    [
        {"precision": "bf16-mixed"},
        {"precision": "16-mixed"},
        {"accumulate_grad_batches": 2},
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
        {"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"},
    ],
    ids=["bf16", "fp16", "accumulation", "accumulation_clipped_by_value", "clipped_by_value"],
)
def test_precisions_and_accumulation(tmp_path, options):
    steps = 3 if "accumulate_grad_batches" in options else 5
    poison, guard = Poison([2]), FiniteGuard()
    train(tmp_path, "mae", poison, guard, steps=steps, **options)
    moved = [not same(a, b) for a, b in zip(poison.states, poison.states[1:], strict=False)]
    if steps == 3:  # micro-batches 2 and 3 make the second update: it is not made
        assert moved == [False, True, False, False, False, True] and guard.skipped == 1
    else:
        assert not moved[2] and moved[0] and moved[-1] and guard.skipped == 1


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["sgd", "lars"])
def test_optimizers_that_know_no_flag(tmp_path, kind, monkeypatch):
    cls, arguments = METHODS["mae"]
    monkeypatch.setitem(METHODS, "mae", (cls, {**arguments, "optimizer": OptimizerConfig(lr=0.1, kind=kind)}))
    poison, guard = Poison([2]), FiniteGuard()
    train(tmp_path, "mae", poison, guard)
    moved = [not same(a, b) for a, b in zip(poison.states, poison.states[1:], strict=False)]
    assert moved == [True, True, False, True, True]


def test_the_run_stops_after_some_in_a_row_and_says_why(tmp_path):
    poison, guard = Poison(range(2, 9)), FiniteGuard(max_in_row=3)
    with pytest.raises(UserError) as caught:
        train(tmp_path, "mae", poison, guard, steps=8)
    text = str(caught.value)
    assert "3 updates in a row" in text and "at step 4" in text and "learning rate" in text and "precision 32" in text
    assert "0.0% of the input's pixels" in text and len(text.splitlines()) == 2
    assert same(poison.states[2], poison.states[-1])


def test_a_run_without_any_update_is_no_success(tmp_path):
    with pytest.raises(UserError, match="all 2 were skipped"):
        train(tmp_path, "mae", Poison(range(2)), FiniteGuard(), steps=2)


@pytest.mark.filterwarnings("ignore")
def test_the_batch_is_told_saved_and_replayed(tmp_path, caplog, capsys):
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path, name="run", version="0")
    trainer, module = train(tmp_path, "mae", Poison([1, 3]), FiniteGuard(keep=1), logger=logger, log_every_n_steps=1)
    files = sorted((tmp_path / "run" / "0" / "guard").iterdir())
    assert [f.name for f in files] == ["step_0000003.pt"]  # the newest stays
    assert "Skipped the update of step 1 (epoch 0, batch 1): the loss is nan." in caplog.text
    record = read_record(files[0])
    assert record["total_batch_idx"] == 3 and record["batch"]["image"].shape == (4, 13, 32, 32)
    result = replay(module, record)  # the poison is gone with the Trainer's own step count
    assert math.isnan(record["loss"]) and result.layer is None
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    assert cli.main(["doctor", "--replay", str(files[0]), "--ckpt_path", str(tmp_path / "after.ckpt")]) == 0
    assert "this step is finite with these weights" in capsys.readouterr().out
    assert cli.main(["doctor", "--replay", str(files[0])]) == 2  # without weights
    logged = tmp_path / "run" / "0" / "metrics.csv"
    logger.save()
    assert "guard/skipped" in logged.read_text()


def test_a_file_of_another_program_is_refused(tmp_path):
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="missing"):
        read_record(path)
    torch.save({"format": 3}, path)
    with pytest.raises(UserError, match="not written by"):
        read_record(path)
    torch.save({"format": "xscale guard 1", "batch": []}, path)
    with pytest.raises(UserError, match="'batch' is damaged"):
        read_record(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(UserError, match="is not opened"):
        read_record(path)


def test_its_state_travels_in_the_checkpoint(tmp_path):
    guard = FiniteGuard()
    guard.skipped, guard.in_row, guard.updates = 3, 2, 7
    guard.spikes.recall([1.0, 2.0])
    torch.save(guard.state_dict(), tmp_path / "s.pt")
    other = FiniteGuard()
    other.load_state_dict(torch.load(tmp_path / "s.pt", weights_only=True))
    assert other.state_dict() == guard.state_dict()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, -3e38, 2.0])
def test_the_largest_entry_of_every_gradient(dtype, value):
    gradients = [torch.linspace(-1, 1, 33, dtype=dtype), torch.zeros(3, 40, dtype=dtype), torch.ones((), dtype=dtype)]
    gradients[1][2, 7] = value
    peaks = peaks_of(gradients, torch.device("cpu"))
    wanted = torch.tensor([1.0, abs(gradients[1][2, 7].float()), 1.0])
    torch.testing.assert_close(peaks, wanted, equal_nan=True, rtol=0, atol=0)
    assert peaks_of([], torch.device("cpu")).shape == (0,)


def test_spikes_are_far_above_what_is_usual():
    detector = SpikeDetector(10.0)
    assert not any(detector.is_spike(1.0 + 0.01 * (i % 7)) for i in range(32))
    assert not detector.is_spike(1.5) and detector.is_spike(3.0) and not detector.is_spike(1.0)


def test_a_spike_and_a_collapse_are_told_once(tmp_path, recwarn):
    class Now:
        global_step = 0

    guard, now = FiniteGuard(), Now()
    for now.global_step, rank in ((0, 20.0), (10, 9.0), (20, 1.5), (30, 1.1)):
        guard.record_probe(now, Measurement({"geometry/rank": rank}, "val"))
    told = [str(w.message) for w in recwarn if "collapse" in str(w.message)]
    assert len(told) == 1 and "1.50 at step 20, 20.00 at step 0" in told[0] and "#the-features-collapse" in told[0]


@pytest.mark.parametrize("wrong", [{"max_in_row": 0}, {"keep": -1}, {"spike": math.nan}, {"collapse": 2.0}])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(UserError, match=f"guard.{next(iter(wrong))}"):
        FiniteGuard(**wrong)


def test_a_large_gradient_is_finite_though_its_squares_overflow() -> None:
    huge, small = torch.full((3, 5), 1e30), torch.tensor([3.0, -4.0])
    sound = peaks_of([huge, small], torch.device("cpu"))
    assert sound.isfinite().all() and sound[0] >= 1e30 and sound[1] >= 4
    broken = [small, torch.tensor([math.nan, 1.0]), huge, torch.tensor([[-math.inf]])]
    assert peaks_of(broken, torch.device("cpu")).isfinite().tolist() == [True, False, True, False]
