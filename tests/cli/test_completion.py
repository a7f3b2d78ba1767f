"""`xscale completion`: what a real bash offers after Tab, and that it starts no Python for it."""

import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import yaml

from xscale_lightning import cli
from xscale_lightning.commands.completion import collect
from xscale_lightning.commands.completion_scripts import bash, fish

ROOT = Path(__file__).resolve().parents[2]
pytestmark = [pytest.mark.usefixtures("process"), pytest.mark.skipif(not shutil.which("bash"), reason="needs bash")]


@pytest.fixture(scope="module")
def offer(process):
    return collect()


@pytest.fixture(scope="module")
def script(offer, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "xscale"
    path.write_text(bash(offer))
    return path


@pytest.fixture
def complete(script):
    """What bash offers for the last word of a command line; only system programs are on its path."""

    def complete(*words: str, folder: Path = ROOT) -> list[str]:
        code = 'source "$0"; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); _xscale; printf "%s\\n" "${COMPREPLY[@]}"'
        command = ["bash", "--norc", "-c", code, str(script), *words]
        started = time.perf_counter()
        done = subprocess.run(command, cwd=folder, env={"PATH": "/usr/bin:/bin"}, capture_output=True, text=True)
        assert done.returncode == 0 and not done.stderr, done.stderr
        assert time.perf_counter() - started < 1.0
        return done.stdout.split("\n")[:-1] if done.stdout.strip() else []

    return complete


def test_verbs(complete):
    assert set(complete("xscale", "")) == set(cli.COMMANDS)
    assert complete("xscale", "st") == ["stats"]


def test_methods_data_and_presets(complete):
    assert {"mae", "s2mae", "spatial_affinity", "Classification"} <= set(complete("xscale", "fit", "--model", ""))
    assert "FineTune" not in complete("xscale", "fit", "--model", "")
    assert complete("xscale", "fit", "--data", "Sce") == ["SceneFolder"]
    assert complete("xscale", "fit", "--data.bands.sensor", "nai") == ["naip"]
    assert "vit_tiny_patch8" in complete("xscale", "fit", "--model.backbone.name", "vit_tiny")
    assert complete("xscale", "fit", "--trainer.precision", "=", "bf") == ["bf16-mixed"]
    assert complete("xscale", "fit", "--model.backbone.class_token", "") == ["true", "false"]


def test_options_belong_to_the_class_that_is_named(complete):
    assert complete("xscale", "fit", "--model", "mae", "--model.mask") == ["--model.mask_ratio"]
    assert "--model.masks.sampler" in complete("xscale", "fit", "--model", "ijepa", "--model.mask")
    assert complete("xscale", "fit", "--data", "SceneFolder", "--data.bl") == ["--data.block_size"]
    every = complete("xscale", "fit", "--model.mask")
    assert {"--model.mask_ratio", "--model.masks.sampler"} <= set(every)


def test_configurations_name_classes_and_are_completed(complete, tmp_path):
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"model": {"class_path": "xscale_lightning.methods.mae.MAE"}}))
    (tmp_path / "other.txt").write_text("")
    (tmp_path / "folder").mkdir()
    for option in ("-c", "--config"):
        assert complete("xscale", "fit", option, "", folder=tmp_path) == ["mine.yaml", "folder/"]
        words = ("xscale", "fit", option, "mine.yaml", "--model.mask")
        assert complete(*words, folder=tmp_path) == ["--model.mask_ratio"]
    assert complete("xscale", "fit", "--config", "configs/s2mae.yaml", "--model.predict") == ["--model.predict_ratio"]


def test_sections_come_before_their_options(complete):
    sections = complete("xscale", "fit", "--")
    assert {"--model.", "--trainer.", "--data.", "--config", "--ckpt_path"} <= set(sections) and len(sections) < 60
    assert "--trainer.max_epochs" in complete("xscale", "fit", "--trainer.max")


@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        (("stats", "--wr"), "--write"),
        (("stats", "--data.fr"), "--data.fractions"),
        (("embed", "--min"), "--min-valid"),
        (("sweep", "x.yaml", "--on"), "--only"),
        (("bench", "x.yaml", "--trainer.max_e"), "--trainer.max_epochs"),
        (("completion", "z"), "zsh"),
        (("reconstruct", "--ti"), "--tif"),
    ],
)
def test_other_verbs(words, wanted, complete):
    assert wanted in complete("xscale", *words)


def test_fish_lists_each_option_once_with_its_verbs(offer):
    text = fish(offer)
    assert "complete -c xscale -n __fish_use_subcommand -a stats" in text
    (line,) = [line for line in text.splitlines() if line.endswith(" -l model.mask_ratio")]
    assert "'__fish_seen_subcommand_from fit validate test predict'" in line
    assert re.search(r"-s c -l config -r -F$", text, re.MULTILINE)


def test_the_command_prints_the_script(capsys, monkeypatch, offer):
    monkeypatch.setattr("xscale_lightning.commands.completion.collect", lambda: offer)
    assert cli.main(["completion", "zsh"]) == 0
    assert "bashcompinit" in capsys.readouterr().out
    assert cli.main(["completion", "tcsh"]) == 2
    assert "tcsh" in capsys.readouterr().err
