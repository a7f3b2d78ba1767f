"""Two processes on the CPU (gloo): gradients of data-parallel ones, shards (FSDP2), and a step that both skip."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
STEERING = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "RANK", "LOCAL_RANK", "NODE_RANK", "PL_GLOBAL_SEED")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the two processes are forked"),
]


@pytest.fixture(scope="module")
def all_of_them(tmp_path_factory) -> Path:
    """Folder with what the scripts have found; the environment has nothing that would steer a distributed run."""
    folder = tmp_path_factory.mktemp("distributed")
    kept = {name: value for name, value in os.environ.items() if name not in STEERING}
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**kept, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "MPLBACKEND": "Agg"}
    scripts = [HERE / f"{name}.py" for name in ("gradients", "shards", "skipped")]
    command = [sys.executable, HERE / "run_all.py", folder, *scripts]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder


@pytest.fixture
def found(all_of_them):
    """Check that a script has run; returns the folder and its output."""

    def check(script: str) -> tuple[Path, str]:
        record = json.loads((all_of_them / f"{script}.json").read_text())
        assert record["code"] == 0, record["output"][-5000:]
        return all_of_them, record["output"]

    return check


@pytest.mark.parametrize("method", ["mae", "cross_scale_mae", "s2mae", "ijepa", "latent_mim", "spatial_affinity"])
def test_two_processes_have_the_gradients_of_one(method, found):
    folder, _ = found("gradients")
    two, one = (torch.load(folder / f"{method}_{name}.pt", weights_only=True) for name in ("two", "one"))
    assert (two["world"], one["world"]) == (2, 1)
    assert two["lr"] == one["lr"] == pytest.approx(1.5e-4 * 8 / 256)
    assert two["gradients"].keys() == one["gradients"].keys() and len(one["gradients"]) > 30
    for name, gradient in one["gradients"].items():
        assert gradient.abs().max() > 0, name
        torch.testing.assert_close(
            two["gradients"][name], gradient, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
        )


@pytest.mark.parametrize("method", ["mae", "ijepa", "latent_mim"])
def test_shards_train_as_the_whole(method, found):
    """Loss, gradients, clipping, a step and the EMA are those of one process."""
    folder, _ = found("shards")
    for rank in (0, 1):
        results = torch.load(folder / f"{method}_{rank}.pt", weights_only=True)
        one, two = results["one"], results["two"]
        assert 0.45 < two["share"] < 0.55
        assert two["class_path"].startswith(f"xscale_lightning.methods.{method}.") and "FSDP" not in two["class_path"]
        assert one["norm"] > 0.01, "nothing was clipped"
        assert one["gradients"].keys() == two["gradients"].keys() and len(one["gradients"]) > 30
        for key in ("loss", "norm", "features", "restored"):
            torch.testing.assert_close(two[key], one[key], rtol=1e-6 if key == "features" else 1e-9, atol=1e-9)
        for part in ("gradients", "after"):
            for name, wanted in one[part].items():
                torch.testing.assert_close(
                    two[part][name], wanted, rtol=1e-9, atol=1e-12, msg=lambda text, n=name: f"{n}: {text}"
                )


def test_both_processes_skip_what_one_cannot_do(found):
    folder, output = found("skipped")
    zero, one = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    assert zero["skipped"] == one["skipped"] == 1 and zero["updates"] == one["updates"] == 2
    for record in (zero, one):
        first, second, third = record["states"]
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(second[name], third[name]) for name in first)
        assert all(tensor.isfinite().all() for tensor in third.values())
    assert all(torch.equal(zero["states"][-1][name], one["states"][-1][name]) for name in zero["states"][-1])
    told = [line for line in output.splitlines() if "Skipped the update" in line]
    assert len(told) == 1 and "process 1" in told[0]
    assert [path.name for path in (folder / "run" / "0" / "guard").iterdir()] == ["step_0000001_process1.pt"]
