"""What the processes of one run owe each other: to stop together, without waiting for it, and not to stay alone."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from xscale_lightning import launched
from xscale_lightning.callbacks import preemption
from xscale_lightning.callbacks.preemption import Preemption
from xscale_lightning.errors import Stopped


class Processes:
    """A stand-in for a Trainer of two processes; the other one reports what is in `other`."""

    def __init__(self) -> None:
        self.world_size, self.global_step, self.agreed = 2, 0, list[int]()
        self.other = torch.zeros(2)
        self.strategy = SimpleNamespace(root_device="cpu", reduce=self._reduce)
        self.fit_loop = SimpleNamespace(epoch_loop=SimpleNamespace(_should_accumulate=lambda: False))
        self.checkpoint_callbacks, self.is_global_zero, self.log_dir = [], True, None

    def _reduce(self, tensor, reduce_op):
        assert reduce_op == "max"
        self.agreed.append(self.global_step)
        return torch.maximum(tensor, self.other)


@pytest.fixture
def processes(monkeypatch):
    """The stand-in, and a callback that has begun."""
    callback, trainer = Preemption(), Processes()
    monkeypatch.setattr(callback, "_listen", lambda trainer: None)
    callback.on_train_start(trainer, None)

    def steps(count: int) -> None:
        for _ in range(count):
            trainer.global_step += 1
            callback.on_train_batch_end(trainer, None, None, None, 0)

    return callback, trainer, steps


def test_they_agree_every_ten_steps(processes):
    _, trainer, steps = processes
    steps(35)
    assert trainer.agreed == [1, 11, 21, 31]


def test_slow_steps_of_any_process_make_them_agree_more_often(processes):
    _, trainer, steps = processes
    trainer.other = torch.tensor([0.0, 2.0])  # seconds per step, of the other process
    steps(7)
    assert trainer.agreed == [1, 3, 5, 7]
    trainer.other = torch.tensor([0.0, 60.0])
    steps(4)
    assert trainer.agreed == [1, 3, 5, 7, 9, 10, 11]


@pytest.mark.parametrize("where", ["here", "there"])
def test_a_signal_of_one_process_stops_all_at_the_same_step(processes, where):
    callback, trainer, steps = processes
    steps(2)
    if where == "here":
        callback._signal = signal.SIGTERM
    else:
        trainer.other = torch.tensor([float(signal.SIGTERM), 0.0])
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        steps(30)
    assert trainer.global_step == 11 and stopped.value.code == preemption.PREEMPTED


def test_a_signal_before_the_first_hook_of_training_is_ours_already(train, seed, tmp_path, monkeypatch):
    """Lightning's own handler would end the run with exit code 0 and without a checkpoint."""
    run = Trainer._run_stage

    def run_stage(self):
        os.kill(os.getpid(), signal.SIGTERM)
        return run(self)

    monkeypatch.setattr(Trainer, "_run_stage", run_stage)
    with pytest.raises(Stopped):
        train(tmp_path, "straight", callbacks=[Preemption()])
    state = torch.load(tmp_path / "straight/checkpoints/last.ckpt", weights_only=True)
    assert state["global_step"] == 1


def test_the_first_process_says_so_and_the_others_watch_it(monkeypatch):
    watched = []
    monkeypatch.setattr(launched, "watch", watched.append)
    for name in ("LOCAL_RANK", launched.LAUNCHER):
        monkeypatch.delenv(name, raising=False)
    launched.leave_with_launcher()
    assert os.environ[launched.LAUNCHER] == str(os.getpid())
    monkeypatch.setenv("LOCAL_RANK", "0")
    launched.leave_with_launcher()
    assert watched == []
    monkeypatch.setenv("LOCAL_RANK", "1")
    launched.leave_with_launcher()
    end = time.monotonic() + 5
    while not watched and time.monotonic() < end:
        time.sleep(0.01)
    assert watched == [os.getpid()]
    monkeypatch.delenv(launched.LAUNCHER)  # started by torchrun
    launched.leave_with_launcher()
    assert watched == [os.getpid()]


def test_a_process_whose_launcher_is_gone_ends():
    """The child of a child, which waits for ever, is gone soon after its parent."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        parent = os.getpid()
        if os.fork() == 0:
            os.close(read)
            launched.watch(parent, pause=0.01, grace=0.05)  # never returns
        time.sleep(0.1)
        os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    begun = time.monotonic()
    assert os.read(read, 1) == b""  # the end of the pipe: nobody holds it any more
    assert time.monotonic() - begun < 5
    os.close(read)
