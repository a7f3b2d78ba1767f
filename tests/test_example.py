"""The example plug-in: its own tests run beside ours (`testpaths`); here what pages and command line make of it."""

import json
import re
import sys
from pathlib import Path

import pytest

from xscale_lightning import cli

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "examples" / "xscale_vicreg"
PAGES = ["add-a-backbone.md", "add-a-tokenizer.md", "add-a-view.md", "add-data.md"]


@pytest.mark.parametrize("page", PAGES)
def test_pages_quote_the_files_as_they_are(page):
    text = (ROOT / "docs" / page).read_text()
    quoted = re.findall(r'^```python title="(.+?)"\n(.*?)^```$', text, re.MULTILINE | re.DOTALL)
    assert quoted
    for name, code in quoted:
        assert code in (PLUGIN / name).read_text(), f"{page} quotes {name} otherwise than it is"


def test_it_is_small():
    files = [path.read_text().splitlines() for path in (PLUGIN / "xscale_vicreg").glob("*.py")]
    assert sum(map(len, files)) < 300 and len((PLUGIN / "xscale_vicreg" / "method.py").read_text().splitlines()) < 100


@pytest.mark.slow
def test_its_configuration_trains_on_its_own_data(tmp_path, monkeypatch):
    import numpy as np

    monkeypatch.setattr(sys, "argv", ["xscale"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    chips = tmp_path / "chips"
    chips.mkdir()
    for i in range(30):
        values = 100 + 40 * np.random.default_rng(i).standard_normal((4, 16, 16))
        np.save(chips / f"{i}.npy", values.clip(0, 255).astype(np.uint8))
    data = ["--data", "xscale_vicreg.NumpyChips", "--data.root", str(chips), "--data.bands.sensor", "naip"]
    small = ["--data.batch_size", "4", "--data.num_workers", "0", "--model.dim", "16", "--model.backbone.depth", "1"]
    short = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "2", "--knn.every_n_epochs", "0"]
    short += ["--trainer.accelerator", "cpu", "--trainer.devices", "1"]
    words = ["--config", str(PLUGIN / "configs" / "vicreg.yaml"), *data, *small, *short]
    assert cli.main(["fit", *words, "--output", str(tmp_path / "runs"), "--debug"]) == 0
    (folder,) = (tmp_path / "runs").glob("*/*")
    assert json.loads((folder / "results.json").read_text())["steps"] == 2
