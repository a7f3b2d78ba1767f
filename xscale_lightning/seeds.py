"""Seeds: what is random is a function of whole numbers such as (seed, epoch, sample), never of a history."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def run_seed() -> int:
    """The run's seed, as `seed_everything` left it; 0 without."""
    return int(os.environ.get("PL_GLOBAL_SEED", 0))


def mix_seed(*parts: int) -> int:
    """A well-mixed 63-bit seed of several integers (splitmix64's finaliser, folded over them)."""
    state = 0
    for part in parts:
        state = (state ^ (part + 1)) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 27
    return state >> 1


def seed_generators(seed: int) -> None:
    """Seed this process's generators on the CPU: torch's, NumPy's and Python's. Some 20 microseconds."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """The same for a while; afterwards the generators are as they were."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    seed_generators(seed)
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
