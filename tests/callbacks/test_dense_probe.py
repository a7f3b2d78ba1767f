"""The dense probe in a run: what it logs, that it leaves no trace, and what it refuses."""

import json
import math

import pytest
import torch

from xscale_lightning.callbacks import OnlineDenseProbe, OnlineKNN, RunSummary
from xscale_lightning.callbacks.verdict import Record, verdict
from xscale_lightning.errors import UserError

RECIPE = {"epochs": 20, "warmup_epochs": 2, "lr": 0.05, "batch_size": 16, "every_n_epochs": 0, "training_data": True}


class Masked(torch.utils.data.Dataset):
    """Images whose quarters are bright or dark, with masks that say which; one column is ignored."""

    def __init__(self, bands, size, seed, classes=2):
        draws = torch.Generator().manual_seed(seed)
        quarters = torch.randint(classes, (size, 2, 2), generator=draws)
        self.masks = quarters.repeat_interleave(4, 1).repeat_interleave(4, 2)
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (bands.means, bands.stds))
        noise = 0.2 * torch.randn(size, len(bands), 8, 8, generator=draws)
        self.images = (noise + 2.0 * self.masks[:, None] - 1) * std + mean
        self.masks[:, :, 0] = -1

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return {"image": self.images[index], "mask": self.masks[index]}


@pytest.fixture
def make_masked(make_data):
    class MaskedData(make_data):
        def __init__(self, name="fields", **options):
            super().__init__(classes=None, **options)
            self.name, self.num_mask_classes, self.class_names = name, 2, ("dark", "bright")

        def build_dataset(self, split):
            size, seed = {"train": (40, 0), "val": (21, 1), "test": (18, 2)}[split]
            return Masked(self.bands, size, seed)

    return MaskedData


@pytest.fixture
def make_dense_method(make_method):
    def make(data):
        method = make_method(data)
        method.maps = torch.nn.Conv2d(len(data.bands), 8, 4, stride=4)
        method.seen = []

        @torch.no_grad()
        def patch_features(batch):
            method.seen.append((tuple(batch["image"].shape), batch["gsd"][0].item()))
            return method.maps(method._normalise(batch["image"])).float()

        method.patch_features = patch_features
        return method

    return make


class Listener(OnlineKNN):
    """Records what is published; measures nothing itself."""

    def __init__(self):
        super().__init__(every_n_epochs=0)
        self.heard = []

    def record_probe(self, trainer, measurement):
        self.heard.append(measurement)


def test_logs_beside_step_0_and_draws(make_masked, make_dense_method, make_trainer, tmp_path):
    data = make_masked()
    trainer = make_trainer(OnlineDenseProbe(**RECIPE, num_images=3), RunSummary())
    trainer.fit(make_dense_method(data), datamodule=data)
    results = json.loads((tmp_path / "runs" / "a" / "results.json").read_text())
    record = results["metrics"]["dense/fields/miou"]
    assert record["step_0"] > 0.8 and record["last"] > 0.8 and record["split"] == "val"
    assert record["last_step"] == 4 and 0 < record["error"] < 0.2
    assert record["baselines"]["mean spectrum"] > 0.8
    assert set(results["metrics"]) == {
        "dense/fields/miou",
        "dense/fields/accuracy",
        "dense/fields/iou/dark",
        "dense/fields/iou/bright",
    }
    assert "dense probe mIoU on fields" in results["verdict"]
    ious = [results["metrics"][f"dense/fields/iou/{name}"]["last"] for name in ("dark", "bright")]
    assert record["last"] == pytest.approx(sum(ious) / 2)
    assert {p.name for p in (tmp_path / "runs" / "a" / "pictures").iterdir()} == {
        "dense_fields_step_0000000.png",
        "dense_fields_step_0000004.png",
    }


def test_leaves_no_trace_in_the_training(make_masked, make_dense_method, make_trainer):
    data = make_masked()
    bare, probed = make_dense_method(data), make_dense_method(data)
    make_trainer(logger=False).fit(bare, datamodule=make_masked())
    probe = OnlineDenseProbe(**{**RECIPE, "every_n_epochs": 1})
    make_trainer(probe, logger=False).fit(probed, datamodule=data)
    assert bare.losses == probed.losses


def test_test_asks_about_the_test_split(make_masked, make_dense_method, make_trainer):
    data, listener = make_masked(), Listener()
    method = make_dense_method(data)
    trainer = make_trainer(OnlineDenseProbe(data=data, **RECIPE), listener, logger=False)
    trainer.test(method, datamodule=make_masked())
    (measurement,) = listener.heard
    assert measurement.split == "test" and measurement.metrics["dense/fields/miou"] > 0.8
    assert sum(shape[0] for shape, _ in method.seen) == 40 + 18 + 21  # validation chooses the epoch
    trainer.validate(method, datamodule=make_masked(), verbose=False)
    assert listener.heard[-1].split == "val"


def test_images_are_resized_for_the_encoder_alone(make_masked, make_dense_method, make_trainer):
    data, listener = make_masked(), Listener()
    method = make_dense_method(data)
    make_trainer(OnlineDenseProbe(**RECIPE, image_size=16, max_train=20, max_test=7), listener, logger=False).validate(
        method, datamodule=data, verbose=False
    )
    assert {shape[1:] for shape, _ in method.seen} == {(3, 16, 16)} and {gsd for _, gsd in method.seen} == {5.0}
    assert sum(shape[0] for shape, _ in method.seen) == 27
    assert listener.heard[0].metrics["dense/fields/miou"] > 0.8


@pytest.mark.parametrize(("verb", "own", "asked"), [("fit", None, 0), ("validate", None, 1), ("test", False, 0)])
def test_the_runs_own_masks_are_asked_outside_fit(make_masked, make_dense_method, make_trainer, verb, own, asked):
    data, listener = make_masked(), Listener()
    trainer = make_trainer(OnlineDenseProbe(**{**RECIPE, "training_data": own}), listener, logger=False)
    options = {} if verb == "fit" else {"verbose": False}
    getattr(trainer, verb)(make_dense_method(data), datamodule=data, **options)
    found = [m for m in listener.heard if "dense/fields/miou" in m.metrics]
    assert len(found) == asked
    for measurement in found:
        low, high = measurement.intervals["dense/fields/miou"]
        assert low <= measurement.metrics["dense/fields/miou"] <= high
        assert set(measurement.intervals) == set(measurement.metrics)
        assert measurement.protocols["dense/fields/miou"]["samples"] == 21


def test_masks_may_be_finer_than_images(make_masked, make_dense_method, make_trainer, tmp_path):
    data, listener = make_masked(), Listener()
    data.setup("fit")
    for split in ("train", "val"):
        source = data.dataset(split)
        source.masks = source.masks.repeat_interleave(2, 1).repeat_interleave(2, 2)
    make_trainer(OnlineDenseProbe(**RECIPE), listener).validate(make_dense_method(data), datamodule=data, verbose=False)
    assert listener.heard[0].metrics["dense/fields/miou"] > 0.8
    assert list((tmp_path / "runs" / "a" / "pictures").iterdir())


def test_a_class_missing_from_training_is_named(make_masked, make_dense_method, make_trainer):
    data, listener = make_masked(), Listener()
    data.num_mask_classes, data.class_names = 3, ("dark", "bright", "marsh")
    with pytest.warns(UserWarning, match="no pixel of the 40 training images of fields is of class 'marsh'"):
        make_trainer(OnlineDenseProbe(**RECIPE), listener, logger=False).validate(
            make_dense_method(data), datamodule=data, verbose=False
        )
    assert "dense/fields/iou/marsh" not in listener.heard[0].metrics
    assert not math.isnan(listener.heard[0].metrics["dense/fields/miou"])


def test_data_that_do_not_fit_are_refused(make_data, make_masked, make_dense_method, make_trainer):
    data = make_masked()
    method = make_dense_method(data)

    def run(probe_data):
        make_trainer(OnlineDenseProbe(data=probe_data, **RECIPE), logger=False).validate(
            method, datamodule=data, verbose=False
        )

    with pytest.raises(UserError, match="tiny has no masks"):
        run(make_data())
    with pytest.raises(UserError, match=r"OnlineDenseProbe.data: the bands of fields are not the model's"):
        run(make_masked(bands="naip"))
    out_of_range, blank = make_masked(), make_masked()
    out_of_range.setup("fit")
    out_of_range.dataset("train").masks[3, 4, 4] = 9
    with pytest.raises(UserError, match="label 9 of the train split of fields is not one of the 2 classes"):
        run(out_of_range)
    blank.setup("fit")
    blank.dataset("val").masks.fill_(-1)
    with pytest.raises(UserError, match="all pixels of the val split of fields are ignored"):
        run(blank)


@pytest.mark.parametrize(
    "options", [{"epochs": 0}, {"lr": -1}, {"max_train": 0}, {"image_size": 0}, {"num_images": -1}, {"max_test": 0}]
)
def test_numbers_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=name):
        OnlineDenseProbe(**options)


def test_verdict_looks_at_the_mean_iou_alone():
    records = {
        "dense/fields/miou": Record(0.50, "val", 0.60, 10, "val", {"mean spectrum": 0.7}, 0.01),
        "dense/fields/iou/dark": Record(0.50, "val", 0.30, 10, "val"),
    }
    assert verdict(records) == "It learned: dense probe mIoU on fields 0.600 is above its step-0 value 0.500."
    records["dense/fields/miou"].error = 0.06
    assert verdict(records).startswith("These figures do not show whether it learned: dense probe mIoU")


def test_a_patch_that_does_not_divide_is_refused_before_the_first_step(make_masked, make_dense_method, make_trainer):
    data = make_masked()
    method = make_dense_method(data)
    method.backbone = torch.nn.Identity()
    method.backbone.patch_size = 3
    with pytest.raises(UserError, match=r"OnlineDenseProbe.image_size for fields: patch size 3 does not divide"):
        make_trainer(OnlineDenseProbe(**RECIPE), logger=False).fit(method, datamodule=data)
    make_trainer(OnlineDenseProbe(**RECIPE, image_size=12), logger=False).fit(method, datamodule=data)
