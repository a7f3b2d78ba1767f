"""`xscale new-method`: the project it writes works outside the package, installed as any other distribution."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import yaml

from xscale_lightning import cli
from xscale_lightning.testing import check_method

ROOT = Path(__file__).resolve().parents[1]
TINY_RUN = [
    *("--data.batch_size", "4", "--data.samples_per_epoch", "16", "--data.num_workers", "0"),
    *("--trainer.max_steps", "2", "--trainer.accelerator", "cpu", "--trainer.devices", "1"),
    *("--trainer.limit_val_batches", "1", "--knn.max_train", "8", "--knn.max_test", "4"),
]


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mine")
    assert cli.main(["new-method", "my_method", "--into", str(folder)]) == 0
    return folder / "my_method"


@pytest.fixture(scope="module")
def site(project) -> Path:
    """A folder of installed packages with the project in it, as an installer would leave it; no network, no build."""
    declared = tomllib.loads((project / "pyproject.toml").read_text())
    name, version = declared["project"]["name"], declared["project"]["version"]
    folder = project.parent / "site"
    for package in declared["tool"]["setuptools"]["packages"]:
        shutil.copytree(project / package, folder / package)
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    lines = []
    for group, entries in declared["project"]["entry-points"].items():
        lines += [f"[{group}]", *(f"{key} = {value}" for key, value in entries.items())]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    return folder


# One process, so that one import serves all three: what the project's README asks for, and a run by entry point.
RUN = """
import json, sys
import pytest
from xscale_lightning import cli
codes = [int(pytest.main(["-q", "-p", "no:cacheprovider", sys.argv[2]]))]
codes += [cli.main(["fit", *command, "--debug"]) for command in json.loads(sys.argv[1])]
print("codes", *codes)
"""


@pytest.fixture(scope="module")
def used(project, site, tmp_path_factory) -> tuple[str, Path, Path]:
    """What the process has said, and the folders of the runs by class path and by entry point."""
    by_path, by_name, cwd = (tmp_path_factory.mktemp(name) for name in ("by_path", "by_name", "elsewhere"))
    shipped = ["--config", str(project / "configs/my_method.yaml"), "--data.image_size", "32"]
    shipped += ["--model.backbone.depth", "1"]
    given = ["--model", "my_method", "--model.noise", "0.25", "--data", "SampleScene", "--data.image_size", "32"]
    given += ["--model.backbone.name", "vit_tiny_patch8", "--model.backbone.depth", "1"]
    given += ["--model.views.scale", "[1.0,1.0]"]
    runs = [[*shipped, *TINY_RUN, "--output", str(by_path)], [*given, *TINY_RUN, "--output", str(by_name)]]
    path = os.pathsep.join(filter(None, [str(site), str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "MPLBACKEND": "Agg"}
    command = [sys.executable, "-c", RUN, json.dumps(runs), str(project / "tests")]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout + done.stderr, by_path, by_name


def checkpoint_of(output: Path, method: str) -> dict:
    (folder,) = (output / method).iterdir()
    assert (folder / "results.json").exists()
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_the_project_is_whole_and_has_no_placeholder_left(project):
    files = {path.relative_to(project).as_posix(): path for path in project.rglob("*") if path.is_file()}
    assert set(files) == {
        "pyproject.toml",
        "README.md",
        "my_method/__init__.py",
        "my_method/method.py",
        "configs/my_method.yaml",
        "tests/test_my_method.py",
    }
    for name, path in files.items():
        assert "@" not in path.read_text(), name
    assert len(files["my_method/method.py"].read_text().splitlines()) < 100


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["masked", "joint"])
def test_other_kinds_keep_the_contract(kind, tmp_path):
    assert cli.main(["new-method", f"my_{kind}", "--kind", kind, "--into", str(tmp_path)]) == 0
    folder = tmp_path / f"my_{kind}"
    text = "".join(path.read_text() for path in folder.rglob("*.*"))
    assert "@" not in text.replace("@property", "").replace("mT @ other", "")
    assert len((folder / f"my_{kind}" / "method.py").read_text().splitlines()) < 100
    file = folder / f"my_{kind}" / "method.py"
    spec = importlib.util.spec_from_file_location(f"my_{kind}_method", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # checkpoints name the class by its module
    try:
        spec.loader.exec_module(module)
        check_method(getattr(module, f"My{kind.capitalize()}"))
    finally:
        del sys.modules[spec.name]
    given = yaml.safe_load((folder / "configs" / f"my_{kind}.yaml").read_text())["model"]
    assert given["class_path"] == f"my_{kind}.method.My{kind.capitalize()}"
    assert set(given["init_args"]) & {"mask_ratio", "dim"}


@pytest.mark.slow
def test_its_own_test_passes(used):
    assert "1 passed" in used[0] and "codes 0 0 0" in used[0], used[0][-6000:]


@pytest.mark.slow
def test_it_trains_by_class_path(used):
    checkpoint = checkpoint_of(used[1], "my_method")
    assert checkpoint["global_step"] == 2
    assert checkpoint["xscale"]["class_path"] == "my_method.method.MyMethod"
    assert checkpoint["xscale"]["init_args"]["noise"] == 0.5


@pytest.mark.slow
def test_it_trains_by_its_entry_point_name(used):
    checkpoint = checkpoint_of(used[2], "my_method")
    assert checkpoint["global_step"] == 2
    assert checkpoint["xscale"]["class_path"] == "my_method.method.MyMethod"
    assert checkpoint["xscale"]["init_args"]["noise"] == 0.25
