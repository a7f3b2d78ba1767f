import logging

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, DistributedSampler

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.damage import DamageLog, without_path
from xscale_lightning.data.datamodule import Collate, XScaleDataModule, check_folder, default_num_workers
from xscale_lightning.data.left_out import InOrder
from xscale_lightning.data.reading import Reader
from xscale_lightning.errors import UserError


class Numbers(Dataset):
    """Sample i is an image full of i; the indices in `broken` cannot be read."""

    def __init__(self, length, broken=()):
        self.length, self.broken = length, set(broken)

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        if index in self.broken:
            raise OSError("truncated")
        return {"image": torch.full((3, 4, 4), float(index)), "label": index}


class NumbersData(XScaleDataModule):
    def __init__(self, lengths, broken=(), on_error="skip", **kwargs):
        super().__init__(bands=BandSelection("sentinel2_rgb"), **kwargs)
        self.lengths, self.broken, self.on_error = lengths, broken, on_error

    def build_dataset(self, split):
        if split not in self.lengths:
            return None
        source = Numbers(self.lengths[split], self.broken)
        name = "file{}.tif".format
        return Reader(source, lambda sample, index: sample, self.on_error, name, self.damage)


def labels(loader):
    return torch.cat([batch["label"] for batch in loader]).tolist()


def test_batches_have_our_form():
    data = NumbersData({"train": 6}, batch_size=4, num_workers=0)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 3, 4, 4) and batch["image"].dtype == torch.float32
    assert batch["label"].shape == (4,) and batch["label"].dtype == torch.int64
    assert batch["gsd"].dtype == torch.float32 and torch.equal(batch["gsd"], torch.full((4,), 10.0))


def test_training_is_shuffled_and_evaluation_is_not():
    data = NumbersData({"train": 50, "val": 10, "test": 7}, batch_size=8, num_workers=0)
    torch.manual_seed(0)
    seen = labels(data.train_dataloader())
    assert len(seen) == 48 and seen != sorted(seen)  # the incomplete batch is dropped
    assert labels(data.val_dataloader()) == list(range(10))
    assert labels(data.test_dataloader()) == list(range(7))
    assert labels(data.predict_dataloader()) == list(range(7))
    assert labels(data.probe_dataloader("train")) == list(range(50))


def test_a_training_set_smaller_than_a_batch_still_trains():
    data = NumbersData({"train": 3}, batch_size=8, num_workers=0)
    assert len(labels(data.train_dataloader())) == 3


def test_missing_splits():
    data = NumbersData({"train": 3}, batch_size=2, num_workers=0)
    assert data.val_dataloader() == []
    assert labels(data.predict_dataloader()) == [0, 1, 2]
    with pytest.raises(UserError, match="no test split"):
        data.test_dataloader()
    with pytest.raises(UserError, match="no val split"):
        data.probe_dataloader("val")


def test_each_split_is_opened_once():
    data = NumbersData({"train": 3}, num_workers=0)
    data.setup("fit")
    assert data.dataset("train") is data.dataset("train")


@pytest.mark.parametrize("workers", [0, 2])
def test_training_replaces_damaged_files_and_says_how_many(workers, caplog):
    data = NumbersData({"train": 12}, broken=(2, 3), batch_size=6, num_workers=workers)
    batches = list(data.train_dataloader())
    seen = [label for batch in batches for label in batch["label"].tolist()]
    assert sorted(seen) == [0, 1, 4, 5, 6, 7, 8, 9, 9, 10, 10, 11]  # 9 stands for 2, 10 for 3
    assert data.skipped == 0, "read, and not yet trained on"
    handed = [data.on_after_batch_transfer(batch, 0) for batch in batches]
    assert data.skipped == 2 and data.left_out_samples == {}
    assert all(set(batch) == {"image", "label", "gsd"} for batch in handed)
    if workers == 0:
        assert "file2.tif is not readable (OSError: truncated); another sample" in caplog.text


@pytest.mark.parametrize("workers", [0, 2])
def test_what_is_read_in_order_has_every_sample_once_and_no_damaged_one(workers, caplog):
    data = NumbersData({"train": 7, "val": 7, "test": 7}, (2, 3, 6), batch_size=2, num_workers=workers)
    for loader in (data.val_dataloader(), data.test_dataloader(), data.probe_dataloader("train")):
        for _ in range(2):
            batches = list(loader)
            assert [batch["label"].tolist() for batch in batches] == [[0, 1], [4, 5]]  # none of [2, 3] and [6]
            assert all(set(batch) == {"image", "label", "gsd"} for batch in batches)
    assert data.skipped == 0 and data.left_out_samples == {"val": 3, "test": 3, "train": 3}
    if workers == 0:
        assert "file2.tif is not readable (OSError: truncated); it is left out" in caplog.text


def test_a_batch_without_a_sample_is_no_batch_among_several_processes():
    data = NumbersData({"val": 8}, broken=(2, 3), batch_size=1, num_workers=0)
    loader = data.val_dataloader()
    sampler = DistributedSampler(loader.dataset, num_replicas=2, rank=0, shuffle=False)  # as Lightning puts it there
    apart = InOrder(loader.dataset, batch_size=1, sampler=sampler, collate_fn=loader.collate_fn)
    with pytest.raises(UserError, match="with several processes every batch needs one"):
        list(apart)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_file_is_named_once_over_loaders_and_workers(workers, tmp_path):
    handler = logging.FileHandler(tmp_path / "log")  # a file: worker processes write to it too
    logging.getLogger("xscale_lightning").addHandler(handler)
    data = NumbersData({"train": 6}, broken=(2, 3), batch_size=3, num_workers=workers)
    for _ in range(3):
        labels(data.probe_dataloader("train"))
    logging.getLogger("xscale_lightning").removeHandler(handler)
    named = (tmp_path / "log").read_text()
    assert named.count("file3.tif is not readable") == 1
    assert data.damage.files == 2
    assert data.damage.summary(9) == "9 damaged samples were replaced (2 files named above)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("cannot identify image file '/a b/River 3.png'", "cannot identify image file"),
        ("'/vsizip/x.zip/a b/River 3.png' not recognized as a raster", "not recognized as a raster"),
        ("[Errno 2] No such file: 'a b/River 3.png'", "[Errno 2] No such file"),
        ("/a b/River 3.png: strip 3 is short", "strip 3 is short"),
        ("/a b/River 3.png", "no reason given"),
        ("strip 3: it's short", "strip 3: it's short"),
    ],
)
def test_the_path_is_cut_from_a_library_message(text, expected):
    assert without_path(text, "/a b/River 3.png") == expected


def test_more_damaged_files_than_are_named():
    damage = DamageLog()
    assert sum(damage.first_time(f"{i}.tif") for i in range(30)) == 20
    assert DamageLog().summary(2).endswith("(their files are named in the log of the run's first part)")
    assert damage.summary(31) == "31 damaged samples were replaced (20 of 30 files named above)"


@pytest.mark.parametrize("workers", [0, 1])
def test_a_damaged_file_stops_the_run_if_asked_to(workers):
    data = NumbersData({"train": 6}, broken=(2,), on_error="stop", batch_size=3, num_workers=workers)
    with pytest.raises(UserError, match=r"file2.tif is not readable"):
        labels(data.probe_dataloader("train"))


def test_nothing_readable_stops_even_when_skipping():
    data = NumbersData({"train": 4}, broken=range(4), num_workers=0)
    with pytest.raises(UserError, match="nor is any of the samples tried"):
        list(data.train_dataloader())
    with pytest.raises(UserError, match="none of the samples can be read"):
        labels(data.probe_dataloader("train"))


def test_many_damaged_files_side_by_side_do_not_stop_a_run():
    data = NumbersData({"train": 1000}, broken=range(600), batch_size=100, num_workers=0)
    delivered = labels(data.train_dataloader())
    assert len(delivered) == 1000 and min(delivered) >= 600
    assert sum(delivered.count(label) > 1 for label in range(600, 1000)) > 200, "the substitutes are many, not one"


def test_mistakes_in_code_are_not_taken_for_damaged_files():
    reader = Reader(Numbers(3), lambda sample, index: sample.missing)
    with pytest.raises(AttributeError):
        reader[0]
    with pytest.raises(AttributeError):
        reader.__getitems__([0])
    assert reader.left_out.slots == []


def test_collate_stacks_lists_and_drops():
    samples = [
        {
            "image": torch.zeros(1, 2, 2, dtype=torch.uint8),
            "file": "a",
            "mask": np.ones((2, 2), np.int64),
            "crs": object(),
            "n": 1,
        },
        {
            "image": torch.ones(1, 2, 2, dtype=torch.uint8),
            "file": "b",
            "mask": np.zeros((2, 2), np.int64),
            "crs": object(),
            "m": 2,
        },
    ]
    batch = Collate(gsd=2.0)(samples)
    assert set(batch) == {"image", "file", "mask", "gsd"}
    assert batch["image"].dtype == torch.float32
    assert batch["file"] == ["a", "b"]
    assert batch["mask"].shape == (2, 2, 2)
    assert batch["gsd"].tolist() == [2.0, 2.0]


def test_collate_keeps_the_samples_own_gsd():
    samples = [{"image": torch.zeros(1, 2, 2), "gsd": gsd} for gsd in (0.3, torch.tensor(30.0).item())]
    torch.testing.assert_close(Collate(gsd=2.0)(samples)["gsd"], torch.tensor([0.3, 30.0]))


def test_collate_refuses_different_sizes_and_unknown_gsd():
    images = [{"image": torch.zeros(1, 2, 2)}, {"image": torch.zeros(1, 3, 2)}]
    with pytest.raises(UserError, match=r"data.image_size"):
        Collate(gsd=1.0)(images)
    with pytest.raises(UserError, match=r"data.gsd"):
        Collate()(images[:1])


@pytest.mark.parametrize(("argument", "value"), [("batch_size", 0), ("batch_size", -3), ("num_workers", -1)])
def test_impossible_numbers_are_named(argument, value):
    with pytest.raises(UserError, match=rf"data.{argument}: {value}"):
        NumbersData({}, **{argument: value})


def test_default_workers_leave_a_core():
    assert 0 <= default_num_workers() <= 8


def test_folders_are_checked(tmp_path):
    with pytest.raises(UserError, match=r"data.root: folder '.*nowhere' does not exist; go"):
        check_folder("data.root", tmp_path / "nowhere", "go")
    with pytest.raises(UserError, match="is empty"):
        check_folder("data.root", tmp_path, "go")
