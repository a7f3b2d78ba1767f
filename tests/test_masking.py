import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from xscale_lightning.errors import UserError
from xscale_lightning.masking import check_ratio, highest_ratio, keep_count, random_mask, to_boolean

LENGTHS = st.integers(4, 200)
RATIOS = st.floats(0.0, 0.75)


def noise(length: int, seed: int = 0, batch: int = 3) -> torch.Tensor:
    return torch.rand(batch, length, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("length", "kept"), [(640, 63), (1000, 99), (480, 47), (196, 19)])
def test_keep_count_truncates_on_the_floating_point_error_as_published(length, kept):
    assert keep_count(length, 0.9) == kept


@pytest.mark.parametrize(("length", "ratio", "kept"), [(196, 0.75, 49), (64, 0.75, 16), (10, 0.0, 10), (4, 0.75, 1)])
def test_keep_count_of_plain_cases(length, ratio, kept):
    assert keep_count(length, ratio) == kept


@settings(deadline=None, max_examples=60)
@given(length=LENGTHS, ratio=RATIOS, seed=st.integers(0, 1000))
def test_kept_and_hidden_partition_the_grid(length, ratio, seed):
    kept, hidden = random_mask(noise(length, seed), ratio)
    assert kept.shape == (3, int(length * (1 - ratio))) and hidden.shape[1] == length - kept.shape[1]
    assert torch.equal(torch.cat([kept, hidden], 1).sort(1).values, torch.arange(length).expand(3, -1))


@settings(deadline=None, max_examples=60)
@given(length=LENGTHS, low=RATIOS, high=RATIOS, seed=st.integers(0, 1000))
def test_the_same_noise_gives_nested_masks(length, low, high, seed):
    low, high = sorted((low, high))
    draw = noise(length, seed)
    many, few = random_mask(draw, low)[0], random_mask(draw, high)[0]
    assert torch.equal(many[:, : few.shape[1]], few)


def test_the_lowest_noise_is_kept():
    draw = torch.tensor([[0.4, 0.1, 0.3, 0.2], [0.9, 0.8, 0.0, 0.1]])
    kept, hidden = random_mask(draw, 0.5)
    assert kept.tolist() == [[1, 3], [2, 3]] and hidden.tolist() == [[2, 0], [1, 0]]


def test_boolean_mask_is_true_at_the_indices():
    mask = to_boolean(torch.tensor([[1, 3], [0, 2]]), 4)
    assert mask.tolist() == [[False, True, False, True], [True, False, True, False]]


@pytest.mark.parametrize("ratio", [1.0, 1.5, -0.1, float("nan")])
def test_a_ratio_outside_zero_to_one_is_refused(ratio):
    for refuse in (check_ratio, lambda value: keep_count(16, value), lambda value: random_mask(noise(16), value)):
        with pytest.raises(UserError, match=rf"mask_ratio must be in \[0, 1\), got {ratio}"):
            refuse(ratio)


def test_a_ratio_that_leaves_no_token_is_refused_with_the_highest_that_works():
    with pytest.raises(UserError, match=r"mask_ratio 0.95 leaves none of the 16 tokens visible: .* at most 0.937"):
        keep_count(16, 0.95)
    with pytest.raises(UserError, match="leaves none"):
        random_mask(noise(4), 0.9)


def test_the_ratio_that_the_error_recommends_leaves_a_token():
    for length in (*range(1, 400), 576, 1000, 3075, 17712):
        if length > 1:
            assert keep_count(length, highest_ratio(length)) >= 1
        assert highest_ratio(length) >= 1 - 1 / length - 2e-3
    with pytest.raises(UserError, match=r"none of the 12 tokens visible: lower it to at most 0\.916"):
        keep_count(12, 0.95)
    with pytest.raises(UserError, match="has none to hide: take larger images"):
        keep_count(1, 0.5)
