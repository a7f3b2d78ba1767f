"""Options of stages on the command line, and bad stages: refused before anything is written."""

import os

import pytest
import yaml

from xscale_lightning import cli
from xscale_lightning.commands import stages as module
from xscale_lightning.commands.stage_options import options, read_stages, take_apart

pytestmark = pytest.mark.usefixtures("process")


def test_options_hold_for_every_stage_or_for_one(staged, tmp_path, instead):
    seen = []
    instead(lambda stage: seen.append(stage.config.fit))
    overlay = tmp_path / "overlay.yaml"
    overlay.write_text("{data: {init_args: {length: 12}}, trainer: {max_epochs: 9}}")
    args = ["--model.mask_ratio", "0.5", "--trainer.max_epochs=5", "--stages.large.model.norm_pix_loss", "true"]
    staged.fit(
        staged.write(tmp_path, stages=staged.fresh), tmp_path / "runs", *args, "--stages.small.config", str(overlay)
    )
    assert [config.model.init_args.mask_ratio for config in seen] == [0.5, 0.5]
    assert [config.trainer.max_epochs for config in seen] == [5, 5]
    assert [config.model.init_args.norm_pix_loss for config in seen] == [False, True]
    assert [config.data.init_args.length for config in seen] == [12, 8]
    assert [config.data.init_args.image_width for config in seen] == [16, 32]


def test_options_win_over_a_stage_and_stages_over_earlier_files(staged, tmp_path, instead):
    seen = []
    instead(lambda stage: seen.append(stage.config.fit))
    later = tmp_path / "later.yaml"
    later.write_text(yaml.safe_dump({"stages": [{"name": "only", "config": {"trainer": {"max_steps": 7}}}]}))
    options = ["--data.image_height", "16", "--data.image_width", "16"]
    staged.fit(staged.write(tmp_path), tmp_path / "a", "--config", str(later), *options)
    assert len(seen) == 1 and seen[0].trainer.max_steps == 7 and seen[0].data.init_args.image_width == 16


@pytest.mark.parametrize("off", [["--stages", "null"], ["--config", "{stages: null}"]], ids=["option", "file"])
def test_null_turns_stages_off(staged, tmp_path, monkeypatch, off):
    seen = []
    monkeypatch.setattr(module.CLI, "_run_subcommand", lambda self, verb: seen.append(self.model.stage))
    run = staged.fit(staged.write(tmp_path), tmp_path / "runs", "--data.image_height", "16", *off)
    assert seen == [None] and list(run.iterdir()) == []


PIXELS_30 = {"data": {"init_args": {"image_height": 30, "image_width": 30}}}


def second(**changes: object) -> list:
    """The two stages, the second one changed."""
    return [{"name": "small"}, {"name": "large", "optimizer": "carry", **changes}]


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        (second(config={"trainer": {"max_epoch": 3}}), ["stage 2 of 2 (large)", "max_epoch", "max_epochs"]),
        (second(config={"model": {"init_args": {"mask_rtio": 0.3}}}), ["stage 2 of 2 (large)", "mask_rtio"]),
        (
            second(config={"data": {"class_path": "SceneFolder", "init_args": {"root": "nowhere"}}}),
            ["(large)", "nowhere"],
        ),
        (second(config=PIXELS_30), ["stage 2 of 2 (large)", "patch size 8", "30"]),
        (
            second(config={"model": {"init_args": {"decoder_dim": 32}}}),
            ["(large)", "decoder_dim is 16 there", "32 here"],
        ),
        (
            second(config={"model": {"init_args": {"backbone": {"depth": 2}}}}),
            ["(large)", "backbone.depth is 1 there", "2 here"],
        ),
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
def test_a_bad_stage_is_refused_before_the_first_one_trains(staged, tmp_path, capsys, monkeypatch, stages, words):
    monkeypatch.chdir(tmp_path)
    message = staged.refused(capsys, tmp_path / "runs", "--config", str(staged.write(tmp_path, stages=stages)))
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
        (["--ckpt_path", "best"], ["'best' names no stage"]),
        (["--ckpt_path", "no.ckpt"], ["no.ckpt", "does not exist"]),
        (["--print_config", "--stages.large.trainer.max_epochs", "3"], ["--stages.NAME.print_config"]),
    ],
)
def test_bad_options_of_stages_are_refused(staged, tmp_path, capsys, args, words):
    if "devices" in args[0] and (os.cpu_count() or 1) < 2:
        pytest.skip("one core")
    message = staged.refused(capsys, tmp_path / "runs", "--config", str(staged.write(tmp_path)), *args)
    for word in words:
        assert word in message, message


def test_a_failed_first_batch_leaves_no_folder(staged, tmp_path, capsys):
    statistics = ["--data.bands.mean", "[1, 1]", "--data.bands.std", "[1, 1]", "--data.class_path", "SampleScene"]
    stages = [{"name": "a"}, {"name": "b"}]
    config = staged.write(tmp_path, stages=stages)
    output = tmp_path / "runs"
    image = ["--data.image_size", "16", "--model.backbone.image_size", "16"]
    assert cli.main(["fit", "--config", str(config), "--output", str(output), *statistics, *image]) == 2
    err = capsys.readouterr().err
    assert "stage 1 of 2 (a)" in err and "do not fit the data" in err
    assert list(output.rglob("*")) == []


def test_print_config_shows_all_stages_or_one(staged, tmp_path, capsys):
    config = str(staged.write(tmp_path))
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
