"""Checks of a run's input that cost one look at the first batch."""

import torch
from torch import Tensor

from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.models.vit import Encoder

# A band whose normalised values lie this far out was normalised with another product's statistics.
MAX_MEAN, MIN_STD, MAX_STD = 5.0, 0.02, 20.0


def check_plane(encoder: Encoder, method: str) -> None:
    """Refuse an encoder of spectral cubes for a method whose tokens lie in the image plane.

    Raises:
        UserError: naming the method that takes it.
    """
    groups = encoder.token_grid(encoder.patch_size, encoder.patch_size)[0]
    if groups > 1:
        raise UserError(
            f"{method} takes patches of all bands, and this backbone cuts {groups} spectral cubes at every place: "
            "take a vit_* backbone, or method s2mae."
        )


def check_finite(raw: Tensor, bands: Bands) -> None:
    """Refuse raw images `[B, C, H, W]` with values that are not finite.

    Raises:
        UserError: naming the band.
    """
    finite = raw.float().isfinite().all(dim=3).all(dim=2).all(dim=0).tolist()
    for band, good in zip(bands.bands, finite, strict=True):
        if not good:
            raise UserError(
                f"band {band.name} of the first batch has values that are not finite: "
                "clean the data or name its nodata value."
            )


def check_statistics(images: Tensor, raw: Tensor, bands: Bands) -> None:
    """Stop a run whose band statistics cannot belong to its data.

    Args:
        images: first batch after normalisation `[B, C, H, W]`.
        raw: the same batch before it.
        bands: record whose statistics were used.

    Raises:
        UserError: a band is not finite, or its normalised mean or deviation is absurd (for example 0-255 statistics
            on 16-bit data); the message gives the measured values.
    """
    check_finite(raw, bands)
    values, measured = images.float().transpose(0, 1).flatten(1), raw.float().transpose(0, 1).flatten(1)  # [C, B*H*W]
    stacked = torch.stack([values.mean(1), values.std(1), measured.mean(1), measured.std(1)]).cpu().tolist()
    for band, mean, std, raw_mean, raw_std in zip(bands.bands, *stacked, strict=True):
        if abs(mean) > MAX_MEAN or std > MAX_STD or (std < MIN_STD and raw_std > 0):
            raise UserError(
                f"bands: mean {band.mean:g} and std {band.std:g} of band {band.name} do not fit the data: after "
                f"normalisation its mean is {mean:.3g} and its std {std:.3g}.\nThe first batch has mean {raw_mean:.6g} "
                f"and std {raw_std:.6g}: set data.bands.mean and data.bands.std, one value per band."
            )
