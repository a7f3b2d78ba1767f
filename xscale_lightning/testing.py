"""The contract suite: what every method, ours or a plug-in's, must do. Call `check_method(MyMethod)` in a test.

Each check is a function of its own, so a failing one can be called alone.
"""

import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.data import DataLoader

from xscale_lightning import checkpoints
from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.data.datamodule import Collate
from xscale_lightning.data.synthetic import SyntheticDataset
from xscale_lightning.data.views import Views
from xscale_lightning.methods.base import Batch, SSLModule
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig

Make = Callable[[Bands], SSLModule]
NO_VIEWS = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, rot90=False)


def check_method(cls: type[SSLModule], size: tuple[int, int] = (32, 48), **options: Any) -> None:
    """Run every check on `cls`.

    Args:
        cls: the method.
        size: (height, width) of the test images; not square on purpose.
        **options: constructor arguments; the default is a two-block `vit_tiny_patch8` without augmentation.

    Raises:
        AssertionError: the first contract that does not hold, in words.
    """

    def make(bands: Bands) -> SSLModule:
        torch.manual_seed(0)
        small = {"backbone": BackboneConfig("vit_tiny_patch8", depth=2), "views": NO_VIEWS}
        return cls(bands=bands, **{**small, "optimizer": OptimizerConfig(lr=1e-3, warmup_epochs=0.5), **options})

    for check in (
        check_gradients_reach_everything,
        check_seeded,
        check_band_counts,
        check_precisions,
        check_accumulation_gradients,
        check_accumulation_schedules,
        check_save_and_load,
        check_resume,
    ):
        check(make, size)


def make_batch(bands: Bands, size: tuple[int, int], count: int, start: int = 0) -> Batch:
    """`count` synthetic samples in the raw units of `bands`: `image [count, C, H, W]`, `gsd`, `label`."""
    data = _dataset(bands, size, start + count)
    return Collate(10.0)([data[i] for i in range(start, start + count)])


def check_gradients_reach_everything(make: Make, size: tuple[int, int]) -> None:
    """Every trainable parameter gets a gradient, so DDP needs no search for unused ones."""
    module = make(generic(3))
    module.train()
    module.step(module.prepare(make_batch(module.bands, size, 4))).loss.backward()
    without = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    assert not without, f"no gradient reaches {without}: use these parameters or freeze them (requires_grad_(False))."


def check_seeded(make: Make, size: tuple[int, int]) -> None:
    """The same seed gives the same loss."""
    module = make(generic(3))
    batch = make_batch(module.bands, size, 4)
    losses = [module.evaluate(batch, seed=s).loss.item() for s in (1, 1)]
    assert losses[0] == losses[1], f"the same seed gave losses {losses}: draw from torch's global generator only."


def check_band_counts(make: Make, size: tuple[int, int]) -> None:
    """1, 3, 4 and 13 bands, on images that are not square; features and maps have the documented shapes."""
    for count in (1, 3, 4, 13):
        module = make(generic(count))
        batch = make_batch(module.bands, size, 2)
        loss = module.evaluate(batch, seed=0).loss
        assert loss.ndim == 0 and loss.isfinite(), f"{count} bands gave the loss {loss}."
        vectors, maps = module.features(batch), module.patch_features(batch)
        assert vectors.shape[0] == 2 and vectors.ndim == 2, f"features are {list(vectors.shape)}, not [B, D]."
        assert vectors.dtype == torch.float32 and bool(vectors.isfinite().all()), "features must be finite float32."
        assert maps.ndim == 4, f"patch_features are {list(maps.shape)}, not [B, D, h, w]."
        assert maps.shape[2] * size[1] == maps.shape[3] * size[0], f"map {list(maps.shape)} has another aspect: {size}."


def check_precisions(make: Make, size: tuple[int, int]) -> None:
    """Float32, float64 and bfloat16 autocast give finite losses and gradients that agree within rounding."""
    losses = []
    for name in ("float64", "float32", "bf16"):
        module = make(generic(3))
        if name == "float64":
            module.double()
        module.train()
        batch = make_batch(module.bands, size, 4)
        torch.manual_seed(5)
        noise = _PerSampleNoise(0)  # the same draws in every precision
        with noise, torch.autocast("cpu", torch.bfloat16, enabled=name == "bf16"):
            loss = module.step(module.prepare(batch)).loss
        loss.backward()
        bad = [n for n, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        assert loss.isfinite() and not bad, f"{name}: loss {loss.item()}, gradients not finite in {bad}."
        losses.append(loss.item())
    exact, single, half = losses
    assert abs(single - exact) <= 1e-4 * max(1, abs(exact)), f"float32 loss {single} is far from float64's {exact}."
    assert abs(half - exact) <= 0.05 * max(1, abs(exact)), f"bf16 loss {half} is far from float64's {exact}."


def check_accumulation_gradients(make: Make, size: tuple[int, int]) -> None:
    """One batch of 8 and four of 2 give the same gradient, for methods whose loss is a mean over samples."""
    module = make(generic(3)).double()
    if not module.sample_wise:
        return
    module.train()

    def gradients(count: int) -> list[Tensor]:
        module.zero_grad()
        for start in range(0, 8, count):
            batch = module.prepare(make_batch(module.bands, size, count, start))
            with _PerSampleNoise(start):
                (module.step(batch).loss * count / 8).backward()
        return [p.grad.clone() for p in module.parameters() if p.grad is not None]

    names = [n for n, p in module.named_parameters() if p.requires_grad]
    for name, whole, parts in zip(names, gradients(8), gradients(2), strict=True):
        worst = (whole - parts).abs().max().item()
        assert torch.allclose(whole, parts, rtol=1e-6, atol=1e-9), (
            f"accumulating 4 x 2 samples changes the gradient of {name} by {worst:.3g}: average over samples, or set "
            "sample_wise = False if the loss compares samples."
        )


def check_accumulation_schedules(make: Make, size: tuple[int, int]) -> None:
    """1 x 8 and 4 x 2 samples per step: same steps, learning rates, weight decays, declared floats, target moves."""
    whole, parts = (_train(make, size, batch_size=b, accumulate=a)[1].rows for b, a in ((8, 1), (2, 4)))
    assert whole == parts, f"gradient accumulation changes the schedules:\n{whole}\n{parts}"


def check_save_and_load(make: Make, size: tuple[int, int]) -> None:
    """A checkpoint rebuilt from the file alone gives the same features to the bit."""
    with tempfile.TemporaryDirectory() as folder:
        bands = generic(4).with_statistics([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0])
        module, _, trainer = _train(make, size, bands=bands)
        path = Path(folder) / "x.ckpt"
        trainer.save_checkpoint(path)
        batch = make_batch(bands, size, 4)
        again = checkpoints.load_method(path)
        assert torch.equal(again.features(batch), module.features(batch)), "features differ after save and load."


def check_resume(make: Make, size: tuple[int, int]) -> None:
    """Stopped after 3 of 6 steps and resumed: schedules, losses and weights of the run that never stopped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "half.ckpt"
        straight, log, _ = _train(make, size, save_at=(3, path))
        resumed, second, _ = _train(make, size, ckpt_path=path)
    assert log.rows[3:] == second.rows, f"schedules after resuming differ:\n{log.rows[3:]}\n{second.rows}"
    assert log.losses[3:] == second.losses, f"losses after resuming differ: {log.losses[3:]} and {second.losses}."
    pairs = zip(straight.state_dict().items(), resumed.state_dict().values(), strict=True)
    different = [name for (name, a), b in pairs if not torch.equal(a, b)]
    assert not different, f"weights after resuming differ: {different}."


class _Log(Callback):
    """What each optimizer step used, and optionally a checkpoint in the middle."""

    def __init__(self, save_at: tuple[int, Path] | None) -> None:
        self.rows: list[tuple] = []
        self.losses: list[float] = []
        self.save_at = save_at
        self.offset = 0

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, *_: Any) -> None:
        """Record after every real step."""
        if trainer.global_step == len(self.rows) + self.offset:
            return
        groups = trainer.optimizers[0].param_groups
        values = tuple(pl_module.value(name) for name in pl_module._schedules)
        moves = tuple(target.moves for _, target in pl_module._targets)
        taken = trainer.global_step - self.offset
        assert all(n == taken for n in moves), f"targets moved {moves} times in {taken} steps: leave it to the base."
        self.rows.append((trainer.global_step, *((g["lr"], g["weight_decay"]) for g in groups), *values))
        self.losses.append(outputs["loss"].item())
        if self.save_at and trainer.global_step == self.save_at[0]:
            trainer.save_checkpoint(self.save_at[1])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        """Count from the step that a resumed run starts at."""
        self.offset = trainer.global_step


def _train(
    make: Make,
    size: tuple[int, int],
    batch_size: int = 4,
    accumulate: int = 1,
    save_at: tuple[int, Path] | None = None,
    ckpt_path: Path | None = None,
    bands: Bands | None = None,
) -> tuple[SSLModule, _Log, Trainer]:
    """Train 6 optimizer steps in 2 epochs."""
    module, log = make(bands or generic(3)), _Log(save_at)
    data = _dataset(module.bands, size, 3 * batch_size * accumulate)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=1,
        logger=False,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[log],
    )
    loader = DataLoader(data, batch_size=batch_size, collate_fn=Collate(10.0))
    trainer.fit(module, loader, ckpt_path=ckpt_path)
    return module, log, trainer


def _dataset(bands: Bands, size: tuple[int, int], length: int) -> SyntheticDataset:
    return SyntheticDataset(torch.tensor(bands.means), torch.tensor(bands.stds), size, length, classes=4, seed=0)


class _PerSampleNoise(TorchFunctionMode, AbstractContextManager):
    """Makes random tensors depend on (number of the draw, sample), so a sample's draws are the same in any batch."""

    FUNCTIONS: ClassVar = {torch.rand, torch.randn, torch.rand_like, torch.randn_like}

    def __init__(self, start: int) -> None:
        super().__init__()
        self.start, self.draws = start, 0

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Replace uniform and normal draws; everything else passes."""
        out = func(*args, **(kwargs or {}))
        if func not in self.FUNCTIONS:
            return out
        self.draws += 1
        uniform = func in (torch.rand, torch.rand_like)
        for row, values in enumerate(out if out.ndim else out.unsqueeze(0)):
            seed = self.draws * 10_007 + (
                self.start + row if out.ndim else 0
            )  # one number for the batch is no sample's
            generator = torch.Generator(out.device).manual_seed(seed)
            single = torch.empty(values.shape, device=out.device)  # float32: each type has a stream of its own
            values.copy_(single.uniform_(generator=generator) if uniform else single.normal_(generator=generator))
        return out
