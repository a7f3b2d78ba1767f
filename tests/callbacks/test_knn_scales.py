"""kNN over scales: what is asked at which size, what is logged, drawn, remembered and refused."""

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xscale_lightning.callbacks import Measurement, OnlineKNN, RunSummary
from xscale_lightning.callbacks import knn as knn_module
from xscale_lightning.callbacks.verdict import Record, is_knn, verdict
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.knn import knn_evaluate
from xscale_lightning.evaluation.scales import scale_batch
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.timm_vit import TimmViT

SCALES = [0.25, 0.5, 1.0]
NAMES = [f"knn/tiny/{part}top1" for part in ("", "scale_50/", "scale_25/", "mean_over_scales/")]


def top1(found: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in found.items() if name.endswith("/top1")}


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[Measurement] = []

    def record_probe(self, trainer: Trainer, measurement: Measurement) -> None:
        self.seen.append(measurement)


@pytest.fixture
def make_any_size(make_method):
    """A method whose features are the brightest pixel and how many pixels there are: they change with the scale."""

    def make(data: Any, patch: int = 1) -> Any:
        method = make_method(data)
        method.backbone = SimpleNamespace(patch_size=patch)
        method.calls = []

        def features(batch: dict[str, Any]) -> torch.Tensor:
            image = method._normalise(batch["image"])
            method.calls.append((len(image), *image.shape[-2:], float(batch["gsd"][0])))
            return torch.cat([image.amax((2, 3)), image[:, :1, 0, 0], torch.ones(len(image), 1)], dim=1)

        method.features = features
        return method

    return make


def scores_of(method: Any, data: Any, share: float, bank_share: float, split: str = "val") -> dict[str, float]:
    def features(split: str, share: float) -> torch.Tensor:
        images = data.dataset(split).images
        return method.features(scale_batch({"image": images, "gsd": torch.full((len(images),), 10.0)}, share, 1))

    train, held_out = data.dataset("train"), data.dataset(split)
    return knn_evaluate(features("train", bank_share), train.labels, features(split, share), held_out.labels, k=3)


@pytest.mark.parametrize("scaled", ["evaluation", "both"])
def test_scores_are_those_of_the_scaled_images(make_data, make_any_size, make_trainer, scaled) -> None:
    data, recorder = make_data(), Recorder()
    method = make_any_size(data)
    probe = OnlineKNN(k=3, scales=SCALES, scaled=scaled)
    make_trainer(probe, recorder).validate(method, datamodule=data, verbose=False)
    (measurement,) = recorder.seen
    assert list(top1(measurement.metrics)) == NAMES and len(measurement.metrics) == 2 * len(NAMES)
    expected = [scores_of(method, data, s, s if scaled == "both" else 1.0)["top1"] for s in (1.0, 0.5, 0.25)]
    other = [scores_of(method, data, s, 1.0 if scaled == "both" else s)["top1"] for s in (1.0, 0.5, 0.25)]
    assert expected != other  # or the test could not tell the conventions apart
    found = list(top1(measurement.metrics).values())
    assert found == pytest.approx([*expected, sum(expected) / 3])
    errors = [(value * (1 - value) / 40) ** 0.5 for value in expected]
    assert [measurement.errors[name] for name in NAMES] == pytest.approx([*errors, sum(errors) / 3])


@pytest.mark.parametrize(("scaled", "banks"), [("evaluation", {(8, 8)}), ("both", {(8, 8), (4, 4), (2, 2)})])
def test_bank_is_made_once_and_gsd_is_handed_on(make_data, make_any_size, make_trainer, scaled, banks) -> None:
    data = make_data(batch_size=64)  # one batch per split: 64 for the bank, 40 asked
    method = make_any_size(data)
    probe = OnlineKNN(scales=SCALES, scaled=scaled)
    make_trainer(probe).validate(method, datamodule=data, verbose=False)
    bank = [call for call in method.calls if call[0] == 64]
    asked = [call for call in method.calls if call[0] == 40]
    assert len(bank) == len(banks) and {call[1:3] for call in bank} == banks
    assert [call[1:] for call in asked] == [(8, 8, 10.0), (4, 4, 20.0), (2, 2, 40.0)]


def test_one_scale_is_what_it_was(make_data, make_method, make_trainer, tmp_path) -> None:
    data, recorder, probe = make_data(), Recorder(), OnlineKNN()
    make_trainer(probe, recorder).fit(make_method(data), datamodule=data)
    assert list(recorder.seen[-1].metrics) == ["knn/tiny/top1"]
    assert not (tmp_path / "runs" / "a" / "pictures").exists()
    assert probe.state_dict() == {}


def test_multilabel(make_data, make_any_size, make_trainer, tmp_path) -> None:
    data, recorder = make_data(multilabel=True), Recorder()
    probe = OnlineKNN(scales=[0.5])
    make_trainer(probe, recorder).validate(make_any_size(data), datamodule=data, verbose=False)
    parts = ("", "scale_50/", "mean_over_scales/")
    metrics = recorder.seen[0].metrics
    assert list(metrics) == [f"knn/tiny/{part}{name}" for part in parts for name in ("map_micro", "map_macro")]
    mean = (metrics["knn/tiny/map_macro"] + metrics["knn/tiny/scale_50/map_macro"]) / 2
    assert metrics["knn/tiny/mean_over_scales/map_macro"] == pytest.approx(mean)
    for name, (low, high) in recorder.seen[0].intervals.items():
        assert low - 1e-9 <= metrics[name] <= high + 1e-9
        assert 0 <= recorder.seen[0].errors[name] <= high - low
    assert set(recorder.seen[0].intervals) == set(metrics)
    assert max(recorder.seen[0].errors.values()) > 0
    assert os.listdir(tmp_path / "runs" / "a" / "pictures") == ["knn_scales_tiny_step_0000000.png"]


def test_the_curve_is_drawn_at_every_probe(make_data, make_any_size, make_trainer, tmp_path: Path) -> None:
    data = make_data(name="eu ro/sat")
    make_trainer(OnlineKNN(scales=SCALES)).fit(make_any_size(data), datamodule=data)
    folder = tmp_path / "runs" / "a" / "pictures"
    names = [f"knn_scales_eu_ro_sat_step_{step:07d}.png" for step in (0, 4)]
    assert sorted(os.listdir(folder)) == names
    first, last = (np.asarray(Image.open(folder / name)) for name in names)
    assert first.shape == last.shape and not np.array_equal(first, last)
    events = EventAccumulator(str(tmp_path / "runs" / "a"))
    events.Reload()
    assert [image.step for image in events.Images("knn/eu ro/sat/scales")] == [0, 4]


@pytest.fixture
def drawn(monkeypatch) -> list[list[Any]]:
    """The curves of every plot."""
    plots: list[list[Any]] = []
    plain = knn_module.plot_curves
    monkeypatch.setattr(
        knn_module, "plot_curves", lambda curves, *rest: (plots.append(curves), plain(curves, *rest))[1]
    )
    return plots


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_step_0_is_remembered_across_a_resume_and_in_test(
    make_data, make_any_size, make_trainer, drawn, tmp_path
) -> None:
    def trainer(folder: str, **options: Any) -> Trainer:
        saves = ModelCheckpoint(tmp_path / folder, save_last=True)
        return make_trainer(OnlineKNN(scales=SCALES), saves, enable_checkpointing=True, **options)

    def labels() -> list[str]:
        return [curve.label for curve in drawn[-1]]

    data = make_data()
    trainer("first").fit(make_any_size(data), datamodule=data)
    assert len(drawn) == 2 and len(drawn[0]) == 1 and labels() == ["step 0 (val)", "step 4 (val)"]
    zero = drawn[0][0]
    assert zero.base_line and list(zero.scores) == [1.0, 0.5, 0.25] and zero.errors.keys() == zero.scores.keys()
    saved = tmp_path / "first" / "last.ckpt"
    trainer("second", max_steps=6).fit(make_any_size(data), datamodule=data, ckpt_path=saved)
    assert labels() == ["step 0 (val)", "step 6 (val)"] and drawn[-1][0] == zero
    trainer("third").test(make_any_size(data), datamodule=data, ckpt_path=saved, verbose=False)
    assert labels() == ["step 0 (val)", "step 4 (test)"] and drawn[-1][0] == zero
    trainer("fourth").test(make_any_size(data), datamodule=data, verbose=False)  # nothing to compare with
    assert labels() == ["step 0 (test)"]


def test_state_round_trip_is_plain() -> None:
    probe, other = OnlineKNN(scales=SCALES), OnlineKNN(scales=SCALES)
    state = {"step_0": ["step 0 (val)", {1.0: 0.7, 0.5: 0.6}, {1.0: 0.01, 0.5: 0.02}]}
    probe.load_state_dict(state)
    assert probe.state_dict() == state
    other.load_state_dict(probe.state_dict())
    assert other.state_dict() == state
    assert OnlineKNN(k=20).state_key != OnlineKNN().state_key != OnlineKNN(scaled="both").state_key


@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ([], r"knn.scales: \[\] is not possible"),
        ([1.5], "knn.scales: 1.5 is not possible"),
        ([0.5, 0.5], "knn.scales: 0.5 is given twice"),
    ],
)
def test_impossible_scales_are_refused(scales, message) -> None:
    with pytest.raises(UserError, match=message):
        OnlineKNN(scales=scales)


def test_less_than_a_patch_is_refused_before_the_first_step(make_data, make_any_size, make_trainer) -> None:
    data = make_data()
    method = make_any_size(data, patch=4)
    with pytest.raises(UserError, match=r"knn.scales: 0.25 of 8 x 8 pixels is 2 x 2, .*give 0.5 or more") as caught:
        make_trainer(OnlineKNN(scales=SCALES)).fit(method, datamodule=data)
    assert method.calls == [] and len(str(caught.value).splitlines()) <= 2
    data.image_size = (0, 0)  # not known before the images are read
    with pytest.raises(UserError, match=r"knn.scales: 0.25 of 8 x 8 pixels"):
        make_trainer(OnlineKNN(scales=SCALES)).fit(method, datamodule=data)
    assert method.losses == []


def test_a_refused_run_leaves_no_folder_with_the_plot_of_step_0(
    make_data, make_any_size, make_trainer, tmp_path
) -> None:
    class Refuse(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            assert (tmp_path / "runs" / "a" / "pictures" / "knn_scales_tiny_step_0000000.png").exists()
            raise UserError("no")

    data = make_data()
    with pytest.raises(UserError, match=r"^no$"):
        make_trainer(OnlineKNN(scales=SCALES), RunSummary(), Refuse()).fit(make_any_size(data), datamodule=data)
    assert not (tmp_path / "runs" / "a").exists()


def test_a_mask_that_refuses_small_images_is_no_hindrance(make_data, make_trainer) -> None:
    data, recorder = make_data(), Recorder()
    backbone = BackboneConfig("vit_tiny_patch4", position="gsd", depth=1)
    method = MAE(bands=data.bands, backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)
    with pytest.raises(UserError):
        method.check_size(4, 4)  # 75 % of one patch: nothing would be visible
    make_trainer(OnlineKNN(scales=[0.5]), recorder).validate(method, datamodule=data, verbose=False)
    assert 0 <= recorder.seen[0].metrics["knn/tiny/scale_50/top1"] <= 1


@pytest.mark.parametrize("position", ["sincos", "learned", "gsd"])
def test_backbones_take_every_scale(position) -> None:
    backbone = BackboneConfig("vit_tiny_patch8", position, image_size=64, depth=1).build(3).eval()
    batch = {"image": torch.rand(2, 3, 64, 96), "gsd": torch.tensor([10.0, 10.0])}
    for share, tokens in ((1.0, 96), (0.5, 24), (0.125, 2)):
        scaled = scale_batch(batch, share, 8)
        assert backbone(scaled["image"], gsd=scaled["gsd"]).patches.shape[1] == tokens


def test_timm_backbones_take_every_scale() -> None:
    backbone = TimmViT("vit_tiny_patch16_224", in_chans=3).eval()
    for share, tokens in ((1.0, 64), (0.5, 16), (0.125, 1)):
        images = scale_batch({"image": torch.rand(1, 3, 128, 128)}, share, 16)["image"]
        with torch.no_grad():
            assert backbone(images).patches.shape[1] == tokens


def test_the_verdict_hears_of_the_native_size_alone() -> None:
    assert [name for name in NAMES if is_knn(name)] == ["knn/tiny/top1"]
    assert is_knn("knn/scale_5/top1") and is_knn("knn/tiny/map_micro") and not is_knn("knn/tiny/scale_50/map_micro")
    worse = Record(step_0=0.7, step_0_split="val", last=0.2, error=0.001)
    better = Record(step_0=0.7, step_0_split="val", last=0.9, error=0.001)
    sentence = verdict({**dict.fromkeys(NAMES, worse), "knn/tiny/top1": better})
    assert sentence == "It learned: kNN top-1 on tiny 0.900 is above its step-0 value 0.700."
