"""The killer script sees a difference where there is one; its cases are commands that can run."""

import json
import random
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def kill(load):
    """The script as a module."""
    return load("kill")


def test_plain_content_leaves_out_folders_and_seconds_alone(kill):
    one = {"path": "/a/run/last.ckpt", "seconds": 1.0, "dirpath": "/a", "weights": [torch.ones(2)], "step": 3}
    two = {"path": "/b/run/last.ckpt", "seconds": 2.0, "dirpath": "/b", "weights": [torch.ones(2)], "step": 3}
    assert kill.plain(one) == kill.plain(two)
    for change in ({"path": "/b/run/other.ckpt"}, {"weights": [torch.tensor([1.0, 1.0000001])]}, {"step": 4}):
        found = kill.first_difference(kill.plain(one), kill.plain({**two, **change}))
        assert found is not None and next(iter(change)) in found


def test_a_difference_is_named(kill):
    assert kill.first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 2}]}) is None
    assert kill.first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "/a/1/b: 2 and 3"
    assert kill.first_difference({"a": 1}, {}) == "/a: 1 and None"


@pytest.mark.parametrize("bad", ["wrong_lines", "missing_lines", "end_differs_in", "exit_code", "left_behind"])
def test_anything_that_is_not_as_it_has_to_be_counts(kill, bad):
    good = dict.fromkeys(("wrong_lines", "missing_lines", "end_differs_in", "exit_code", "left_behind"), 0)
    assert kill.is_equal(good) and not kill.is_equal({**good, bad: 1})


class Batches:
    """A process that writes a line per look, and can be killed."""

    def __init__(self, trace: Path, part: Path | None = None) -> None:
        self.trace, self.part, self.killed_after = trace, part, None

    def wait(self, until, pause=0.0):
        while not until():
            with self.trace.open("a") as file:
                file.write("line\n")
            if self.part and kill_lines(self.trace) > 20:
                self.part.touch()
        return None

    def kill(self):
        self.killed_after = kill_lines(self.trace)


def kill_lines(path: Path) -> int:
    return path.read_text().count("\n")


def test_it_kills_after_batches_and_while_a_checkpoint_is_written(kill, tmp_path):
    folder = tmp_path / "killed" / "checkpoints"
    folder.mkdir(parents=True)
    process = Batches(tmp_path / "killed.txt")
    assert kill.kill_once(process, "batch", tmp_path, random.Random(0), (6, 1.0), float("inf")) is None
    assert 1 <= process.killed_after <= 6
    process = Batches(tmp_path / "killed.txt", part=folder / ".last.ckpt.1.part")
    assert kill.kill_once(process, "write", tmp_path, random.Random(0), (6, 1.0), float("inf")) is None
    assert process.killed_after > 20 and process.part.is_file()


def test_the_page_says_what_the_record_says():
    """`docs/resume.md` gives the sums of `benchmarks/results/kill.json`."""
    record = json.loads((FOLDER / "results" / "kill.json").read_text())
    runs = [run for entries in record.values() for run in entries.values()]
    page = (FOLDER.parent / "docs" / "resume.md").read_text()
    assert f"{sum(run['kills'] for run in runs)} kills" in page
    assert f"{sum(run['kills_while_writing'] for run in runs)} of them while a checkpoint was being written" in page
    assert f"{sum(run['lines_compared'] for run in runs):,} lines" in page
    assert not any(run["wrong_lines"] or run["missing_lines"] or run["left_behind"] for run in runs)
