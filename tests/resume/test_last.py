"""`--ckpt_path last` on the command line: which run, which file, which folder."""

import json
import os
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xscale_lightning import cli
from xscale_lightning.checkpoints import by_position
from xscale_lightning.commands.resume import (
    differs,
    first_difference,
    is_finished_run,
    named_run,
    newest_checkpoint,
    runs_of,
)
from xscale_lightning.pretrained import locate

LAST = ("--ckpt_path", "last")


def test_the_same_command_again_and_again_is_one_run(command, capsys):
    """What a requeued job does: the first start begins, later ones go on, in one folder; at the end none does."""
    assert command.fit(name="straight") == 0
    for run in command.runs():
        run.rename(command.folder / "straight")
    command.killed_at(3, *LAST)
    assert "there is no run" in capsys.readouterr().err
    command.killed_at(7, *LAST)
    message = capsys.readouterr().err
    assert "going on with the run in" in message and "(step 3)" in message
    assert command.fit(*LAST) == 0
    assert set(command.rows()) == set(command.rows("straight")) and len(command.rows()) == 10
    (run,) = command.runs()
    assert yaml.safe_load((run / "config.yaml").read_text())["ckpt_path"] is None
    results = json.loads((run / "results.json").read_text())
    assert results["status"] == "finished" and results["images_seen"] == 40
    scalars = EventAccumulator(str(run)).Reload().Scalars("train/loss")
    assert sorted({event.step for event in scalars}) == list(range(10))
    straight = EventAccumulator(str(command.folder / "straight")).Reload().Scalars("train/loss")
    assert {(e.step, e.value) for e in scalars} == {(e.step, e.value) for e in straight}
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["last.ckpt", "step_0000010.ckpt"]

    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    assert command.fit(*LAST) == 0
    assert "is finished" in capsys.readouterr().err
    assert command.runs() == [run] and {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before
    assert command.fit(*LAST, "--trainer.max_epochs", "3") == 0
    assert len(command.runs()) == 2 and {path: path.stat().st_mtime_ns for path in run.rglob("*")} == before


def test_damaged_files_are_passed_over(command, capsys):
    command.killed_at(7)
    (run,) = command.runs()
    files = run / "checkpoints"
    assert newest_checkpoint(run) == files / "last.ckpt"
    whole = (files / "last.ckpt").read_bytes()
    (files / "last.ckpt").write_bytes(whole[: len(whole) // 2])
    assert newest_checkpoint(run) == files / "step_0000005.ckpt"
    assert "passes over a file" in (message := capsys.readouterr().err) and "last.ckpt" in message
    assert command.fit(*LAST, name="again") == 0
    assert [int(row[0]) for row in command.rows("again")] == [5, 6, 7, 8, 9]
    assert newest_checkpoint(run) == files / "last.ckpt", "written anew in its place"
    for file in files.iterdir():
        file.write_bytes(b"")
    assert newest_checkpoint(run) is None


def test_times_of_files_do_not_count(command, capsys):
    """After a copy all are of one time, or in any order."""
    command.killed_at(7)
    (run,) = command.runs()
    last, older = (run / "checkpoints" / name for name in ("last.ckpt", "step_0000005.ckpt"))
    (run / "checkpoints" / "z.ckpt").write_bytes(b"PK\x05\x06" + bytes(18))
    for times in ((1, 2), (2, 1), (3, 3)):
        for path, seconds in zip((last, older), times, strict=True):
            os.utime(path, (seconds, seconds))
        assert newest_checkpoint(run) == last
        assert "passes over a file" in (message := capsys.readouterr().err) and "z.ckpt" in message
    os.utime(older, (9, 9))
    assert locate(run / "checkpoints") == last, "what is called last goes before others"
    last.rename(run / "checkpoints" / "last-v1.ckpt")
    older.rename(last)
    assert locate(run) == run / "checkpoints" / "last-v1.ckpt"


def test_records_are_read_without_their_weights(command):
    """So that many large checkpoints are put in order in no time; the one that is taken is read whole."""
    command.killed_at(7)
    (run,) = command.runs()
    last = run / "checkpoints" / "last.ckpt"
    content = bytearray(last.read_bytes())
    with zipfile.ZipFile(last) as archive:
        record = max(archive.infolist(), key=lambda record: record.file_size if "/data/" in record.filename else 0)
    content[record.header_offset + 200] ^= 1  # a bit of a weight
    last.write_bytes(content)
    assert by_position([last, run / "checkpoints" / "step_0000005.ckpt"])[0] == last
    assert newest_checkpoint(run) == run / "checkpoints" / "step_0000005.ckpt"


def test_a_run_that_is_named_goes_on_or_is_refused(command, capsys, monkeypatch):
    command.killed_at(4)
    command.killed_at(2, seed_everything=4)
    first, second = command.runs()
    monkeypatch.setattr(command, "output", command.folder / "elsewhere")
    assert command.fit(*LAST, config=first / "config.yaml", name="again") == 0
    assert [int(row[0]) for row in command.rows("again")] == list(range(4, 10))
    assert not command.output.exists() and json.loads((first / "results.json").read_text())["status"] == "finished"
    for file in (second / "checkpoints").iterdir():
        file.unlink()
    capsys.readouterr()
    assert cli.main(["fit", "--config", str(second / "config.yaml"), *LAST]) == 2
    message = capsys.readouterr().err
    assert str(second / "checkpoints") in message and "Traceback" not in message


def test_a_run_of_another_configuration_is_not_gone_on_with(command, capsys):
    command.killed_at(4)
    command.killed_at(2, *LAST, seed_everything=4)
    message = capsys.readouterr().err
    assert "no run has this configuration" in message and "seed_everything is 3, not 4" in message
    assert len(command.runs()) == 2
    command.killed_at(6, *LAST, "--data.init_args.num_workers", "0", "--trainer.max_epochs", "3")
    assert "(step 4)" in capsys.readouterr().err and len(command.runs()) == 2, "lengths and workers do not count"


def test_evaluation_of_the_last_checkpoint(command, capsys):
    command.killed_at(4)
    (run,) = command.runs()
    words = ["validate", "--config", str(run / "config.yaml"), "--output", str(command.folder / "evaluated"), *LAST]
    assert cli.main([*words, "--debug"]) == 0
    assert f"'{run}/checkpoints/last.ckpt' (step 4)" in capsys.readouterr().err
    (results,) = (command.folder / "evaluated").rglob("results.json")
    assert json.loads(results.read_text())["steps"] == 4


@pytest.mark.slow
def test_stages_go_on_inside_a_stage_and_between_two(command, capsys):
    stages = [
        {"name": "one", "config": {"trainer": {"max_epochs": 1}}},
        {"name": "two", "optimizer": "carry", "config": {"data": {"init_args": {"batch_size": 5}}}},
    ]
    assert command.fit(name="straight", stages=stages) == 0
    for run in command.runs():
        run.rename(command.folder / "straight")
    command.killed_at(3, *LAST, stages=stages)  # inside stage 1
    command.killed_at(0, *LAST, stages=stages)  # stage 1 is finished; stage 2 has begun and saved nothing
    assert command.fit(*LAST, stages=stages) == 0
    straight, rows = command.rows("straight"), command.rows()
    assert len(straight) == 13 and set(rows) == set(straight)
    (run,) = command.runs()
    for stage in ("stage_1_one", "stage_2_two"):
        one, two = (
            torch.load(folder / stage / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
            for folder in (run, command.folder / "straight")
        )
        assert all(torch.equal(value, two[name]) for name, value in one.items())
    assert command.fit(*LAST, stages=stages) == 0
    assert "is finished" in capsys.readouterr().err


def test_differences_of_configurations():
    one = {"model": {"class_path": "a", "init_args": {"x": 1}}, "trainer": {"max_epochs": 3}, "stages": None}
    assert differs(one, {**one, "trainer": {"max_epochs": 9}, "new_option": 3}) is None
    assert differs(one, {**one, "model": {"class_path": "a", "init_args": {"x": 2}}}) == ("model.init_args.x", 1, 2)
    assert differs({**one, "stages": [{"name": "s", "config": one}]}, one) == ("stages", ["s"], [])
    staged = {**one, "stages": [{"name": "s", "config": {"a": [1, 2]}}]}
    assert differs(staged, {**one, "stages": [{"name": "s", "config": {"a": [1, 3]}}]}) == ("a", 2, 3)
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == ("a", [1], [1, 2])


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "3", '{"command": ["fit"], "status": {}}', "\0", '{"command": "fit", "status": NaN}']
)
def test_results_that_are_damaged_are_those_of_no_finished_run(tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    assert not is_finished_run(tmp_path, {})
    (tmp_path / "results.json").write_text('{"command": "fit", "status": "finished"}')
    assert is_finished_run(tmp_path, {})


def test_configurations_that_are_damaged_are_those_of_no_run(tmp_path):
    one = {"model": {"class_path": "a"}, "trainer": {"max_epochs": 3}}
    wrong = {
        "aliases": "model: {class_path: a}\nx: &x [1, 1]\n" + "".join(f"y{i}: &x [*x, *x]\n" for i in range(40)),
        "deep": "{model: {class_path: a}, trainer: " + "[" * 100_000,
        "tag": "model: !!python/object/apply:os.system [a]\ntrainer: {}\n",
        "model": "model: [class_path, a]\ntrainer: {}\n",
        "trainer": "model: {class_path: a}\ntrainer: 3\n",
        "stages": yaml.safe_dump({**one, "stages": [{"name": ["a"], "config": one}]}),
    }
    for name, text in {**wrong, "whole": yaml.safe_dump(one)}.items():
        (tmp_path / "a" / name).mkdir(parents=True)
        (tmp_path / "a" / name / "config.yaml").write_text(text)
    assert [path.name for path, _ in runs_of(tmp_path, one)] == ["whole"]


def test_a_configuration_that_only_has_the_name_is_no_run(tmp_path: Path):
    (tmp_path / "config.yaml").write_text("{}")
    assert named_run(["--config", str(tmp_path / "config.yaml")]) is None
    os.mkdir(tmp_path / "checkpoints")
    assert named_run(["--config", str(tmp_path / "config.yaml")]) == tmp_path
