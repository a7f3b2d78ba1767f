"""Online dense probe: can one linear layer read the land cover from the features of every patch?"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from xscale_lightning.callbacks.labelled import measured
from xscale_lightning.callbacks.probe import (
    Measurement,
    ProbeCallback,
    evaluation_split,
    publish_picture,
    run_folder,
    to_device,
)
from xscale_lightning.callbacks.sampling import Batch, sample_batches
from xscale_lightning.callbacks.sources import asks_unasked, open_probe_data, patch_size
from xscale_lightning.data.bands import Bands
from xscale_lightning.data.datamodule import Split, XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import estimates
from xscale_lightning.evaluation.dense import (
    DenseHead,
    DenseRecipe,
    absent_classes,
    check_maps,
    confusion_matrices,
    dense_scores,
    fit_dense_head,
)
from xscale_lightning.evaluation.dense_picture import dense_picture
from xscale_lightning.evaluation.pictures import composite, stretch_limits
from xscale_lightning.evaluation.scores import pixel_scores
from xscale_lightning.models.tokenizers import check_divides

BASE_LINE = "mean spectrum"
TITLES = ("image", "mask", "prediction")


@dataclass
class Maps:
    """What a split gives to the probe, for all its images."""

    features: Tensor
    """`[N, D, h, w]` float32 on the model's device."""
    masks: Tensor
    """`[N, H, W]` int16 on the CPU."""
    spectra: Tensor
    """`[N, C, h, w]`: every patch's mean of every band, standardised by the data's band record."""
    shown: list[tuple[int, Tensor]]
    """Number and pixels `[3, H, W]` of the images for the picture, those whose masks are most varied."""


class OnlineDenseProbe(ProbeCallback):
    """Mean IoU of one linear layer per patch on the frozen features, on any data with masks.

    The layer is trained on the training split (features are computed once, the encoder stays as it is), its logits are
    interpolated bilinearly to the size of the masks. It is asked about the validation split in `fit` and `validate`;
    in `test` about the test split, with the epoch that was best on the validation split. Logs `dense/<data>/miou`,
    `dense/<data>/accuracy` and `dense/<data>/iou/<class>`, from one confusion matrix over the whole split, beside what
    the same layer reaches on the mean spectrum of each patch; draws image, mask and prediction.

    Args:
        data: data with masks; null looks at `training_data`.
        training_data: whether to probe on the masks of the run's own data where `data` is null; null does so in
            `validate` and `test` of a method, if there are masks.
        epochs: passes over the training features.
        lr: peak learning rate of AdamW.
        batch_size: images per step of the layer.
        warmup_epochs: epochs in which the learning rate rises from a tenth of `lr`.
        min_lr: where the cosine ends; null keeps `lr` throughout.
        class_weights: weight of every class in the cross-entropy; null weighs all pixels alike.
        standardise: bring every feature to mean 0 and deviation 1 first; not part of the published protocol.
        image_size: height and width in pixels to which images are resized for the encoder (masks are not); null leaves
            them as they are.
        max_train: at most so many images to train on (a fixed random part); null takes all. Their features stay in
            the device's memory: 0.6 MB for an image of 224 pixels in a ViT-B/16.
        max_test: at most so many images to ask about; null takes all.
        baseline: whether to train the layer on mean spectra too, once per split.
        num_images: rows of the picture; 0 draws none.
        seed: of the layer's first weights and the order of its images.
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.

    Raises:
        UserError: if a number is out of range; when the run starts, if the data has no masks or other bands than the
            model, or the patch size does not divide its images; when it is evaluated, if a mask does not fit.
    """

    def __init__(
        self,
        data: XScaleDataModule | None = None,
        training_data: bool | None = None,
        epochs: int = 100,
        lr: float = 1e-3,
        batch_size: int = 64,
        warmup_epochs: int = 10,
        min_lr: float | None = 1e-6,
        class_weights: Sequence[float] | None = None,
        standardise: bool = False,
        image_size: int | None = None,
        max_train: int | None = 1000,
        max_test: int | None = 1000,
        baseline: bool = True,
        num_images: int = 6,
        seed: int = 0,
        every_n_epochs: int = 10,
    ) -> None:
        super().__init__(every_n_epochs)
        limits = {"image_size": image_size, "max_train": max_train, "max_test": max_test}
        for name, value in limits.items():
            if value is not None and value < 1:
                raise UserError(f"OnlineDenseProbe.{name}: {value} is not possible; give at least 1, or null.")
        if num_images < 0:
            raise UserError(f"OnlineDenseProbe.num_images: {num_images} is not possible; give 0 or more.")
        self.data, self.training_data = data, training_data
        self.recipe = DenseRecipe(
            epochs=epochs,
            batch_size=batch_size,
            lr=lr,
            warmup_epochs=warmup_epochs,
            warmup_lr=0.1 * lr,
            min_lr=min_lr,
            class_weights=class_weights,
            standardise=standardise,
            seed=seed,
        )
        self.image_size, self.max_train, self.max_test = image_size, max_train, max_test
        self.baseline, self.num_images = baseline, num_images
        self._probe_data: XScaleDataModule | None = None
        self._base_lines: dict[str, float] = {}
        self._warned: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the data and compare it with the model, before the first step."""
        training: XScaleDataModule | None = getattr(trainer, "datamodule", None)
        own = self.training_data
        if own is None:
            own = asks_unasked(trainer, pl_module) and getattr(training, "num_mask_classes", None) is not None
        self._probe_data = data = self.data or (training if own else None)
        self._base_lines.clear()
        if data is None:
            return
        open_probe_data(trainer, pl_module, data, stage, "OnlineDenseProbe")
        if data.num_mask_classes is None:
            raise UserError(
                f"OnlineDenseProbe.data: {data.name} has no masks, or does not say how many classes they have; give "
                "data with masks, or set num_classes of it."
            )
        height, width = (self.image_size, self.image_size) if self.image_size else data.image_size
        try:
            if height and width:
                check_divides(patch_size(pl_module), height, width)
        except UserError as error:
            raise UserError(f"OnlineDenseProbe.image_size for {data.name}: {error}") from None

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Features of the splits, the trained layer, and its scores on the held-out one."""
        data = self._probe_data
        if data is None:
            return None
        split, classes, ignore = evaluation_split(trainer), data.num_mask_classes or 0, data.ignore_index
        # `test` runs in inference mode, whose tensors cannot be trained on.
        with torch.inference_mode(False), torch.no_grad():
            train = self._maps(trainer, pl_module, data, "train", self.max_train)
            asked = self._maps(trainer, pl_module, data, split, self.max_test)
            chosen: Maps | None = None
            if trainer.state.fn == TrainerFn.TESTING and data.dataset("val") is not None:
                chosen = self._maps(trainer, pl_module, data, "val", self.max_test)
            self._warn_absent(data, train.masks)
            selection = None if chosen is None else (chosen.features, chosen.masks)
            head = fit_dense_head(train.features, train.masks, classes, self.recipe, selection, ignore)
            confusion = confusion_matrices(head, asked.features, asked.masks, ignore)
            if self.baseline and split not in self._base_lines:
                selection = None if chosen is None else (chosen.spectra, chosen.masks)
                simple = fit_dense_head(train.spectra, train.masks, classes, self.recipe, selection, ignore)
                found = confusion_matrices(simple, asked.spectra, asked.masks, ignore)
                self._base_lines[split] = dense_scores(found).miou
            if asked.shown and trainer.is_global_zero:
                self._draw(trainer, data, head, asked)
        prefix = f"dense/{data.name}"
        found = estimates(pixel_scores(confusion, class_names(data)))
        found = {f"{prefix}/{name}": score for name, score in found.items() if math.isfinite(score.value)}
        base = {f"{prefix}/miou": {BASE_LINE: self._base_lines[split]}} if self.baseline else {}
        counts = {"data": data.name, "samples": len(asked.masks), "train_samples": len(train.masks)}
        protocol = {**counts, "image_size": self.image_size, "epochs": self.recipe.epochs, "seed": self.recipe.seed}
        return measured(found, split, base, dict.fromkeys(found, protocol))

    def _maps(
        self, trainer: Trainer, pl_module: LightningModule, data: XScaleDataModule, split: Split, limit: int | None
    ) -> Maps:
        """Features, masks and mean spectra of one split.

        Raises:
            UserError: if batches have no mask, or the masks do not go with the classes.
        """
        loader: DataLoader[Any] = data.probe_dataloader(split)
        features, masks, spectra = [], [], []
        shown: list[tuple[float, int, Tensor]] = []
        for raw in sample_batches(loader, limit):
            if "mask" not in raw:
                raise UserError(f"OnlineDenseProbe.data: {data.name} gives batches without mask; give data with masks.")
            batch = self._resized(to_device(trainer, pl_module, raw))
            with trainer.precision_plugin.forward_context():
                maps = pl_module.patch_features(batch).float()  # type: ignore[operator]
            mask = raw["mask"]
            if split != "train" and self.num_images:
                variety = [_variety(m, data.num_mask_classes or 0) for m in mask]
                pixels = raw["image"][:, list(data.bands.rgb)].float()
                first = sum(len(part) for part in masks)
                shown += [(-n, first + i, p.clone()) for i, (n, p) in enumerate(zip(variety, pixels, strict=True))]
                shown = sorted(shown, key=lambda item: item[:2])[: self.num_images]
            features.append(maps)
            masks.append(mask.to("cpu", torch.int16))
            spectra.append(F.adaptive_avg_pool2d(_standardised(batch["image"], data.bands), maps.shape[-2:]))
        if not features:
            raise UserError(f"OnlineDenseProbe.data: the {split} split of {data.name} is empty; choose other data.")
        found = Maps(
            torch.cat(features),
            torch.cat(masks),
            torch.cat(spectra),
            [(number, pixels) for _, number, pixels in sorted(shown, key=lambda item: item[1])],
        )
        what = f"the {split} split of {data.name}"
        check_maps(found.features, found.masks, data.num_mask_classes or 0, data.ignore_index, what)
        return found

    def _resized(self, batch: Batch) -> Batch:
        """The batch with its images, and their gsd, at the size the encoder is to see."""
        images, size = batch["image"], self.image_size
        if size is None or images.shape[-2:] == (size, size):
            return batch
        factor = size / math.sqrt(images.shape[-2] * images.shape[-1])
        images = F.interpolate(images, (size, size), mode="bilinear", antialias=True)
        return {**batch, "image": images, **({"gsd": batch["gsd"] / factor} if "gsd" in batch else {})}

    def _warn_absent(self, data: XScaleDataModule, masks: Tensor) -> None:
        """Name classes that the layer cannot learn, once."""
        absent = [class_names(data)[number] for number in absent_classes(masks, data.num_mask_classes or 0)]
        if absent and data.name not in self._warned:
            self._warned.add(data.name)
            names = ", ".join(f"'{name}'" for name in absent)
            rank_zero_warn(
                f"OnlineDenseProbe: no pixel of the {len(masks)} training images of {data.name} is of class {names}; "
                "it cannot be learned, and its IoU is 0 where it occurs."
            )

    def _draw(self, trainer: Trainer, data: XScaleDataModule, head: DenseHead, maps: Maps) -> None:
        if run_folder(trainer) is None:
            if "picture" not in self._warned:
                rank_zero_info("OnlineDenseProbe: no logger, so no run folder; no pictures are written.")
            self._warned.add("picture")
            return
        numbers = torch.tensor([number for number, _ in maps.shown])
        masks = maps.masks[numbers].long()
        # Masks of pairs have the pixels of the finer image.
        pixels = F.interpolate(torch.stack([p for _, p in maps.shown]).cpu(), masks.shape[1:], mode="nearest-exact")
        predicted = head.predict(maps.features[numbers.to(maps.features.device)], (masks.shape[1], masks.shape[2]))
        together = pixels.transpose(0, 1).flatten(1)[None, :, None]  # [1, 3, 1, N * H * W]: one stretch for all rows
        images = composite(
            pixels, (0, 1, 2), stretch_limits(together[..., :: _thinning(together)]).expand(len(pixels), -1, -1)
        )
        picture = dense_picture(images, masks, predicted.cpu(), class_names(data), TITLES)
        stem = re.sub(r"[^\w.-]+", "_", data.name)  # a name need not be fit for files
        publish_picture(trainer, picture, f"dense/{data.name}", f"dense_{stem}_")


def class_names(data: XScaleDataModule) -> list[str]:
    """Names of the classes, or their numbers."""
    return list(data.class_names or map(str, range(data.num_mask_classes or 0)))


def _standardised(images: Tensor, bands: Bands) -> Tensor:
    mean, std = (torch.tensor(v, device=images.device).view(1, -1, 1, 1) for v in (bands.means, bands.stds))
    return (images.float() - mean) / std


def _variety(mask: Tensor, num_classes: int) -> float:
    """Entropy of the shares that the classes have of a mask `[H, W]`."""
    known = mask[(mask >= 0) & (mask < num_classes)].flatten()
    return float(torch.special.entr(torch.bincount(known) / max(1, len(known))).sum())


def _thinning(pixels: Tensor) -> int:
    """Step through pixels that leaves as many as `torch.quantile` takes."""
    return max(1, math.ceil(pixels.shape[-1] / 1_000_000))
