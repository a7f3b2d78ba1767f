import pytest
import torch
import torch.nn.functional as F

from xscale_lightning.errors import UserError
from xscale_lightning.losses import normalize_patches, nt_xent, patch_mse


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


def explicit_nt_xent(a, b, temperature, positive):
    rows = F.normalize(torch.cat([a, b]), dim=1)
    total = 0.0
    for i in range(len(rows)):
        partner = (i + len(a)) % len(rows)
        others = [k for k in range(len(rows)) if k != i and (positive or k != partner)]
        denominator = sum(torch.exp(rows[i] @ rows[k] / temperature) for k in others)
        total = total + torch.log(denominator + 1e-8) - rows[i] @ rows[partner] / temperature
    return total / len(rows)


@pytest.mark.parametrize("positive", [False, True])
@pytest.mark.parametrize("temperature", [0.5, 0.05])
def test_nt_xent_is_the_explicit_sum(positive, temperature):
    torch.manual_seed(0)
    a, b = torch.randn(2, 5, 7, dtype=torch.float64).requires_grad_().unbind()
    expected = explicit_nt_xent(a, b, temperature, positive)
    torch.testing.assert_close(nt_xent(a, b, temperature, positive), expected, rtol=1e-12, atol=0)


def test_orthogonal_features_give_log_of_the_number_of_negatives():
    a = torch.eye(4, dtype=torch.float64)[:2]
    b = torch.eye(4, dtype=torch.float64)[2:]
    assert nt_xent(a, b).item() == pytest.approx(torch.tensor(2 + 1e-8).log().item())


def test_rows_of_every_process_sum_to_the_loss_of_the_whole_batch():
    torch.manual_seed(0)
    a, b = torch.randn(2, 6, 8, dtype=torch.float64).unbind()
    keys = torch.cat([a[:3], b[:3], a[3:], b[3:]])  # as two processes would gather them
    parts = [nt_xent(a[i : i + 3], b[i : i + 3], keys=keys, first=2 * i) for i in (0, 3)]
    torch.testing.assert_close(sum(parts) / 2, nt_xent(a, b))


def test_nt_xent_ignores_autocast_and_refuses_one_image():
    torch.manual_seed(0)
    a, b = torch.randn(2, 8, 32).unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = nt_xent(a.bfloat16(), b.bfloat16())
    assert inside.dtype is torch.float32
    torch.testing.assert_close(inside, nt_xent(a.bfloat16().float(), b.bfloat16().float()))
    with pytest.raises(UserError, match="at least 2 images"):
        nt_xent(a[:1], b[:1])
