"""Tokenizer, backbone, view and data source."""

import numpy as np
import pytest
import torch
from xscale_vicreg import Haze, NumpyChips, RegionEmbed
from xscale_vicreg.regions import spectral_regions

from xscale_lightning import create_backbone
from xscale_lightning.data.bands import SENSORS, BandSelection
from xscale_lightning.errors import UserError

PAIR = BandSelection(sensor="naip", names=["R", "NIR"])


def test_regions_of_sentinel2():
    bands = SENSORS["sentinel2_l1c"]
    groups = [[bands.names[i] for i in group] for group in spectral_regions(bands.wavelengths)]
    assert groups[0] == ["B01", "B02", "B03", "B04"] and groups[-1] == ["B10", "B11", "B12"]
    assert spectral_regions([None, 0.5, None]) == [[1], [0, 2]]


def test_tokens_are_those_of_the_groups_and_of_the_places_kept():
    embed, images = RegionEmbed(4, [[0, 2], [1]], 16), torch.randn(2, 3, 8, 12)
    tokens = embed(images)
    assert embed.grid(images) == (2, 2, 3) and tokens.shape == (2, 12, 16)
    keep = torch.tensor([[0, 7], [11, 3]])
    assert torch.equal(embed(images, keep), tokens.gather(1, keep[..., None].expand(-1, -1, 16)))
    changed = images.clone()
    changed[:, 1] += 1
    moved = (embed(changed) != tokens).any(dim=2)
    assert not moved[:, :6].any() and moved[:, 6:].all()


def test_the_backbone_by_name():
    waves = SENSORS["sentinel2_l1c"].wavelengths
    encoder = create_backbone("region_vit_tiny_patch8", in_chans=13, depth=1, wavelengths=waves)
    tokens = encoder(torch.randn(2, 13, 16, 24), keep=torch.tensor([[0, 5, 17], [1, 2, 3]]))
    assert tokens.grid == (3, 2, 3) and tokens.patches.shape == (2, 3, 192)
    assert encoder.pool(tokens).shape == (2, 192)


def test_haze_is_blue():
    images = torch.zeros(4, 3, 16, 16)
    out = Haze(strength=2.0)(images, [0.49, 0.98, None])
    assert out[:, 0].min() > 0 and out[:, 0].max() <= 2.0
    assert torch.allclose(out[:, 1], out[:, 0] / 16) and not out[:, 2].any()
    assert Haze()(images, [0.49, 0.98, None]) is images
    with pytest.raises(UserError, match="strength"):
        Haze(strength=-1.0)


@pytest.fixture
def root(tmp_path):
    for i in range(40):
        np.save(tmp_path / f"{i:02d}.npy", np.full((2, 8, 8), i, np.uint16))
    return tmp_path


def test_chips_are_dealt_out_by_name(root):
    data = NumpyChips(str(root), PAIR, batch_size=4, num_workers=0)
    files = {split: {path.name for path in data.dataset(split).files} for split in ("train", "val", "test")}
    assert sum(map(len, files.values())) == len(set.union(*files.values())) == 40
    batch = next(iter(data.train_dataloader()))
    assert batch["image"].shape == (4, 2, 8, 8) and batch["image"].dtype == torch.float32
    assert batch["gsd"].tolist() == [data.bands.gsd] * 4 and data.image_size == (8, 8)
    np.save(root / "new.npy", np.zeros((2, 8, 8)))
    again = NumpyChips(str(root), PAIR)
    assert files["val"] <= {path.name for path in again.dataset("val").files}


def test_wrong_chips_are_refused_in_words(root, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        NumpyChips(str(tmp_path / "nowhere"), PAIR).dataset("train")
    with pytest.raises(UserError, match=r"not \[3, H, W\]"):
        NumpyChips(str(root), BandSelection(sensor="rgb")).dataset("train")


def test_a_module_before_the_name_is_imported_first():
    assert create_backbone("xscale_vicreg.regions:region_vit_tiny_patch8", in_chans=3, depth=1).depth == 1
    with pytest.raises(UserError, match="'no_such_module' cannot be imported"):
        create_backbone("no_such_module:narrow", in_chans=3)
