"""The reference that speed is measured against computes what MAE computes, and the scripts run."""

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from xscale_lightning.data.scale_view import View
from xscale_lightning.masking import random_mask
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.methods.discovery import method_entries

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """Import a script of the benchmarks folder by name."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.delitem(sys.modules, "common", raising=False)

    def load(name: str) -> ModuleType:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)
        spec.loader.exec_module(module)
        return module

    return load


def test_the_reference_computes_the_same_loss_from_the_same_weights(load):
    common = load("common")
    size = common.SIZES["smallest"]
    ours, reference = common.build_mae(size), common.ReferenceMAE(size)
    reference.load_state_dict(ours.state_dict())
    images = common.synthetic_images(size, torch.device("cpu"), batch=3)
    torch.manual_seed(5)
    loss = ours.step({"image": images}).loss
    torch.manual_seed(5)
    expected = reference(images, torch.rand(3, size.tokens))
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_the_cross_scale_reference_computes_the_same_loss_from_the_same_weights(load):
    load("common")
    script = load("cross_scale")
    size = script.SIZES["smallest"]
    ours, reference = script.build(size, Recipe(preset="paper")), script.ReferenceCrossScale(size)
    reference.load_state_dict(ours.state_dict())
    images, second = torch.randn(2, 3, size.bands, size.image, size.image)
    noise = torch.rand(2, 3, size.tokens)
    masks = [random_mask(part, size.mask_ratio) for part in noise]
    loss = ours.train().loss(View(images), View(second), *masks).loss
    expected = reference.train()(images, noise[0], second, noise[1])
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-5, msg=name)


def test_the_s2mae_reference_computes_the_same_loss_from_the_same_weights(load):
    load("common")
    script = load("s2mae")
    size = script.SIZES["smallest"]
    ours, reference = script.build(size), script.ReferenceS2MAE(size)
    reference.load_state_dict(ours.state_dict())
    images, noise = torch.rand(3, size.bands, size.image, size.image), torch.rand(3, reference.length)
    loss = ours.loss(images, *random_mask(noise, size.mask_ratio)).loss
    expected = reference(images, noise)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    gradients = dict(reference.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-6, msg=name)


def test_s2mae_times_every_variant(load, tmp_path):
    load("common")
    load("s2mae").main(["--size", "smallest", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path)])
    variants = json.loads((tmp_path / "s2mae.json").read_text())["sizes"]["smallest"]["variants"]
    assert {"reference float32", "ours float32", "ours bfloat16 math", "ours bfloat16 sdpa"} <= set(variants)
    assert variants["reference float32"]["ratio"] == 1 and all(v["images_per_s"] > 0 for v in variants.values())


def test_cross_scale_times_every_variant(load, tmp_path):
    load("common")
    script = load("cross_scale")
    script.main(["--size", "smallest", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path)])
    variants = json.loads((tmp_path / "cross_scale.json").read_text())["sizes"]["smallest"]["variants"]
    assert {"reference float32", "recommended math", "recommended sdpa", "paper math", "mae auto"} <= set(variants)
    assert variants["reference float32"]["ratio"] == 1 and all(v["images_per_s"] > 0 for v in variants.values())


def test_train_step_measures_both_and_writes_json(load, tmp_path, capsys):
    script = load("train_step")
    script.main(["--size", "smallest", "--seconds", "0", "--device", "cpu", "--no-memory", "--output", str(tmp_path)])
    result = json.loads((tmp_path / "train_step.json").read_text())
    size = result["sizes"]["smallest"]
    assert size["ratio"] > 0 and size["ours"]["images_per_s"] > 0 and size["reference"]["dtype"] == "float32"
    assert {"date", "cpu", "versions"} <= set(result)
    assert "smallest reference" in capsys.readouterr().out


def test_attention_times_every_backend(load, tmp_path):
    script = load("attention")
    arguments = ["--lengths", "5", "--tokens", "20", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path)]
    script.main(arguments)
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert len(rows) == 4 and {row["packed"] for row in rows} == {False, True}
    assert all(set(row["milliseconds"]) == {"sdpa", "math"} for row in rows)


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="times for minutes on a GPU")
def test_the_gpu_script_checks_everything_without_a_gpu(load, capsys):
    assert load("gpu").main(["--steps", "8"]) == 0
    out = capsys.readouterr().out
    assert "No CUDA device" in out
    assert all(f"method {name} bfloat16" in out for name in method_entries())


def test_a_disagreeing_backend_is_reported(load, monkeypatch):
    script = load("gpu")
    monkeypatch.setattr(script, "attend", lambda q, k, v, seqlens=None, backend="auto": q + k + v)
    assert all("FAILED" in row[2] for row in script.check_attention(torch.device("cpu")))


def test_affinity_times_every_variant(load, tmp_path):
    load("common")
    script = load("affinity")
    script.main(["--size", "smallest", "--seconds", "0", "--device", "cpu", "--no-memory", "--output", str(tmp_path)])
    hosts = json.loads((tmp_path / "affinity.json").read_text())["hosts"]
    assert set(hosts) == {"ijepa", "latent_mim"}
    for variants in hosts.values():
        assert set(variants) == {"alone", "teacher host", "teacher own"} and variants["alone"]["time_ratio"] == 1
        assert all(figures["step_ms"] > 0 for figures in variants.values())
