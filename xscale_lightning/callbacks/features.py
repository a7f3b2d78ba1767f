"""Features of whole splits, computed once for all probes that ask for them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from xscale_lightning.callbacks.sampling import Batch, extract_variants
from xscale_lightning.callbacks.sources import patch_size
from xscale_lightning.data.datamodule import Split, XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.scales import scale_batch


@dataclass(frozen=True)
class SplitFeatures:
    """What a split gives to probes, on the model's device."""

    features: dict[float, Tensor]
    """`[N, D]` float32 by share of the native image size."""
    labels: Tensor
    """`[N]` or `[N, K]`."""
    statistics: Tensor
    """`[N, 2C]`: mean and deviation of every band of the image, in units of the data's band record."""
    total: int | None
    """Samples in the whole split, of which N were taken; None if the data does not know."""


_found: WeakKeyDictionary[Trainer, tuple[Any, dict[Any, SplitFeatures]]] = WeakKeyDictionary()


def split_features(
    trainer: Trainer,
    pl_module: LightningModule,
    data: XScaleDataModule,
    split: Split,
    limit: int | None,
    shares: Sequence[float] = (1.0,),
) -> SplitFeatures:
    """Features of a split at one or several scales; kept until the weights change or the command ends.

    Args:
        trainer: of the run.
        pl_module: the model.
        data: labelled data.
        split: which part of it.
        limit: at most so many samples, always the same ones.
        shares: of the native image size, 1.0 first.

    Raises:
        UserError: if the data gives batches without label, or the split is empty.
    """
    weights = (trainer.state.fn, trainer.global_step)
    stamp, kept = _found.get(trainer, (None, {}))
    if stamp != weights:
        kept = {}
        _found[trainer] = (weights, kept)
    key = (id(data), split, limit)
    known = kept.get(key)
    missing = [share for share in shares if known is None or share not in known.features]
    if missing:
        fresh = _extract(trainer, pl_module, data, split, limit, missing)
        features = {**(known.features if known else {}), **fresh.features}
        kept[key] = known = SplitFeatures(features, fresh.labels, (known or fresh).statistics, fresh.total)
    assert known is not None
    return known


def forget_features(trainer: Trainer) -> None:
    """Free what `split_features` keeps."""
    _found.pop(trainer, None)


def _extract(
    trainer: Trainer,
    pl_module: LightningModule,
    data: XScaleDataModule,
    split: Split,
    limit: int | None,
    shares: list[float],
) -> SplitFeatures:
    patch, statistics = patch_size(pl_module), []

    def first(batch: Batch) -> Batch:
        statistics.append(_band_statistics(batch["image"], data))
        return scale_batch(batch, shares[0], patch)

    variants = [first, *(partial(scale_batch, share=share, patch=patch) for share in shares[1:])]
    loader = data.probe_dataloader(split)
    found, labels = extract_variants(trainer, pl_module, loader, limit, variants)
    if not statistics:
        raise UserError(f"data: the {split} split of {data.name} is empty; choose other data.")
    if labels is None:
        raise UserError(f"data: {data.name} gives batches without label; give labelled data.")
    dataset = loader.dataset
    total = len(dataset) if hasattr(dataset, "__len__") else None  # type: ignore[arg-type]
    return SplitFeatures(dict(zip(shares, found, strict=True)), labels, torch.cat(statistics), total)


def _band_statistics(images: Tensor, data: XScaleDataModule) -> Tensor:
    mean, std = (torch.tensor(values, device=images.device) for values in (data.bands.means, data.bands.stds))
    pixels = images.float().flatten(2)
    return torch.cat([(pixels.mean(2) - mean) / std, pixels.std(2, correction=0) / std], dim=1)
