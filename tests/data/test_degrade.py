import pytest
import torch

from xscale_lightning.data.degrade import degrade
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.errors import UserError


def test_pixels_are_exact_block_means_and_gsd_grows():
    images = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    coarse, gsd = degrade(images, 2, torch.tensor([10.0, 3.0]))
    expected = images.view(2, 3, 2, 2, 3, 2).mean(dim=(3, 5))
    assert torch.equal(coarse, expected)
    assert gsd.tolist() == [20.0, 6.0]


def test_footprint_and_total_energy_stay():
    images = torch.rand(1, 2, 12, 18)
    coarse, gsd = degrade(images, 6, torch.tensor([10.0]))
    assert [side * gsd.item() for side in coarse.shape[-2:]] == [side * 10.0 for side in images.shape[-2:]]
    torch.testing.assert_close(coarse.mean(), images.mean())


def test_ratio_one_changes_nothing():
    images, gsd = torch.rand(1, 1, 5, 7), torch.tensor([10.0])
    assert degrade(images, 1, gsd)[0] is images


@pytest.mark.parametrize("ratio", [0, -1, 5])
def test_ratio_that_does_not_divide_is_refused(ratio):
    with pytest.raises(UserError, match=r"ratio: .*12x18"):
        degrade(torch.rand(1, 1, 12, 18), ratio, torch.tensor([10.0]))


def test_data_module_delivers_pairs_of_one_footprint():
    data = SampleScene(image_size=(16, 24), pair_ratio=3, batch_size=4, samples_per_epoch=8)
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 13, 16, 24)
    assert batch["image_hr"].shape == (4, 13, 48, 72)
    assert batch["gsd_hr"].tolist() == [10.0] * 4
    assert batch["gsd"].tolist() == [30.0] * 4
    torch.testing.assert_close(batch["image"], batch["image_hr"].view(4, 13, 16, 3, 24, 3).mean(dim=(3, 5)))
