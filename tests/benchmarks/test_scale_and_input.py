"""The page of full trainings says what its script prints; the input benchmark runs."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a script of the benchmarks folder by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(f"benchmark_{name}", FOLDER / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_page_says_what_the_script_prints(load, monkeypatch, tmp_path):
    scale = load("scale")
    assert scale.main(["--check"]) == 0
    page = scale.PAGE.read_text(encoding="utf-8")
    (tmp_path / "scale.md").write_text(page.replace("| MAE, ViT-L/16 |", "| MAE, ViT-X/16 |"), encoding="utf-8")
    monkeypatch.setattr(scale, "PAGE", tmp_path / "scale.md")
    assert scale.main(["--check"]) == 1
    assert ("assumed, not measured" in page) == (scale.measured_shares(FOLDER / "results" / "gpu.json") is None)


def test_hours_follow_from_operations(load):
    scale = load("scale")
    recipe = scale.RECIPES["MAE, ViT-L/16"]
    count = {"flops": 1e12, "activations": 1e8, "trained": 1e9, "targets": 1e9}
    counts = {name: count for name in scale.RECIPES}
    seconds = 1e12 * recipe.images * recipe.epochs / (989e12 * 0.5)
    line = next(line for line in scale.tables(counts, (0.5, 0.5)).splitlines() if line.startswith("| MAE, ViT-L/16"))
    assert f"| {seconds / 86400:.1f} d to {seconds / 86400:.1f} d |" in line
    assert scale.state_bytes(counts["MAE, ViT-L/16"]) == 24e9


def test_measured_speed_is_taken_where_there_is_any(load, tmp_path):
    scale = load("scale")
    assert scale.measured_shares(tmp_path / "gpu.json") is None
    (tmp_path / "gpu.json").write_text(
        json.dumps({"speed": {"mae": {"mfu": 0.4}, "ijepa": [{"mfu": 0.5}, {"mfu": None}]}})
    )
    assert scale.measured_shares(tmp_path / "gpu.json") == (0.4, 0.5)


@pytest.mark.slow
def test_counts_are_those_of_the_code(load):
    scale = load("scale")
    saved = json.loads((FOLDER / "results" / "scale.json").read_text())
    assert saved.keys() == scale.RECIPES.keys()
    name = "LatentMIM, ViT-B/16"
    found = scale.count(scale.RECIPES[name])
    assert found["flops"] == saved[name]["flops"] and found["trained"] == saved[name]["trained"]
    assert found["activations"] == pytest.approx(saved[name]["activations"], rel=0.02)


@pytest.mark.slow
def test_the_input_path_is_timed(load, tmp_path):
    script = load("input")
    options = ["--files", "30", "--side", "512", "--seconds", "0.05", "--workers", "0"]
    assert script.main([*options, "--output", str(tmp_path)]) == 0
    found = json.loads((tmp_path / "input.json").read_text())["images_per_s"]
    assert len(found) >= 7 and all(value["per_core"] > 0 and value["0 workers"] > 0 for value in found.values())
