"""The cost of the guard is measured in one training, in pairs of neighbouring steps."""

import dataclasses
import json
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.mark.filterwarnings("ignore")
def test_steps_with_and_without_the_guard_alternate(load, tmp_path, monkeypatch, capsys):
    guard = load("guard")
    tiny = dataclasses.replace(
        guard.SIZES["base4"]["mae"], dim=16, depth=1, heads=2, image=32, decoder_dim=16, decoder_depth=1,
        decoder_heads=2, batch=2,
    )  # fmt: skip
    monkeypatch.setitem(guard.SIZES, "base4", {"mae": tiny})
    seen = []
    real = guard.FiniteGuard.on_before_optimizer_step

    def watched(self, *args):
        seen.append(self.enabled)
        real(self, *args)

    monkeypatch.setattr(guard.FiniteGuard, "on_before_optimizer_step", watched)
    guard.main(["--seconds", "0", "--device", "cpu", "--output", str(tmp_path)])
    assert seen == [True, False, False, True] * 2
    found = json.loads((tmp_path / "guard.json").read_text())["cpu"]["mae base4 32-true"]
    assert found["pairs"] == 2 and found["ratio"] > 0 and found["skipped"] == 0
    assert "over 2 pairs" in capsys.readouterr().out


def test_the_page_says_what_the_record_says():
    record = json.loads((FOLDER / "results" / "guard.json").read_text())["cpu"]
    small, large = record["mae quickstart 32-true"], record["mae base4 32-true"]
    page = " ".join((FOLDER.parent / "docs" / "troubleshooting.md").read_text().split())
    assert f"took {small['ratio']:.2f} times those" in page and f"and {large['ratio']:.2f} times at ViT-B's" in page
    assert f"over {small['pairs']} and {large['pairs']} pairs" in page
