"""`FineTune`: what downstream tasks share. A task adds a head, a loss and its scores, and is one short file.

It is an `SSLModule` whose step has labels: bands, normalisation, views, optimizer, schedules, seeding and checkpoints
are the same, so a fine-tuned encoder is exported, embedded and evaluated like a pretrained one.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor, nn

from xscale_lightning import checkpoints
from xscale_lightning.callbacks.probe import publish
from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.init_from import transfer
from xscale_lightning.methods.base import Batch, SSLModule
from xscale_lightning.methods.measure import evaluation
from xscale_lightning.methods.output import StepOutput
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.scaling import Scale, image_scaling
from xscale_lightning.models.vit import Pool
from xscale_lightning.tasks.freezing import Tune, freeze, quieten
from xscale_lightning.tasks.scores import Scores
from xscale_lightning.tasks.start import Statistics, beginning, measurement
from xscale_lightning.tasks.weights import ClassWeights, check_seen, class_weights, given_weights


class FineTune(SSLModule):
    """Base of downstream tasks.

    Args:
        init_from: weights to start from (a run's checkpoint or folder, an export folder ...); null trains from scratch.
            It never resumes a run: that is `--ckpt_path`.
        num_classes: number of classes; null takes the data's.
        tune: what is trained beside the head: the whole encoder (`full`), its last blocks (`last_k`), or nothing of it
            (`frozen`).
        last_k: how many blocks `last_k` trains.
        drop_path: stochastic depth of the last block while fine-tuning; null keeps the encoder's.
        pool: one vector per image by `mean` or `cls`; null keeps the encoder's.
        final_norm: whether the encoder's last LayerNorm is applied; null keeps the encoder's.
        normalize: scaling of the images: by the band record (`standardize`), every band of every image to [0, 1]
            (`minmax`) or not at all (`none`); null takes that of the encoder's pretraining.
        statistics: whose mean and deviation `standardize` uses: those the weights of `init_from` were trained with, as
            far as they say them and the unit is the same (`checkpoint`), or the `data`'s.
        adapt_bands: take a checkpoint of other bands all the same, as far as it can be adapted.
        class_weights: weight of every class in the loss, or `balanced` (inverse frequency in the training split).
        test: after `fit`, evaluate the best checkpoint on the test split, if there is one.
        bands: record of the data's bands; on the command line it comes from the data module.
        backbone: the encoder when there is no `init_from`.
        **kwargs: see `SSLModule`.

    Raises:
        UserError: weights that cannot be read, other bands than the data's, or options out of range.
    """

    headline = "top1"  # the score that selects checkpoints
    without_callbacks = ("knn", "geometry", "pictures")  # those tell how pretraining goes
    head: nn.Module

    def __init__(
        self,
        init_from: str | None = None,
        num_classes: int | None = None,
        tune: Tune = "full",
        last_k: int = 2,
        drop_path: float | None = None,
        pool: Pool | None = None,
        final_norm: bool | None = None,
        normalize: Scale | None = None,
        statistics: Statistics = "checkpoint",
        adapt_bands: bool = False,
        class_weights: ClassWeights = None,
        test: bool = True,
        bands: Bands | None = None,
        backbone: BackboneConfig = BackboneConfig(),  # noqa: B008 (never changed; shown as default in --help)
        **kwargs,
    ) -> None:
        source, config, bands = beginning(init_from, bands, backbone, adapt_bands, statistics)
        changed = {"drop_path": drop_path, "pool": pool, "final_norm": final_norm}
        config = replace(config, **{name: value for name, value in changed.items() if value is not None})
        super().__init__(bands=bands, backbone=config, **kwargs)
        if source is not None:
            report = transfer(source, self.backbone, self.bands)
            rank_zero_info(f"encoder from {init_from}: {report}")
        self.init_from, self.test_after_fit = init_from, test
        self.tune: Tune = tune
        self.normalize: Scale = normalize or (source.scaling if source else None) or "standardize"
        self.class_weights: ClassWeights = class_weights
        self.num_classes: int | None = None
        self.class_names: list[str] = []
        self._seen: Tensor | None = None
        freeze(self.backbone, tune, last_k)
        # A checkpoint is rebuilt without the file that its run started from.
        self._hparams.update(init_from=None, backbone=checkpoints.plain(config), normalize=self.normalize)
        if num_classes is not None:
            self.make_head(num_classes)

    # ---- what a task implements ----------------------------------------------------------------------------------

    def build_head(self, num_classes: int) -> nn.Module:
        """The head. Required."""
        raise TypeError(f"{type(self).__name__} must implement build_head(num_classes).")

    def build_scores(self, num_classes: int) -> Scores:
        """Scores over a whole split. Required."""
        raise TypeError(f"{type(self).__name__} must implement build_scores(num_classes).")

    def logits(self, batch: Batch) -> Tensor:
        """Class scores of a prepared batch. Required."""
        raise TypeError(f"{type(self).__name__} must implement logits(batch).")

    def loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """Training loss. Required."""
        raise TypeError(f"{type(self).__name__} must implement loss(logits, batch).")

    def target(self, batch: Batch) -> Tensor:
        """What the scores compare with. Required."""
        raise TypeError(f"{type(self).__name__} must implement target(batch).")

    def classes_of(self, data: Any) -> int | None:
        """Number of classes of a data module, None if it does not know (yet)."""
        return getattr(data, "num_classes", None)

    def check_targets(self, batch: Mapping[str, Any]) -> Tensor:
        """Refuse labels that cannot be meant; `batch` is still on the CPU. Returns the number of each class `[K]`."""
        raise TypeError(f"{type(self).__name__} must implement check_targets(batch).")

    def predictions(self, logits: Tensor) -> dict[str, Tensor]:
        """What `xscale predict` writes beside the embeddings."""
        return {"score": logits.softmax(1).float()}

    # ---- the encoder ----------------------------------------------------------------------------------------------

    def train(self, mode: bool = True) -> "FineTune":
        """Training mode, in which frozen parts of the encoder stay in evaluation mode."""
        super().train(mode)
        if mode:
            quieten(self.backbone, self.tune)
        return self

    def encoding(self) -> Any:
        """Context for passes through the encoder: without gradients where it is frozen."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and self.tune != "frozen")

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """Offset and scale as `normalize` says."""
        return image_scaling(raw, self.normalize, self.mean, self.std)

    def check_first_batch(self, images: Tensor, raw: Tensor) -> None:
        """As the base, where the statistics are used at all."""
        if self.normalize == "standardize":
            super().check_first_batch(images, raw)

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """Normalise `image` and, where there is one, `image2`; augment both and `mask` by the same draw."""
        prepared = super().prepare(batch)
        if "image2" in batch:
            prepared["image2"] = super().prepare({"image": batch["image2"]})["image"]
        if not augment:
            return prepared
        images = prepared["image"]
        if not self._first_batch_seen:
            self.check_first_batch(images, batch["image"])
            self._first_batch_seen = True
        draw = self.views.draw(images)
        gsd = batch.get("gsd")
        given = images.new_ones(len(images)) if gsd is None else gsd
        for name in ("image", "image2"):
            if name in prepared:
                prepared[name], scaled = self.views.apply(draw, prepared[name], given)
        if gsd is not None:
            prepared["gsd"] = scaled
        if "mask" in prepared:
            prepared["mask"] = self.views.apply_to_masks(draw, prepared["mask"])
        return prepared

    # ---- data -----------------------------------------------------------------------------------------------------

    def check_data(self, data: Any, fitting: bool) -> None:
        """As the base; the head is made here if its number of classes was not given.

        Raises:
            UserError: data without labels or with another number of classes than the model's.
        """
        super().check_data(data, fitting)
        classes = self.classes_of(data)
        if classes is None and not getattr(data, "downloads", False) and self.num_classes is None:
            raise UserError(f"{type(self).__name__} needs labelled data, and {data.name} says no number of classes.")
        if self.num_classes is None and classes is not None:
            self.make_head(classes)
        elif classes is not None and classes != self.num_classes:
            raise UserError(f"model.num_classes is {self.num_classes}, and {data.name} has {classes}: leave it null.")
        if self.num_classes is not None:
            names = [str(name) for name in getattr(data, "class_names", None) or ()]  # fewer where masks lack a label
            self.class_names = (names + [str(i) for i in range(len(names), self.num_classes)])[: self.num_classes]

    def make_head(self, num_classes: int) -> None:
        """Head, scores and class weights for `num_classes` classes.

        Raises:
            UserError: fewer than two classes, or class weights of another number.
        """
        if num_classes < 2:
            raise UserError(f"model.num_classes must be at least 2, got {num_classes}.")
        self.num_classes = num_classes
        self._hparams["num_classes"] = num_classes
        self.class_names = self.class_names or [str(i) for i in range(num_classes)]
        self.head = self.build_head(num_classes)
        self.scores = nn.ModuleDict({split: self.build_scores(num_classes) for split in ("val", "test")})
        self.register_buffer("weight", given_weights(self.class_weights, num_classes))

    def setup(self, stage: str) -> None:
        """As the base; weights that follow from the training split are measured here."""
        super().setup(stage)
        rule = self.class_weights
        if stage == "fit" and rule is not None and not isinstance(rule, list):
            rank_zero_info(f"class_weights {rule}: counting the training split ...")
            counts = sum(self.check_targets(batch) for batch in self.trainer.datamodule.probe_dataloader("train"))  # type: ignore[attr-defined]
            assert isinstance(counts, Tensor)
            self.weight = class_weights(counts, rule).to(self.weight)
            shown = ", ".join(f"{n} {w:.3g}" for n, w in zip(self.class_names, self.weight.tolist(), strict=True))
            rank_zero_info(f"class weights: {shown}")

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Refuse labels that cannot be meant while they are on the CPU; count those of the first epoch."""
        if self._trainer is None or self.trainer.predicting or not isinstance(batch, dict):
            return batch
        counts = self.check_targets(batch)
        if self.trainer.training and self.current_epoch == 0:
            self._seen = counts if self._seen is None else self._seen + counts
        return batch

    def on_train_epoch_end(self) -> None:
        """After the first epoch, say which classes had no sample; as the base.

        Raises:
            UserError: nothing had a label.
        """
        super().on_train_epoch_end()
        seen, self._seen = self._seen, None
        if seen is not None:
            check_seen(seen, self.class_names)

    # ---- steps ----------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """Loss of a prepared batch."""
        return StepOutput(loss=self.loss(self.logits(batch), batch))

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and scores of a validation batch."""
        self._score("val", batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Loss and scores of a test batch."""
        self._score("test", batch)

    def _score(self, split: str, batch: Batch) -> None:
        prepared = self.prepare(batch)
        logits = self.logits(prepared)
        distributed = self.trainer.world_size > 1
        size = len(prepared["image"])
        self.log(f"{split}/loss", self.loss(logits, prepared), on_epoch=True, batch_size=size, sync_dist=distributed)
        scores: Scores = self.scores[split]  # type: ignore[assignment]
        scores.update(logits.float(), self.target(prepared))

    def on_validation_epoch_end(self) -> None:
        """Scores over the whole validation split: `val/<score>`."""
        self._publish("val")

    def on_test_epoch_end(self) -> None:
        """Scores over the whole test split with bootstrap intervals: `test/<score>`."""
        self._publish("test")

    def _publish(self, split: str) -> None:
        scores: Scores = self.scores[split]  # type: ignore[assignment]
        found = scores.summary(self.class_names, intervals=split == "test")
        scores.reset()
        if self.trainer.sanity_checking:
            return
        if self.trainer.is_global_zero:
            publish(self.trainer, measurement(split, found))
        else:  # `monitor` needs them on every process
            values = {f"{split}/{name}": torch.tensor(value) for name, value in found.values.items()}
            self.trainer.callback_metrics.update(values)

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Embeddings `[B, D]`, what the head says, and the labels of the batch, if it has them."""
        with evaluation(self):
            shown = self.predictions(self.logits(self.prepare(batch)))
        return {**super().predict_step(batch, batch_idx), **shown}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """As the base; `init_from` says where the encoder came from."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[checkpoints.KEY]["init_from"] = self.init_from
