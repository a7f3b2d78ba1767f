import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from xscale_lightning.callbacks import (
    FeatureGeometry,
    Measurement,
    OnlineKNN,
    ProgressBar,
    ReconstructionPictures,
    RunSummary,
    Throughput,
)
from xscale_lightning.callbacks.sampling import extract_features, sample_batches
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.knn import knn_evaluate


class Recorder(Callback):
    """Keeps every measurement with its step."""

    def __init__(self) -> None:
        self.seen: list[tuple[int, Measurement]] = []

    def record_probe(self, trainer: Any, measurement: Measurement) -> None:
        self.seen.append((trainer.global_step, measurement))

    def steps(self, name: str) -> list[int]:
        return [step for step, measurement in self.seen if name in measurement.metrics]


def tensorboard(folder: Path) -> EventAccumulator:
    events = EventAccumulator(str(folder))
    events.Reload()
    return events


def test_a_run_with_all_callbacks_has_the_same_losses(make_data, make_method, make_trainer) -> None:
    losses, modes = [], []
    options = {"max_steps": -1, "max_epochs": 3, "num_sanity_val_steps": 0}
    everything = [
        OnlineKNN(every_n_epochs=1),
        OnlineKNN(make_data(name="other"), every_n_epochs=1),
        FeatureGeometry(every_n_epochs=1),
        ReconstructionPictures(every_n_epochs=1),
        Throughput(),
        RunSummary(),
        ProgressBar(),
    ]
    for callbacks in ([], everything):
        data = make_data()
        method = make_method(data)
        np.random.seed(0)
        # No validation: the stand-in's own validation step is careless with random numbers.
        make_trainer(*callbacks, limit_val_batches=0, **options).fit(method, datamodule=data)
        losses.append(method.losses)
        modes.append([module.training for module in method.modules()])
    assert len(losses[0]) == 12
    assert losses[0] == losses[1]
    assert modes[0] == modes[1] and not all(modes[0])


def test_measured_at_step_0_every_n_epochs_and_once_at_the_end(make_data, make_method, make_trainer) -> None:
    for every, steps in ((0, [0, 12]), (1, [0, 4, 8, 12]), (2, [0, 8, 12])):
        data, recorder = make_data(), Recorder()
        trainer = make_trainer(FeatureGeometry(every_n_epochs=every), recorder, max_steps=-1, max_epochs=3)
        trainer.fit(make_method(data), datamodule=data)
        assert recorder.steps("geometry/rank") == steps


def test_knn_value_is_that_of_the_features_and_is_logged(make_data, make_method, make_trainer, tmp_path) -> None:
    data, recorder = make_data(), Recorder()
    method = make_method(data)
    trainer = make_trainer(OnlineKNN(k=3, max_train=None, max_test=None), recorder)
    trainer.fit(method, datamodule=data)
    train, val = data.dataset("train"), data.dataset("val")
    expected = knn_evaluate(
        method.features({"image": train.images}),
        train.labels,
        method.features({"image": val.images}),
        val.labels,
        k=3,
    )
    step, last = recorder.seen[-1]
    assert (step, last.split) == (4, "val")
    assert last.metrics == {"knn/tiny/top1": pytest.approx(expected["top1"])}  # while training this one alone
    assert trainer.callback_metrics["knn/tiny/top1"].item() == pytest.approx(expected["top1"])
    points = tensorboard(tmp_path / "runs" / "a").Scalars("knn/tiny/top1")
    assert [point.step for point in points] == [0, 4]


def test_multilabel_and_other_data_than_the_training_data(make_data, make_method, make_trainer) -> None:
    data, recorder = make_data(classes=None), Recorder()
    probe = make_data(classes=4, multilabel=True, name="extra")
    trainer = make_trainer(OnlineKNN(probe), recorder)
    trainer.fit(make_method(data), datamodule=data)
    assert recorder.steps("knn/extra/map_micro") == [0, 4]
    assert set(recorder.seen[0][1].metrics) == {"knn/extra/map_micro", "knn/extra/map_macro"}
    assert recorder.seen[-1][1].metrics["knn/extra/map_micro"] > 0.5


def test_unlabelled_training_data_is_skipped_and_says_how(make_data, make_method, make_trainer, caplog) -> None:
    data, recorder = make_data(classes=None), Recorder()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(OnlineKNN(every_n_epochs=1), recorder).fit(make_method(data), datamodule=data)
    assert recorder.seen == []
    messages = [record.message for record in caplog.records if "OnlineKNN" in record.message]
    assert len(messages) == 1 and "set OnlineKNN.data" in messages[0]


def test_other_bands_are_named_before_training(make_data, make_method, make_trainer) -> None:
    data = make_data()
    method = make_method(data)
    with pytest.raises(UserError, match=r"OnlineKNN.data: the bands of ten are not the model's .*B08"):
        make_trainer(OnlineKNN(make_data("sentinel2_10", name="ten"))).fit(method, datamodule=data)
    with pytest.raises(UserError, match=r"OnlineKNN.data: bare has no labels"):
        make_trainer(OnlineKNN(make_data(classes=None, name="bare"))).fit(method, datamodule=data)
    assert method.losses == []


def test_validate_and_test_use_their_own_split(make_data, make_method, make_trainer) -> None:
    for verb, split in (("validate", "val"), ("test", "test")):
        data, recorder = make_data(), Recorder()
        callbacks = [OnlineKNN(), FeatureGeometry(), ReconstructionPictures(), RunSummary(), ProgressBar(), recorder]
        trainer = make_trainer(*callbacks)
        getattr(trainer, verb)(make_method(data), datamodule=data, verbose=False)
        names = {name for _, measurement in recorder.seen for name in measurement.metrics}
        assert names >= {"knn/tiny/top1", "geometry/rank", "reconstruction/psnr"}
        assert {measurement.split for _, measurement in recorder.seen} == {split}


def test_pictures_and_their_figures(make_data, make_method, make_trainer, tmp_path: Path) -> None:
    data, recorder = make_data(), Recorder()
    trainer = make_trainer(ReconstructionPictures(num_images=2, num_score_images=20), recorder)
    trainer.fit(make_method(data), datamodule=data)
    folder = tmp_path / "runs" / "a" / "pictures"
    assert sorted(os.listdir(folder)) == ["step_0000000.png", "step_0000004.png"]
    assert np.asarray(Image.open(folder / "step_0000004.png")).std() > 10
    events = tensorboard(tmp_path / "runs" / "a")
    assert [image.step for image in events.Images("reconstruction")] == [0, 4]
    for name in ("psnr", "psnr_mean_fill", "psnr_bilinear"):
        values = [point.value for point in events.Scalars(f"reconstruction/{name}")]
        assert len(values) == 2 and all(np.isfinite(values))
        # Same images, same masks: the base lines do not move, the method does.
        assert (values[0] == values[1]) == (name != "psnr")


def test_images_are_scored_in_batches_of_the_data(make_data, make_method, make_trainer, monkeypatch) -> None:
    from xscale_lightning.callbacks import pictures

    sizes, scores = [], []
    plain = pictures.bilinear_inpainting

    def watched(target: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
        sizes.append(len(target))
        return plain(target, visible)

    monkeypatch.setattr(pictures, "bilinear_inpainting", watched)
    for batch_size in (5, 40):
        sizes.clear()
        data, recorder = make_data(batch_size=batch_size), Recorder()
        trainer = make_trainer(ReconstructionPictures(num_images=2, num_score_images=40), recorder)
        trainer.validate(make_method(data), datamodule=data, verbose=False)
        assert max(sizes) == batch_size and sum(sizes) == 40
        (measurement,) = [m for _, m in recorder.seen]
        scores.append([*measurement.metrics.values(), *measurement.baselines["reconstruction/psnr"].values()])
    assert scores[0] == pytest.approx(scores[1], abs=0.02)


def test_a_method_without_pixels_is_skipped_silently(make_data, make_method, make_trainer, caplog, tmp_path) -> None:
    data, recorder = make_data(), Recorder()
    with caplog.at_level("INFO"):
        make_trainer(ReconstructionPictures(), recorder).fit(make_method(data, pixels=False), datamodule=data)
    assert recorder.seen == []
    assert not (tmp_path / "runs" / "a" / "pictures").exists()
    assert not any("ReconstructionPictures" in record.message for record in caplog.records)


def test_without_a_logger_nothing_is_written(make_data, make_method, make_trainer, caplog, tmp_path) -> None:
    data, recorder = make_data(), Recorder()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        trainer = make_trainer(ReconstructionPictures(every_n_epochs=1), RunSummary(), recorder, logger=False)
        trainer.fit(make_method(data), datamodule=data)
    assert recorder.steps("reconstruction/psnr") == [0, 4]
    assert os.listdir(tmp_path) == []
    for name in ("ReconstructionPictures", "RunSummary"):
        assert len([r for r in caplog.records if name in r.message and "no logger" in r.message]) == 1


def test_samples_are_a_fixed_part_of_the_whole_set(make_data, make_method, make_trainer) -> None:
    data = make_data()
    loader = data.probe_dataloader("train")
    first, second = (torch.cat([b["label"] for b in sample_batches(loader, 20)]) for _ in range(2))
    assert len(first) == 20 and torch.equal(first, second)
    assert first.unique().tolist() == [0, 1, 2, 3]  # the first 20 in order would be two classes
    everything = torch.cat([batch["label"] for batch in sample_batches(loader, None)])
    assert torch.equal(everything, data.dataset("train").labels)


def test_features_come_in_order_with_their_labels(make_data, make_method, make_trainer) -> None:
    data = make_data()
    method, trainer = make_method(data), make_trainer()
    features, labels = extract_features(trainer, method, data.probe_dataloader("val"), None)
    torch.testing.assert_close(features, method.features({"image": data.dataset("val").images}))
    assert labels is not None and torch.equal(labels, data.dataset("val").labels)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OnlineKNN(k=0),
        lambda: OnlineKNN(temperature=0.0),
        lambda: OnlineKNN(k=5, max_train=4),
        lambda: OnlineKNN(max_test=0),
        lambda: OnlineKNN(every_n_epochs=-1),
        lambda: FeatureGeometry(max_samples=1),
        lambda: ReconstructionPictures(num_images=0),
        lambda: ReconstructionPictures(num_score_images=0),
        lambda: Throughput(every_n_steps=0),
        lambda: Throughput(peak_tflops=0.0),
        lambda: ProgressBar(refresh_rate=-1),
    ],
)
def test_impossible_arguments_are_refused(make) -> None:
    with pytest.raises(UserError, match=r"(\.\w+: |=)-?\d.* is not\s+possible|neighbours are not possible|too few"):
        make()


def test_k_above_the_training_set_is_refused(make_data, make_method, make_trainer) -> None:
    data = make_data()
    with pytest.raises(UserError, match="k: 65 neighbours"):
        make_trainer(OnlineKNN(k=65)).fit(make_method(data), datamodule=data)
