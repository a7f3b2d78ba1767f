"""Pairs of MR and HR images as spatial affinity needs them: what is refused, and how HR gets the units of MR."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import Batch

FARTHEST = 0.1  # micrometres between the centres of two bands that stand for the same


def check_paired_data(data: Any, bands: Bands, ratio: int, source: str) -> None:
    """Refuse a data module whose pairs cannot be those of `ratio` and `bands`, as far as it says what it delivers.

    Raises:
        UserError: no HR, another ratio, another number of HR bands, or HR bands in another order.
    """
    files = hasattr(data, "ratio")  # pairs of files; else HR that is degraded to MR
    given = getattr(data, "ratio" if files else "pair_ratio", None)
    if given == 1 and not files:
        raise UserError(f"source {source} needs HR and the data deliver none: set data.pair_ratio to {ratio}.")
    if given is not None and given != ratio:
        name = "data.ratio (with data.resample true where the files' is another)" if files else "data.pair_ratio"
        raise UserError(
            f"source {source} with model.ratio {ratio}, the data's pairs have ratio {given}: set model.ratio and "
            f"{name} to the same whole number."
        )
    finer: Bands | None = getattr(data, "bands_hr", None)
    if finer is None:
        return
    if len(finer) != len(bands):
        raise UserError(
            f"data.bands are {len(bands)} ({_listed(bands)}) and data.bands_hr {len(finer)} ({_listed(finer)}): "
            "name the same bands for both."
        )
    for here, there in zip(bands.bands, finer.bands, strict=True):
        centres = here.wavelength, there.wavelength
        if None not in centres and abs(centres[0] - centres[1]) > FARTHEST:  # type: ignore[operator]
            raise UserError(
                f"data.bands and data.bands_hr do not go together: {here.name} ({here.wavelength:g} um) stands beside "
                f"{there.name} ({there.wavelength:g} um): name the same bands in the same order."
            )


def _listed(bands: Bands) -> str:
    names = bands.names
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])}, ..."


def check_pair(batch: Batch, ratio: int, source: str) -> None:
    """Refuse a batch without `image_hr`, or with one of another size than `ratio` says or of other bands.

    Raises:
        UserError: naming what is there and the remedy.
    """
    coarse, fine = batch["image"], batch.get("image_hr")
    if fine is None:
        raise UserError(
            f"source {source} needs batch['image_hr'] and the data deliver none: take paired data (with "
            "SceneFolder or SampleScene data.pair_ratio), or set model.source to mr or interpolated."
        )
    if fine.shape[1] != coarse.shape[1]:
        raise UserError(
            f"image has {coarse.shape[1]} bands and image_hr {fine.shape[1]}: choose the same bands for both."
        )
    if not pair_fits(batch, ratio):
        (h, w), (fine_h, fine_w) = (tuple(x.shape[-2:]) for x in (coarse, fine))
        whole = fine_h % h == 0 and fine_w % w == 0 and fine_h // h == fine_w // w
        remedy = f"set model.ratio to {fine_h // h}" if whole else "deliver HR at a whole multiple of the MR size"
        raise UserError(
            f"image_hr of {fine_h} x {fine_w} pixels is not {ratio} times the image of {h} x {w}: {remedy}."
        )


def pair_fits(batch: Batch, ratio: int) -> bool:
    """Whether the batch has an `image_hr` of as many bands as its image and `ratio` times its size."""
    fine, (bands, height, width) = batch.get("image_hr"), batch["image"].shape[1:]
    return fine is not None and tuple(fine.shape[1:]) == (bands, ratio * height, ratio * width)


def hr_in_units_of_mr(bands: Bands, finer: Bands, like: Tensor) -> tuple[Tensor, Tensor]:
    """`(gain, shift) [1, C, 1, 1]`: raw HR `* gain + shift` has the means and deviations of raw MR, band by band.

    So each sensor is normalised by its own statistics, as in the published code, although the host knows MR's alone.
    """
    mean, std, mean_hr, std_hr = (
        torch.tensor(values, device=like.device, dtype=like.dtype).view(1, -1, 1, 1)
        for values in (bands.means, bands.stds, finer.means, finer.stds)
    )
    gain = std / std_hr
    return gain, mean - mean_hr * gain


def enlarged(batch: Batch, ratio: int) -> Batch:
    """A prepared batch with its own image, enlarged `ratio` times, as `image_hr`: larger input, no finer ground."""
    images, gsd = batch["image"], batch.get("gsd")
    finer = F.interpolate(images, scale_factor=ratio, mode="bilinear", align_corners=False)
    return {**batch, "image_hr": finer.to(images.dtype), **({} if gsd is None else {"gsd_hr": gsd / ratio})}


def hr_alone(batch: Batch) -> Batch:
    """The batch with HR in the place of MR."""
    gsd = {"gsd": batch["gsd_hr"]} if "gsd_hr" in batch else {}
    return {
        **{key: value for key, value in without_hr(batch).items() if key != "gsd"},
        "image": batch["image_hr"],
    } | gsd


def without_hr(batch: Batch) -> Batch:
    """The batch without HR."""
    return {key: value for key, value in batch.items() if key not in ("image_hr", "gsd_hr")}
