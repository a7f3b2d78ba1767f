"""Small configurations in stages, shared by the tests of the command line."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from xscale_lightning import cli
from xscale_lightning.commands.stages import StageCLI


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


FRESH = [CONFIG["stages"][0], {**CONFIG["stages"][1], "optimizer": "fresh"}]


def write(folder: Path, **changes: object) -> Path:
    path = folder / "staged.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def fit(config: Path, output: Path, *args: str) -> Path:
    """Run it; returns the run folder, or `output` where nothing was written."""
    assert cli.main(["fit", "--config", str(config), "--output", str(output), *args, "--debug"]) == 0
    return next(output.glob("mae/*"), output)


def refused(capsys, output: Path, *args: str) -> str:
    assert cli.main(["fit", *args, "--output", str(output)]) == 2
    err = capsys.readouterr().err
    message = err[err.index("xscale: error: ") :].strip()
    assert len(message.splitlines()) <= 2 and "Traceback" not in err
    assert not output.exists(), list(output.rglob("*"))
    return message


@pytest.fixture(scope="session")
def staged() -> SimpleNamespace:
    """A configuration of two stages, how to write and run it, and how to see it refused."""
    return SimpleNamespace(config=CONFIG, fresh=FRESH, size=size, write=write, fit=fit, refused=refused)


@pytest.fixture(scope="module")
def process():
    """The command line sets these for its process; the next tests get them back."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["xscale"])
        for name, value in (("PL_GLOBAL_SEED", "0"), ("PL_SEED_WORKERS", "0"), ("MPLBACKEND", "Agg")):
            patch.setenv(name, value)
        yield


@pytest.fixture
def instead(monkeypatch):
    """Something else instead of training, given the command line object of the stage."""

    def replace(action) -> None:
        run = StageCLI._run_subcommand

        def act(self, subcommand):
            action(self) if not self.check_only else run(self, subcommand)

        monkeypatch.setattr(StageCLI, "_run_subcommand", act)

    return replace
