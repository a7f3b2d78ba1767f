"""What the TensorBoard of a run holds beside its curves and pictures."""

import re
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import metadata

from xscale_lightning.callbacks import (
    FeatureGeometry,
    OnlineKNN,
    ReconstructionPictures,
    RunSummary,
    TensorBoardReport,
)
from xscale_lightning.callbacks.tensorboard import CHAPTERS, layout, run_options


@pytest.fixture
def run(make_data, make_method, make_trainer, tmp_path):
    """A run with all probes; returns its event files as TensorBoard reads them."""

    def run(*reports: TensorBoardReport) -> EventAccumulator:
        data = make_data()
        probes = [OnlineKNN(), FeatureGeometry(), ReconstructionPictures()]
        trainer = make_trainer(*probes, RunSummary(), *reports)
        trainer.fit(make_method(data), datamodule=data)
        events = EventAccumulator(str(tmp_path / "runs" / "a"), size_guidance={"tensors": 0})
        events.Reload()
        return events

    return run


def text(events: EventAccumulator, tag: str) -> tuple[int, str]:
    (event,) = events.Tensors(f"{tag}/text_summary")
    return event.step, event.tensor_proto.string_val[0].decode()


def test_the_layout_holds_the_curves_of_the_run_and_no_empty_charts(run) -> None:
    events = run(TensorBoardReport())
    (event,) = events.Tensors("custom_scalars__config__")
    found = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    charts = {chart.title: chart.multiline.tag[0] for chapter in found.category for chart in chapter.chart}
    tags = events.Tags()["scalars"]
    shown = {title: [tag for tag in tags if re.match(pattern, tag)] for title, pattern in charts.items()}
    assert "knn/tiny/top1" in shown["nearest neighbours, by scale"]
    assert "reconstruction/psnr_bilinear" in shown["masked PSNR (dB), beside base lines"]
    assert shown["training"] == ["train/loss"] and shown["effective rank"] == ["geometry/rank"]
    assert not any("affinity" in chapter.title for chapter in found.category)
    assert "dense probe, beside mean spectra" not in charts


def test_texts_say_how_it_was_configured_and_what_came_out(run) -> None:
    events = run(TensorBoardReport())
    step, verdict = text(events, "run/1_verdict")
    assert step == 4 and verdict.startswith("**") and "kNN top-1 on tiny" in verdict
    assert re.search(r"\| knn/tiny/top1 \| 0\.\d+ \| [01]\.\d+ \| 4 \|", verdict)
    assert text(events, "run/3_config")[0] == 0 and '"method": "tiny"' in text(events, "run/3_config")[1]
    assert "Custom Scalars" in text(events, "run/2_guide")[1]


def test_hparams_hold_the_options_and_write_no_points(run) -> None:
    events = run(TensorBoardReport())
    content = events.PluginTagToContent(metadata.PLUGIN_NAME)
    options = metadata.parse_session_start_info_plugin_data(content[metadata.SESSION_START_INFO_TAG]).hparams
    assert options["method"].string_value == "tiny" and options["data.bands"].number_value == 3
    assert metadata.SESSION_END_INFO_TAG in content
    assert metadata.EXPERIMENT_TAG not in content  # TensorBoard would show one run's options for all
    assert [point.step for point in events.Scalars("knn/tiny/top1")] == [0, 4]  # the probe's own, none of hparams'


def test_it_can_be_switched_off(run) -> None:
    assert not run(TensorBoardReport(enabled=False)).Tags()["tensors"]


def test_without_a_logger_nothing_happens(make_data, make_method, make_trainer, tmp_path: Path) -> None:
    data = make_data()
    make_trainer(RunSummary(), TensorBoardReport(), logger=False).fit(make_method(data), datamodule=data)
    assert not list(tmp_path.rglob("events.out*"))


def test_every_pattern_finds_the_tag_it_is_for() -> None:
    tags = {
        "dense/sample/miou_mean_spectrum": "dense probe, beside mean spectra",
        "linear/sample/top1": "linear probe",
        "reconstruction/psnr_at_50": "PSNR (dB) by share hidden",
        "reconstruction/spectral_angle_bilinear": "spectral angle (degrees), beside base lines",
        "affinity/gram": "error of the Gram matrices",
        "affinity/student": "mean cosine of different patches",
        "affinity/rank_teacher": "rank of the tokens",
        "schedule/lr": "learning rate",
        "schedule/momentum": "all others",
        "speed/tflops": "10^12 operations per second",
    }
    for tag, chart in tags.items():
        assert [title for charts in layout([tag]).values() for title in charts] == [chart]
    assert layout(["dense/sample/iou/woods", "reconstruction/psnr_at_50_bilinear", "epoch"]) == {}
    assert len({title for charts in CHAPTERS.values() for title in charts}) == sum(map(len, CHAPTERS.values()))


def test_options_are_flat_and_plain(make_data, make_method, make_trainer) -> None:
    data = make_data()
    method, trainer = make_method(data), make_trainer()
    method.hparams.update({"bands": {"a": 1}, "optimizer": {"lr": 0.1, "final": None}, "scale": [0.2, 1.0]})
    options: dict[str, Any] = run_options(trainer, method)
    assert options["optimizer.lr"] == 0.1 and options["scale"] == "[0.2, 1.0]" and options["trainer.max_steps"] == 4
    assert not {"optimizer.final", "bands.a", "bands"} & options.keys()
