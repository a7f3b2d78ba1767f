"""A fixed part of the configuration fuzz, and one example for every class of failure that it has found."""

import math
import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the fuzz is a script of its own, too
import fuzz_config
from fuzz_config import Case

FOUND = [
    Case("s2mae", "SyntheticData", [("data", "bands", 0)]),
    Case("cross_scale_mae", "ChangeFolder", [("pictures", "num_images", None)]),
    Case("mae", "SyntheticData", [("model", "backbone.depth", 10**9)]),
    Case("mae", "SyntheticData", [("model", "backbone.dim", 10**9)]),
    Case("mae", "SyntheticData", [("model", "decoder_heads", 0)]),
    Case("mae", "SyntheticData", [("data", "image_height", 10**9)]),
    Case("mae", "SyntheticData", [("data", "seed", 2**63)]),
    Case("mae", "SyntheticData", [("data", "gsd", math.nan)]),
    Case("mae", "SyntheticData", [("data", "num_workers", 10**9)]),
    Case("ijepa", "SyntheticData", [("model", "ema_momentum.start", math.nan)]),
    Case("mae", "SceneFolder", [("data", "split_seed", -1)]),
    Case("mae", "SceneFolder", [("data", "samples_per_epoch", 10**30)]),
    Case("mae", "ImageFolderData", [("data", "image_size", 10**9)]),
    Case("mae", "SyntheticData", [("trainer", "gradient_clip_val", math.nan)]),
    Case("mae", "SyntheticData", [("trainer", "gradient_clip_val", 1.0), ("trainer", "precision", "16-mixed")]),
    Case("mae", "SyntheticData", [("trainer", "check_val_every_n_epoch", 0)]),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "files"
    fuzz_config.make_files(root)
    return root


@pytest.mark.parametrize("number", range(6))
def test_drawn_configurations_run_or_are_refused(number, files, tmp_path, process):
    case = fuzz_config.draw(random.Random(number), fuzz_config.pool())
    assert not fuzz_config.problem(case, files, tmp_path), case


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_what_the_fuzz_has_found(case, files, tmp_path, process):
    assert not fuzz_config.problem(case, files, tmp_path)
