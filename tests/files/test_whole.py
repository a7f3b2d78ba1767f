"""Files are there whole or not at all, and nothing is left of an attempt."""

import errno
import json
import os

import numpy as np
import pytest
import torch

from xscale_lightning import files, unwritten
from xscale_lightning.commands.journal import JOB, Journal
from xscale_lightning.errors import UserError
from xscale_lightning.files import save_tensors, told, whole, write_bytes, write_json, write_together


@pytest.fixture
def full(monkeypatch):
    """A disk that is full from the moment on that the test says so."""
    state = {"full": False}
    real = os.fsync

    def fsync(handle: int) -> None:
        if state["full"]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    return state


def test_old_or_new_and_nothing_else(tmp_path, full):
    path = write_bytes(tmp_path / "a", b"old")
    full["full"] = True
    with pytest.raises(OSError, match="No space"):
        write_bytes(path, b"new")
    with pytest.raises(ZeroDivisionError), whole(path) as part:
        part.write_bytes(b"half")
        raise ZeroDivisionError
    with pytest.raises(OSError, match="No space"):
        save_tensors({"a": torch.zeros(2)}, tmp_path / "b")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]


def test_content_is_synced_before_it_gets_its_name_and_the_folder_after(tmp_path, monkeypatch):
    done: list[str] = []
    sync, replace = os.fsync, os.replace

    def synced(handle: int) -> None:
        done.append("folder" if os.path.isdir(f"/dev/fd/{handle}") else "file")
        sync(handle)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", lambda a, b: done.append("name") or replace(a, b))
    write_bytes(tmp_path / "a", b"x")
    assert done == ["file", "name", "folder"]


def test_several_files_or_none(tmp_path):
    write_together({tmp_path / "a": b"1", tmp_path / "b": b"2"})
    with pytest.raises(UserError, match=r"c' cannot be written \(No such file or directory\)"):
        write_together({tmp_path / "a": b"3", tmp_path / "none" / "c": b"4"})
    assert (tmp_path / "a").read_bytes() == b"1" and sorted(os.listdir(tmp_path)) == ["a", "b"]


def test_a_full_disk_is_told_with_the_room_there_is(tmp_path):
    message = r"x' cannot be written \(No space .*: [\d.]+ \wB free\); make room and run it again"
    with pytest.raises(UserError, match=message), told(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert files.size(999) == "999 bytes" and files.size(12_345_678) == "12.3 MB"


def test_a_part_of_a_journal_is_whole_and_the_others_stay(tmp_path, full):
    journal = Journal(tmp_path / "out.parts", {"a": 1})
    journal.save("one", {"x": np.arange(3)})
    full["full"] = True
    with pytest.raises(UserError, match="make room and run it again"):
        journal.save("two", {"x": np.arange(3)})
    full["full"] = False
    assert (journal.folder / ".lock").is_file()
    again = Journal(tmp_path / "out.parts", {"a": 1})
    assert "one" in again and "two" not in again and again.load("one")["x"].tolist() == [0, 1, 2]
    (again.folder / "one.npz").write_bytes(b"PK\x03\x04damaged")
    with pytest.raises(UserError, match="is damaged"):
        again.load("one")
    again.remove()
    assert not again.folder.exists()
    assert JOB == "job.json"


def test_a_journal_that_begins_anew_or_is_finished_leaves_nothing_else(tmp_path):
    work = Journal(tmp_path / "out.parts", {"a": 1}).folder
    for name in ("old.npy", "old.npz", "old.json", ".x.part"):
        (work / name).write_bytes(b"")
    journal = Journal(work, {"a": 2}, restart=True)
    assert {path.name for path in work.iterdir()} - {".lock"} == {JOB}
    for name in ("new.npy", ".y.part"):
        (work / name).write_bytes(b"1")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "replaced").write_bytes(b"")
    journal.become(tmp_path / "out", {"new.npy"})
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["out", "out/new.npy"]


def test_json_of_numbers_that_are_not_finite(tmp_path):
    write_json({"a": float("nan"), "b": (1.0, float("inf"))}, tmp_path / "new" / "x.json")
    assert json.loads((tmp_path / "new" / "x.json").read_text()) == {"a": None, "b": [1.0, None]}


def test_what_is_lost_is_told_once_at_once_and_at_the_end(capsys):
    unwritten.forget()
    for number in range(7):
        unwritten.note(f"p{number}", f"picture {number} is not written.", kind="pictures")
    unwritten.made_good("p6")
    assert capsys.readouterr().err == "xscale: warning: picture 0 is not written.\n"
    assert unwritten.tell() == 1
    assert capsys.readouterr().err.splitlines()[-1] == "xscale: error: ... and 1 more files are not written"
    unwritten.forget()
    assert unwritten.tell() == 0 and not capsys.readouterr().err
