import time
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import RichProgressBar
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xscale_lightning.callbacks import OnlineKNN, ProgressBar, ReconstructionPictures, RunSummary, Throughput
from xscale_lightning.callbacks import progress as progress_module
from xscale_lightning.callbacks.throughput import StepClock, peak_tflops


def test_clock_counts_steps_and_waiting_but_not_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = StepClock()

    def pass_time(seconds: float) -> None:
        now[0] += seconds

    clock.resume()
    pass_time(1)
    clock.batch_start()
    pass_time(3)
    clock.batch_end(8)
    clock.pause()
    pass_time(100)  # validation
    clock.resume()
    pass_time(2)
    clock.batch_start()
    pass_time(4)
    clock.batch_end(8)
    assert (clock.seconds, clock.waited, clock.images, clock.steps) == (10, 3, 16, 2)


class SlowSteps(Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        time.sleep(0.05)


def test_throughput_of_a_run(make_data, make_method, make_trainer, tmp_path: Path) -> None:
    data = make_data()
    callbacks = [Throughput(every_n_steps=2, peak_tflops=1e-6), SlowSteps()]
    trainer = make_trainer(*callbacks, max_steps=8)
    trainer.fit(make_method(data), datamodule=data)
    speed = {name: value.item() for name, value in trainer.callback_metrics.items() if name.startswith("speed/")}
    assert 50 < speed["speed/images_per_s"] < 16 / 0.05
    assert 0 <= speed["speed/data_wait"] < 0.9
    steps_per_second = speed["speed/images_per_s"] / 16
    assert speed["speed/tflops"] == pytest.approx(1000 * steps_per_second / 1e12, rel=1e-4)
    assert speed["speed/mfu"] == pytest.approx(speed["speed/tflops"] / 1e-6, rel=1e-4)
    events = EventAccumulator(str(tmp_path / "runs" / "a"))
    events.Reload()
    assert [point.step for point in events.Scalars("speed/images_per_s")] == [4, 6, 8, 8]


def test_no_flops_no_mfu_and_a_run_shorter_than_the_interval(make_data, make_method, make_trainer) -> None:
    data = make_data()
    method = make_method(data)
    method.flops_per_batch = 0
    trainer = make_trainer(Throughput(every_n_steps=100))
    trainer.fit(method, datamodule=data)
    names = {name for name in trainer.callback_metrics if name.startswith("speed/")}
    assert names == {"speed/images_per_s", "speed/data_wait"}


def test_peak_is_unknown_on_the_cpu() -> None:
    assert peak_tflops(torch.device("cpu"), "bf16-mixed") is None


def test_peak_depends_on_the_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA A100-SXM4-80GB")
    assert peak_tflops(torch.device("cuda"), "bf16-mixed") == pytest.approx(312)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "GeForce RTX")  # too short for the table's reader
    assert peak_tflops(torch.device("cuda"), "16-mixed") is None


def test_plain_lines_where_the_output_is_no_terminal(make_data, make_method, make_trainer, capsys) -> None:
    data = make_data()
    bar = ProgressBar(seconds_between_lines=0.0)
    make_trainer(bar, OnlineKNN(), ReconstructionPictures()).fit(make_method(data), datamodule=data)
    out = capsys.readouterr().out
    assert "\x1b" not in out
    lines = out.splitlines()
    steps = [line for line in lines if line.startswith("epoch 1")]
    assert len(steps) == 4
    assert "step 4/4" in steps[-1] and "loss" in steps[-1] and "images/s" in steps[-1]
    probes = [line for line in lines if line.startswith("step 4:")]
    assert len(probes) == 2 and all("(step 0: " in line for line in probes)
    assert any("bilinear inpainting" in line for line in probes)


def test_no_output_when_switched_off(make_data, make_method, make_trainer, capsys) -> None:
    data = make_data()
    make_trainer(ProgressBar(refresh_rate=0), OnlineKNN()).fit(make_method(data), datamodule=data)
    assert "step" not in capsys.readouterr().out


def test_bar_in_a_terminal(make_data, make_method, make_trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(force_terminal=True, width=200, record=True)
    monkeypatch.setattr(progress_module, "get_console", lambda: console)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.get_console", lambda: console)
    monkeypatch.setattr(progress_module, "SECONDS_BETWEEN_METRICS", 0.0)
    monkeypatch.setattr("lightning.pytorch.callbacks.progress.rich_progress.reconfigure", lambda **_: None)
    data, bar = make_data(), ProgressBar()
    assert isinstance(bar, RichProgressBar)
    trainer = make_trainer(bar, OnlineKNN(), RunSummary())
    trainer.fit(make_method(data), datamodule=data)
    shown = bar.get_metrics(trainer, trainer.lightning_module)
    assert set(shown) >= {"loss", "knn/tiny/top1"}
    assert "(step 0: " in shown["knn/tiny/top1"]
    text = console.export_text()
    assert "Epoch 0" in text and "loss" in text
