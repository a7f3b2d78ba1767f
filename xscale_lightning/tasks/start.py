"""What a task starts from: the options of its encoder, its bands, and where weights come from."""

from dataclasses import replace
from typing import Literal

from xscale_lightning.callbacks.probe import Measurement
from xscale_lightning.data.bands import Bands
from xscale_lightning.init_from import Source, fitting_bands, open_source
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.tasks.scores import Summary

Statistics = Literal["data", "checkpoint"]


def beginning(
    init_from: str | None, bands: Bands | None, backbone: BackboneConfig, adapt_bands: bool, statistics: Statistics
) -> tuple[Source | None, BackboneConfig, Bands | None]:
    """Source of the weights (None: from scratch), options of the encoder, and the record of its bands.

    Raises:
        UserError: weights that cannot be read, or of other bands than `bands`.
    """
    if init_from is None:
        return None, backbone, bands
    source = open_source(init_from, len(bands) if bands else None, None)
    theirs = fitting_bands(source, bands, adapt_bands)
    config = source.config
    if source.bands is None or source.bands.names != theirs.names:
        config = replace(config, wavelengths=None)  # those of the bands at hand
    return source, config, theirs if bands is None or statistics == "checkpoint" else bands


def measurement(split: str, found: Summary) -> Measurement:
    """Scores of a split under their log names."""
    return Measurement(
        metrics={f"{split}/{name}": value for name, value in found.values.items()},
        split=split,
        baselines={f"{split}/{name}": values for name, values in found.baselines.items()},
        errors={f"{split}/{name}": value for name, value in found.errors.items()},
        intervals={f"{split}/{name}": value for name, value in found.intervals.items()},
    )
