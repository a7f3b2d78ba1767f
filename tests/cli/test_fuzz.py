"""A fixed part of the configuration fuzz, and one example for every class of failure that it has found."""

import math
import random
import sys
from pathlib import Path

import pytest

from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.discovery import load_class
from xscale_lightning.models.blocks import Block

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the fuzz is a script of its own, too
import fuzz_config
from fuzz_draw import Case, class_name, concrete
from fuzz_files import LABELLED, METHODS, TASKS, data_modules, make_files

SEGMENTATION = "xscale_lightning.tasks.segmentation.Segmentation"
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
    Case("latent_mim", "SyntheticData", [("model", "objective", [])]),
    Case("spatial_affinity", "SyntheticData", [("model", "host_args", 0.5)]),
    Case(SEGMENTATION, "MaskFolder", [("data", "batch_size", None)]),
    Case(SEGMENTATION, "MaskFolder", [("model", "decoder_dim", 0)]),
    Case("mae", "ChangeFolder", [("data", "bands", {"a": 1})]),
    Case("mae", "TorchGeoData", [("data", "test", {"a": 1})]),
    Case("mae", "TorchGeoData", [("trainer", "accumulate_grad_batches", None)]),
    Case("mae", "TorchGeoData", [("data", "split_argument", "../..")]),
    Case("mae", "TorchGeoData:labels", [("data", "splits.val", "1")]),
    Case("mae", "SyntheticData", [("trainer", "accelerator", "")]),
    Case("mae", "SyntheticData", [("trainer", "val_check_interval", 10**30)]),
    Case("mae", "SyntheticData", [("", "ckpt_path", "")]),
    Case("mae", "SyntheticData", [("", "ckpt_path", "best")]),
    Case("mae", "SyntheticData", [("", "ckpt_path", "1")]),
    Case("mae", "SyntheticData", [("", "ckpt_path", "a" * 300)]),
    Case("mae", "MaskFolder", [("data", "test_list", "../..")]),
    Case("mae", "MaskFolder", [("data", "num_classes", 10**9)]),
    Case("mae", "SyntheticData", [("pictures", "false_colour", True)]),
    Case("mae", "SyntheticData", [("data", "batch_size", 2**63)]),
    Case("mae", "SyntheticData", [("data", "image_width", 1)]),
    Case("mae", "SyntheticData", [("model", "views.size", 10**9)]),
    Case("mae", "SyntheticData", [("model", "backbone.dim", 2)]),
    Case("mae", "SyntheticData", [("model", "init_from", "../..")]),
    Case("mae", "SampleScene", [("data", "samples_per_epoch", 1)]),
    Case("mae", "SceneFolder", [("data", "gsd", 10**30)]),
    Case("mae", "PairedFolders", [("data", "file_bands_hr", [])]),
    Case("mae", "PairedGeo", [("data", "bands_hr", {})]),
    Case("mae", "ChangeFolder", [("data", "first", "")]),
    Case("s2mae", "SyntheticData", [("model", "backbone.image_size", None)]),
    Case("ijepa", "SyntheticData", [("model", "masks.targets", 2**63)]),
    Case("cross_scale_mae", "SyntheticData", [("model", "prediction_weight", -math.inf)]),
    Case("cross_scale_mae", "SyntheticData", [("model", "temperature", 1e-300)]),
    Case("latent_mim", "SyntheticData", [("model", "objective.similarity.kind", "constant")]),
    Case("spatial_affinity", "PairedFolders", [("model", "optimizer.weight_decay", 1e300)]),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz") / "files"
    make_files(root)
    with fuzz_config.warm():
        yield root


@pytest.fixture(scope="module")
def arguments():
    return fuzz_config.pool()


def test_every_method_task_and_data_module_is_drawn():
    assert {cls.__name__ for cls in concrete(XScaleDataModule, "data")} == set(map(class_name, data_modules(Path())))
    drawn = {load_class(name) for name in (*METHODS, *TASKS)}
    assert set(concrete(SSLModule, "methods", "tasks")) == drawn
    assert set(LABELLED) == {name.rpartition(".")[2] for name in TASKS}


@pytest.mark.parametrize("number", range(6))
def test_drawn_configurations_run_or_are_refused(number, files, arguments, tmp_path, process):
    choice = random.Random(number)
    case = next(case for _ in range(9) if (case := fuzz_config.draw(choice, arguments)).data != "PackedData")
    assert not fuzz_config.problem(case, files, tmp_path), case


@pytest.mark.parametrize("case", FOUND, ids=str)
def test_what_the_fuzz_has_found(case, files, tmp_path, process):
    assert not fuzz_config.problem(case, files, tmp_path)


@pytest.mark.parametrize("name", ["backbone.depth", "decoder_depth", "backbone.dim", "decoder_dim"])
def test_what_is_far_too_large_is_refused_before_it_is_built(name, files, tmp_path, process, monkeypatch):
    built, init = [], Block.__init__
    monkeypatch.setattr(Block, "__init__", lambda self, *args, **kwargs: built.append(1) or init(self, *args, **kwargs))
    case = Case("mae", "SyntheticData", [("model", name, 10**9)])
    assert fuzz_config.outcome(case, files, tmp_path) == ("refused", "")
    assert len(built) <= 2  # the encoder's one, and the decoder's first
