"""Progressive pretraining: order, what a stage hands on, resuming anywhere, refusals before anything is written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xscale_lightning import cli
from xscale_lightning.checkpoints import metadata
from xscale_lightning.commands import stages as module
from xscale_lightning.commands.carry import carry_weights, check_architecture, moments_by_name, parameter_names
from xscale_lightning.data.bands import generic
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.resizing import fit_tables

pytestmark = pytest.mark.usefixtures("process")
ROOT = Path(__file__).resolve().parents[2]
TABLE = "backbone.positions.table"


def last(folder: Path) -> dict:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def same(one: dict, other: dict) -> None:
    """Weights and optimizer state are equal to the last bit."""
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    there = other["optimizer_states"][0]["state"]
    for number, state in one["optimizer_states"][0]["state"].items():
        assert all(torch.equal(value, there[number][key]) for key, value in state.items()), number


@pytest.fixture(scope="module")
def whole(staged, process, tmp_path_factory) -> tuple[Path, Path, list]:
    """The run that never stopped: its configuration, its folder, and what each stage began with."""
    folder = tmp_path_factory.mktemp("whole")
    config, began = staged.write(folder), []

    def record(self: SSLModule) -> None:
        moments = moments_by_name(self, self.trainer.optimizers[0].state_dict())
        moments = {name: {key: value.clone() for key, value in state.items()} for name, state in moments.items()}
        began.append(({name: value.clone() for name, value in self.state_dict().items()}, moments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSLModule, "on_fit_start", record)
        patch.setattr(SSLModule, "on_train_start", record)
        run = staged.fit(config, folder / "runs")
    assert sys.argv == ["xscale"]
    return config, run, began[1::2]  # `on_train_start` comes after everything is loaded


def test_every_stage_has_a_folder_and_says_what_it_is(whole):
    _, run, began = whole
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "stage_1_small", "stage_2_large"]
    assert len(began) == 2
    for number, name in enumerate(("small", "large"), start=1):
        folder = run / f"stage_{number}_{name}"
        record = {"number": number, "of": 2, "name": name}
        assert last(folder)["xscale"]["stage"] == record
        assert json.loads((folder / "results.json").read_text())["stage"] == record
        events = EventAccumulator(str(folder)).Reload()
        assert {event.value for event in events.Scalars("schedule/stage")} == {float(number)}
        saved = yaml.safe_load((folder / "config.yaml").read_text())
        assert saved["stages"] is None and saved["data"]["init_args"]["image_height"] == 16 * number


def test_weights_go_over_and_tables_are_resized(whole):
    _, run, began = whole
    end, (start, _) = last(run / "stage_1_small")["state_dict"], began[1]
    assert end[TABLE].shape == (1, 4, 16) and start[TABLE].shape == (1, 16, 16)
    by_hand, changed = fit_tables(method(32), end)
    assert changed == [TABLE]
    for name, value in start.items():
        assert torch.equal(value, by_hand[name]), name
    assert not torch.equal(end["decoder.mask_token"], began[0][0]["decoder.mask_token"]), "stage 1 trained nothing"


def test_moments_go_over_by_name(whole):
    _, run, began = whole
    state = last(run / "stage_1_small")["optimizer_states"][0]
    before, (_, now) = moments_by_name(method(16), state), began[1]
    assert began[0][1] == {} and set(now) == set(before) - {TABLE}
    for name, moments in now.items():
        assert all(torch.equal(value, before[name][key]) for key, value in moments.items()), name
        assert moments["step"] == 4 and moments["exp_avg"].abs().sum() > 0
    steps = moments_by_name(method(32), last(run / "stage_2_large")["optimizer_states"][0])
    assert steps[TABLE]["step"] == 4 and steps["backbone.cls_token"]["step"] == 8


def method(pixels: int) -> MAE:
    backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2, position="learned", image_size=pixels)
    return MAE(bands=generic(2), backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)


@pytest.mark.parametrize(
    ("checkpoint", "folders"),
    [
        ("stage_1_small/checkpoints/step_0000002.ckpt", ["stage_1_small", "stage_2_large"]),
        ("stage_1_small/checkpoints/last.ckpt", ["stage_2_large"]),
        ("stage_2_large/checkpoints/step_0000002.ckpt", ["stage_2_large"]),
    ],
    ids=["inside stage 1", "after stage 1", "inside stage 2"],
)
def test_resumed_runs_equal_the_one_that_never_stopped(staged, whole, checkpoint, folders, tmp_path):
    _, run, _ = whole
    again = staged.fit(run / "config.yaml", tmp_path, "--ckpt_path", str(run / checkpoint))
    assert sorted(path.name for path in again.iterdir()) == ["config.yaml", *folders]
    for folder in folders:
        same(last(again / folder), last(run / folder))
    one, other = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, again))
    assert one["stages"] == other["stages"] and len(one["stages"]) == 2


def test_reinit_keeps_the_new_tables_and_carries_the_rest(staged, tmp_path, instead):
    stages = [staged.config["stages"][0], {**staged.config["stages"][1], "tables": "reinit", "optimizer": "fresh"}]
    states, callbacks = [], []

    def change(stage):
        states.append({name: value.clone() for name, value in stage.model.state_dict().items()})
        callbacks.append([type(callback).__name__ for callback in stage.trainer.callbacks])
        for value in stage.model.state_dict().values():
            value += 1

    instead(change)
    staged.fit(staged.write(tmp_path, stages=stages), tmp_path / "runs")
    torch.manual_seed(0)
    assert states[1][TABLE].std() < 0.05 and states[1][TABLE].mean().abs() < 0.01, "not as initialised"
    for name, value in states[1].items():
        if name != TABLE:
            assert torch.equal(value, states[0][name] + 1), name
    assert "CarryMoments" not in callbacks[1]


def test_checkpoints_of_no_stage_or_another_are_refused(staged, whole, tmp_path, capsys):
    _, run, _ = whole
    checkpoint = run / "stage_2_large/checkpoints/last.ckpt"
    config = staged.write(tmp_path, stages=[staged.config["stages"][0], {**staged.config["stages"][1], "name": "wide"}])
    message = staged.refused(capsys, tmp_path / "runs", "--config", str(config), "--ckpt_path", str(checkpoint))
    assert "stage 2 'large'" in message and "1 'small', 2 'wide'" in message
    content = torch.load(checkpoint, weights_only=True)
    del content["xscale"]["stage"]
    torch.save(content, tmp_path / "none.ckpt")
    message = staged.refused(
        capsys, tmp_path / "runs", "--config", str(config), "--ckpt_path", str(tmp_path / "none.ckpt")
    )
    assert "without stages" in message


def test_the_saved_configuration_of_a_stage_resumes_that_stage(staged, whole, tmp_path):
    _, run, _ = whole
    stage = run / "stage_2_large"
    again = staged.fit(stage / "config.yaml", tmp_path, "--ckpt_path", str(stage / "checkpoints/step_0000002.ckpt"))
    same(last(again), last(stage))


@pytest.mark.parametrize(("stage", "pixels"), [("stage_1_small", 16), (None, 32)])
def test_other_verbs_take_the_stage_of_the_checkpoint_or_the_last(whole, tmp_path, monkeypatch, stage, pixels):
    config, run, _ = whole
    seen = []
    monkeypatch.setattr(module.CLI, "_run_subcommand", lambda self, verb: seen.append(self.datamodule.image_size))
    args = ["--ckpt_path", str(run / stage / "checkpoints/last.ckpt")] if stage else []
    assert cli.main(["validate", "--config", str(config), "--output", str(tmp_path), *args, "--debug"]) == 0
    assert seen == [(pixels, pixels)]


def test_carried_weights_must_fit():
    small, large = method(16), method(32)
    assert carry_weights(large, small.state_dict(), "resize") == [TABLE]
    assert torch.equal(large.decoder.mask_token, small.decoder.mask_token)
    with pytest.raises(UserError, match="only in the stage before"):
        carry_weights(large, {**small.state_dict(), "more": torch.zeros(1)}, "resize")
    assert set(parameter_names(large)) == {name for name, p in large.named_parameters() if p.requires_grad}


def architecture(pixels: int = 16, decoder_heads: int = 2, mask_ratio: float = 0.75, size: int | None = None, **other):
    small = {"depth": 1, "dim": 16, "num_heads": 2, "position": "sincos", **other}
    backbone = BackboneConfig("vit_tiny_patch8", image_size=pixels, **small)
    decoder = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": decoder_heads}
    return MAE(bands=generic(2), backbone=backbone, views=Views(size=size), mask_ratio=mask_ratio, **decoder)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 4}, r"backbone\.num_heads is 2 there and 4 here; set model\.backbone\.num_heads once"),
        ({"decoder_heads": 4}, "decoder_heads is 2 there and 4 here"),
        ({"norm_eps": 1e-5}, r"backbone\.norm_eps is 1e-06 there and 1e-05 here"),
        ({"position": "gsd"}, r"backbone\.position is sincos there and gsd here"),
        ({"reference_gsd": 30.0}, r"backbone\.reference_gsd is 10\.0 there and 30\.0 here"),
    ],
)
def test_a_stage_of_another_architecture_is_refused_where_shapes_do_not_tell(change, message):
    before = metadata(architecture())["init_args"]
    assert carry_weights(architecture(**change), architecture().state_dict(), "resize") == []
    with pytest.raises(UserError, match=message):
        check_architecture(architecture(**change), before)


def test_a_stage_may_change_what_it_sees_and_its_rates():
    other = architecture(32, mask_ratio=0.5, size=32, drop_path=0.1, wavelengths=[0.5, 0.6])
    check_architecture(other, metadata(architecture())["init_args"])


def test_another_architecture_is_refused_before_the_first_stage_trains(staged, tmp_path, capsys):
    stages = json.loads(json.dumps(staged.config["stages"]))
    stages[1]["config"]["model"]["init_args"]["decoder_heads"] = 4
    config = staged.write(tmp_path, stages=stages)
    message = staged.refused(capsys, tmp_path / "runs", "--config", str(config))
    assert "stage 2 of 2 (large)" in message and "decoder_heads is 2 there and 4 here" in message


def processes_in(folder: Path) -> list[str]:
    """Command lines of the processes whose working directory is a folder."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if (entry / "cwd").resolve() == folder.resolve():
                found.append((entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has ended, or is another user's
            continue
    return found


@pytest.mark.slow
def test_two_processes_go_through_both_stages(staged, tmp_path):
    steering = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "PL_GLOBAL_SEED")
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    kept = {name: value for name, value in os.environ.items() if name not in steering}
    environment = {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MPLBACKEND": "Agg"}
    command = [
        sys.executable,
        "-m",
        "xscale_lightning.cli",
        "fit",
        "--config",
        str(staged.write(tmp_path)),
        "--output",
        "runs",
    ]
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    done = subprocess.run(
        [*command, *devices], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    (run,) = (tmp_path / "runs" / "mae").iterdir()
    assert sorted(path.name for path in run.iterdir()) == ["config.yaml", "stage_1_small", "stage_2_large"]
    assert last(run / "stage_1_small")["global_step"] == last(run / "stage_2_large")["global_step"] == 2
    assert (done.stdout + done.stderr).count("8 samples per step") == 2
    results = json.loads((run / "stage_2_large" / "results.json").read_text())
    assert results["device"]["processes"] == 2 and results["stage"]["name"] == "large"
    assert {"results.json", "checkpoints"} <= {path.name for path in (run / "stage_1_small").iterdir()}
    assert not processes_in(tmp_path), "a process of the run is left behind"
