"""Pictures of reconstructions, and masked PSNR beside two base lines that see the same pixels."""

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor

from xscale_lightning.callbacks.probe import Measurement, ProbeCallback, evaluation_split, run_folder, to_device
from xscale_lightning.callbacks.sampling import sample_batches
from xscale_lightning.callbacks.sources import held_out_loader
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.pictures import composite, picture_grid, save_png, shown_channels, stretch_limits
from xscale_lightning.evaluation.reconstruction import bilinear_inpainting, masked_psnr, mean_fill, percentile_range

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
        """Reconstruct, score and draw."""
        parts = self._reconstruct(trainer, pl_module)
        if parts is None:
            return None
        target, prediction, visible, borrows = parts
        if bool(visible.all()):
            return None
        if trainer.is_global_zero:
            self._draw(trainer, pl_module, target, prediction, visible)
        if borrows:
            self._explain("the target is normalised per patch, so pictures borrow from the original; no PSNR.")
            return None
        scale = percentile_range(target)
        metric = "reconstruction/psnr"
        baselines = {
            "mean fill": masked_psnr(target, mean_fill(target, visible), visible, scale),
            "bilinear inpainting": masked_psnr(target, bilinear_inpainting(target, visible), visible, scale),
        }
        metrics = {metric: masked_psnr(target, prediction, visible, scale)}
        return Measurement(metrics, evaluation_split(trainer), {metric: baselines})

    def _reconstruct(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Tensor, Tensor, Tensor, bool] | None:
        """Target, prediction, visible pixels `[N, C, H, W]`, and whether they borrow; None without reconstruction."""
        loader = held_out_loader(trainer)
        if loader is None:
            return None
        targets, predictions, masks, borrows = [], [], [], False
        count = max(self.num_images, self.num_score_images)
        for i, raw in enumerate(sample_batches(loader, count, self.seed)):
            batch = to_device(trainer, pl_module, raw)
            with trainer.precision_plugin.forward_context():
                output = pl_module.evaluate(batch, self.seed + i)  # type: ignore[operator]
                if output.reconstruction is None:
                    return None
                result = output.reconstruction()
            targets.append(result.target.float())
            predictions.append(result.prediction.float())
            masks.append(result.visible.expand_as(result.target))
            borrows = borrows or result.borrows
        return (torch.cat(targets), torch.cat(predictions), torch.cat(masks), borrows) if targets else None

    def _explain(self, text: str) -> None:
        if not self._explained:
            rank_zero_info(f"ReconstructionPictures: {text}")
            self._explained = True

    def _draw(
        self, trainer: Trainer, pl_module: LightningModule, target: Tensor, prediction: Tensor, visible: Tensor
    ) -> None:
        folder = run_folder(trainer)
        if folder is None:
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
        picture = picture_grid(columns, TITLES)
        save_png(picture, folder / "pictures" / f"step_{trainer.global_step:07d}.png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                # A copy: TensorBoard turns the array into a tensor, which needs a writable one.
                logger.experiment.add_image(
                    "reconstruction", picture.copy(), global_step=trainer.global_step, dataformats="HWC"
                )
