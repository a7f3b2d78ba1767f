"""The alignment check in a run: silent on aligned pairs, and firing when HR is shifted by one pixel."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader

from xscale_lightning.callbacks import alignment
from xscale_lightning.callbacks.alignment import PairAlignment
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.errors import UserError


def run(monkeypatch, callback, change=lambda batch: batch):
    """Let the callback probe pairs of the embedded scene; returns its measurement and the pictures."""
    data = SampleScene(pair_ratio=2, image_size=32, batch_size=16)
    samples = next(iter(data.val_dataloader()))
    batch = change({key: samples[key] for key in ("image", "gsd", "image_hr", "gsd_hr")})
    rows = [{key: value[i] for key, value in batch.items()} for i in range(len(batch["image"]))]
    monkeypatch.setattr(alignment, "held_out_loader", lambda trainer: DataLoader(rows, batch_size=8))
    monkeypatch.setattr(alignment, "evaluation_split", lambda trainer: "val")
    pictures = []
    monkeypatch.setattr(alignment, "publish_picture", lambda trainer, picture, *_, **__: pictures.append(picture))
    return callback.probe(SimpleNamespace(datamodule=data), SimpleNamespace()), pictures


def shifted(batch):
    """HR one pixel further down, as a georeference that is off by one pixel would give it."""
    batch["image_hr"] = F.pad(batch["image_hr"], (0, 0, 1, 0), mode="replicate")[:, :, :-1]
    return batch


def test_aligned_pairs_are_silent(monkeypatch, recwarn):
    measurement, pictures = run(monkeypatch, PairAlignment(action="stop"))
    assert abs(measurement.metrics["alignment/shift_rows"]) < 0.2
    assert measurement.metrics["alignment/correlation"] > 0.95
    assert not [w for w in recwarn if "PairAlignment" in str(w.message)]
    assert pictures[0].ndim == 3 and pictures[0].shape[1] > 4 * 160


def test_one_pixel_fires(monkeypatch):
    with pytest.raises(UserError, match=r"HR lies \+[01]\.\d\d rows and [+-]0\.\d\d columns .* mend the georeference"):
        run(monkeypatch, PairAlignment(action="stop"), shifted)
    with pytest.warns(UserWarning, match="beside MR"):
        measurement, _ = run(monkeypatch, PairAlignment(), shifted)
    assert abs(measurement.metrics["alignment/shift_rows"] - 1) < 0.25


def test_unrelated_pairs_are_not_judged(monkeypatch):
    def noise(batch):
        batch["image_hr"] = torch.rand(batch["image_hr"].shape, generator=torch.Generator().manual_seed(0))
        return batch

    with pytest.warns(UserWarning, match="too little to tell"):
        run(monkeypatch, PairAlignment(action="stop"), noise)


def test_data_without_pairs_is_passed_over(monkeypatch):
    def single(batch):
        return {"image": batch["image"], "gsd": batch["gsd"]}

    assert run(monkeypatch, PairAlignment(action="stop"), single) == (None, [])


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("num_pairs", 0),
        ("num_shown", 0),
        ("tolerance", 0.0),
        ("min_correlation", 1.0),
        ("agreement", 1.0),
        ("action", "ignore"),
    ],
)
def test_impossible_arguments_are_named(argument, value):
    with pytest.raises(UserError, match=argument):
        PairAlignment(**{argument: value})
