"""Small runs of tasks through the command line."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from xscale_lightning import cli
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import XScaleDataModule

ENCODER = ["--model.backbone.name=vit_tiny_patch8", "--model.backbone.dim=24", "--model.backbone.depth=2"]
ENCODER += ["--model.backbone.num_heads=2"]
RUN = ["--trainer.accelerator=cpu", "--trainer.devices=1", "--trainer.enable_progress_bar=false"]


class Shapes(Dataset):
    """Images whose mean says their class; masks, labels and second dates follow from it."""

    def __init__(self, kind: str, length: int, classes: int, wrong: str = "", bands: int = 2) -> None:
        self.kind, self.length, self.classes, self.wrong, self.bands = kind, length, classes, wrong, bands

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, Any]:
        noise = torch.randn(self.bands, 16, 16, generator=torch.Generator().manual_seed(index)) * 0.1
        label = index % self.classes
        sample: dict[str, Any] = {"image": noise + label, "gsd": torch.tensor(10.0)}
        if self.kind == "class":
            return {**sample, "label": torch.tensor(label + (9 if self.wrong == "range" else 0))}
        if self.kind == "labels":
            return {**sample, "label": (torch.arange(self.classes) <= label).long()}
        mask = torch.full((16, 16), label)
        mask[0] = -1
        if self.wrong == "range":
            mask[1] = 9
        if self.wrong == "ignored":
            mask[:] = -1
        if self.wrong == "size":
            mask = mask[:8]
        return {**sample, "mask": mask, **({"image2": noise} if self.kind == "change" else {})}


class ShapeData(XScaleDataModule):
    """`Shapes` for the command line."""

    def __init__(
        self,
        kind: str = "class",
        classes: int = 2,
        length: int = 32,
        wrong: str = "",
        sensor: str = "generic",
        batch_size: int = 8,
    ) -> None:
        names = ["a", "b"] if sensor == "generic" else None
        super().__init__(BandSelection(sensor=sensor, names=names), batch_size, 0)
        self.kind, self.length, self.wrong, self.classes = kind, length, wrong, classes
        self.name, self.image_size = "shapes", (16, 16)
        dense = kind in ("mask", "change")
        self.num_classes, self.multilabel = None if dense else classes, kind == "labels"
        self.num_mask_classes, self.ignore_index = classes if dense else None, -1
        self.class_names = [f"class{i}" for i in range(classes)]

    def build_dataset(self, split: str) -> Shapes:
        """Splits of one rule; training may lack the last class."""
        seen = self.classes - (self.wrong == "missing" and split == "train")
        return Shapes(self.kind, self.length, seen, self.wrong, len(self.bands))


@pytest.fixture
def fit(tmp_path, monkeypatch):
    """Run `fit` with a task on shapes; returns (folder of the run, its results)."""
    monkeypatch.setattr(sys, "argv", ["xscale"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")
    monkeypatch.setenv("PL_SEED_WORKERS", "0")

    def run(
        task: str, kind: str, *options: str, before: Sequence[str] = (), output: str = "runs"
    ) -> tuple[Path, dict[str, Any]]:
        """`before` holds configurations; without any, the task is given on the command line."""
        data = [f"--data={__name__}.ShapeData", f"--data.kind={kind}"]
        folder = tmp_path / output
        first = before or [f"--model={task}", *ENCODER]
        arguments = [*first, *data, *RUN, "--output", str(folder)]
        assert cli.main(["fit", *arguments, *options, "--debug"]) == 0
        (made,) = folder.glob("*/*")
        return made, json.loads((made / "results.json").read_text())

    return run
