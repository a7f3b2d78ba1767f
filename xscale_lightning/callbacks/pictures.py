"""Pictures of reconstructions, and masked PSNR beside two base lines that see the same pixels."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from xscale_lightning.callbacks.probe import (
    Measurement,
    ProbeCallback,
    evaluation_split,
    log_scalars,
    publish,
    publish_picture,
    run_folder,
    to_device,
)
from xscale_lightning.callbacks.sampling import cut_batch, sample_batches
from xscale_lightning.callbacks.sources import held_out_loader
from xscale_lightning.callbacks.steps import current_step
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.pictures import composite, picture_grid, shown_channels, stretch_limits
from xscale_lightning.evaluation.ratio_figure import FigureText, ratio_figure
from xscale_lightning.evaluation.ratios import (
    BILINEAR,
    MEAN,
    RATIOS,
    RatioScores,
    Restored,
    check_ratios,
    raw_angle_sum,
    restore_at_ratios,
    restored,
    score,
)
from xscale_lightning.evaluation.reconstruction import (
    MAX_QUANTILE_VALUES,
    ErrorSums,
    bilinear_inpainting,
    error_sums,
    mean_fill,
    percentile_range,
    psnr,
)
from xscale_lightning.evaluation.spectral import AngleSum
from xscale_lightning.methods.measure import evaluation

TITLES = ("original", "masked", "reconstruction", "with visible pixels")
DRAWN = 2  # images of the ratio figure
LOG_NAMES = {"mean fill": "mean_fill", BILINEAR: "bilinear"}


class ReconstructionPictures(ProbeCallback):
    """Reconstructs the same held-out images with the same masks every time.

    Writes `<run>/pictures/step_0000123.png` and the same picture to TensorBoard, and logs `reconstruction/psnr`,
    `reconstruction/psnr_mean_fill` and `reconstruction/psnr_bilinear` (dB, hidden pixels only) and
    `reconstruction/spectral_angle` (degrees, raw units). Methods that put no pixels back are skipped. Without a logger
    there is no run folder and only the numbers are kept.

    Methods with a `mask_ratio` are shown at several: `pictures/ratios_step_0000123.png` has the first images with
    nested masks, and `reconstruction/psnr_at_90` is the PSNR with 90 % hidden, over few images.

    Args:
        num_images: rows of the picture.
        num_score_images: images that the PSNR is computed over.
        seed: draws images and masks.
        false_colour: near infrared, red, green instead of natural colours.
        ratios: mask ratios of the second picture; an empty list leaves it out.
        num_ratio_images: images that its numbers are computed over; the first two are drawn.
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.

    Raises:
        UserError: if a number is below 1 or a ratio not between 0 and 1; when the run starts, if bands for a
            false-colour picture are missing.
    """

    def __init__(
        self,
        num_images: int = 6,
        num_score_images: int = 64,
        seed: int = 0,
        false_colour: bool = False,
        ratios: Sequence[float] = RATIOS,
        num_ratio_images: int = 4,
        every_n_epochs: int = 1,
    ) -> None:
        super().__init__(every_n_epochs)
        counts = {"num_images": num_images, "num_score_images": num_score_images, "num_ratio_images": num_ratio_images}
        for name, value in counts.items():
            if value < 1:
                raise UserError(f"ReconstructionPictures.{name}: {value} is not possible; give at least 1.")
        check_ratios(ratios, "ReconstructionPictures.ratios")
        self.num_images = num_images
        self.num_score_images = num_score_images
        self.ratios, self.num_ratio_images = tuple(ratios), num_ratio_images
        self.seed = seed
        self.false_colour = false_colour
        self._explained: set[str] = set()
        self._image_size: list[int] | None = None

    def state_dict(self) -> dict[str, Any]:
        """Height and width of the images: `xscale reconstruct` takes a window of that size."""
        return {"image_size": self._image_size}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self._image_size = state_dict.get("image_size")

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
        angles: dict[str, AngleSum] = {}
        first: dict[str, Any] | None = None
        for i, raw in enumerate(sample_batches(loader, count, self.seed)):
            batch = to_device(trainer, pl_module, raw)
            first = first or cut_batch(batch, self.num_ratio_images)
            self._image_size = list(batch["image"].shape[-2:])
            result = self._reconstruct(trainer, pl_module, batch, self.seed + i)
            if result is None:
                return None
            target, prediction, visible = result.target, result.prediction, result.visible
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
                (BILINEAR, bilinear_inpainting(target, visible)),
            ):
                _add(sums, name, error_sums(target, guess, visible))
                bands: Any = pl_module.bands
                if len(bands) > 1:  # the spectrum of one band has no shape
                    _add(angles, name, raw_angle_sum(target, guess, visible, bands))
        picture = [torch.cat(parts) for parts in zip(*rows, strict=True)]
        if picture and not bool(picture[2].all()) and trainer.is_global_zero:
            self._draw(trainer, pl_module, *picture)
        self._publish_ratios(trainer, self._ratios(trainer, pl_module, first))
        if not sums or not bool(sums[""].count.any()):
            return None
        scale = percentile_range(torch.cat(values))
        scores = {name: psnr(part, scale) for name, part in sums.items()}
        metric, angle = "reconstruction/psnr", "reconstruction/spectral_angle"
        metrics, base_lines = {metric: scores.pop("")}, {metric: scores}
        if angles:
            metrics[angle] = angles.pop("").mean
            # Not among the base lines of the measurement, of which the highest counts as the best one.
            log_scalars(trainer, {f"{angle}_{LOG_NAMES[name]}": part.mean for name, part in angles.items()})
        return Measurement(metrics, evaluation_split(trainer), base_lines)

    def _publish_ratios(self, trainer: Trainer, scores: Mapping[float, RatioScores]) -> None:
        """The numbers of every ratio, apart from those of the training's own: they are of fewer images."""
        metrics, base_lines = {}, {}
        for ratio, part in scores.items():
            if part.method is not None:
                name = f"reconstruction/psnr_at_{100 * ratio:g}"
                metrics[name] = part.method.psnr
                base_lines[name] = {n.replace(MEAN, "mean fill"): s.psnr for n, s in part.base_lines.items()}
        if metrics and trainer.is_global_zero:
            publish(trainer, Measurement(metrics, evaluation_split(trainer), base_lines))

    def _reconstruct(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any], seed: int
    ) -> Restored | None:
        """One batch, in the run's precision and in standard units; None from methods that put no pixels back."""
        with trainer.precision_plugin.forward_context(), evaluation(pl_module):
            output = pl_module.evaluate(batch, seed)  # type: ignore[operator]
            if output.reconstruction is None:
                return None
            return restored(output.reconstruction(), batch["image"], pl_module)  # type: ignore[arg-type]

    def _ratios(
        self, trainer: Trainer, pl_module: LightningModule, batch: dict[str, Any] | None
    ) -> Mapping[float, RatioScores]:
        """Reconstruct the first images at every ratio, draw, and return the numbers."""
        if batch is None or not self.ratios or not hasattr(pl_module, "mask_ratio"):
            return {}
        method: Any = pl_module
        try:
            with trainer.precision_plugin.forward_context(), evaluation(pl_module):
                found, left_out = restore_at_ratios(method, batch, self.ratios, self.seed)
        except UserError as error:  # no ratio at all is possible
            found, left_out = {}, {ratio: str(error) for ratio in self.ratios}
        for ratio, reason in left_out.items():
            self._explain(f"ratio {ratio:g} is left out: {reason}")
        scores = score(found, method.bands)
        if found and trainer.is_global_zero and run_folder(trainer) is not None:
            first = {ratio: part.first(DRAWN) for ratio, part in found.items()}
            text = FigureText(
                f"{getattr(method, 'method_name', type(method).__name__)}, step {current_step(trainer)}",
                (f"Numbers over {len(batch['image'])} images.",),
            )
            picture = ratio_figure(first, scores, method.bands, text)
            publish_picture(trainer, picture, "reconstruction/mask_ratios", prefix="ratios_")
        return scores

    def _explain(self, text: str) -> None:
        if text not in self._explained:
            rank_zero_info(f"ReconstructionPictures: {text}")
            self._explained.add(text)

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


def _add(sums: dict[str, Any], name: str, part: Any) -> None:
    sums[name] = sums[name] + part if name in sums else part


def _thinned(target: Tensor, images: int) -> Tensor:
    """Every n-th pixel of `[B, C, H, W]` as `[B, C, 1, M]`: of `images` such images, as many as percentiles need."""
    pixels = target.flatten(2)
    return pixels[:, :, :: max(1, math.ceil(images * pixels.shape[2] / MAX_QUANTILE_VALUES))].unsqueeze(2)
