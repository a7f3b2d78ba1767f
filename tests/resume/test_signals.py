"""SIGTERM, SIGUSR1 and Ctrl-C: a checkpoint at the next optimizer step, an exit code, no process left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from xscale_lightning.callbacks import preemption
from xscale_lightning.callbacks.geometry import FeatureGeometry
from xscale_lightning.callbacks.saving import CheckpointFiles
from xscale_lightning.callbacks.trace import Trace, read_rows
from xscale_lightning.data.samplers import begin_worker
from xscale_lightning.errors import Stopped

LAST = ("--ckpt_path", "last")


@pytest.fixture
def send(monkeypatch):
    """Sends this process signals before one of the training batches."""

    def arrange(batch: int, *numbers: int) -> None:
        def before(self, trainer, pl_module, content, batch_idx):
            if trainer.fit_loop.total_batch_idx == batch:
                monkeypatch.delattr(Trace, "on_train_batch_start")
                for number in numbers:
                    os.kill(os.getpid(), number)

        monkeypatch.setattr(Trace, "on_train_batch_start", before, raising=False)

    return arrange


@pytest.mark.parametrize(
    ("number", "code", "name"),
    [(signal.SIGTERM, 75, "SIGTERM"), (signal.SIGUSR1, 75, "SIGUSR1"), (signal.SIGINT, 130, "Ctrl-C")],
)
def test_the_run_stops_after_the_step_and_goes_on_exactly(command, send, capfd, number, code, name):
    changes = {"checkpoint": {"minutes": None}, "trainer": {**command.config["trainer"], "accumulate_grad_batches": 2}}
    assert command.fit(name="straight", **changes) == 0
    for run in command.runs():
        run.rename(command.folder / "straight")
    before = signal.getsignal(number)
    send(0, number)
    assert command.fit(**changes) == code
    assert signal.getsignal(number) == before, "the process keeps our handler"
    assert [int(row[0]) for row in command.rows()] == [0, 1], "it stops at the end of the step, not of the batch"
    (run,) = command.runs()
    message = capfd.readouterr().err
    assert f"stopped by {name}; to go on: xscale fit --config {run}/config.yaml --ckpt_path last" in message
    assert "Traceback" not in message
    assert json.loads((run / "results.json").read_text())["status"] == "interrupted"
    assert command.fit(*LAST, **changes) == 0
    assert command.rows() == command.rows("straight")


def test_a_second_ctrl_c_ends_it_at_once(command, send):
    send(2, signal.SIGINT, signal.SIGINT)
    assert command.fit() == 130
    assert len(command.rows()) == 2, "the batch was finished first"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_while_validating_waits_for_its_end(command, monkeypatch, number, code):
    changes = {"checkpoint": {"minutes": None}, "trainer": {**command.config["trainer"], "val_check_interval": 2}}

    def on_validation_start(self, trainer, pl_module):
        if trainer.global_step == 2:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Trace, "on_validation_start", on_validation_start, raising=False)
    assert command.fit(**changes) == code and len(command.rows()) == 2
    monkeypatch.undo()
    state = torch.load(next(command.output.rglob("last.ckpt")), weights_only=True)
    assert state["global_step"] == 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("when", ["step 0", "writing"])
def test_a_signal_while_step_0_is_measured_or_a_checkpoint_written(command, monkeypatch, capfd, when, number):
    """It waits for the next optimizer step; the checkpoint that was being written is whole."""
    assert command.fit(name="straight") == 0
    for run in command.runs():
        run.rename(command.folder / "straight")
    sent, saved = [], []

    def send() -> None:
        if not sent:
            sent.append(number)
            os.kill(os.getpid(), number)

    real_probe, real_save = FeatureGeometry.probe, CheckpointFiles.save_checkpoint

    def probe(self, trainer, pl_module):
        send()
        return real_probe(self, trainer, pl_module)

    class Sends:
        """Plain content that is asked for while it is written."""

        def __reduce__(self):
            send()
            return str, ()

    def save(self, checkpoint, path, storage_options=None):
        saved.append(path)
        content = {**checkpoint, "sends": Sends()} if len(saved) == 3 else checkpoint
        real_save(self, content, path, storage_options)
        assert path.stat().st_size if isinstance(path, Path) else os.path.getsize(path)

    with monkeypatch.context() as patch:
        if when == "step 0":
            patch.setattr(FeatureGeometry, "probe", probe)
        else:
            patch.setattr(CheckpointFiles, "save_checkpoint", save)
        assert command.fit() == (130 if number == signal.SIGINT else 75)
    assert sent and "Traceback" not in capfd.readouterr().err
    (run,) = command.runs()
    done = 1 if when == "step 0" else 4
    assert len(command.rows()) == done
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == done
    assert command.fit(*LAST) == 0
    assert command.rows() == command.rows("straight")


@pytest.mark.parametrize("full", [False, True])
def test_a_signal_after_the_end_says_what_is_written(command, monkeypatch, capfd, full):
    """12 steps are no two epochs more: `last.ckpt` is written after the signal, and the disk may be full by then."""
    steps = {"max_epochs": 9, "max_steps": 12}
    saving = {"minutes": None, "every_n_epochs": 2}
    changes = {"checkpoint": saving, "trainer": {**command.config["trainer"], **steps}}

    def on_train_end(self, trainer, pl_module):
        os.kill(os.getpid(), signal.SIGTERM)
        if full:
            monkeypatch.setattr(os, "fsync", lambda handle: (_ for _ in ()).throw(OSError(28, "No space left")))

    monkeypatch.setattr(Trace, "on_train_end", on_train_end, raising=False)
    assert command.fit(**changes) == (1 if full else 75)
    message, found = capfd.readouterr().err, list(command.output.rglob("last.ckpt"))
    assert "stopped by SIGTERM after the end of training" in message
    steps = [torch.load(path, weights_only=True)["global_step"] for path in found]
    if full:
        assert "the last.ckpt of its end (step 12) could not be written; that of step 10 is kept" in message
        assert steps == [10]
    else:
        assert steps == [12] and f"its weights are in '{found[0]}'" in message


def test_without_checkpoints_it_says_that_nothing_is_kept(send, train, tmp_path, monkeypatch):
    send(1, signal.SIGTERM)
    monkeypatch.setattr(preemption, "RunCheckpoint", Trace)  # none of that kind is there
    with pytest.raises(Stopped, match="nothing of it is kept") as stopped:
        train(tmp_path, "straight", callbacks=[preemption.Preemption()])
    assert stopped.value.code == 75


def test_the_job_is_queued_again(command, send, monkeypatch, tmp_path, capfd):
    """With SLURM's environment, SIGUSR1 means so; `scontrol` is a script that writes down what it is told."""
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "17")

    start = preemption.Preemption.on_train_start

    def with_slurm(self, trainer, pl_module):
        start(self, trainer, pl_module)
        self._requeue_signal = signal.SIGUSR1

    monkeypatch.setattr(preemption.Preemption, "on_train_start", with_slurm)
    send(1, signal.SIGUSR1)
    assert command.fit() == 75
    assert (tmp_path / "told").read_text() == "requeue 17\n"


def session(leader: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == leader and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_with_workers(command, tmp_path, number):
    """SIGTERM to the whole group, as a scheduler sends it; SIGKILL to the training process alone."""
    content = {**command.config, "trainer": {**command.config["trainer"], "max_epochs": 200}}
    content["data"]["init_args"]["num_workers"] = 2
    config, trace = tmp_path / "small.yaml", tmp_path / "trace.txt"
    config.write_text(yaml.safe_dump(content))
    words = [sys.executable, "-m", "xscale_lightning.cli", "fit", "--config", str(config), "--trace.file", str(trace)]
    child = subprocess.Popen(
        [*words, "--output", str(command.output)],
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
    )
    try:
        end = time.monotonic() + 90
        while (not trace.is_file() or len(read_rows(trace)) < 3) and time.monotonic() < end:
            assert child.poll() is None, child.stderr and child.stderr.read()
            time.sleep(0.05)
        assert len(session(child.pid)) >= 3
        (os.killpg if number == signal.SIGTERM else os.kill)(child.pid, number)
        error = child.communicate(timeout=60)[1]
        assert child.returncode == (75 if number == signal.SIGTERM else -signal.SIGKILL), error
        assert "Traceback" not in error
        end = time.monotonic() + 20  # workers look for their parent every 5 seconds
        while session(child.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not session(child.pid)
    finally:
        for process in session(child.pid):
            os.kill(process, signal.SIGKILL)
    count, step = len(read_rows(trace)), int(read_rows(trace)[-1][1])
    command.killed_at(count + 3, *LAST, config=config)
    rows = read_rows(trace)
    if number == signal.SIGTERM:
        assert [int(row[0]) for row in rows] == list(range(count + 3)), "nothing is run twice after SIGTERM"
        assert int(rows[count][1]) == step + 1


def test_a_worker_ignores_what_a_terminal_sends_and_leaves_for_its_parent():
    child = os.fork()
    if child == 0:
        begin_worker(0)
        time.sleep(30)
        os._exit(1)
    time.sleep(0.3)
    os.kill(child, signal.SIGINT)
    subprocess.run([sys.executable, "-S", "-c", f"import os; os.kill({child}, 15)"], check=True)  # not the parent
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0), "it has left"
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
