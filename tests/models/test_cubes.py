"""Spectral cubes: order, padding, and the positions that go with them."""

import pytest
import torch
import torch.nn.functional as F

from xscale_lightning.data.bands import SENSORS
from xscale_lightning.errors import UserError
from xscale_lightning.models.cubes import CubeEmbed, cut_cubes, join_cubes
from xscale_lightning.models.pos_embed import LearnedPositions, SinCosPositions, resize_table
from xscale_lightning.models.registry import create_backbone
from xscale_lightning.models.resizing import fit_tables
from xscale_lightning.models.spectral_positions import (
    JointSinCos,
    LearnedSpectral,
    SinCosSpectral,
    SpectralPositions,
    WavelengthPositions,
)


def test_cubes_are_cut_group_row_column_and_band_row_column():
    images = torch.arange(6 * 8 * 12.0).view(1, 6, 8, 12)
    cubes = cut_cubes(images, depth=3, patch=4)
    assert cubes.shape == (1, 2 * 2 * 3, 48)
    for g, h, w in ((0, 0, 0), (0, 1, 2), (1, 0, 1)):
        cube = images[0, 3 * g : 3 * g + 3, 4 * h : 4 * h + 4, 4 * w : 4 * w + 4]
        assert torch.equal(cubes[0, (g * 2 + h) * 3 + w], cube.flatten())
    assert torch.equal(join_cubes(cubes, 3, 4, (2, 2, 3)), images)


def test_embedding_is_a_strided_convolution_in_three_dimensions():
    embed = CubeEmbed(4, 6, 5, depth=2).double()
    images = torch.randn(2, 6, 8, 12, dtype=torch.float64)
    expected = F.conv3d(images.unsqueeze(1), embed.proj.weight, embed.proj.bias, stride=(2, 4, 4)).flatten(2).mT
    torch.testing.assert_close(embed(images), expected, rtol=1e-12, atol=1e-12)
    keep = torch.tensor([[3, 0], [17, 5]])
    torch.testing.assert_close(embed(images, keep)[1, 0], expected[1, 17], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bands", [13, 10, 4, 3, 12, 1])
def test_any_number_of_bands_goes_through_and_comes_back(bands):
    images = torch.randn(2, bands, 8, 8)
    for pad, filling in (("mean", images.mean(1)), ("edge", images[:, -1]), ("zero", torch.zeros(2, 8, 8))):
        embed = CubeEmbed(8, bands, 4, depth=3, pad=pad)
        cubes, grid = embed.cut(images), embed.grid(images)
        assert grid == (-(-bands // 3), 1, 1) and cubes.shape == (2, grid[0], 192)
        assert torch.equal(embed.join(cubes, grid), images)
        real = embed.real_values(torch.arange(grid[0]))
        assert real.sum() == bands * 64
        if embed.padded:
            padding = cubes[:, -1].view(2, 3, 8, 8)[:, -1]
            torch.testing.assert_close(padding, filling)
            assert not real[-1].view(3, 64)[-1].any() and real[-1].view(3, 64)[0].all()


def test_bands_that_do_not_fill_the_cubes_need_a_rule():
    with pytest.raises(
        UserError, match=r"10 bands are not divisible by the cube depth 3: set backbone.cube_depth to 1 or 2 or 5"
    ):
        create_backbone("spectral_vit_tiny_cube3_patch8", 10)
    with pytest.raises(UserError, match="patch size 8 does not divide"):
        create_backbone("spectral_vit_tiny_cube3_patch8", 3, depth=1)(torch.zeros(1, 3, 12, 12))
    with pytest.raises(UserError, match="has no spectral cubes"):
        create_backbone("vit_tiny_patch8", 3, cube_depth=1)
    with pytest.raises(UserError, match=r"brings its own"):
        create_backbone("timm:vit_tiny_patch16_224", 3, spectral="learned")


def test_separable_positions_are_a_sum_and_the_group_is_slowest():
    spatial, spectral = LearnedPositions(8, (2, 3)), LearnedSpectral(8, 4)
    table = SpectralPositions(spatial, spectral)((4, 2, 3), like=torch.zeros(1))
    assert table.shape == (1, 24, 8)
    for g, s in ((0, 0), (3, 5), (2, 1)):
        torch.testing.assert_close(table[0, g * 6 + s], spatial.table[0, s] + spectral.table[0, g])


def test_sincos_forms():
    like = torch.zeros(1, dtype=torch.float64)
    separable = SpectralPositions(SinCosPositions(8), SinCosSpectral(8))((3, 2, 2), like=like)
    g, row, column = 2, 1, 0
    omega = torch.tensor([1.0, 10000**-0.25, 10000**-0.5, 10000**-0.75], dtype=torch.float64)
    spectral = torch.cat([(g * omega).sin(), (g * omega).cos()])
    half = omega[[0, 2]]
    spatial = torch.cat([f(place * half) for place in (column, row) for f in (torch.sin, torch.cos)])
    torch.testing.assert_close(separable[0, g * 4 + row * 2 + column], spectral + spatial, atol=1e-7, rtol=0)
    joint = JointSinCos(8)((3, 2, 2), like=like)
    torch.testing.assert_close(joint[0, 11], torch.cat([(11 * omega).sin(), (11 * omega).cos()]), atol=1e-7, rtol=0)


def test_all_sensors_share_the_curve_over_the_wavelength():
    sentinel, landsat = SENSORS["sentinel2_l1c_12"].wavelengths, SENSORS["landsat8"].wavelengths
    a = WavelengthPositions(16, [[w] for w in sentinel])
    b = WavelengthPositions(16, [[w] for w in landsat])
    assert a.state_dict().keys() == {"table"}, "nothing in the weights depends on the sensor"
    b.load_state_dict(a.state_dict())
    here, there = a(12, torch.zeros(1))[0], b(7, torch.zeros(1))[0]
    distance = torch.cdist(there, here)
    nearest = [min(range(12), key=lambda i, w=w: abs(sentinel[i] - w)) for w in landsat]
    assert distance.argmin(1).tolist() == nearest, "bands of equal wavelength have the nearest positions"
    same = WavelengthPositions(16, [[sentinel[3]], [sentinel[3], sentinel[4]]])
    same.load_state_dict(a.state_dict())
    one, mean = same(2, torch.zeros(1))[0]
    torch.testing.assert_close(one, here[3])
    torch.testing.assert_close(mean, (here[3] + here[4]) / 2)


def test_the_curve_is_linear_in_the_logarithm():
    curve = WavelengthPositions(8, [[0.3], [15.0], [(0.3 * 15.0) ** 0.5]])
    assert curve.weights[0, 0] == 1 and curve.weights[1, 255] == 1
    torch.testing.assert_close(curve.weights[2, 127:129], torch.tensor([0.5, 0.5]), atol=1e-4, rtol=0)
    assert torch.allclose(curve.weights.sum(1), torch.ones(3))


def test_wavelengths_must_be_known():
    options = {"position": "learned", "spectral": "wavelength", "depth": 1}
    with pytest.raises(UserError, match="needs the centre wavelength"):
        create_backbone("spectral_vit_tiny_cube3_patch8", 3, **options)
    with pytest.raises(UserError, match="2 values for 3 bands"):
        create_backbone("spectral_vit_tiny_cube3_patch8", 3, **options, wavelengths=[0.4, 0.5])
    with pytest.raises(UserError, match=r"within 0.3 to 15 um"):
        create_backbone("spectral_vit_tiny_cube3_patch8", 3, **options, wavelengths=[490.0, 560.0, 665.0])
    with pytest.raises(UserError, match=r"set backbone\.position to sincos"):
        create_backbone("spectral_vit_tiny_cube3_patch8", 3, depth=1, position="learned", spectral="joint")
    encoder = create_backbone("spectral_vit_tiny_cube3_patch8", 3, **options, wavelengths=[0.4, 0.5, 0.6])
    assert encoder(torch.zeros(2, 3, 16, 16)).x.shape == (2, 1 + 4, 192)


def test_tables_of_another_size_are_resized_or_left_as_they_are():
    small = create_backbone(
        "spectral_vit_tiny_cube3_patch8", 12, depth=1, position="learned", spectral="learned", image_size=32
    )
    large = create_backbone(
        "spectral_vit_tiny_cube3_patch8", 15, depth=1, position="learned", spectral="learned", image_size=48
    )
    state = small.state_dict()
    names = ["positions.spatial.table", "positions.spectral.table"]
    fitted, changed = fit_tables(large, state)
    assert sorted(changed) == names
    torch.testing.assert_close(fitted[names[0]], resize_table(state[names[0]], (4, 4), (6, 6)))
    spectral, old = fitted[names[1]][0], state[names[1]][0]
    assert torch.equal(spectral[0], old[0]) and torch.equal(spectral[-1], old[-1])
    torch.testing.assert_close(spectral[1], old[0] + 0.75 * (old[1] - old[0]))
    large.load_state_dict(fitted)
    kept, changed = fit_tables(large, state, "reinit")
    assert sorted(changed) == names and all(torch.equal(kept[n], large.state_dict()[n]) for n in names)
    assert fit_tables(small, state)[1] == [] and all(torch.equal(state[n], v) for n, v in small.state_dict().items())
    with pytest.raises(UserError, match="no square grid"):
        fit_tables(large, {names[0]: torch.zeros(1, 12, 192)})


def test_positions_of_kept_tokens_get_their_gradient():
    encoder = create_backbone(
        "spectral_vit_tiny_cube3_patch8",
        6,
        depth=1,
        position="learned",
        spectral="learned",
        image_size=16,
        class_token=False,
    )
    keep = torch.tensor([[0, 5], [5, 2]])
    tokens = encoder.embed(torch.zeros(2, 6, 16, 16), keep=keep)
    tokens.x.sum().backward()
    counts = torch.tensor([1.0, 2.0, 1.0, 0.0])  # places 0, 1 (of token 5, twice), 2
    torch.testing.assert_close(encoder.positions.spatial.table.grad[0], counts[:, None].expand(-1, 192))
    torch.testing.assert_close(encoder.positions.spectral.table.grad[0, :, 0], torch.tensor([2.0, 2.0]))
