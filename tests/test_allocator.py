"""Freed memory stays with a process that trains on a CPU."""

import subprocess
import sys

import pytest

STEPS = """
import resource, sys
import torch
from xscale_lightning.allocator import keep_freed_memory
torch.set_num_threads(1)
kept = keep_freed_memory() if sys.argv[1] == "kept" else None
def step():
    blocks = [torch.full((2**20,), 1.0) for _ in range(16)]  # 4 MiB each: 1,024 pages
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 5)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="page faults are counted on Linux")
def test_steps_take_the_same_memory_again():
    done = subprocess.run([sys.executable, "-c", STEPS, "kept"], capture_output=True, text=True)
    kept, faults = done.stdout.split()
    if kept == "False":
        pytest.skip("not glibc")
    assert int(faults) < 50, done.stderr  # without it 204 with large pages (of 2 MiB), 16,352 with small ones


def test_the_users_own_settings_win(monkeypatch):
    from xscale_lightning.allocator import keep_freed_memory

    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert keep_freed_memory() is False
