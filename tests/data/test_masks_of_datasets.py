"""Masks of somebody else's datasets: classes learned from them or given, values mapped, misfits refused."""

import pytest
import torch
from torch.utils.data import Dataset

from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.torchgeo import TorchGeoData
from xscale_lightning.errors import UserError

BANDS = BandSelection("rgb")


class Fields(Dataset):
    """Like TorchGeo's segmentation sets: `image [C, H, W]`, `mask [H, W]` or `[1, H, W]`, `classes` and `files`."""

    def __init__(self, mask=None, classes=("soil", "crop", "tree")):
        self.mask = torch.arange(64).view(8, 8) % 3 if mask is None else mask
        self.files = [f"field_{i}.tif" for i in range(4)]
        if classes:
            self.classes = list(classes)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"image": 100.0 + index + torch.arange(192.0).view(3, 8, 8), "mask": self.mask}


def data(source, **options) -> TorchGeoData:
    return TorchGeoData(train=source, val=source, bands=BANDS, gsd=1.0, name="fields", num_workers=0, **options)


def first(module):
    module.setup("fit")
    return next(iter(module.probe_dataloader("train")))


def test_classes_are_the_datasets():
    module = data(Fields())
    batch = first(module)
    assert torch.equal(batch["mask"][2], torch.arange(64).view(8, 8) % 3) and batch["mask"].dtype == torch.int64
    assert module.num_mask_classes == 3 and module.class_names == ("soil", "crop", "tree")
    assert module.num_classes is None  # that is of image labels, which kNN asks for


def test_classes_are_given():
    module = data(
        Fields(mask=(torch.arange(64).view(1, 8, 8) % 3 + 1) * 10, classes=None), labels={10: 1, 20: 0}, ignore=[30]
    )
    batch = first(module)
    assert torch.equal(batch["mask"][0], torch.tensor([1, 0, -1])[torch.arange(64).view(8, 8) % 3])
    assert module.num_mask_classes == 2 and module.class_names == ("20", "10")
    module = data(Fields(classes=None), num_classes=3, image_size=4)
    assert first(module)["mask"].shape == (4, 4, 4) and module.num_mask_classes == 3 and module.num_classes is None


def test_what_is_given_wins_over_what_the_dataset_says():
    module = data(Fields(), labels={0: 0, 1: 0, 2: 1})
    first(module)
    assert module.class_names == ("0+1", "2")
    module = data(Fields(), num_classes=4)
    first(module)
    assert module.class_names == ("0", "1", "2", "3")


def test_without_a_number_of_classes_masks_come_as_they_are():
    module = data(Fields(mask=torch.full((8, 8), 77), classes=None))
    assert bool((first(module)["mask"] == 77).all()) and module.num_mask_classes is None


def test_misfits_are_named_and_refused(caplog):
    for source, words, options in (
        (Fields(mask=torch.zeros(4, 8)), "the mask has shape (4, 8), its image (3, 8, 8)", {}),
        (Fields(mask=torch.arange(64).view(8, 8) % 4), "value 3 is no class (classes: 0, 1, 2; ignored: 255)",
         {"ignore": [255]}),
    ):  # fmt: skip
        with pytest.raises(UserError, match="none of the samples can be read"):
            first(data(source, **options))
        assert f"field_0.tif is not readable (ValueError: {words}" in caplog.text
    with pytest.raises(UserError, match=r"class_names 2, data.num_classes 3"):
        first(data(Fields(), class_names=["a", "b"], num_classes=3))


class OneWrong(Fields):
    """The third mask has a value that is no class."""

    def __getitem__(self, index):
        return super().__getitem__(index) | {"mask": self.mask + 9 * (index == 2)}


def test_a_mask_with_a_wrong_value_is_skipped(caplog):
    module = data(OneWrong(), batch_size=4)
    module.setup("fit")
    masks = torch.cat([batch["mask"] for batch in module.train_dataloader()])
    assert len(masks) == 4 and masks.max() == 2
    assert "field_2.tif is not readable" in caplog.text and "is no class" in caplog.text
    with pytest.raises(UserError, match=r"field_2.tif .* set data.on_error to skip"):
        stopping = data(OneWrong(), batch_size=4, on_error="stop")
        stopping.setup("fit")
        list(stopping.train_dataloader())
