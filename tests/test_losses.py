import math

import pytest
import torch
import torch.nn.functional as F

from xscale_lightning.errors import UserError
from xscale_lightning.losses import (
    affinity_features,
    affinity_gram,
    mean_similarity,
    normalize_patches,
    nt_xent,
    patch_discrimination,
    patch_mse,
)


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


def test_patch_discrimination_of_orthogonal_targets_has_a_closed_form():
    tau, count = 0.25, 5
    tokens = 3.0 * torch.eye(count, dtype=torch.float64).expand(2, -1, -1)  # lengths do not matter
    right = patch_discrimination(tokens, tokens, tau, standardize=False)
    assert right.item() == pytest.approx(2 * tau * math.log(1 + (count - 1) * math.exp(-1 / tau)))
    wrong = patch_discrimination(tokens.roll(1, dims=1), tokens, tau, standardize=False)
    assert wrong.item() == pytest.approx(right.item() + 2)  # 2 tau * 1 / tau
    batch = patch_discrimination(tokens, tokens, tau, standardize=False, negatives="batch")
    every = math.exp(1 / tau)  # of the other image, one target is the same
    assert batch.item() == pytest.approx(2 * tau * (math.log(2 * every + 2 * (count - 1)) - 1 / tau))


def test_standardised_predictions_forget_scale_and_offset_of_every_feature():
    torch.manual_seed(0)
    prediction, target = torch.randn(2, 3, 7, 4, dtype=torch.float64).unbind()
    moved = prediction * torch.tensor([1e3, 2e3, 5e3, 4e3]) + torch.tensor([10.0, -3.0, 1.0, 0.0])
    plain, other = (patch_discrimination(x, target) for x in (1e3 * prediction, moved))
    assert abs(plain - other) < 1e-6 < abs(patch_discrimination(moved, target, standardize=False) - plain)
    a, b = (prediction - prediction.mean(1, keepdim=True)), target
    a = a / (prediction.std(1, keepdim=True) + 1e-4)
    cosine = F.cosine_similarity(a[:, :, None], b[:, None], dim=-1) / 0.2
    expected = 0.4 * F.cross_entropy(cosine.flatten(0, 1), torch.arange(7).repeat(3))
    torch.testing.assert_close(patch_discrimination(prediction, target), expected, rtol=1e-12, atol=0)


def test_mean_similarity_is_that_of_all_pairs():
    torch.manual_seed(0)
    tokens = torch.randn(3, 6, 5, dtype=torch.float64)
    pairs = F.cosine_similarity(tokens[:, :, None], tokens[:, None], dim=-1)
    torch.testing.assert_close(mean_similarity(tokens), pairs.mean(), rtol=1e-12, atol=0)
    assert mean_similarity(tokens[:, :1].expand(-1, 4, -1)).item() == pytest.approx(1)


def test_affinities_compare_cosines_of_pairs_or_the_tokens():
    torch.manual_seed(0)
    s, t = torch.randn(2, 3, 6, 5, dtype=torch.float64).unbind()
    a, b = (F.cosine_similarity(x[:, :, None], x[:, None], dim=-1) for x in (s, t))
    torch.testing.assert_close(affinity_gram(s, t), (a - b).square().mean(), rtol=1e-12, atol=0)
    turn = torch.linalg.qr(torch.randn(5, 5, dtype=torch.float64))[0]
    assert affinity_gram(s, 2 * s @ turn).item() < 1e-28  # blind to rotations, which the tokens are not
    torch.testing.assert_close(affinity_features(s, t), (2 - 2 * F.cosine_similarity(s, t, dim=-1)).mean() / 5)
    assert affinity_features(s, s @ turn) > 0.01 and affinity_gram(s, torch.randn(3, 6, 9).double()).ndim == 0


@pytest.mark.parametrize(
    "loss", [patch_discrimination, affinity_gram, affinity_features, lambda a, b: mean_similarity(a)]
)
def test_losses_of_tokens_ignore_autocast(loss):
    torch.manual_seed(0)
    a, b = torch.randn(2, 2, 16, 32).bfloat16().unbind()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss(a, b)
    assert inside.dtype is torch.float32
    torch.testing.assert_close(inside, loss(a.float(), b.float()))


def test_patch_discrimination_refuses_one_token_and_no_temperature():
    tokens = torch.randn(2, 3, 4)
    with pytest.raises(UserError, match="at least 2 hidden tokens per image, got 1"):
        patch_discrimination(tokens[:, :1], tokens[:, :1])
    with pytest.raises(UserError, match="temperature must be above 0"):
        patch_discrimination(tokens, tokens, temperature=0.0)
