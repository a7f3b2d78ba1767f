"""Orders that are functions of (seed, epoch) and begin anywhere; randomness of a sample that has no history."""

import random

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, WeightedRandomSampler

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.data.samplers import DrawnBatches, DrawnSampler, ShuffledSampler, begin_inside, make_resumable
from xscale_lightning.seeds import mix_seed, seeded


class Drawing(Dataset):
    """Samples with a user's transform that draws from all three generators."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        drawn = [float(torch.rand(())), float(np.random.rand()), random.random()]
        return {"image": torch.tensor([index, *drawn], dtype=torch.float64).view(4, 1, 1), "gsd": torch.tensor(10.0)}


class Drawn(XScaleDataModule):
    def build_dataset(self, split):
        return Drawing()


def batches(loader: DataLoader, epoch: int, first: int = 0) -> torch.Tensor:
    assert begin_inside(loader, epoch, first)
    return torch.cat([batch["image"].flatten(1) for batch in loader])


@pytest.mark.parametrize("workers", [0, 2])
def test_what_a_transform_draws_is_a_function_of_seed_epoch_and_sample(workers, monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "5")
    straight = Drawn(BandSelection("rgb"), batch_size=4, num_workers=0).train_dataloader()
    epochs = [batches(straight, epoch) for epoch in range(2)]
    assert not torch.equal(epochs[0], epochs[1])
    by_sample = [dict(zip(epoch[:, 0].tolist(), epoch[:, 1].tolist(), strict=True)) for epoch in epochs]
    assert all(by_sample[0][index] != by_sample[1][index] for index in range(12)), "an epoch repeats the one before"
    torch.rand(7)  # another history
    loader = Drawn(BandSelection("rgb"), batch_size=4, num_workers=workers).train_dataloader()
    for epoch, first in ((1, 2), (0, 1), (1, 0), (1, 1)):
        assert torch.equal(batches(loader, epoch, first), epochs[epoch][4 * first :]), (epoch, first)
    assert len(loader) == 3, "the length is that of the whole epoch"


def test_another_epoch_begins_at_its_beginning():
    sampler = ShuffledSampler(Drawing())
    sampler.begin_at(3, 8)
    assert len(list(sampler)) == 4 and len(list(sampler)) == 4
    sampler.set_epoch(4)
    assert len(list(sampler)) == 12


@pytest.mark.parametrize("kind", [RandomSampler, lambda data: WeightedRandomSampler([1.0] * 12, 12)])
def test_a_foreign_sampler_becomes_a_function_of_seed_and_epoch(kind):
    sampler = DrawnSampler(kind(Drawing()))
    state = torch.get_rng_state()
    first = [draw.index for draw in sampler]
    assert torch.equal(torch.get_rng_state(), state), "the run's generator moved"
    sampler.set_epoch(1)
    second = [draw.index for draw in sampler]
    assert first != second and len(first) == 12
    torch.rand(3)
    sampler.begin_at(0, 5)
    assert [draw.index for draw in sampler] == first[5:]


def test_a_foreign_sampler_with_a_generator_of_its_own_has_no_history_either():
    sampler = DrawnSampler(RandomSampler(Drawing(), generator=torch.Generator().manual_seed(1)))
    assert [draw.index for draw in sampler] == [draw.index for draw in sampler]


def test_batches_of_a_foreign_batch_sampler():
    options = {"batch_sampler": BatchSampler(RandomSampler(Drawing()), 5, drop_last=False)}
    data = make_resumable(Drawing(), options, training=True)
    loader = DataLoader(data, **options)
    assert isinstance(loader.batch_sampler, DrawnBatches) and len(loader) == 3
    straight = batches(loader, 1)
    assert torch.equal(batches(loader, 1, 2), straight[10:]) and not torch.equal(batches(loader, 0), straight)


def test_a_loader_without_our_sampler_cannot_begin_inside():
    assert begin_inside(DataLoader(Drawing()), 1, 0) and not begin_inside(DataLoader(Drawing()), 1, 2)


def test_processes_share_an_epoch(monkeypatch):
    parts = []
    for rank in range(2):
        monkeypatch.setattr("xscale_lightning.data.samplers.replicas_and_rank", lambda rank=rank: (2, rank))
        parts.append([draw.index for draw in DrawnSampler(RandomSampler(Drawing()))])
    assert sorted(parts[0] + parts[1]) == list(range(12))


def test_seeds():
    assert mix_seed(0, 1) != mix_seed(1, 0) and 0 <= mix_seed(3, 2, 1) < 2**63
    before = torch.rand(1), np.random.rand(), random.random()
    with seeded(4):
        inside = torch.rand(1), np.random.rand(), random.random()
    with seeded(4):
        assert inside == (torch.rand(1), np.random.rand(), random.random()) != before
