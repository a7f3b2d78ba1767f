"""What is not about batches, and was once lost over a kill."""

import copy


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
