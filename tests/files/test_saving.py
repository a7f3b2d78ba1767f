"""A disk that is full while a run writes: the run goes on, keeps what it has, and says at the end what is missing."""

import errno
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from xscale_lightning import checkpoints, cli, unwritten
from xscale_lightning.callbacks.event_log import EventFile, RunLogger
from xscale_lightning.callbacks.saving import Checkpoint, CheckpointFiles, use_checkpoint_files

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Tiny(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def training_step(self, batch, batch_idx):
        loss = self.layer(batch).mean()
        self.log("loss", loss, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


@pytest.fixture
def disk(monkeypatch):
    """`disk.full` says of a file whether there is no room for it."""
    state = SimpleNamespace(full=lambda path: False)
    real = os.replace

    def replace(part, target):
        if state.full(Path(target)):
            raise FULL
        real(part, target)

    monkeypatch.setattr(os, "replace", replace)
    unwritten.forget()
    yield state
    unwritten.forget()


def train(folder: Path, epochs: int, callback: ModelCheckpoint, ckpt_path: str | None = None) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        logger=False,
        callbacks=[callback],
        max_epochs=epochs,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    use_checkpoint_files(trainer)
    torch.manual_seed(0)
    data = torch.utils.data.DataLoader(torch.randn(4, 4), batch_size=2)
    trainer.fit(Tiny(), data, ckpt_path=ckpt_path, weights_only=True)
    return trainer


def steps(folder: Path) -> dict[str, int]:
    return {path.name: torch.load(path, weights_only=True)["global_step"] for path in folder.glob("*.ckpt")}


@pytest.mark.parametrize("kind", [Checkpoint, ModelCheckpoint])
@pytest.mark.parametrize("options", [{"save_last": True}, {"monitor": "loss", "save_top_k": 1, "save_last": True}])
def test_the_last_good_checkpoints_stay(tmp_path, disk, capsys, kind, options):
    callback = kind(dirpath=tmp_path, filename="{step}", **options)
    disk.full = lambda path: path.suffix == ".ckpt" and len(list(tmp_path.glob("*.ckpt"))) >= 2
    trainer = train(tmp_path, 3, callback)
    assert trainer.global_step == 6 and not list(tmp_path.glob(".*"))
    assert steps(tmp_path) == {"step=2.ckpt": 2, "last.ckpt": 2}
    err = capsys.readouterr().err
    assert "of step 6 is not written (No space left on device: " in err and " needed, " in err and " free); " in err
    assert f"the last good one is '{tmp_path / 'last.ckpt'}' of step 2" in err
    assert unwritten.tell() == 1
    if kind is Checkpoint:
        assert callback.last_model_path == str(tmp_path / "last.ckpt") and Path(callback.best_model_path).is_file()
        assert all(Path(path).is_file() for path in callback.best_k_models)


def test_a_later_checkpoint_makes_good(tmp_path, disk):
    disk.full = lambda path: "step=2" in path.name
    callback = Checkpoint(dirpath=tmp_path, filename="{step}", save_last=True)
    train(tmp_path, 2, callback)
    assert steps(tmp_path) == {"step=4.ckpt": 4, "last.ckpt": 4} and not unwritten.lost()
    disk.full = lambda path: path.name == "last.ckpt"
    callback = Checkpoint(dirpath=tmp_path, filename="{step}", save_last=True)
    train(tmp_path, 3, callback, ckpt_path=str(tmp_path / "last.ckpt"))
    assert steps(tmp_path)["last.ckpt"] == 4 and list(unwritten.lost()) == [str(tmp_path / "last.ckpt")]


def test_the_state_has_the_key_of_lightnings_class(tmp_path):
    ours, theirs = (kind(dirpath=tmp_path, save_last=True) for kind in (Checkpoint, ModelCheckpoint))
    assert ours.state_key == theirs.state_key


def test_an_error_on_the_way_is_counted_to_the_end(tmp_path, monkeypatch, capsys):
    """The size that was needed is told although writing stopped at the first bytes."""
    real = Path.open

    class Small(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 1000:
                raise FULL
            return super().write(data)

    def opened(self, mode="r", **options):
        return Small(self, "w") if mode == "wb" else real(self, mode, **options)

    monkeypatch.setattr(Path, "open", opened)
    unwritten.forget()
    files = CheckpointFiles()
    files.save_checkpoint({"state_dict": {"w": torch.zeros(1_000_000)}, "global_step": 3}, tmp_path / "a.ckpt")
    assert files.failed and "4.0 MB needed" in capsys.readouterr().err and not os.listdir(tmp_path)
    unwritten.forget()


def test_a_checkpoint_is_opened_as_carefully_by_the_trainer(tmp_path):
    (tmp_path / "x.ckpt").write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(checkpoints.UserError, match="damaged or no checkpoint"):
        CheckpointFiles().load_checkpoint(str(tmp_path / "x.ckpt"), weights_only=True)


def test_plugins_of_the_user_are_left_alone():
    class Own(CheckpointFiles):
        pass

    own = Own()
    trainer = Trainer(accelerator="cpu", plugins=[own], logger=False)
    use_checkpoint_files(trainer)
    assert trainer.strategy.checkpoint_io is own
    trainer = Trainer(accelerator="cpu", logger=False)
    use_checkpoint_files(trainer)
    assert type(trainer.strategy.checkpoint_io) is CheckpointFiles


def scalars(folder: Path) -> list[tuple[int, float]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    if "a" not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars("a")]


def test_tensorboard_reads_a_run_while_it_is_written(tmp_path):
    logger = RunLogger(str(tmp_path), name="n", version="v", default_hp_metric=False)
    reader = EventAccumulator(logger.log_dir)
    for step in range(3):
        logger.log_metrics({"a": step / 2}, step=step)
        logger.save()
        reader.Reload()
        assert [event.step for event in reader.Scalars("a")] == list(range(step + 1))
    logger.experiment.add_image("p", torch.zeros(3, 4, 4), 2)
    logger.finalize("success")
    reader.Reload()
    assert reader.Tags()["images"] == ["p"]
    assert (tmp_path / "n" / "v" / "hparams.yaml").is_file()


def test_a_run_that_goes_on_takes_back_what_came_after_its_checkpoint(tmp_path):
    for purge, values in ((None, [0, 1, 2, 3]), (2, [20, 30])):
        options = {} if purge is None else {"purge_step": purge}
        logger = RunLogger(str(tmp_path), name="n", version="v", default_hp_metric=False, **options)
        for step, value in enumerate(values, start=purge or 0):
            logger.log_metrics({"a": float(value)}, step=step)
        logger.finalize("success")
    assert scalars(tmp_path / "n" / "v") == [(0, 0.0), (1, 1.0), (2, 20.0), (3, 30.0)]


def test_a_log_on_a_full_disk_waits_and_is_never_torn(tmp_path, monkeypatch, capsys):
    unwritten.forget()
    logger = RunLogger(str(tmp_path), name="n", version="v", default_hp_metric=False)
    logger.log_metrics({"a": 0.0}, step=0)
    logger.save()
    room, real = [10], io.FileIO.write

    class Small(io.FileIO):
        def write(self, data):
            if not room[0]:
                raise FULL
            count = real(self, bytes(data[: room[0]]))
            room[0] -= count
            return count

    module = "xscale_lightning.callbacks.event_log"
    monkeypatch.setattr(f"{module}.open", lambda path, mode, buffering: Small(path, "ab"), raising=False)
    monkeypatch.setattr(f"{module}.ATTEMPT_SECONDS", 0.0)
    for step in range(1, 4):
        logger.log_metrics({"a": float(step)}, step=step)
        logger.save()
    assert scalars(tmp_path / "n" / "v") == [(0, 0.0)]
    assert capsys.readouterr().err.count("the run goes on") == 1 and unwritten.tell() == 1
    room[0] = 10**6
    logger.log_metrics({"a": 4.0}, step=4)
    logger.finalize("success")
    assert [step for step, _ in scalars(tmp_path / "n" / "v")] == [0, 1, 2, 3, 4]
    assert unwritten.tell() == 0
    unwritten.forget()


def test_what_waits_for_room_is_bounded(tmp_path, monkeypatch):
    unwritten.forget()
    monkeypatch.setattr("xscale_lightning.callbacks.event_log.KEPT", 1000)
    log = EventFile(str(tmp_path))
    log.path = Path("/dev/full")
    for _ in range(100):
        log.write(bytes(100))
    log.add_event(__import__("tensorboard.compat.proto.event_pb2", fromlist=["Event"]).Event(step=1))
    assert sum(map(len, log._waiting)) <= 1000 and log._dropped
    unwritten.forget()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of a few megabytes."""
    folder = tmp_path / "small"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mount is not permitted here")
    yield folder
    unwritten.forget()
    subprocess.run(["umount", str(folder)], check=True)


def test_a_fit_on_a_small_disk(small_disk, tmp_path, staged, process, capsys):
    changes = {"stages": None, "trainer": {**staged.config["trainer"], "max_epochs": 6}}
    first = staged.write(tmp_path, stages=None, trainer={**changes["trainer"], "max_epochs": 1})
    (whole,) = staged.fit(first, tmp_path / "large").glob("checkpoints/last.ckpt")
    room = whole.stat().st_size * 9 // 2  # for the checkpoints of three epochs, the last one among them, and the log
    config = staged.write(tmp_path, **changes)
    (small_disk / "filler").write_bytes(bytes(max(0, shutil.disk_usage(small_disk).free - room)))
    unwritten.forget()
    capsys.readouterr()
    code = cli.main(["fit", "--config", str(config), "--output", str(small_disk / "runs"), "--debug"])
    (run,) = (small_disk / "runs" / "mae").iterdir()
    err = capsys.readouterr().err
    written = list((run / "checkpoints").glob("*.ckpt"))
    assert code == 1 and "of step 12 is not written (No space left on device: " in err
    assert not list(run.rglob("*.part")) and not (run / ".lock").exists()
    assert written and all(checkpoints.read_metadata(path) for path in written)
    results = run / "results.json"
    if results.exists():
        assert json.loads(results.read_text())["unwritten"]
