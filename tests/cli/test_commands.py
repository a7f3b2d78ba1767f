"""The plain commands, and how fast the light ones answer."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from xscale_lightning import __version__, cli
from xscale_lightning.commands.parser import concise, import_methods


@pytest.mark.parametrize("argument", ["--help", "--version"])
def test_light_answers_import_nothing_heavy(argument):
    code = (
        "import sys; from xscale_lightning.cli import main; "
        f"assert main(['{argument}']) == 0; "
        "heavy = {'torch', 'lightning', 'timm', 'numpy', 'jsonargparse', 'rich'} & set(sys.modules); "
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert __version__ in done.stdout


def test_help_names_every_verb(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(verb in shown for verb in cli.COMMANDS)


def test_methods_table(capsys):
    assert cli.main(["methods"]) == 0
    assert "mae" in capsys.readouterr().out


def test_methods_in_words(capsys, monkeypatch):
    monkeypatch.chdir(Path(__file__).resolve().parents[2])
    assert cli.main(["methods", "--verbose", "mae", "latent_mim"]) == 0
    mae, latent = capsys.readouterr().out.split("\n\n")
    assert "xscale_lightning.methods.mae.MAE" in mae and "He et al." in mae
    assert "--model.mask_ratio 0.75" in mae and "--model.norm_pix_loss" in mae and "optimizer" not in mae
    assert "configs/mae.yaml" in mae and "docs/methods/mae.md" in mae
    assert latent.startswith("latent_mim: ") and "configs/latent_mim.yaml" in latent
    assert cli.main(["methods", "mea"]) == 2
    assert "no such method" in capsys.readouterr().err


def test_backbones_table(capsys):
    assert cli.main(["backbones", "--bands", "13", "--verbose"]) == 0
    shown = capsys.readouterr().out
    assert "vit_huge_patch14" in shown and "timm:NAME" in shown
    assert "\n  reference_gsd    10.0\n" in shown and "\n  patch_size       null\n" in shown


def test_doctor(capsys, tmp_path):
    logger = logging.getLogger("lightning.pytorch")
    before = logger.level
    assert cli.main(["doctor", "--output", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert shown.count("ok ") == 5 and "this machine can train" in shown
    assert not (tmp_path / "runs").exists()
    assert logger.level == before, "whatever runs next in this process says nothing"


def test_doctor_fails_on_a_folder_that_cannot_be_written(capsys, tmp_path):
    (tmp_path / "file").write_text("")
    assert cli.main(["doctor", "--output", str(tmp_path / "file" / "runs")]) == 1
    assert "FAILED  run folder" in capsys.readouterr().out


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, str]:
    file = tmp_path_factory.mktemp("schema") / "schema.json"  # a process that has not seen the classes of other tests
    command = [sys.executable, "-m", "xscale_lightning.cli", "schema", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return file, done.stdout


@pytest.mark.slow
def test_schema_for_editors(written):
    file, shown = written
    schema = json.loads(file.read_text())
    assert {"model", "data", "trainer", "knn", "seed_everything"} <= set(schema["properties"])
    assert all(name in json.dumps(schema) for name in ("mask_ratio", "samples_per_epoch", "max_epochs"))
    assert list(file.parent.iterdir()) == [file] and "yaml-language-server" in shown


@pytest.mark.slow
def test_the_schema_accepts_every_shipped_file_and_marks_unknown_names(written):
    jsonschema = pytest.importorskip("jsonschema", reason="needs the dev extra")
    schema = json.loads(written[0].read_text())
    valid = jsonschema.validators.validator_for(schema)(schema).is_valid
    for file in (Path(__file__).resolve().parents[2] / "configs").rglob("*.yaml"):
        if file.parent.name not in ("ablations", "bench"):  # those are of `sweep` and `bench`
            assert valid(yaml.safe_load(file.read_text())), file
    assert not valid({"trainer": {"max_epoch": 3}})
    assert not valid({"model": {"class_path": "mae", "init_args": {"mask_ration": 0.5}}})
    assert not valid({"data": {"class_path": "SampleScene", "init_args": {"imagesize": 3}}})


@pytest.mark.parametrize(
    ("message", "short"),
    [
        ("Option 'mask_ration' is not accepted", "unknown option 'mask_ration': did you mean 'mask_ratio'?"),
        ("unrecognized arguments: --backbone.nmae=x", "unknown option 'backbone.nmae': did you mean 'name'?"),
        ("unrecognized arguments: --max_epochs=3", "unknown option 'max_epochs': did you mean 'trainer.max_epochs'?"),
        ("unrecognized arguments: --model.dim=3", "unknown option 'model.dim': did you mean 'model.backbone.dim'?"),
        (
            "Group 'model' does not accept option 'predictor'",
            "unknown option 'predictor': it is an argument of IJEPA; that of a host goes into model.host_args.",
        ),
        ("the following arguments are required: fit.data, fit.model", "missing: data, model."),
        ("Parser key \"a.b\":\n  Expected a <class 'float'>. Got value: x", "a.b: Expected a float. Got value: x"),
    ],
)
def test_parser_messages_are_made_short(message, short):
    import_methods()  # as the command line does
    assert concise(message, ["model.mask_ratio", "name", "trainer.max_epochs"]).startswith(short)
