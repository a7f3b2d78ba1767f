"""Pictures of reconstructions, and masked PSNR beside two base lines that see the same pixels."""

import math
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from xscale_lightning.callbacks.probe import (
    Measurement,
    ProbeCallback,
    evaluation_split,
    publish_picture,
    run_folder,
    to_device,
)
from xscale_lightning.callbacks.sampling import sample_batches
from xscale_lightning.callbacks.sources import held_out_loader
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.pictures import composite, picture_grid, shown_channels, stretch_limits
from xscale_lightning.evaluation.reconstruction import (
    MAX_QUANTILE_VALUES,
    ErrorSums,
    bilinear_inpainting,
    error_sums,
    mean_fill,
    percentile_range,
    psnr,
)
from xscale_lightning.methods.output import Reconstruction

TITLES = ("original", "masked", "reconstruction", "with visible pixels")


class ReconstructionPictures(ProbeCallback):
    """Reconstructs the same held-out images with the same masks every time.

    Writes `<run>/pictures/step_0000123.png` and the same picture to TensorBoard, and logs `reconstruction/psnr`,
    `reconstruction/psnr_mean_fill` and `reconstruction/psnr_bilinear` (dB, hidden pixels only). Methods that put no
    pixels back are skipped. Without a logger there is no run folder and only the figures are kept.

    Args:
        num_images: rows of the picture.
        num_score_images: images that the PSNR is computed over.
        seed: draws images and masks.
        false_colour: near infrared, red, green instead of natural colours.
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.

    Raises:
        UserError: if a number is below 1; when the run starts, if bands for a false-colour picture are missing.
    """

    def __init__(
        self,
        num_images: int = 6,
        num_score_images: int = 64,
        seed: int = 0,
        false_colour: bool = False,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(every_n_epochs)
        for name, value in (("num_images", num_images), ("num_score_images", num_score_images)):
            if value < 1:
                raise UserError(f"ReconstructionPictures.{name}: {value} is not possible; give at least 1.")
        self.num_images = num_images
        self.num_score_images = num_score_images
        self.seed = seed
        self.false_colour = false_colour
        self._explained = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a false-colour picture that the bands cannot give."""
        shown_channels(pl_module.bands, self.false_colour)  # type: ignore[arg-type]

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Reconstruct, score and draw, batch by batch: only the picture's rows and the error sums are kept."""
        loader = held_out_loader(trainer)
        if loader is None:
            return None
        count = max(self.num_images, self.num_score_images)
        rows: list[tuple[Tensor, ...]] = []
        values: list[Tensor] = []
        sums: dict[str, ErrorSums] = {}
        for i, raw in enumerate(sample_batches(loader, count, self.seed)):
            result = self._reconstruct(trainer, pl_module, raw, self.seed + i)
            if result is None:
                return None
            target, prediction = result.target.float(), result.prediction.float()
            visible = result.visible.expand_as(target)
            kept = max(0, self.num_images - sum(len(row[0]) for row in rows))
            if kept:
                rows.append(tuple(part[:kept].cpu() for part in (target, prediction, visible)))
            if result.borrows:
                self._explain("the target is normalised per patch, so pictures borrow from the original; no PSNR.")
                if sum(len(row[0]) for row in rows) == self.num_images:
                    break
                continue
            values.append(_thinned(target, count))
            for name, guess in (
                ("", prediction),
                ("mean fill", mean_fill(target, visible)),
                ("bilinear inpainting", bilinear_inpainting(target, visible)),
            ):
                part = error_sums(target, guess, visible)
                sums[name] = sums[name] + part if name in sums else part
        picture = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        if picture and not bool(picture[2].all()) and trainer.is_global_zero:
            self._draw(trainer, pl_module, *picture)
        if not sums or not bool(sums[""].count.any()):
            return None
        scale = percentile_range(torch.cat(values))
        scores = {name: psnr(part, scale) for name, part in sums.items()}
        metric = "reconstruction/psnr"
        return Measurement({metric: scores.pop("")}, evaluation_split(trainer), {metric: scores})

    def _reconstruct(
        self, trainer: Trainer, pl_module: LightningModule, raw: dict[str, Any], seed: int
    ) -> Reconstruction | None:
        """One batch, in the run's precision; None from methods that put no pixels back."""
        batch = to_device(trainer, pl_module, raw)
        with trainer.precision_plugin.forward_context():
            output = pl_module.evaluate(batch, seed)  # type: ignore[operator]
            return None if output.reconstruction is None else output.reconstruction()

    def _explain(self, text: str) -> None:
        if not self._explained:
            rank_zero_info(f"ReconstructionPictures: {text}")
            self._explained = True

    def _draw(
        self, trainer: Trainer, pl_module: LightningModule, target: Tensor, prediction: Tensor, visible: Tensor
    ) -> None:
        if run_folder(trainer) is None:
            self._explain("no logger, so no run folder; no pictures are written.")
            return
        rows = slice(0, self.num_images)
        target, prediction, visible = target[rows], prediction[rows], visible[rows]
        channels = shown_channels(pl_module.bands, self.false_colour)  # type: ignore[arg-type]
        # One stretch for all rows: colours stay comparable, and a uniform scene does not turn garish.
        together = target.transpose(0, 1).flatten(1).unsqueeze(0).unsqueeze(2)  # [1, C, 1, N * H * W]
        limits = stretch_limits(together).expand(len(target), -1, -1)
        columns = [
            composite(target, channels, limits),
            composite(target, channels, limits, visible),
            composite(prediction, channels, limits),
            composite(torch.where(visible, target, prediction), channels, limits),
        ]
        publish_picture(trainer, picture_grid(columns, TITLES), "reconstruction")


def _thinned(target: Tensor, images: int) -> Tensor:
    """Every n-th pixel of `[B, C, H, W]` as `[B, C, 1, M]`: of `images` such images, as many as percentiles need."""
    pixels = target.flatten(2)
    return pixels[:, :, :: max(1, math.ceil(images * pixels.shape[2] / MAX_QUANTILE_VALUES))].unsqueeze(2)
