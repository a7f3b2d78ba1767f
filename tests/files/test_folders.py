"""Two processes never write into one folder, and a lock of a process that is gone is no obstacle."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from xscale_lightning.commands.writing import writing
from xscale_lightning.errors import UserError
from xscale_lightning.locks import LOCK, acquire, held, release

HOLD = """
import os, sys, time
from pathlib import Path
from xscale_lightning.locks import acquire
acquire(Path(sys.argv[1]))
if os.fork():
    print("held", flush=True)
time.sleep(60)
"""


TAKE = """
import sys
try:
    locks.acquire(Path(sys.argv[1]), "run folder")
except ValueError as error:
    print(error)
"""


def trainer(logger: object) -> Trainer:
    return Trainer(accelerator="cpu", logger=logger, enable_progress_bar=False, enable_model_summary=False)


def taken(folder: Path) -> str:
    """What another process is told that wants the folder; "" if it gets it."""
    words = [sys.executable, "-c", f"from xscale_lightning import locks; from pathlib import Path\n{TAKE}", str(folder)]
    return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()


def test_a_folder_is_held_by_one_process_and_given_back(tmp_path):
    handle = acquire(tmp_path, "run folder")
    assert f"run folder '{tmp_path}' is in use by process {os.getpid()} on " in taken(tmp_path)
    again = acquire(tmp_path)
    release(again)
    assert "in use" in taken(tmp_path)
    release(handle)
    release(handle)
    assert not (tmp_path / LOCK).exists() and not taken(tmp_path)
    with held(tmp_path / "new"):
        assert (tmp_path / "new" / LOCK).is_file()
    assert not (tmp_path / "new" / LOCK).exists()


def test_a_process_that_was_killed_leaves_no_obstacle(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    with pytest.raises(UserError, match=f"process {process.pid} on"):
        acquire(tmp_path)
    children = [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
    process.kill()
    process.wait()
    handle = acquire(tmp_path)  # although a child of it, as a worker that loads data, is still there
    assert handle is not None and f"process {os.getpid()} " in (tmp_path / LOCK).read_text()
    release(handle)
    for child in children:
        os.kill(child, 9)
    process.stdout.close()


@pytest.mark.parametrize("make", [TensorBoardLogger, CSVLogger])
def test_the_folder_of_another_run_is_refused(tmp_path, make):
    given = trainer(make(str(tmp_path), name="a", version="mine"))
    folder = tmp_path / "a" / "mine"
    with writing(given, None, None):
        assert "in use by process" in taken(folder)
    (folder / "results.json").write_text("{}")
    with pytest.raises(UserError, match=r"holds a run already \(results\.json\): give the logger another version"):
        writing(given, None, None).__enter__()
    for resumed, checkpoint in ((None, folder / "checkpoints" / "last.ckpt"), (folder, None)):  # the run that goes on
        with writing(given, resumed, checkpoint and str(checkpoint)):
            assert (folder / LOCK).is_file()


def test_what_a_killed_process_was_writing_goes(tmp_path):
    given = trainer(TensorBoardLogger(str(tmp_path), name="a", version="mine"))
    folder = tmp_path / "a" / "mine" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / ".tmp123.part").write_bytes(b"half")
    (folder / "last.ckpt").write_bytes(b"whole")
    with writing(given, tmp_path / "a", None):
        assert os.listdir(folder) == ["last.ckpt"]


def test_without_a_logger_there_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with writing(trainer(False), None, None):
        assert not os.listdir(tmp_path)
