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
from xscale_lightning.commands import stages as module
from xscale_lightning.commands.carry import carry_weights, moments_by_name, parameter_names
from xscale_lightning.commands.stage_options import options, read_stages, take_apart
from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.resizing import fit_tables

ROOT = Path(__file__).resolve().parents[2]
TABLE = "backbone.positions.table"


def size(pixels: int) -> dict:
    return {
        "model": {"init_args": {"backbone": {"image_size": pixels}}},
        "data": {"init_args": {"image_height": pixels, "image_width": pixels}},
    }


CONFIG = {
    "seed_everything": 3,
    "model": {
        "class_path": "mae",
        "init_args": {
            "decoder_dim": 16,
            "decoder_depth": 1,
            "decoder_heads": 2,
            "backbone": {"name": "vit_tiny_patch8", "depth": 1, "dim": 16, "num_heads": 2, "position": "learned"},
            "optimizer": {"lr": 0.1},
        },
    },
    "data": {
        "class_path": "SyntheticData",
        "init_args": {"length": 8, "batch_size": 4, "bands": {"names": ["B02", "B03"]}},
    },
    "trainer": {
        "max_epochs": 2,
        "accelerator": "cpu",
        "devices": 1,
        "enable_progress_bar": False,
        "log_every_n_steps": 1,
    },
    "checkpoint": {"save_top_k": -1},
    "knn": {"max_train": 8, "max_test": 2, "every_n_epochs": 0},
    "geometry": {"max_samples": 2, "every_n_epochs": 0},
    "pictures": {"num_images": 1, "num_score_images": 1, "every_n_epochs": 0},
    "stages": [
        {"name": "small", "config": size(16)},
        {"name": "large", "optimizer": "carry", "config": size(32)},
    ],
}


@pytest.fixture(scope="module", autouse=True)
def process():
    """The command line sets these for its process; the next tests get them back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xscale"])
        for name, value in (("PL_GLOBAL_SEED", "0"), ("PL_SEED_WORKERS", "0"), ("MPLBACKEND", "Agg")):
            patch.setenv(name, value)
        yield


FRESH = [CONFIG["stages"][0], {**CONFIG["stages"][1], "optimizer": "fresh"}]


def write(folder: Path, **changes: object) -> Path:
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def fit(config: Path, output: Path, *args: str) -> Path:
    """Run it; returns the run folder, or `output` where nothing was written."""
    assert cli.main(["fit", "--config", str(config), "--output", str(output), *args, "--debug"]) == 0
    return next(output.glob("mae/*"), output)


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
def whole(tmp_path_factory) -> tuple[Path, Path, list]:
    """The run that never stopped: its configuration, its folder, and what each stage began with."""
    folder = tmp_path_factory.mktemp("whole")
    config, began = write(folder), []

    def record(self: SSLModule) -> None:
        moments = moments_by_name(self, self.trainer.optimizers[0].state_dict())
        moments = {name: {key: value.clone() for key, value in state.items()} for name, state in moments.items()}
        began.append(({name: value.clone() for name, value in self.state_dict().items()}, moments))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SSLModule, "on_fit_start", record)
        patch.setattr(SSLModule, "on_train_start", record)
        run = fit(config, folder / "runs")
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
def test_resumed_runs_equal_the_one_that_never_stopped(whole, checkpoint, folders, tmp_path):
    _, run, _ = whole
    again = fit(run / "config.yaml", tmp_path, "--ckpt_path", str(run / checkpoint))
    assert sorted(path.name for path in again.iterdir()) == ["config.yaml", *folders]
    for folder in folders:
        same(last(again / folder), last(run / folder))
    one, other = (yaml.safe_load((folder / "config.yaml").read_text()) for folder in (run, again))
    assert one["stages"] == other["stages"] and len(one["stages"]) == 2


@pytest.fixture
def instead(monkeypatch):
    """Something else instead of training, given the command line object of the stage."""

    def replace(action) -> None:
        run = module.StageCLI._run_subcommand

        def act(self, subcommand):
            action(self) if not self.check_only else run(self, subcommand)

        monkeypatch.setattr(module.StageCLI, "_run_subcommand", act)

    return replace


def test_reinit_keeps_the_new_tables_and_carries_the_rest(tmp_path, instead):
    stages = [CONFIG["stages"][0], {**CONFIG["stages"][1], "tables": "reinit", "optimizer": "fresh"}]
    states, callbacks = [], []

    def change(stage):
        states.append({name: value.clone() for name, value in stage.model.state_dict().items()})
        callbacks.append([type(callback).__name__ for callback in stage.trainer.callbacks])
        for value in stage.model.state_dict().values():
            value += 1

    instead(change)
    fit(write(tmp_path, stages=stages), tmp_path / "runs")
    torch.manual_seed(0)
    assert states[1][TABLE].std() < 0.05 and states[1][TABLE].mean().abs() < 0.01, "not as initialised"
    for name, value in states[1].items():
        if name != TABLE:
            assert torch.equal(value, states[0][name] + 1), name
    assert "CarryMoments" not in callbacks[1]


def test_options_hold_for_every_stage_or_for_one(tmp_path, instead):
    seen = []
    instead(lambda stage: seen.append(stage.config.fit))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("{data: {init_args: {length: 12}}, trainer: {max_epochs: 9}}")
    args = ["--model.mask_ratio", "0.5", "--trainer.max_epochs=5", "--stages.large.model.norm_pix_loss", "true"]
    fit(write(tmp_path, stages=FRESH), tmp_path / "runs", *args, "--stages.small.config", str(overlay))
    assert [config.model.init_args.mask_ratio for config in seen] == [0.5, 0.5]
    assert [config.trainer.max_epochs for config in seen] == [5, 5]
    assert [config.model.init_args.norm_pix_loss for config in seen] == [False, True]
    assert [config.data.init_args.length for config in seen] == [12, 8]
    assert [config.data.init_args.image_width for config in seen] == [16, 32]


def test_options_win_over_a_stage_and_stages_over_earlier_files(tmp_path, instead):
    seen = []
    instead(lambda stage: seen.append(stage.config.fit))
    later = tmp_path / "later.yaml"
    later.write_text(yaml.safe_dump({"stages": [{"name": "only", "config": {"trainer": {"max_steps": 7}}}]}))
    fit(
        write(tmp_path), tmp_path / "a", "--config", str(later), "--data.image_height", "16", "--data.image_width", "16"
    )
    assert len(seen) == 1 and seen[0].trainer.max_steps == 7 and seen[0].data.init_args.image_width == 16


@pytest.mark.parametrize("off", [["--stages", "null"], ["--config", "{stages: null}"]], ids=["option", "file"])
def test_null_turns_stages_off(tmp_path, monkeypatch, off):
    seen = []
    monkeypatch.setattr(module.CLI, "_run_subcommand", lambda self, verb: seen.append(self.model.stage))
    run = fit(write(tmp_path), tmp_path / "runs", "--data.image_height", "16", *off)
    assert seen == [None] and list(run.iterdir()) == []


def refused(capsys, output: Path, *args: str) -> str:
    assert cli.main(["fit", *args, "--output", str(output)]) == 2
    err = capsys.readouterr().err
    message = err[err.index("xscale: error: ") :].strip()
    assert len(message.splitlines()) <= 2 and "Traceback" not in err
    assert not output.exists(), list(output.rglob("*"))
    return message


def second(**changes: object) -> list:
    return [CONFIG["stages"][0], {**CONFIG["stages"][1], **changes}]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (second(config={"trainer": {"max_epoch": 3}}), ["stage 2 of 2 (large)", "max_epoch", "max_epochs"]),
        (second(config={"model": {"init_args": {"mask_rtio": 0.3}}}), ["stage 2 of 2 (large)", "mask_rtio"]),
        (
            second(config={"data": {"class_path": "SceneFolder", "init_args": {"root": "nowhere"}}}),
            ["(large)", "nowhere"],
        ),
        (second(config=size(30)), ["stage 2 of 2 (large)", "patch size 8", "30"]),
        (second(config={"model": {"init_args": {"decoder_dim": 32}}}), ["(large)", "decoder", "16] there", "32] here"]),
        (second(config={"model": {"init_args": {"backbone": {"depth": 2}}}}), ["(large)", "blocks.1", "missing there"]),
        (second(config={"data": {"init_args": {"bands": {"names": ["B02"]}}}}), ["(large)", "patch_embed"]),
        (second(config={"stages": []}), ["'large'", "stages", "for all stages"]),
        (second(confg={}), ["'large'", "'confg'", "'config'"]),
        (second(tables="rezise"), ["tables", "'rezise'", "resize or reinit"]),
        (second(name="small"), ["two are called 'small'"]),
        (second(name="a/b"), ["'a/b'", "letters"]),
        ({"a": 1}, ["stages", "no list"]),
        ([{"config": {}}], ["entry 1 has no name"]),
    ],
)
def test_a_bad_stage_is_refused_before_the_first_one_trains(tmp_path, capsys, monkeypatch, stages, words):
    monkeypatch.chdir(tmp_path)
    message = refused(capsys, tmp_path / "runs", "--config", str(write(tmp_path, stages=stages)))
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--stages.huge.trainer.max_epochs", "3"], ["'huge'", "small, large"]),
        (["--stages.large.output", "x"], ["output", "for all stages"]),
        (["--stages.large.trainer.max_epoch", "3"], ["stage 2 of 2 (large)", "max_epoch"]),
        (["--stages+", "{name: x}"], ["--stages.NAME.OPTION"]),
        (["--stages.large.trainer.devices", "2"], ["2 processes after 1"]),
        (["--ckpt_path", "last"], ["names no stage"]),
        (["--ckpt_path", "no.ckpt"], ["no.ckpt", "does not exist"]),
        (["--print_config", "--stages.large.trainer.max_epochs", "3"], ["--stages.NAME.print_config"]),
    ],
)
def test_bad_options_of_stages_are_refused(tmp_path, capsys, args, words):
    if "devices" in args[0] and (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    message = refused(capsys, tmp_path / "runs", "--config", str(write(tmp_path)), *args)
    for word in words:
        assert word in message, message


def test_checkpoints_of_no_stage_or_another_are_refused(whole, tmp_path, capsys):
    _, run, _ = whole
    checkpoint = run / "stage_2_large/checkpoints/last.ckpt"
    config = write(tmp_path, stages=[CONFIG["stages"][0], {**CONFIG["stages"][1], "name": "wide"}])
    message = refused(capsys, tmp_path / "runs", "--config", str(config), "--ckpt_path", str(checkpoint))
    assert "stage 2 'large'" in message and "1 'small', 2 'wide'" in message
    content = torch.load(checkpoint, weights_only=True)
    del content["xscale"]["stage"]
    torch.save(content, tmp_path / "none.ckpt")
    message = refused(capsys, tmp_path / "runs", "--config", str(config), "--ckpt_path", str(tmp_path / "none.ckpt"))
    assert "without stages" in message


def test_the_saved_configuration_of_a_stage_resumes_that_stage(whole, tmp_path):
    _, run, _ = whole
    stage = run / "stage_2_large"
    again = fit(stage / "config.yaml", tmp_path, "--ckpt_path", str(stage / "checkpoints/step_0000002.ckpt"))
    same(last(again), last(stage))


@pytest.mark.parametrize(("stage", "pixels"), [("stage_1_small", 16), (None, 32)])
def test_other_verbs_take_the_stage_of_the_checkpoint_or_the_last(whole, tmp_path, monkeypatch, stage, pixels):
    config, run, _ = whole
    seen = []
    monkeypatch.setattr(module.CLI, "_run_subcommand", lambda self, verb: seen.append(self.datamodule.image_size))
    args = ["--ckpt_path", str(run / stage / "checkpoints/last.ckpt")] if stage else []
    assert cli.main(["validate", "--config", str(config), "--output", str(tmp_path), *args, "--debug"]) == 0
    assert seen == [(pixels, pixels)]


def test_a_failed_first_batch_leaves_no_folder(tmp_path, capsys):
    statistics = ["--data.bands.mean", "[1, 1]", "--data.bands.std", "[1, 1]", "--data.class_path", "SampleScene"]
    stages = [{"name": "a"}, {"name": "b"}]
    config = write(tmp_path, stages=stages)
    output = tmp_path / "runs"
    image = ["--data.image_size", "16", "--model.backbone.image_size", "16"]
    assert cli.main(["fit", "--config", str(config), "--output", str(output), *statistics, *image]) == 2
    err = capsys.readouterr().err
    assert "stage 1 of 2 (a)" in err and "do not fit the data" in err
    assert list(output.rglob("*")) == []


def test_print_config_shows_all_stages_or_one(tmp_path, capsys):
    config = str(write(tmp_path))
    for args in (["--print_config"], ["--stages.large.print_config", "--model.mask_ratio", "0.6"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(["fit", "--config", config, *args])
        assert not stop.value.code
        shown = yaml.safe_load(capsys.readouterr().out)
        if args == ["--print_config"]:
            assert [stage["name"] for stage in shown["stages"]] == ["small", "large"]
        else:
            assert shown["model"]["init_args"]["mask_ratio"] == 0.6
            assert shown["data"]["init_args"]["image_height"] == 32 and shown["stages"] is None


def test_command_line_is_taken_apart():
    argv = [
        "fit",
        "--a",
        "1",
        "--stages.s.b.c=2",
        "--stages.s.x",
        "-3",
        "--stages",
        "[{name: s}]",
        "--stages.s.help",
        "-y",
    ]
    command = take_apart(argv)
    assert command.common == ["--a", "1", "-y"]
    assert command.own == {"s": ["--b.c=2", "--x", "-3", "--help"]}
    assert [found[:2] for found in options(["--a=1", "--b", "-c", "x", "y"])] == [("--a", "1"), ("--b", "-c")]
    assert read_stages(None) == []


def test_an_overlay_may_be_long_and_hold_addresses(tmp_path):
    text = "s3://bucket/" + "x" * 5000
    stages = yaml.safe_dump(
        [{"name": "s", "config": {"trainer": {"default_root_dir": text}, "model": {"class_path": "mae"}}}]
    )
    arguments = take_apart(["fit", f"--stages={stages}"]).arguments(0)
    parser = module.build(module.CLI, arguments=[*arguments, "--data", "SyntheticData"], check_only=True)
    assert parser.config.fit.trainer.default_root_dir == text


def test_carried_weights_must_fit():
    small, large = method(16), method(32)
    assert carry_weights(large, small.state_dict(), "resize") == [TABLE]
    assert torch.equal(large.decoder.mask_token, small.decoder.mask_token)
    with pytest.raises(UserError, match="only in the stage before"):
        carry_weights(large, {**small.state_dict(), "more": torch.zeros(1)}, "resize")
    assert set(parameter_names(large)) == {name for name, p in large.named_parameters() if p.requires_grad}


@pytest.mark.slow
def test_two_processes_go_through_both_stages(tmp_path):
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
        str(write(tmp_path)),
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
