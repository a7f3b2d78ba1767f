"""The linear probe in a run, and what all probes on labels share: checks, features kept, intervals, provenance."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from xscale_lightning.callbacks import LinearProbe, OnlineDenseProbe, OnlineKNN, RunSummary
from xscale_lightning.callbacks.verdict import Record, verdict
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import estimates, values
from xscale_lightning.evaluation.knn import knn_scores
from xscale_lightning.evaluation.linear import LinearRecipe, fit_linear
from xscale_lightning.evaluation.scores import class_scores


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[Any] = []

    def record_probe(self, trainer: Any, measurement: Any) -> None:
        self.seen.append(measurement)


def results(tmp_path: Path) -> dict[str, Any]:
    return json.loads((tmp_path / "runs" / "a" / "results.json").read_text())


def features(method: Any, data: Any, split: str) -> tuple[torch.Tensor, torch.Tensor]:
    dataset = data.dataset(split)
    return method.features({"image": dataset.images}), dataset.labels


@pytest.fixture
def spoilt(make_data):
    """Data whose training labels a function changes."""

    def make(change: Any, **options: Any) -> Any:
        class Spoilt(make_data):
            def build_dataset(self, split: str) -> Any:
                dataset = super().build_dataset(split)
                if split == "train":
                    dataset.labels = change(dataset.labels.clone())
                return dataset

        return Spoilt(**options)

    return make


def test_the_test_split_is_asked_with_the_c_that_is_best_on_the_validation_split(
    make_data, make_method, make_trainer
) -> None:
    data, recorder = make_data(batch_size=13), Recorder()  # 32 test images: an uneven last batch
    method = make_method(data)
    make_trainer(LinearProbe(c=[1e-4, 0.1]), recorder).test(method, datamodule=data, verbose=False)
    (found,) = recorder.seen
    x, y = features(method, data, "train")
    fitted = fit_linear(x, y, 4, LinearRecipe(c=[1e-4, 0.1]), features(method, data, "val"))
    asked, truth = features(method, data, "test")
    expected = estimates(class_scores(fitted.head.logits(asked).argmax(1), truth, 4))
    assert found.split == "test" and set(found.metrics) == {"linear/tiny/top1", "linear/tiny/macro_f1"}
    for name in ("top1", "macro_f1"):
        assert found.metrics[f"linear/tiny/{name}"] == pytest.approx(expected[name].value)
        assert found.intervals[f"linear/tiny/{name}"] == pytest.approx(expected[name].interval)
    protocol = found.protocols["linear/tiny/top1"]
    assert (protocol["c"], protocol["chosen_on"], protocol["solver"]) == (fitted.chosen, "val", "lbfgs")
    assert (protocol["data"], protocol["samples"], protocol["train_samples"]) == ("tiny", 32, 64)
    # The classes are the brightness of the images: the mean of a band says them.
    assert found.baselines["linear/tiny/top1"]["band statistics"] > 0.8


def test_validate_chooses_on_training_samples(make_data, make_method, make_trainer) -> None:
    data, recorder = make_data(), Recorder()
    make_trainer(LinearProbe(solver="sgd", epochs=5), recorder).validate(
        make_method(data), datamodule=data, verbose=False
    )
    (found,) = recorder.seen
    protocol = found.protocols["linear/tiny/top1"]
    assert (found.split, protocol["chosen_on"], protocol["samples"]) == ("val", "train", 40)
    assert protocol["solver"] == "sgd" and protocol["lr"] in LinearRecipe.lr


def test_multilabel(make_data, make_method, make_trainer) -> None:
    data, recorder = make_data(multilabel=True), Recorder()
    make_trainer(LinearProbe(), recorder).test(make_method(data), datamodule=data, verbose=False)
    (found,) = recorder.seen
    assert set(found.metrics) == {"linear/tiny/map_micro", "linear/tiny/map_macro"}
    assert found.metrics["linear/tiny/map_micro"] > 0.6 and set(found.intervals) == set(found.metrics)


def test_off_in_fit_unless_asked_for(make_data, make_method, make_trainer, tmp_path) -> None:
    data, recorder = make_data(), Recorder()
    make_trainer(LinearProbe(every_n_epochs=1), recorder).fit(make_method(data), datamodule=data)
    assert recorder.seen == []
    make_trainer(LinearProbe(while_training=True, every_n_epochs=0), RunSummary()).fit(
        make_method(data), datamodule=data
    )
    record = results(tmp_path)["metrics"]["linear/tiny/top1"]
    assert record["step_0"] is not None and record["last_step"] == 4 and record["split"] == "val"


def test_a_task_and_data_without_labels_are_left_alone(make_data, make_method, make_trainer) -> None:
    data, recorder = make_data(), Recorder()
    method = make_method(data)
    method.without_callbacks = ("knn",)
    make_trainer(LinearProbe(), OnlineDenseProbe(), recorder).test(method, datamodule=data, verbose=False)
    bare = make_data(classes=None)
    make_trainer(LinearProbe(), OnlineDenseProbe(), recorder).test(make_method(bare), datamodule=bare, verbose=False)
    assert recorder.seen == []


def test_features_are_computed_once_for_all_probes_and_anew_when_the_weights_change(
    make_data, make_method, make_trainer
) -> None:
    data = make_data(batch_size=64)
    method, calls = make_method(data), []
    plain = method.features
    method.features = lambda batch: (calls.append(len(batch["image"])), plain(batch))[1]
    make_trainer(OnlineKNN(), LinearProbe()).test(method, datamodule=data, verbose=False)
    assert sorted(calls) == [32, 40, 64]
    make_trainer(OnlineKNN(), LinearProbe()).test(method, datamodule=data, verbose=False)
    assert sorted(calls) == [32, 32, 40, 40, 64, 64]
    recorder = Recorder()
    trainer = make_trainer(OnlineKNN(), LinearProbe(while_training=True), recorder, max_steps=8)
    trainer.fit(method, datamodule=data)
    knn = [found.metrics["knn/tiny/top1"] for found in recorder.seen if "knn/tiny/top1" in found.metrics]
    expected = knn_scores(*features(method, data, "train"), *features(method, data, "val"))
    assert knn[-1] == pytest.approx(values(expected)["top1"])
    assert knn[0] != knn[-1]


def test_labels_outside_the_classes_are_refused(spoilt, make_method, make_trainer) -> None:
    def change(labels: torch.Tensor) -> torch.Tensor:
        labels[3] = 9
        return labels

    for probe in (OnlineKNN(), LinearProbe()):
        data = spoilt(change)
        with pytest.raises(UserError, match="labels: 9 of the train split of tiny is not one of the 4 classes 0 to 3"):
            make_trainer(probe).test(make_method(data), datamodule=data, verbose=False)


def test_a_class_without_training_samples_is_named(spoilt, make_method, make_trainer) -> None:
    data, recorder = spoilt(lambda labels: labels.masked_fill(labels == 2, 1)), Recorder()
    data.dataset("train").classes = ["sea", "field", "forest", "town"]
    with pytest.warns(UserWarning, match=r"OnlineKNN: none of the 64 training samples of tiny is of class 'forest'"):
        trainer = make_trainer(OnlineKNN(), LinearProbe(), recorder)
        trainer.test(make_method(data), datamodule=data, verbose=False)
    assert len(recorder.seen) == 2
    assert all(found.metrics[name] <= 0.75 for found in recorder.seen for name in found.metrics)


def test_k_larger_than_the_training_split_is_refused_at_once(make_data, make_method, make_trainer) -> None:
    data = make_data()
    method = make_method(data)
    with pytest.raises(UserError, match=r"OnlineKNN\.k: 65 neighbours asked for, and tiny has 64 training samples"):
        make_trainer(OnlineKNN(k=65)).fit(method, datamodule=data)
    assert method.losses == []
    make_trainer(OnlineKNN(k=64)).test(method, datamodule=data, verbose=False)


def test_results_say_what_they_stand_on(make_data, make_method, make_trainer, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "7")
    data = make_data()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt")
    trainer = make_trainer(OnlineKNN(), RunSummary(), checkpoint, enable_checkpointing=True)
    trainer.fit(make_method(data), datamodule=data)
    assert results(tmp_path)["checkpoint"] is None
    (path,) = (tmp_path / "ckpt").glob("*.ckpt")
    capsys.readouterr()
    trainer = make_trainer(OnlineKNN(k=3, temperature=0.07, scales=[0.5]), LinearProbe(), RunSummary())
    method = make_method(data)
    plain = method.features
    method.features = lambda batch: plain({"image": torch.nn.functional.interpolate(batch["image"], 8)})
    trainer.test(method, datamodule=data, ckpt_path=path, verbose=False)
    found = results(tmp_path)
    assert found["checkpoint"] == {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()[:16]}
    assert (found["seed"], found["data"], found["init_from"], found["steps"]) == (7, "tiny", None, 4)
    record = found["metrics"]["knn/tiny/scale_50/macro_f1"]
    expected = {"data": "tiny", "samples": 32, "train_samples": 64, "k": 3, "temperature": 0.07, "scale": 0.5}
    assert record["protocol"] == expected and record["split"] == "test"
    assert record["interval"][0] <= record["last"] <= record["interval"][1]
    assert found["metrics"]["knn/tiny/mean_over_scales/top1"]["protocol"]["scale"] == [1.0, 0.5]
    assert found["metrics"]["knn/tiny/top1"]["step_0"] is not None  # of the fit, on val
    assert {"xscale_lightning", "torch", "lightning", "torchgeo"} <= set(found["versions"])
    printed = capsys.readouterr().out
    low, high = found["metrics"]["linear/tiny/top1"]["interval"]
    assert f"[{low:.3f}, {high:.3f}]" in printed and "samples" in printed and "on val" in printed


def test_the_interval_of_the_mean_over_scales_is_of_the_same_draws(make_data, make_method, make_trainer) -> None:
    data, recorder = make_data(), Recorder()
    method = make_method(data)
    plain = method.features
    method.features = lambda batch: plain({"image": torch.nn.functional.interpolate(batch["image"], 8)})
    make_trainer(OnlineKNN(scales=[0.5]), recorder).test(method, datamodule=data, verbose=False)
    widths = {name: high - low for name, (low, high) in recorder.seen[0].intervals.items() if name.endswith("top1")}
    single = [width for name, width in widths.items() if "mean" not in name]
    assert 0 < widths["knn/tiny/mean_over_scales/top1"] <= max(single) + 1e-9


def test_verdict_compares_with_the_base_line_where_step_0_is_of_another_split() -> None:
    record = Record(0.3, "val", 0.8, 9, "test", {"band statistics": 0.6}, 0.02, [0.7, 0.9])
    text = verdict({"linear/x/top1": record})
    assert text == "It learned: linear probe top-1 on x 0.800 [0.700, 0.900] is above band statistics 0.600."
    record.baselines = {"band statistics": 0.72}
    assert verdict({"knn/x/top1": record}).startswith("These figures do not show whether it learned: kNN top-1")
    record.baselines = {"band statistics": 0.95}
    assert "is below band statistics 0.950" in verdict({"linear/x/map_micro": record})


def test_wrong_numbers_are_named() -> None:
    for options in ({"max_train": 1}, {"max_test": 0}, {"every_n_epochs": -1}):
        (name,) = options
        with pytest.raises(UserError, match=f"LinearProbe.{name}"):
            LinearProbe(**options)
    with pytest.raises(UserError, match=r"linear\.c"):
        LinearProbe(c=[])
