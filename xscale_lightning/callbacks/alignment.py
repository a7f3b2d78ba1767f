"""Do the pairs show the same ground? A number and a picture before training starts."""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor

from xscale_lightning.callbacks.probe import Measurement, ProbeCallback, evaluation_split, publish_picture
from xscale_lightning.callbacks.sampling import sample_batches
from xscale_lightning.callbacks.sources import held_out_loader
from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.alignment import Displacement, checkerboard, displacement, edge_overlay
from xscale_lightning.evaluation.pictures import composite, picture_grid

TITLES = ("MR", "HR", "HR edges on MR", "checkerboard")
MAX_SIDE = 512  # pixels of a picture's cell
MANY = 20  # bands from which on the first three say little


class PairAlignment(ProbeCallback):
    """Measures how far HR lies beside MR on held-out pairs, and shows both footprints over each other.

    Writes `<run>/pictures/alignment_step_0000000.png` and logs `alignment/shift_rows`, `alignment/shift_cols`,
    `alignment/error` (HR pixels) and `alignment/correlation`. Data without `image_hr` is passed over.

    The check fires where HR lies more than `tolerance` beside MR, even if the estimate is off by two standard errors,
    and at least `agreement` of the windows say so: a wrong georeference moves everything alike, clouds do not.

    Args:
        num_pairs: pairs that the displacement is measured over.
        num_shown: rows of the picture.
        tolerance: displacement in HR pixels beyond which the check fires.
        agreement: share of the windows that must be displaced alike for the check to fire.
        min_correlation: share of a band's variance in a window that HR must explain for the band to be listened to.
        action: "warn" or "stop" where the check fires.
        seed: draws the pairs.

    Raises:
        UserError: if a number is out of range; in a run, if the check fires and is to stop it.
    """

    def __init__(
        self,
        num_pairs: int = 32,
        num_shown: int = 4,
        tolerance: float = 0.5,
        agreement: float = 0.75,
        min_correlation: float = 0.3,
        action: Literal["warn", "stop"] = "warn",
        seed: int = 0,
    ) -> None:
        super().__init__(every_n_epochs=0)
        for name, value in (("num_pairs", num_pairs), ("num_shown", num_shown)):
            if value < 1:
                raise UserError(f"PairAlignment.{name}: {value} is not possible; give at least 1.")
        if tolerance <= 0:
            raise UserError(f"PairAlignment.tolerance: {tolerance} is not possible; give HR pixels above 0.")
        if not 0 <= agreement < 1:
            raise UserError(f"PairAlignment.agreement: {agreement} is not possible; give 0 to below 1.")
        if not 0 <= min_correlation < 1:
            raise UserError(f"PairAlignment.min_correlation: {min_correlation} is not possible; give 0 to below 1.")
        if action not in ("warn", "stop"):
            raise UserError(f"PairAlignment.action: {action} is not possible; give warn or stop.")
        self.num_pairs, self.num_shown, self.seed = num_pairs, num_shown, seed
        self.tolerance, self.agreement = tolerance, agreement
        self.min_correlation, self.action = min_correlation, action
        self.found: Displacement | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing: training does not move the data."""

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Measure, draw and judge."""
        loader = held_out_loader(trainer)
        parts: list[tuple[Tensor, Tensor, Tensor]] = []
        for batch in sample_batches(loader, self.num_pairs, self.seed) if loader is not None else ():
            if "image_hr" not in batch:
                return None
            parts.append((batch["image"].float(), batch["image_hr"].float(), batch["gsd_hr"].float()))
        if not parts:
            return None
        mr, hr, gsd = (torch.cat(values).cpu() for values in zip(*parts, strict=True))
        self._draw(trainer, pl_module, mr[: self.num_shown], hr[: self.num_shown])
        self.found = displacement(mr, hr, min_share=self.min_correlation)
        if self.found is None:
            rank_zero_info("PairAlignment: the pairs are too few, small or uniform to measure their displacement.")
            return None
        self._judge(self.found, float(gsd.mean()))
        metrics = {"alignment/correlation": self.found.correlation}
        if self.found.windows:
            metrics |= {
                "alignment/shift_rows": self.found.rows,
                "alignment/shift_cols": self.found.cols,
                "alignment/error": self.found.error,
            }
        return Measurement(metrics, evaluation_split(trainer))

    def _judge(self, found: Displacement, gsd: float) -> None:
        if not found.windows:
            rank_zero_warn(
                f"PairAlignment: in hardly any of {found.looked_at} windows do the bands of MR agree where HR lies (HR "
                f"explains {found.correlation:.0%} of their variance): too little to tell whether they are aligned."
            )
        elif found.pixels - 2 * found.error > self.tolerance and found.agreeing >= self.agreement:
            least = "at least " if found.at_limit else ""
            text = (
                f"HR lies {least}{found.rows:+.2f} rows and {found.cols:+.2f} columns of HR "
                f"({found.pixels * gsd:.3g} m; +- {found.error:.2f} pixels) beside MR (positive: down, right); "
                "see pictures/alignment_step_*.png and mend the georeference"
            )
            if self.action == "stop":
                raise UserError(f"data: {text}, or set the tolerance of PairAlignment ({self.tolerance:g} HR pixels).")
            rank_zero_warn(f"PairAlignment: {text}.")

    def _draw(self, trainer: Trainer, pl_module: LightningModule, mr: Tensor, hr: Tensor) -> None:
        data: Any = getattr(trainer, "datamodule", None)
        bands: Bands | None = getattr(data, "bands", None) or getattr(pl_module, "bands", None)
        bands_hr: Bands | None = getattr(data, "bands_hr", None) or bands
        size = tuple(min(side, MAX_SIDE) for side in hr.shape[-2:])
        fine = F.interpolate(hr, size=size, mode="area") if size != tuple(hr.shape[-2:]) else hr
        coarse = composite(mr, _channels(bands, mr))
        # Nearest, by the footprint: MR's pixels are to be seen as what they are.
        coarse = F.interpolate(coarse, size=size, mode="nearest-exact")
        fine = composite(fine, _channels(bands_hr, hr))
        # Edges at twice MR's resolution: every leaf of a wood has one, which MR could never show.
        rough = F.interpolate(
            fine, size=tuple(min(a, 2 * b) for a, b in zip(size, mr.shape[-2:], strict=True)), mode="area"
        )
        rough = F.interpolate(rough, size=size, mode="bilinear", align_corners=False)
        columns = [coarse, fine, edge_overlay(coarse, rough), checkerboard(coarse, fine)]
        publish_picture(trainer, picture_grid(columns, TITLES), "alignment", prefix="alignment_")


def _channels(bands: Bands | None, images: Tensor) -> tuple[int, int, int]:
    count = images.shape[1]
    if bands is not None and len(bands) == count and (count <= MANY or any(bands.wavelengths)):
        return bands.rgb
    if count > MANY:  # hundreds of nameless bands: the first ones are often mostly noise
        return 3 * count // 4, count // 2, count // 4
    return (0, 1, 2) if count >= 3 else (0, 0, 0)
