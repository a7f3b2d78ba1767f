"""Orders of samples as functions of (seed, epoch) that may begin inside an epoch, and what is random in a sample."""

import os
import signal
import threading
from collections.abc import Iterator, Sequence, Sized
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.seed import pl_worker_init_function
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from xscale_lightning.seeds import mix_seed, run_seed, seed_generators, seeded


def replicas_and_rank() -> tuple[int, int]:
    """Number of training processes and which one this is, from torch.distributed where it runs."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_world_size(), torch.distributed.get_rank()
    return 1, 0


class Draw(NamedTuple):
    """What a sampler hands to a dataset: which sample, and what its random numbers start from."""

    index: Any
    seed: int
    epoch: int = 0
    number: int = -1
    """Its place in the epoch, where somebody else's sampler has drawn it."""


class SeededSamples(Dataset[Any]):
    """Samples whose random numbers (torch's, NumPy's, Python's) are functions of (seed, epoch, sample) alone.

    So a transform that draws gives the same in a resumed run, and with any number of worker processes. In training what
    takes the place of a damaged sample is such a function, too: see `Reader`.
    """

    def __init__(self, dataset: Dataset[Any], training: bool = True, sampler: Any = None) -> None:
        """Wrap a dataset; a `Draw` seeds its sample, any other index does not.

        Args:
            dataset: what to read from.
            training: whether damaged samples are replaced; else they are left out.
            sampler: the `DrawnSampler` or `DrawnBatches` that draws, if it is one.
        """
        self.dataset, self.training, self.sampler = dataset, training, sampler

    def __len__(self) -> int:
        """Number of samples."""
        return len(self.dataset)  # type: ignore[arg-type]

    def __getitem__(self, draw: Any) -> Any:
        """One sample."""
        if not isinstance(draw, Draw):
            return self.dataset[draw]
        seed_generators(draw.seed)
        if self.sampler is not None and getattr(self.dataset, "replaces", False):
            return self.dataset.read(draw.index, self._others(draw))  # type: ignore[attr-defined]
        return self.dataset[draw.index]

    def _others(self, draw: Draw) -> Iterator[Any]:
        """The windows after one, in its epoch."""
        drawn = draw_all(self.sampler.source, self.sampler.seed, draw.epoch)
        flat = [other for entry in drawn for other in (entry if isinstance(entry, list) else [entry])]
        yield from (flat[(draw.number + step) % len(flat)].index for step in range(1, len(flat)))

    def __getitems__(self, draws: Sequence[Any]) -> Any:
        """A batch; a dataset that fetches whole batches is seeded once for each."""
        whole = getattr(self.dataset, "__getitems__", None)
        one_by_one = getattr(self.dataset, "replaces", False)
        if whole is None or (one_by_one and self.training):
            return [self[draw] for draw in draws]
        if one_by_one:
            return [sample for draw in draws for sample in self._readable(draw)]
        if isinstance(draws[0], Draw):
            seed_generators(draws[0].seed)
        return whole([draw.index if isinstance(draw, Draw) else draw for draw in draws])

    def _readable(self, draw: Any) -> list[Any]:
        if isinstance(draw, Draw):
            seed_generators(draw.seed)
        return self.dataset.__getitems__([draw.index if isinstance(draw, Draw) else draw])  # type: ignore[attr-defined]


class ResumableSampler(DistributedSampler[Any]):
    """Base: this process's part of an epoch, from any place on. Lightning calls `set_epoch`."""

    _begin = (0, 0)

    def begin_at(self, epoch: int, first: int) -> None:
        """Leave out the first samples of this process in one epoch; nothing is read for it."""
        self._begin = (epoch, first)
        self.set_epoch(epoch)

    @property
    def first(self) -> int:
        """Number of samples to leave out in the present epoch."""
        return self._begin[1] if self._begin[0] == self.epoch else 0


class ShuffledSampler(ResumableSampler):
    """Order of the samples as a function of (seed, epoch) alone, so a resumed run goes on with the order it had."""

    def __init__(self, dataset: Dataset[Any]) -> None:
        """Take the run's seed from `seed_everything`."""
        replicas, rank = replicas_and_rank()
        super().__init__(dataset, num_replicas=replicas, rank=rank, shuffle=True, seed=run_seed() % 2**31)

    def __iter__(self) -> Iterator[Draw]:
        """Yield this process's samples of the present epoch."""
        order = list(super().__iter__())[self.first :]
        return (Draw(index, mix_seed(self.seed, self.epoch, index)) for index in order)


class DrawnSampler(ResumableSampler):
    """Somebody else's sampler (random windows of a GeoDataset), made a function of (seed, epoch)."""

    def __init__(self, sampler: Any) -> None:
        """Wrap a sampler that has a length."""
        replicas, rank = replicas_and_rank()
        super().__init__(sampler, num_replicas=replicas, rank=rank, shuffle=False, seed=run_seed() % 2**31)
        self.source = sampler

    def __iter__(self) -> Iterator[Draw]:
        """Yield this process's samples of the present epoch."""
        drawn = draw_all(self.source, self.seed, self.epoch)
        mine = [drawn[number % len(drawn)] for number in range(self.rank, self.total_size, self.num_replicas)]
        return iter(mine[self.first :])


class DrawnBatches:
    """The same for a batch sampler; positions count batches. One process only, as the samplers that there are."""

    def __init__(self, sampler: Any) -> None:
        """Wrap a batch sampler that has a length."""
        self.source, self.batch_size = sampler, getattr(sampler, "batch_size", None)
        self.seed, self.epoch, self._begin = run_seed() % 2**31, 0, (0, 0)
        self.sampler = self  # where Lightning looks for `set_epoch`

    def __len__(self) -> int:
        """Number of batches in an epoch."""
        return len(self.source)

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before every epoch."""
        self.epoch = epoch

    def begin_at(self, epoch: int, first: int) -> None:
        """Leave out the first batches in one epoch."""
        self._begin = (epoch, first)
        self.set_epoch(epoch)

    def __iter__(self) -> Iterator[list[Draw]]:
        """Yield the batches of the present epoch."""
        first = self._begin[1] if self._begin[0] == self.epoch else 0
        return iter(draw_all(self.source, self.seed, self.epoch)[first:])


def draw_all(sampler: Any, seed: int, epoch: int) -> list[Any]:
    """Everything a sampler yields in an epoch, with seeds for its samples; the generators stay as they were."""
    start = mix_seed(seed, epoch)
    own = getattr(sampler, "generator", None)
    if isinstance(own, torch.Generator):
        own.manual_seed(start)
    with seeded(start):
        drawn = list(sampler)
    numbers = iter(range(2**62))

    def name(index: Any) -> Draw:
        number = next(numbers)
        return Draw(index, mix_seed(seed, epoch, number), epoch, number)

    return [[name(index) for index in entry] if isinstance(entry, list) else name(entry) for entry in drawn]


def make_resumable(dataset: Dataset[Any], options: dict[str, Any], training: bool) -> Dataset[Any]:
    """Put our samplers into a loader's `options`; returns the dataset to read from, which takes their draws."""
    sampler: Any = None
    if options.pop("shuffle", False):
        options["sampler"] = ShuffledSampler(dataset)
    elif isinstance(options.get("batch_sampler"), Sized):
        options["batch_sampler"] = sampler = DrawnBatches(options["batch_sampler"])
    elif isinstance(options.get("sampler"), Sized) and not isinstance(options["sampler"], ResumableSampler):
        options["sampler"] = sampler = DrawnSampler(options["sampler"])
    else:
        return dataset
    return SeededSamples(dataset, training, sampler)


def begin_inside(loader: DataLoader[Any], epoch: int, batch: int) -> bool:
    """Let a loader begin with one batch of an epoch. False if its sampler cannot, so that batches must be read past."""
    batches, samples = getattr(loader, "batch_sampler", None), getattr(loader, "sampler", None)
    if isinstance(batches, DrawnBatches):
        batches.begin_at(epoch, batch)
    elif isinstance(samples, ResumableSampler) and loader.batch_size is not None:
        samples.begin_at(epoch, batch * loader.batch_size)
    else:
        if isinstance(samples, DistributedSampler):
            samples.set_epoch(epoch)
        return batch == 0
    return True


def begin_worker(worker: int) -> None:
    """Set up a worker process: it goes when the training process says so, and only then.

    A terminal sends Ctrl-C to all processes of a command, a scheduler SIGTERM. The training process then still needs
    its workers: it writes a checkpoint at the next optimizer step and stops them itself.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_leave_when_told, args=(os.getppid(),), daemon=True).start()
    if int(os.environ.get("PL_SEED_WORKERS", 0)):
        pl_worker_init_function(worker)


def _leave_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
