"""`SSLModule`: everything that self-supervised methods share, so that a method is one short file.

A method implements `step(batch) -> StepOutput`. The base owns the encoder and the band record, the sealed way
normalise -> (views) -> encode -> pool, the optimizer and all schedules, target networks (EMA), seeding, log names and
checkpoint metadata. Probes and pictures are callbacks; they never touch the loss or the step count.
"""

import re
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from xscale_lightning import checkpoints
from xscale_lightning.allocator import keep_freed_memory
from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.data.views import Views
from xscale_lightning.ema import EMA
from xscale_lightning.errors import UserError
from xscale_lightning.methods.checked import CheckedModule
from xscale_lightning.methods.measure import count_flops, evaluation
from xscale_lightning.methods.output import Reconstruction, StepOutput
from xscale_lightning.methods.position import go_on
from xscale_lightning.methods.sharding import shard_if_asked
from xscale_lightning.models.attention import Backend, set_backend
from xscale_lightning.models.blocks import set_checkpointing, set_compiled
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.optim import OptimizerConfig

__all__ = ["Reconstruction", "SSLModule", "StepOutput"]

Batch = dict[str, Any]


class SSLModule(CheckedModule):
    """Base of all methods.

    Args:
        bands: record of the data's bands; on the command line it comes from the data module.
        backbone: the encoder.
        optimizer: AdamW and its schedules.
        views: augmentation of the training images, on the device.
        attention: attention backend of every layer; `auto` chooses by device and type.
        init_from: weights that the encoder starts from: a checkpoint, run or export folder, `timm:NAME`, or a published
            file. It never resumes a run: that is `--ckpt_path`.
        adapt_bands: allow `init_from` weights of other bands; shared ones keep their filters.
        activation_checkpointing: compute every block again in the backward pass: less memory, up to a third more work.
        compile_blocks: torch.compile for the training steps; equal within rounding, after a minute of compiling.

    Attributes:
        backbone: the encoder.
        sample_wise: whether the loss of a batch is the mean of its samples' losses; contrastive methods say False, and
            the contract suite then does not expect gradient accumulation to give the same gradients.
        paired: whether `image_hr` and `gsd_hr` of a batch are prepared with the image, by the same views.

    Raises:
        UserError: options that the backbone cannot have.
    """

    sample_wise = True
    paired = False
    mean: Tensor
    std: Tensor

    def __init__(
        self,
        bands: Bands | None = None,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 (never changed; shown as default in --help)
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        views: Views = Views(),  # noqa: B008
        attention: Backend = "auto",
        init_from: str | None = None,
        adapt_bands: bool = False,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        super().__init__(optimizer)
        self.save_hyperparameters()
        self._hparams = self._hparams_initial = checkpoints.plain_hparams(self.hparams)
        self.bands = bands or generic(3)
        self.views = views
        self.attention: Backend = attention
        self.activation_checkpointing, self.compile_blocks = activation_checkpointing, compile_blocks
        self.backbone_name, self.backbone_config = backbone.name, backbone
        self.backbone = backbone.build(len(self.bands), self.bands.wavelengths)
        self.register_buffer("mean", torch.tensor(self.bands.means).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(self.bands.stds).view(1, -1, 1, 1), persistent=False)
        self._start = (init_from, adapt_bands)
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

    # ---- what a method offers to add-ons that look at its tokens (`spatial_affinity`), beside `StepOutput.student` ---

    @property
    def student_encoder(self) -> torch.nn.Module:
        """What made `StepOutput.student`: called with `(images, keep=, gsd=)` it gives `Tokens`."""
        return self.backbone

    @property
    def target_encoder(self) -> EMA | None:
        """The EMA of `student_encoder`, if the method has one."""
        target = getattr(self, "target", None)
        return target if isinstance(target, EMA) else None

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
        offset, scale = self.scaling(raw)
        images = (raw.to(self.mean.dtype) - offset) / scale
        if augment and not self._first_batch_seen:
            self.check_first_batch(images, raw)
            self._first_batch_seen = True
        prepared = {**batch, "image": images}
        pairs = [("image", "gsd")]
        if self.paired and "image_hr" in batch:
            finer = batch["image_hr"]
            offset, scale = self.scaling(finer)
            prepared["image_hr"] = (finer.to(self.mean.dtype) - offset) / scale
            pairs.append(("image_hr", "gsd_hr"))
        if augment:
            draw = self.views.draw(images)
            for image, name in pairs:
                gsd = batch.get(name)
                ratio = prepared[image].shape[-2] // raw.shape[-2]
                given = images.new_ones(len(images)) if gsd is None else gsd
                prepared[image], scaled = self.views.apply(draw, prepared[image], given, ratio)
                if gsd is not None:
                    prepared[name] = scaled
        return prepared

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale of raw images `[B, C, H, W]`: the model sees `(raw - offset) / scale`.

        Here the mean and deviation of the band record `[1, C, 1, 1]`; a method may scale every image by itself
        `[B, C, 1, 1]`.
        """
        return self.mean, self.std

    def denormalise(self, images: Tensor, raw: Tensor) -> Tensor:
        """Normalised images `[B, C, H, W]` in raw sensor units, by the scaling of the `raw` images they belong to."""
        offset, scale = self.scaling(raw)
        return images * scale + offset

    def encode(self, batch: Batch) -> Tokens:
        """Tokens of a raw batch, nothing masked."""
        prepared = self.prepare(batch)
        return self.feature_encoder(prepared["image"], gsd=prepared.get("gsd"))

    def features(self, batch: Batch) -> Tensor:
        """One vector per image of a raw batch: `[B, D]` float32, in evaluation mode and without gradients."""
        with evaluation(self):
            return self.backbone.pool(self.encode(batch)).float()

    def patch_features(self, batch: Batch) -> Tensor:
        """Feature map of a raw batch: `[B, D, h, w]` float32, in evaluation mode and without gradients."""
        with evaluation(self):
            return self.encode(batch).feature_map().float()

    def evaluate(self, batch: Batch, seed: int) -> StepOutput:
        """`step` on a raw batch, without gradients and augmentation, with a seed that leaves training's draws alone."""
        devices = [self.device] if self.device.type == "cuda" else []
        with evaluation(self), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return self.step(self.prepare(batch))

    # ---- Lightning's hooks ----------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse data that the model cannot take, before the first batch."""
        self.check_machine(self.trainer.strategy.root_device)
        set_backend(self, self.attention)
        set_checkpointing(self, self.activation_checkpointing)
        set_compiled(self, self.compile_blocks)
        data = getattr(self.trainer, "datamodule", None)
        if data is not None:
            self.check_data(data, fitting=stage == "fit")

    def configure_model(self) -> None:
        """Share the parameters out among processes where the strategy asks for it (FSDP2)."""
        shard_if_asked(self)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """A run that is resumed has its weights."""
        self._start = (None, False)

    def on_fit_start(self) -> None:
        """Start from the weights of `init_from`, unless the run is resumed."""
        self.initialise()
        if self.device.type == "cpu":
            keep_freed_memory()

    def initialise(self, frozen: bool = False) -> None:
        """Take the weights of `init_from`, if it is given; only once. `frozen` takes the statistics of its bands, too.

        Raises:
            UserError: no such weights, of other bands, or that do not fit.
        """
        source, adapt_bands = self._start
        if source is not None:
            from xscale_lightning.init_from import start_from

            rank_zero_info(f"encoder from {source}: {start_from(self, source, adapt_bands, frozen)}")
            self._start = (None, False)

    def on_train_start(self) -> None:
        """Let a resumed run's loader begin where its checkpoint was written."""
        go_on(self.trainer)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One training batch; every random draw is a function of (seed, rank, number of the batch)."""
        self._seed(self.trainer.fit_loop.epoch_loop.total_batch_idx)
        prepared = self.prepare(batch, augment=True)
        output = self.step(prepared)
        if self._flops is None:
            self._flops = ({k: v[:2].detach() for k, v in prepared.items() if isinstance(v, Tensor)}, 0)
        self.log("train/loss", output.loss.detach(), prog_bar=True)
        self.newest_terms = {name: term.detach() for name, term in output.logs.items()}
        terms = {f"train/{name}": term for name, term in self.newest_terms.items()}
        self.log_dict({**terms, **{f"schedule/{name}": value for name, value in self._scheduled().items()}})
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
        self.log_dict(terms, on_epoch=True, batch_size=len(batch["image"]), sync_dist=self.trainer.world_size > 1)

    def on_train_epoch_end(self) -> None:
        """Say how many damaged samples the data module had to replace, if any: `data/skipped`."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "count_skipped") and data.count_skipped():
            self.log("data/skipped", float(data.skipped))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what is needed to rebuild the method: class, arguments, bands, versions; plain types only."""
        checkpoint[checkpoints.KEY] = checkpoints.metadata(self)

    # ---- the rest -------------------------------------------------------------------------------------------------

    @property
    def method_name(self) -> str:
        """Short name for run folders: the module's of methods here (`latent_mim`), else the class's (`my_method`)."""
        package, _, module = type(self).__module__.rpartition(".")
        of_class = re.sub("(?<=[a-z0-9])(?=[A-Z])", "_", type(self).__name__).lower()
        return module if package.startswith("xscale_lightning.") else of_class

    @property
    def flops_per_batch(self) -> int:
        """Floating-point operations of one training batch (forward and backward), 0 before the first one.

        Measured once on two samples and scaled; matrix products and attention count, element-wise work does not.
        """
        if self._flops is None:
            return 0
        sample, flops = self._flops
        if not flops:
            flops = count_flops(self, sample) // len(sample["image"])
            self._flops = (sample, flops)
        return flops * (self._batch_size() or 1)

    @property
    def flops_per_image(self) -> int:
        """What `flops_per_batch` has measured, for one image; 0 where it has not been asked."""
        return self._flops[1] if self._flops else 0
