"""What is not about batches, and was once lost over a kill."""

import copy
import json

import pytest
import torch

from xscale_lightning.callbacks.geometry import FeatureGeometry


def test_overlays_for_several_methods_are_settled_in_the_stages_that_are_done(command):
    """As in quickstart.yaml: `model.optional_args` also stands in the configurations of stages that are over."""
    model = copy.deepcopy(command.config["model"])
    model["optional_args"] = {"decoder_dim": model["init_args"].pop("decoder_dim"), "predictor": {"dim": 8}}
    stages = [{"name": "one", "config": {"trainer": {"max_epochs": 1}}}, {"name": "two"}]
    changes = {"model": model, "stages": stages}
    command.killed_at(7, **changes)  # the first stage has batches 0 to 4
    assert command.fit("--ckpt_path", "last", **changes) == 0
    (run,) = command.runs()
    assert (run / "stage_2_two" / "results.json").is_file()
    assert [int(row[0]) for row in command.rows()] == [*range(5), *range(10)]


def test_the_loss_of_the_last_validation_is_reported_by_a_run_that_went_on_after_it(command):
    changes = {"trainer": {**command.config["trainer"], "val_check_interval": 3}}
    command.killed_at(9, **changes)  # validated after batches 2 and 7
    assert command.fit("--ckpt_path", "last", **changes) == 0
    (run,) = command.runs()
    assert {"train/loss", "val/loss"} <= set(json.loads((run / "results.json").read_text())["losses"])


class Gone(BaseException):
    """The end of the process."""


def killed_at_the_last_measurement(command, **changes):
    def on_train_end(self, trainer, pl_module):
        raise Gone

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureGeometry, "on_train_end", on_train_end)
        with pytest.raises(Gone):
            command.fit(**changes)


@pytest.mark.parametrize("optimizer", ["fresh", "carry"])
def test_a_kill_during_the_last_measurement_of_a_stage_does_not_lose_it(command, optimizer):
    stages = [{"name": "one", "config": {"trainer": {"max_epochs": 1}}}, {"name": "two", "optimizer": optimizer}]
    assert command.fit(name="straight", stages=stages) == 0
    for run in command.runs():
        run.rename(command.folder / "straight")
    killed_at_the_last_measurement(command, stages=stages)
    assert command.fit("--ckpt_path", "last", stages=stages) == 0
    (run,) = command.runs()
    folders = (run, command.folder / "straight")
    ours, theirs = (json.loads((folder / "stage_1_one" / "results.json").read_text()) for folder in folders)
    assert ours["status"] == "finished" and ours["losses"] == theirs["losses"]
    assert {k: v["last"] for k, v in ours["metrics"].items()} == {k: v["last"] for k, v in theirs["metrics"].items()}
    assert command.rows() == command.rows("straight"), "the second stage begins with the same weights and moments"


def test_a_kill_during_the_last_measurement_does_not_lose_it(command):
    killed_at_the_last_measurement(command)
    assert command.fit("--ckpt_path", "last") == 0
    (run,) = command.runs()
    results = json.loads((run / "results.json").read_text())
    metrics = results["metrics"]
    assert set(results["losses"]["train/loss"]) == {"first", "last"}
    assert "geometry/rank" in metrics and {record["last_step"] for record in metrics.values()} == {10}


@pytest.mark.parametrize("minutes", [None, 1e-9])
def test_the_last_checkpoint_has_one_epoch_whatever_the_clock_says(command, minutes):
    trainer = {**command.config["trainer"], "val_check_interval": 3}  # files fall due after validations, at 3 and 8
    assert command.fit(checkpoint={"minutes": minutes}, trainer=trainer) == 0
    (last,) = command.output.rglob("last.ckpt")
    state = torch.load(last, weights_only=True)
    assert (state["global_step"], state["epoch"]) == (10, 1)
