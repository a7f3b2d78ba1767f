"""What is being written is nobody else's, what a killed process leaves goes, and a folder is exchanged in one step."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from xscale_lightning import exports, places
from xscale_lightning.commands.journal import JOB, Journal
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.errors import UserError
from xscale_lightning.files import write_bytes
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.places import beside, put_in_place, recover
from xscale_lightning.pretrained import Origin, Pretrained, load_backbone

HOLD = """
import sys, time
from pathlib import Path
from xscale_lightning.files import whole
with whole(Path(sys.argv[1]) / "a") as part:
    part.write_bytes(b"half")
    print("writing", flush=True)
    time.sleep(60)
"""


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o002])
def test_a_new_file_is_as_open_as_any_other_and_one_that_replaces_another_as_that(tmp_path, mask):
    before = os.umask(mask)
    try:
        assert write_bytes(tmp_path / "a", b"1").stat().st_mode & 0o777 == 0o666 & ~mask
        for mode in (0o600, 0o664, 0o444):
            (tmp_path / "a").chmod(mode)
            assert write_bytes(tmp_path / "a", b"2").stat().st_mode & 0o777 == mode
    finally:
        os.umask(before)


def test_what_a_killed_process_was_writing_goes_and_what_a_living_one_writes_stays(tmp_path, monkeypatch):
    writers = [
        subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert all(process.stdout and process.stdout.readline() == "writing\n" for process in writers)
    assert len(names(tmp_path)) == 2
    writers[0].send_signal(signal.SIGKILL)
    writers[0].wait()
    foreign = tmp_path / ".notes.12345678.part"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("years")
    monkeypatch.setattr(places, "_SWEPT", set())  # as a process that starts
    with beside(tmp_path / "b") as own:
        write_bytes(tmp_path / "c", b"whole")
        monkeypatch.setattr(places, "_SWEPT", set())
        write_bytes(tmp_path / "d", b"whole")
        assert own.is_dir(), "its own"
    left = [name for name in names(tmp_path) if name.endswith(".part") and name != foreign.name]
    assert len(left) == 1 and (foreign / "thesis.txt").is_file()
    writers[1].terminate()
    writers[1].wait()
    monkeypatch.setattr(places, "_SWEPT", set())
    write_bytes(tmp_path / "c", b"whole")
    assert names(tmp_path) == [foreign.name, "c", "d"]
    for process in writers:
        assert process.stdout
        process.stdout.close()


def one(folder: Path, text: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "x").write_text(text)
    return folder


def test_an_old_or_a_new_folder_is_there_at_every_moment(tmp_path, monkeypatch):
    """Another process looks all the time, for thousands of exchanges."""
    if places._exchange_call() is None:
        pytest.skip("this system has no call for it")
    target = one(tmp_path / "out", "0")
    watcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import os\nprint('ready', flush=True)\nlooked = missing = 0\n"
            f"while not os.path.exists({str(tmp_path / 'stop')!r}):\n"
            f"    looked += 1\n    missing += not os.path.exists({str(target / 'x')!r})\nprint(looked, missing)",
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert watcher.stdout and watcher.stdout.readline() == "ready\n"
    new, end = one(tmp_path / "new", "1"), time.monotonic() + 0.5
    while time.monotonic() < end:
        put_in_place(new, target)
    (tmp_path / "stop").touch()
    looked, missing = map(int, watcher.communicate()[0].split())
    assert looked and missing == 0


def test_where_names_cannot_be_exchanged_the_old_folder_comes_back(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "_exchange_call", lambda: None)
    target, replace = one(tmp_path / "out", "old"), os.replace
    put_in_place(one(tmp_path / "new", "new"), target)
    assert names(tmp_path) == ["out"] and (target / "x").read_text() == "new"

    class Gone(BaseException):
        """The end of the process."""

    def killed(a, b):
        if Path(b) == target:
            raise Gone
        replace(a, b)

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Gone):
        put_in_place(one(tmp_path / "new", "newer"), target)
    monkeypatch.undo()
    assert not target.exists()
    assert recover(target) and (target / "x").read_text() == "new" and not recover(target)


def encoder(seed: int):
    torch.manual_seed(seed)
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2)
    bands = BandSelection("sentinel2_rgb").resolve()
    return Pretrained(
        backbone.build(len(bands), bands.wavelengths), bands, backbone, "standardize", Origin("x", "", 16)
    )


@pytest.mark.parametrize("exchange", [True, False])
def test_an_export_that_is_replaced_is_there_or_comes_back(tmp_path, monkeypatch, exchange):
    """The process ends at every rename in turn."""
    target, replace = tmp_path / "out", os.replace
    monkeypatch.setattr(places, "_SWEPT", set())
    exports.write_export(encoder(0), target, lambda config: "card")
    old = (target / "model.safetensors").read_bytes()
    if not exchange:
        monkeypatch.setattr(places, "_exchange_call", lambda: None)

    class Gone(BaseException):
        """The end of the process."""

    calls = [0]

    def killed(a, b):
        if "out" in Path(b).name:
            calls[0] += 1
            if calls[0] == stop:
                raise Gone
        replace(a, b)

    monkeypatch.setattr(os, "replace", killed)
    for stop in (1, 2):
        calls[0] = 0
        try:
            exports.write_export(encoder(stop), target, lambda config: "card", overwrite=True)
        except Gone:
            recover(target)
            assert (target / "model.safetensors").read_bytes() == old
        load_backbone(target)
        old = (target / "model.safetensors").read_bytes()
        assert names(tmp_path) == ["out"]


def pack(folder: Path, text: str) -> Journal:
    journal = Journal(folder / "out.parts", {"a": text})
    write_bytes(journal.folder / "x", text.encode())
    return journal


def test_a_journal_that_was_killed_after_it_had_become_the_output(tmp_path, monkeypatch):
    pack(tmp_path, "old").become(tmp_path / "out", {"x"})
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["x"]

    class Gone(BaseException):
        """The end of the process."""

    def put(new, target):
        put_in_place(new, target)
        raise Gone

    with monkeypatch.context() as patch:
        patch.setattr("xscale_lightning.commands.journal.put_in_place", put)
        with pytest.raises(Gone):
            pack(tmp_path, "new").become(tmp_path / "out", {"x"})
    assert (tmp_path / "out" / "x").read_text() == "new"
    again = Journal(tmp_path / "out.parts", {"a": "newer"})
    assert [name for name in names(again.folder) if name != ".lock"] == [JOB], "nothing of the old output counts"
    write_bytes(again.folder / "x", b"newer")
    again.become(tmp_path / "out", {"x"})
    assert names(tmp_path) == ["out"] and names(tmp_path / "out") == ["x"]


def test_a_folder_with_something_else_is_not_taken_for_parts(tmp_path):
    one(tmp_path / "out.parts", "years")
    with pytest.raises(UserError, match=r"there is something else \(x\): choose another output"):
        Journal(tmp_path / "out.parts", {"a": 1}, restart=True)
    assert (tmp_path / "out.parts" / "x").read_text() == "years"
