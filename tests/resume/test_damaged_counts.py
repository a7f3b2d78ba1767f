"""Damaged samples are counted alike with any number of workers, and in a run that was killed and resumed."""

import pytest
import torch
from torch.utils.data import Dataset

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.data.reading import Reader
from xscale_lightning.errors import UserError

pytestmark = pytest.mark.usefixtures("seed")
BROKEN = (1, 2, 7, 11, 20, 23)


class Images(Dataset):
    """Images of noise; the samples in `BROKEN` cannot be read."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index):
        if index in BROKEN:
            raise OSError("truncated")
        return {"image": torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(index)) * 3000}


class Damaged(XScaleDataModule):
    def build_dataset(self, split):
        self.image_size = (16, 16)
        return Reader(Images(), lambda sample, index: sample, "skip", "{}.tif".format, self.damage)


def fit(train, folder, name, workers, kill=None, ckpt_path=None):
    """Train 3 epochs of 6 batches; returns the data module at the end."""
    data = Damaged(BandSelection("sentinel2_rgb"), batch_size=4, num_workers=workers)
    train(folder, name, kill, ckpt_path, kind=data, limit_val_batches=1.0)
    return data


@pytest.mark.parametrize("workers", [0, 2])
def test_the_count_is_that_of_a_run_that_was_never_stopped(train, tmp_path, workers):
    straight = fit(train, tmp_path, "straight", 0)
    assert (straight.skipped, straight.left_out_samples) == (3 * len(BROKEN), {"val": len(BROKEN)})
    last = tmp_path / "killed" / "checkpoints" / "last.ckpt"
    for kill in (3, 6, 8, 17, None):
        data = fit(train, tmp_path, "killed", workers, kill, last if last.is_file() else None)
        assert torch.load(last, weights_only=True)["Damaged"]["skipped"] <= data.skipped
    assert (data.skipped, data.left_out_samples) == (straight.skipped, straight.left_out_samples)
    files = [tmp_path / name / "checkpoints" / "last.ckpt" for name in ("straight", "killed")]
    states = [torch.load(file, weights_only=True)["Damaged"] for file in files]
    assert states[0] == states[1] == {"skipped": 18, "left_out": {"val": list(BROKEN)}}


@pytest.mark.parametrize(
    "state", [None, {}, {"skipped": -1, "left_out": {}}, {"skipped": 1, "left_out": [3]},
              {"skipped": 1, "left_out": {"val": "all"}}, {"skipped": 1, "left_out": {"val": [1, None]}}],
)  # fmt: skip
def test_a_state_that_is_none_of_ours_is_refused(state):
    with pytest.raises(UserError, match="counts of damaged samples"):
        Damaged(BandSelection("sentinel2_rgb")).load_state_dict(state)
