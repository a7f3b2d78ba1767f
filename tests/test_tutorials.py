"""The tutorials run as they stand, with few steps, and their pages are made of them."""

import re
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = sorted((ROOT / "docs" / "tutorials").glob("*.py"))
# What each one must have printed or written, beside running to its end.
LEFT = {
    "compare_fairly": (r"cross_scale_mae - mae: [+-]\d", []),
    "high_resolution_teacher": (r"pair - mr: [+-]0\.\d+ ± ", ["runs/tutorial_affinity/pair/results.json"]),
    "many_bands": (r"60 bands, reconstruction/psnr: \d", ["cube/scene.tif", "spectrum.png"]),
    "pretrain_and_look": (
        r"masked PSNR \d",
        ["runs/tutorial/features.png", "runs/tutorial/mae/results.json", "runs/tutorial/mae/pictures"],
    ),
    "torchgeo_segmentation": (r"mean over seeds: pretrained \d", ["pretrained/model.safetensors"]),
}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_it_runs(script, tmp_path, monkeypatch, capsys):
    if script.stem == "torchgeo_segmentation" and find_spec("torchgeo") is None:
        pytest.skip("needs TorchGeo")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TUTORIAL_QUICK", "1")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # the scripts set it; afterwards it is as before
    state = torch.get_rng_state()
    try:
        runpy.run_path(str(script), run_name="__main__")
    finally:
        torch.set_rng_state(state)
    printed, written = LEFT[script.stem]
    assert re.search(printed, capsys.readouterr().out)
    assert all((tmp_path / name).exists() for name in written)


def test_they_are_short_and_quote_their_results():
    assert {script.stem for script in SCRIPTS} == set(LEFT)
    for script in SCRIPTS:
        text = script.read_text(encoding="utf-8")
        code = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
        assert len(code) <= 100, f"{script.name} has {len(code)} lines of code"
        assert "step 0" in text and "# ```text\n" in text
        for picture in re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text):
            assert (script.parent / picture).is_file()
