"""The scripts run at toy size, and write what they say."""

import json
from types import SimpleNamespace

import pytest
import torch

from xscale_lightning.methods.discovery import method_entries

TOY = ["--size", "smallest", "--seconds", "0", "--device", "cpu"]


@pytest.fixture(autouse=True)
def quick_rate(load, monkeypatch):
    """A rate of matrix products without the matrix products, which take seconds."""
    monkeypatch.setattr(load("common"), "matmul_rate", lambda dtype, device: 1e12)


def test_train_step_times_every_variant_and_leaves_other_methods_alone(load, tmp_path, capsys):
    script = load("train_step")
    for methods in ("mae", "sa_ijepa"):
        script.main([*TOY, "--methods", methods, "--only", "time", "--output", str(tmp_path)])
    found = json.loads((tmp_path / "train_step.json").read_text())["sizes"]["smallest"]
    assert set(found) == {"mae", "sa_ijepa"}
    for entry in found.values():
        variants = entry["variants"]
        assert {"reference float32", "ours float32", "ours bfloat16"} <= set(variants) and {"date", "cpu"} <= set(entry)
        assert variants["reference float32"]["ratio"] == 1 and entry["pairs"] >= 5
        assert all(row["images_per_s"] > 0 and row["share_of_matmul"] > 0 for row in variants.values())
    assert "sa_ijepa reference float32" in capsys.readouterr().out


def test_memory_is_added_to_an_entry_that_is_there(load, tmp_path, monkeypatch):
    script = load("train_step")
    script.main([*TOY, "--methods", "mae", "--only", "time", "--output", str(tmp_path)])
    monkeypatch.setattr(script.common, "peak_memory", lambda _script, options: 5_000_000 * len(options))
    script.main([*TOY, "--methods", "mae", "--only", "memory", "--output", str(tmp_path)])
    entry = json.loads((tmp_path / "train_step.json").read_text())["sizes"]["smallest"]["mae"]
    assert all(row["peak_memory_mb"] > 0 and row["images_per_s"] > 0 for row in entry["variants"].values())


def test_one_variant_alone_prints_its_peak_memory(load, capsys):
    load("train_step").main([*TOY, "--methods", "mae", "--alone", "ours bfloat16"])
    assert int(capsys.readouterr().out) > 1e8  # bytes: Python and torch alone take more


def test_size_image_bands_and_batch_can_be_chosen(load, tmp_path):
    chosen = ["--image-size", "32", "--bands", "3", "--batch", "3", "--only", "time", "--output", str(tmp_path)]
    load("train_step").main([*TOY, "--methods", "latent_mim", *chosen])
    size = json.loads((tmp_path / "train_step.json").read_text())["sizes"]["smallest"]["latent_mim"]["size"]
    assert (size["image"], size["bands"], size["batch"]) == (40, 3, 3)  # 32 pixels of patches and their gaps


def test_scaling_measures_every_point_and_draws(load, tmp_path, monkeypatch):
    script, scaling = load("train_step"), load("scaling")
    monkeypatch.setattr(scaling, "AXES", {"image": (32, 40), "bands": (3, 51), "batch": (1, 2)})
    monkeypatch.setattr(scaling, "SHAPE", {**scaling.SHAPE, "dim": 48, "depth": 1, "decoder_dim": 48})
    monkeypatch.setattr(scaling, "START", {"image": 32, "bands": 3, "batch": 1})
    arguments = ["--scaling", "--methods", "s2mae", "--axes", "image,bands", "--seconds", "0", "--only", "time"]
    script.main([*arguments, "--device", "cpu", "--output", str(tmp_path)])
    record = json.loads((tmp_path / "scaling.json").read_text())
    assert set(record["s2mae"]) == {"image", "bands"} and set(record["s2mae"]["bands"]["points"]) == {"3", "51"}
    scaling.draw(record, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").stat().st_size > 5000


def test_scaling_leaves_out_what_the_reference_has_no_memory_for(load):
    scaling = load("scaling")
    sizes = [scaling.point("s2mae", "image", value) for value in scaling.AXES["image"]]
    needs = [scaling.attention_bytes(size) for size in sizes]
    assert sorted(needs) == needs and needs[0] < scaling.LIMIT


def test_attention_times_every_backend(load, tmp_path):
    script = load("attention")
    arguments = ["--lengths", "5", "--tokens", "20", "--seconds", "0", "--device", "cpu", "--output", str(tmp_path)]
    script.main(arguments)
    rows = json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert len(rows) == 4 and {row["packed"] for row in rows} == {False, True}
    assert all(set(row["milliseconds"]) >= {"sdpa", "math"} for row in rows)


@pytest.mark.skipif(torch.cuda.is_available(), reason="times for minutes on a GPU")
def test_the_gpu_script_checks_everything_without_a_gpu_and_says_so(load, tmp_path, capsys):
    assert load("gpu").main(["--steps", "6", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "gpu.json").read_text())
    assert record["device"] == "CPU" and "No GPU was available" in record["statement"]
    names = [row[0] for row in record["parts"]["methods"]["rows"]]
    assert {name.split()[0] for name in names} == {
        "mae",
        "cross_scale_mae",
        "s2mae",
        "ijepa",
        "latent_mim",
        "sa_ijepa",
        "sa_latent_mim",
    }
    assert {name.replace("sa_ijepa", "spatial_affinity").split()[0] for name in names} >= set(method_entries())
    assert "all checks passed" in capsys.readouterr().out


def test_a_disagreeing_backend_is_reported(load, monkeypatch):
    script = load("gpu_checks")
    monkeypatch.setattr(script, "attend", lambda q, k, v, seqlens=None, backend="auto": q + k + v)
    rows = [row for row in script.check_attention(torch.device("cpu")) if "padded" not in row[0]]
    assert len(rows) >= 12 and all("FAILED" in row[2] for row in rows)


def test_a_budget_divides_what_is_left(load):
    gpu = load("gpu")
    now = [0.0]
    budget = gpu.Budget(100.0, {"a": 2, "b": 3, "c": 3}, clock=lambda: now[0])
    assert budget.share("a") == 25.0
    now[0] = 40.0  # the first part took longer than its share
    assert budget.share("b") == 30.0
    now[0] = 120.0
    assert budget.share("c") == 0.0


def test_a_part_that_fails_is_recorded_and_the_next_one_runs(load, tmp_path):
    gpu = load("gpu")

    def broken(seconds):
        raise RuntimeError("no such kernel")

    parts = {"broken": broken, "fine": lambda seconds: {"rows": [["x"]]}}
    record = gpu.run_parts(parts, gpu.Budget(10.0, {"broken": 1, "fine": 1}), torch.device("cpu"), str(tmp_path))
    assert record["broken"]["failed"].startswith("RuntimeError: no such kernel") and record["fine"]["rows"] == [["x"]]
    assert json.loads((tmp_path / "gpu.json").read_text())["parts"].keys() == {"broken", "fine"}


def test_the_report_says_which_aims_are_reached(load):
    report = load("report")
    variant = {"images_per_s": 2.0, "ratio": 1.2, "tflops": 0.1, "share_of_matmul": 0.5, "peak_memory_mb": 100}
    where = {"cpu": "C", "torch_threads": 2, "versions": {"torch": "2"}, "date": "2026-01-01T00:00"}
    size = {"dim": 8, "depth": 1, "image": 8, "bands": 3, "batch": 2}
    variants = {name: variant for name in ("reference float32", "ours float32", "ours bfloat16")}
    variants["ours float32"] = {**variant, "ratio": 0.9}
    entry = {**where, "pairs": 7, "augment_s": 0.1, "size": size, "variants": variants}
    text = "\n".join(report.train_step({"sizes": {"base4": {"mae": entry}}}))
    assert "| `mae` | ours bfloat16 | 2.00 |" in text and "100" in text
    assert "mae (base4, 0.90)" in text  # slower than the reference in float32: said
    text = "\n".join(report.train_step({"sizes": {"vit_base": {"s2mae": entry}}}))
    assert "s2mae (vit_base) 1.20 of 5, not reached" in text and "reached by s2mae (vit_base, 50%)" in text


def test_precision_trains_both_and_draws_them(load, tmp_path, capsys):
    load("precision").main(["--methods", "mae", "--steps", "3", "--batch", "4", "--output", str(tmp_path)])
    entry = json.loads((tmp_path / "precision.json").read_text())["mae"]
    assert all(len(run["train_loss"]) == 3 for run in entry["runs"].values())
    assert entry["runs"]["float32"]["train_loss"] != entry["runs"]["bfloat16"]["train_loss"]
    assert entry["apart"]["largest_step"] < 0.05
    assert (tmp_path / "precision.png").stat().st_size > 5000
    assert "mae: train_loss_end" in capsys.readouterr().out


@pytest.fixture
def toy_gpu(load, monkeypatch):
    """`gpu_speed` at toy size on the CPU: its memory readings are made up, the rest runs."""
    script, sizes = load("gpu_speed"), load("sizes")
    monkeypatch.setattr(script, "SIZES", {name: sizes.SIZES["smallest"] for name in ("vit_base", "vit_large")})
    for name in ("empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device=None: 10**9)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(total_memory=15 * 10**8))
    monkeypatch.setattr(script, "timed", lambda step, device, most: 0.5)
    once = script.common.clock
    monkeypatch.setattr(
        script.common,
        "interleave",
        lambda found, *_, **__: {n: [once(f, torch.device("cpu"))] for n, f in found.items()},
    )
    return script


def test_the_sweep_stops_at_the_edge_of_memory(toy_gpu, monkeypatch):
    monkeypatch.setattr(toy_gpu, "METHODS", ("mae", "sa_ijepa"))
    found = toy_gpu.sweep(torch.device("cpu"), 60.0)
    assert [row[:3] for row in found["rows"]] == [
        [m, s, "16"] for m in ("mae", "sa_ijepa") for s in ("vit_large", "vit_base")
    ]
    assert found["best"]["mae vit_base"]["images_per_s"] == 32 and not found["left_out"]

    def full(step, device):
        raise torch.cuda.OutOfMemoryError("full")

    monkeypatch.setattr(toy_gpu, "peak_gb", full)
    monkeypatch.setattr(toy_gpu, "METHODS", ("mae",))
    found = toy_gpu.sweep(torch.device("cpu"), 60.0)
    assert all(row[6] == "out of memory" for row in found["rows"]) and not found["best"]


def test_the_other_gpu_parts_run(toy_gpu, monkeypatch):
    monkeypatch.setattr(toy_gpu, "METHODS", ("mae", "latent_mim"))
    for name, value in (("LENGTHS", (17,)), ("TOKENS", 128), ("BATCH", 2)):
        monkeypatch.setattr(toy_gpu, name, value)
    every = toy_gpu._options
    monkeypatch.setattr(toy_gpu, "_options", lambda *size: list(every(*size))[:-1])  # all but torch.compile
    cpu = torch.device("cpu")
    rows = toy_gpu.against_reference(cpu, 12.0)["rows"]
    assert {row[0] for row in rows} == {"mae", "latent_mim"} and all(float(row[3]) > 0 for row in rows)
    assert [row[1] for row in toy_gpu.options(cpu, 60.0)["rows"]][:3] == [
        "default",
        "augmentation on the device",
        "AdamW not fused",
    ]
    assert {row[1] for row in toy_gpu.attention(cpu, 60.0)["rows"]} == {"plain", "packed"}
    assert toy_gpu.attention(cpu, 0.0)["cut_short"]
