import pytest
import torch

from xscale_lightning.losses import normalize_patches, patch_mse


def test_patches_are_standardised_by_their_own_unbiased_variance():
    patches = torch.tensor([[[1.0, 2.0, 3.0], [10.0, 10.0, 40.0]]], dtype=torch.float64)
    out = normalize_patches(patches)
    # variances 1 and 300 (sum of squares / 2), eps 1e-6
    expected = [[-1 / (1 + 1e-6) ** 0.5, 0.0, 1 / (1 + 1e-6) ** 0.5], [-10 / 300**0.5, -10 / 300**0.5, 20 / 300**0.5]]
    torch.testing.assert_close(out[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-8, atol=1e-9)


def test_a_constant_patch_becomes_zero_and_not_infinite():
    assert normalize_patches(torch.full((1, 2, 5), 7.0)).tolist() == [[[0.0] * 5] * 2]


def test_mse_is_the_mean_of_squares():
    prediction, target = torch.tensor([[[1.0, 2.0]], [[0.0, 0.0]]]), torch.tensor([[[0.0, 4.0]], [[3.0, 1.0]]])
    assert patch_mse(prediction, target).item() == (1 + 4 + 9 + 1) / 4


@pytest.mark.parametrize(
    ("prediction", "target", "result"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_mse_is_computed_in_single_precision_or_better(prediction, target, result):
    values = torch.linspace(0, 1, 24).view(2, 3, 4)
    a, b = values.to(prediction).requires_grad_(), (values + 0.01).to(target)
    loss = patch_mse(a, b)
    loss.backward()
    expected = ((a.detach().double() - b.double()) ** 2).mean()
    assert loss.dtype is result and a.grad.dtype is prediction
    torch.testing.assert_close(loss.detach().double(), expected, rtol=1e-5, atol=0)
