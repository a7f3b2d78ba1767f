"""Every file in configs/finetune: its recipe trains on small data, and without its own data it names the folder."""

import sys
from pathlib import Path

import pytest
import yaml

from xscale_lightning import checkpoints, cli

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "finetune"
FILES = {path.stem: yaml.safe_load(path.read_text()) for path in sorted(FOLDER.glob("*.yaml"))}
RECIPES = [name for name in FILES if name != "quick"]
KINDS = {
    "Classification": "class",
    "MultiLabelClassification": "labels",
    "Segmentation": "mask",
    "ChangeDetection": "change",
}
NARROW = ["--model.backbone.name", "{name}", "--model.backbone.dim", "32", "--model.backbone.depth", "4"]
NARROW += ["--model.backbone.num_heads", "2", "--model.backbone.patch_size", "8"]
SHORT = ["--trainer.max_epochs", "1", "--data.length", "16", "--data.batch_size", "8"]


def task_of(name: str) -> str:
    return FILES[name]["model"]["class_path"].rsplit(".", 1)[-1]


def config(name: str) -> list[str]:
    return ["--config", str(FOLDER / f"{name}.yaml")]


@pytest.mark.slow
@pytest.mark.parametrize("overlay", [[], ["quick"]], ids=["recipe", "quick"])
@pytest.mark.parametrize("name", RECIPES)
def test_recipes_train(fit, name, overlay):
    arguments = FILES[name]["model"]["init_args"]
    spectral = arguments["backbone"]["name"].startswith("spectral")
    data = ["--data.sensor", "sentinel2_l1c_12"] if spectral else []
    decoder = ["--model.decoder_dim", "32"] if "decoder_dim" in arguments else []
    narrow = [word.format(name=arguments["backbone"]["name"]) for word in NARROW]
    task = task_of(name)
    options = [word for part in (name, *overlay) for word in config(part)]
    folder, results = fit(task, KINDS[task], *data, *SHORT, *narrow, *decoder, before=options)
    assert {FILES[name]["checkpoint"]["monitor"], "test/" + FILES[name]["checkpoint"]["monitor"][4:]} <= set(
        results["metrics"]
    )
    saved = checkpoints.read_metadata(folder / "checkpoints" / "last.ckpt")[1]["init_args"]
    for key, value in arguments.items():
        if not isinstance(value, dict) and key not in ("decoder_dim", "drop_path"):
            assert saved[key] == value, key
    optimizer = {**arguments["optimizer"], **(FILES["quick"]["model"]["init_args"]["optimizer"] if overlay else {})}
    assert {key: saved["optimizer"][key] for key in optimizer} == optimizer


@pytest.mark.parametrize("name", [name for name in RECIPES if "class_path" in FILES[name]["data"]])
def test_recipes_without_their_data_name_the_folder(name, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["xscale"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")
    missing, output = tmp_path / "nowhere", tmp_path / "runs"
    narrow = [word.format(name=FILES[name]["model"]["init_args"]["backbone"]["name"]) for word in NARROW]
    assert cli.main(["fit", *config(name), "--data.root", str(missing), *narrow, "--output", str(output)]) == 2
    shown = [line for line in capsys.readouterr().err.splitlines() if line.startswith("xscale: error")]
    assert len(shown) == 1 and str(missing) in shown[0] and "does not exist" in shown[0]
    assert not output.exists()


def test_every_number_of_a_recipe_has_a_source_or_the_file_says_ours():
    for name in RECIPES:
        text = (FOLDER / f"{name}.yaml").read_text()
        head = text.split("seed_everything")[0]
        assert "ours" in head or "Sources" in head, name
