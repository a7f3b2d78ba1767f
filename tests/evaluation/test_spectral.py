import math

import numpy as np
import pytest
import torch

from xscale_lightning.evaluation.spectral import AngleSum, angle_sum, spectral_angle


def spectra(*vectors: tuple[float, ...]) -> torch.Tensor:
    """Vectors as an image of one row: `[1, C, 1, N]`."""
    return torch.tensor(vectors, dtype=torch.float64).T[None, :, None]


@pytest.mark.parametrize(
    ("a", "b", "degrees"),
    [
        ((1, 0), (0, 1), 90.0),
        ((1, 0), (1, 1), 45.0),
        ((1, 1, 1), (7, 7, 7), 0.0),
        ((1, 2), (-1, -2), 180.0),
        ((1, 1, 0), (1, 0, 0), 45.0),
        ((1, 2, 3), (3, 2, 1), math.degrees(math.acos(10 / 14))),
    ],
)
def test_closed_forms(a, b, degrees) -> None:
    assert spectral_angle(spectra(a), spectra(b)).item() == pytest.approx(degrees, abs=1e-12)


def test_tiny_angles_and_extreme_values_keep_their_digits() -> None:
    # The arc cosine of a float64 product gives 0 here.
    small = 1e-9
    angle = spectral_angle(spectra((1.0, 0.0)), spectra((math.cos(small), math.sin(small)))).item()
    assert angle == pytest.approx(math.degrees(small), rel=1e-6)
    for size in (1e-300, 1e300):
        assert spectral_angle(spectra((size, 0.0)), spectra((size, size))).item() == pytest.approx(45.0)
    assert spectral_angle(spectra((1, 0)).float(), spectra((1, 1)).float()).dtype == torch.float64


def test_it_is_that_of_numpy_and_depends_on_the_offset_not_on_the_gain() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = torch.rand(2, 2, 5, 3, 4, generator=generator, dtype=torch.float64)
    u, v = (x.permute(0, 2, 3, 1).numpy() for x in (a, b))
    lengths = np.linalg.norm(u, axis=-1) * np.linalg.norm(v, axis=-1)
    np.testing.assert_allclose(spectral_angle(a, b).numpy(), np.degrees(np.arccos((u * v).sum(-1) / lengths)))
    torch.testing.assert_close(spectral_angle(a, 10_000 * b), spectral_angle(a, b))
    assert (spectral_angle(a + 1, b + 1) < spectral_angle(a, b)).all()


def test_only_pixels_with_a_hidden_band_count_and_visible_values_are_pasted_in() -> None:
    target = spectra((1, 0), (1, 1), (2, 0), (0, 0))
    prediction = spectra((5, 1), (0, 9), (0, 3), (1, 1))
    visible = torch.ones_like(target, dtype=torch.bool)
    visible[0, 1, 0, 0] = False  # (1, 0) becomes (1, 1): 45 degrees
    visible[0, :, 0, 2] = False  # (2, 0) becomes (0, 3): 90 degrees
    visible[0, :, 0, 3] = False  # a spectrum of zeros has no direction
    result = angle_sum(target, prediction, visible)
    assert result.count == 2 and result.mean == pytest.approx(67.5)
    both = result + angle_sum(target[..., :1], prediction[..., :1], visible[..., :1])
    assert both.mean == pytest.approx((45 + 90 + 45) / 3)
    assert math.isnan(angle_sum(target, prediction, torch.ones(1, 1, 1, 4, dtype=torch.bool)).mean)
    assert math.isnan(AngleSum(0.0, 0).mean)
