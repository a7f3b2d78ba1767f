"""A fixed, representative part of a data set, and its features."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader, SequentialSampler, Subset

from xscale_lightning.callbacks.probe import to_device
from xscale_lightning.data.left_out import InOrder

Batch = dict[str, Any]


def sample_loader(loader: DataLoader[Any], limit: int | None, seed: int = 0) -> DataLoader[Any]:
    """Loader of `limit` samples of a data set in order, always the same ones.

    Data sets are often sorted by class: their first samples would be one class. So the samples are drawn at random
    from the whole set with a fixed seed. Where that is impossible (the data set has no length, or a sampler of its own)
    the loader comes back as it is.
    """
    dataset = loader.dataset
    drawable = hasattr(dataset, "__len__") and isinstance(loader.sampler, SequentialSampler)
    if limit is None or not drawable or loader.batch_size is None:  # None: it has a batch sampler of its own
        return loader
    size = len(dataset)  # type: ignore[arg-type]
    if limit >= size:
        return loader
    chosen = torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:limit].sort().values
    return InOrder(
        Subset(dataset, chosen.tolist()),
        batch_size=loader.batch_size,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
    )


def sample_batches(loader: DataLoader[Any], limit: int | None, seed: int = 0) -> Iterator[Batch]:
    """Batches of `sample_loader`, cut so that there are never more than `limit` samples."""
    seen = 0
    for batch in sample_loader(loader, limit, seed):
        count = len(batch["image"])
        keep = count if limit is None else min(count, limit - seen)
        yield batch if keep == count else cut_batch(batch, keep)
        seen += keep
        if limit is not None and seen >= limit:
            return


def cut_batch(batch: Batch, count: int) -> Batch:
    """First `count` samples of a batch: tensors and lists with one entry per sample are cut."""
    size = len(batch["image"])
    return {
        key: value[:count] if isinstance(value, (Tensor, list)) and len(value) == size else value
        for key, value in batch.items()
        if not (isinstance(value, Tensor) and value.ndim == 0)
    }


def extract_features(
    trainer: Trainer, pl_module: LightningModule, loader: DataLoader[Any], limit: int | None
) -> tuple[Tensor, Tensor | None]:
    """Features `[N, D]` float32 and labels `[N]` or `[N, K]` (None where the data has none), on the model's device."""
    (features,), labels = extract_variants(trainer, pl_module, loader, limit, [lambda batch: batch])
    return features, labels


def extract_variants(
    trainer: Trainer,
    pl_module: LightningModule,
    loader: DataLoader[Any],
    limit: int | None,
    variants: Sequence[Callable[[Batch], Batch]],
) -> tuple[list[Tensor], Tensor | None]:
    """Features of several variants of the same images, which are read once; otherwise as `extract_features`."""
    features: list[list[Tensor]] = [[] for _ in variants]
    labels = []
    batches = 0
    for raw in sample_batches(loader, limit):
        batch = to_device(trainer, pl_module, raw)
        for found, variant in zip(features, variants, strict=True):
            with trainer.precision_plugin.forward_context():
                found.append(pl_module.features(variant(batch)).float())  # type: ignore[operator]
        if "label" in batch:
            labels.append(batch["label"])
        batches += 1
    if not batches:
        return [torch.empty(0, 0, device=pl_module.device) for _ in variants], None
    return [torch.cat(found) for found in features], torch.cat(labels) if len(labels) == batches else None
