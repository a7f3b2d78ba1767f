"""`SSLModule`: everything that self-supervised methods share, so that a method is one short file.

A method implements `step(batch) -> StepOutput`. The base owns the encoder and the band record, the sealed way
normalise -> (views) -> encode -> pool, the optimizer and all schedules, target networks (EMA), seeding, log names and
checkpoint metadata. Probes and pictures are callbacks; they never touch the loss or the step count.
"""

import math
import os
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from xscale_lightning import checkpoints
from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.data.views import Views
from xscale_lightning.ema import EMA
from xscale_lightning.errors import UserError
from xscale_lightning.methods.checks import check_statistics
from xscale_lightning.methods.output import Reconstruction, StepOutput
from xscale_lightning.models.attention import Backend, choose_backend, set_backend
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokenizers import check_divides
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.optim import OptimizerConfig, Plan, apply_plan, build_adamw, parameter_groups
from xscale_lightning.schedules import Schedule

__all__ = ["Reconstruction", "SSLModule", "StepOutput"]

Batch = dict[str, Any]


class SSLModule(LightningModule):
    """Base of all methods.

    Args:
        bands: record of the data's bands; on the command line it comes from the data module.
        backbone: the encoder.
        optimizer: AdamW and its schedules.
        views: augmentation of the training images, on the device.
        attention: attention backend of every layer; `auto` chooses by device, type and length.

    Attributes:
        backbone: the encoder.
        sample_wise: whether the loss of a batch is the mean of its samples' losses; contrastive methods say False, and
            the contract suite then does not expect gradient accumulation to give the same gradients.

    Raises:
        UserError: options that the backbone cannot have.
    """

    sample_wise = True
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        bands: Bands | None = None,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 (never changed; shown as default in --help)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        views: Views = Views(),  # noqa: B008
        attention: Backend = "auto",
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self._hparams = self._hparams_initial = checkpoints.plain_hparams(self.hparams)
        self.bands = bands or generic(3)
        self.views = views
        self.attention: Backend = attention
        self.optimizer_config = optimizer
        self.backbone_name = backbone.name
        self.backbone = backbone.build(len(self.bands))
        self.register_buffer("mean", torch.tensor(self.bands.means).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.bands.stds).view(1, -1, 1, 1), persistent=False)
        self.plan: Plan | None = None
        self._schedules: dict[str, Schedule] = {}
        self._targets: list[tuple[nn.Module, EMA]] = []
        self._first_batch_seen = False
        self._flops: tuple[Batch, int] | None = None

    # ---- what a method implements or uses -------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """One pass over a prepared batch (`image [B, C, H, W]` normalised and augmented, `gsd [B]`). Required."""
        raise TypeError(f"{type(self).__name__} must implement step(batch) -> StepOutput.")

    @property
    def feature_encoder(self) -> Any:
        """The encoder that `features` uses: the student; methods with a better target network return that."""
        return self.backbone

    def make_target(self, student: nn.Module, momentum: Schedule) -> EMA:
        """A target network that follows `student`; the base moves it after every real optimizer step."""
        target = EMA(student)
        self._targets.append((student, target))
        self.declare("ema_momentum", momentum)
        return target

    def declare(self, name: str, schedule: Schedule) -> None:
        """Declare a float that changes with the optimizer step; logged as `schedule/<name>`."""
        self._schedules[name] = schedule

    def value(self, name: str) -> float:
        """Present value of a declared float."""
        total = self.plan.total_steps if self.plan else 1
        return self._schedules[name](self._optimizer_step, total)

    # ---- the sealed way: normalise -> views -> encode -> pool ------------------------------------------------------

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """Copy of `batch` with its image normalised by the band record and, when asked, augmented by the views.

        Raises:
            UserError: the image has another number of bands than the record.
        """
        raw = batch["image"]
        if raw.shape[1] != len(self.bands):
            raise UserError(
                f"the batch has {raw.shape[1]} bands and the model was made for {len(self.bands)} "
                f"({', '.join(self.bands.names)}): choose the same bands for the data."
            )
        images = (raw.to(self.mean.dtype) - self.mean) / self.std
        if augment and not self._first_batch_seen:
            check_statistics(images, raw, self.bands)
            self._first_batch_seen = True
        prepared = {**batch, "image": images}
        if augment:
            gsd = batch.get("gsd", images.new_ones(len(images)))
            prepared["image"], prepared["gsd"] = self.views(images, gsd)
        return prepared

    def denormalise(self, images: Tensor) -> Tensor:
        """Normalised images `[B, C, H, W]` in raw sensor units."""
        return images * self.std + self.mean

    def encode(self, batch: Batch) -> Tokens:
        """Tokens of a raw batch, nothing masked."""
        prepared = self.prepare(batch)
        return self.feature_encoder(prepared["image"], gsd=prepared.get("gsd"))

    def features(self, batch: Batch) -> Tensor:
        """One vector per image of a raw batch: `[B, D]` float32, in evaluation mode and without gradients."""
        with _Evaluation(self):
            return self.backbone.pool(self.encode(batch)).float()

    def patch_features(self, batch: Batch) -> Tensor:
        """Feature map of a raw batch: `[B, D, h, w]` float32, in evaluation mode and without gradients."""
        with _Evaluation(self):
            return self.encode(batch).feature_map().float()

    def evaluate(self, batch: Batch, seed: int) -> StepOutput:
        """`step` on a raw batch without gradients and augmentation, with its own seed; training's draws stay as they are."""
        devices = [self.device] if self.device.type == "cuda" else []
        with _Evaluation(self), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self.step(self.prepare(batch))

    # ---- Lightning's hooks ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse data that the model cannot take, before the first batch."""
        set_backend(self, self.attention)
        data = getattr(self.trainer, "datamodule", None)
        if data is None:
            return
        difference = self.bands.difference(data.bands) if hasattr(data, "bands") else ""
        if difference:
            raise UserError(f"the model's bands are not the data's: {difference}. Give both the same data.bands.")
        size = self.views.size if stage == "fit" and self.views.size else getattr(data, "image_size", None)
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        if height and width:
            check_divides(self.backbone.patch_size, height, width)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One training batch; every random draw is a function of (seed, rank, number of the batch)."""
        self._seed(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        prepared = self.prepare(batch, augment=True)
        output = self.step(prepared)
        if self._flops is None:
            self._flops = ({k: v[:2].detach() for k, v in prepared.items() if isinstance(v, Tensor)}, 0)
        self.log("train/loss", output.loss.detach(), prog_bar=True)
        if output.logs:
            self.log_dict({f"train/{name}": term.detach() for name, term in output.logs.items()})
        self.log_dict({f"schedule/{name}": value for name, value in self._scheduled().items()})
        return output.loss

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss without augmentation, with the same masks in every epoch: `val/loss`."""
        self._log_evaluation("val", batch, batch_idx)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss on the test split: `test/loss`."""
        self._log_evaluation("test", batch, batch_idx)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Embeddings `[B, D]` with the labels of the batch, if it has them."""
        labels = {"label": batch["label"]} if "label" in batch else {}
        return {"embedding": self.features(batch), **labels}

    def _log_evaluation(self, split: str, batch: Batch, batch_idx: int) -> None:
        output = self.evaluate(batch, seed=batch_idx)
        terms = {f"{split}/loss": output.loss, **{f"{split}/{name}": term for name, term in output.logs.items()}}
        distributed = self.trainer.world_size > 1
        self.log_dict(terms, on_epoch=True, batch_size=len(batch["image"]), sync_dist=distributed)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW whose groups follow the plan of the run; prints and logs the resolved learning rate.

        Raises:
            UserError: the length of the run or its batch size is unknown.
        """
        config = self.optimizer_config
        self.trainer.fit_loop.setup_data()  # with max_steps, Lightning has not opened the loader yet
        total = self.trainer.estimated_stepping_batches
        if math.isinf(total):
            raise UserError("the schedules need the length of the run: set trainer.max_epochs or trainer.max_steps.")
        batch = self._samples_per_step()
        steps_per_epoch = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        warmup = min(round(config.warmup_epochs * steps_per_epoch), int(total))
        self.plan = Plan(int(total), warmup, config.resolve_lr(batch), config)
        scaled = f"{config.lr:g} x {batch} / 256 = " if config.scale_lr else ""
        dtype = torch.bfloat16 if "bf16" in str(self.trainer.precision) else torch.float32
        backend, why = choose_backend(self.device, dtype, 1)
        if self.attention != "auto":
            backend, why = self.attention, "set by model.attention"
        rank_zero_info(
            f"learning rate {scaled}{self.plan.peak_lr:.4g} ({batch} samples per step), {int(total)} steps, "
            f"{warmup} of warm-up\nattention: {backend} ({why})"
        )
        groups = parameter_groups(self, config.layer_decay, self.backbone.layer_index, self.backbone.depth)
        optimizer = build_adamw(groups, config)
        optimizer.register_step_pre_hook(lambda opt, *_: apply_plan(opt, self._run_plan, self._optimizer_step))
        optimizer.register_step_post_hook(lambda opt, *_: self._move_targets(getattr(opt, "found_inf", None)))
        return optimizer

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to rebuild the method: class, arguments, bands, versions; plain types only."""
        checkpoint[checkpoints.KEY] = checkpoints.metadata(self)

    # ---- the rest -------------------------------------------------------------------------------------------------

    @property
    def method_name(self) -> str:
        """Short name for run folders: the module's name, for example `cross_scale_mae`."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def flops_per_batch(self) -> int:
        """Floating-point operations of one training batch (forward and backward), 0 before the first one.

        Measured once on two samples and scaled; matrix products and attention count, element-wise work does not.
        """
        if self._flops is None:
            return 0
        sample, flops = self._flops
        if not flops:
            flops = self._count_flops(sample) // len(sample["image"])
            self._flops = (sample, flops)
        return flops * (self._batch_size() or 1)

    def _count_flops(self, sample: Batch) -> int:
        buffers = [(buffer, buffer.clone()) for buffer in self.buffers()]
        parameters = [p for p in self.parameters() if p.requires_grad]
        devices = [self.device] if self.device.type == "cuda" else []
        set_backend(self, "math")  # its matrix products are all counted
        try:
            with torch.enable_grad(), torch.random.fork_rng(devices=devices), FlopCounterMode(display=False) as counter:
                torch.autograd.grad(self.step(sample).loss, parameters, allow_unused=True)
        finally:
            set_backend(self, self.attention)
            for buffer, value in buffers:
                buffer.copy_(value)
        return counter.get_total_flops()

    @property
    def _optimizer_step(self) -> int:
        return self.trainer.global_step if self._trainer is not None else 0

    @property
    def _run_plan(self) -> Plan:
        assert self.plan is not None
        return self.plan

    def _scheduled(self) -> dict[str, float]:
        step = self._optimizer_step
        values = {"lr": self._run_plan.lr(step), "weight_decay": self._run_plan.weight_decay(step)}
        return {**values, **{name: self.value(name) for name in self._schedules}}

    def _move_targets(self, skipped: Tensor | None) -> None:
        for student, target in self._targets:
            target.update(student, self.value("ema_momentum"), skipped)

    def _batch_size(self) -> int | None:
        loader = self.trainer.train_dataloader
        size = getattr(loader, "batch_size", None) or getattr(getattr(loader, "batch_sampler", None), "batch_size", None)
        return int(size) if size else None

    def _samples_per_step(self) -> int:
        size = self._batch_size()
        if size is None and self.optimizer_config.scale_lr:
            raise UserError("the loader does not say its batch size: set model.optimizer.scale_lr to false.")
        return (size or 1) * self.trainer.world_size * self.trainer.accumulate_grad_batches

    def _seed(self, batch: int) -> None:
        seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        torch.manual_seed(_mix(seed, self.global_rank, batch))


def _mix(*parts: int) -> int:
    """A well-mixed 63-bit seed of several integers (splitmix64's finaliser, folded)."""
    state = 0
    for part in parts:
        state = (state ^ (part + 1)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
    return state >> 1


class _Evaluation:
    """Evaluation mode without gradients; afterwards every module is in the mode that it was in."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.no_grad = torch.no_grad()

    def __enter__(self) -> None:
        self.modes = [(m, m.training) for m in self.module.modules()]
        self.module.eval()
        self.no_grad.__enter__()

    def __exit__(self, *error: object) -> None:
        self.no_grad.__exit__(*error)
        for module, mode in self.modes:
            module.training = mode
