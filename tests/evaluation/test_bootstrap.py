import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score, f1_score
from torchmetrics.classification import MulticlassF1Score, MultilabelAveragePrecision
from torchmetrics.functional.classification import multiclass_jaccard_index

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import Statistic, bootstrap_draws, estimates, values
from xscale_lightning.evaluation.dense import dense_scores
from xscale_lightning.evaluation.scores import absent_labels, check_labels, class_scores, label_scores, pixel_scores


def pairs(count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(0)
    labels = torch.randint(classes, (count,), generator=draws)
    noise = torch.rand(count, generator=draws) < 0.4
    return torch.where(noise, torch.randint(classes, (count,), generator=draws), labels), labels


def several(count: int, number: int, levels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores with many ties, as a vote of few neighbours has them; the last label is never there."""
    draws = torch.Generator().manual_seed(1)
    labels = (torch.rand(count, number, generator=draws) < 0.3).long()
    labels[:, -1] = 0
    scores = (labels + torch.randint(levels, (count, number), generator=draws)).float() / (levels + 1)
    return scores, labels


def test_class_scores_by_hand() -> None:
    predicted, labels = torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 1])
    # F1 of class 0: 2 * 1 / (2 + 1), of 1: 2 * 1 / (1 + 3), of 2: neither there nor predicted, of 3: 0
    expected = {"top1": 0.5, "macro_f1": (2 / 3 + 0.5 + 0) / 3}
    assert values(class_scores(predicted, labels, 4)) == pytest.approx(expected)


def test_class_scores_are_torchmetrics_over_uneven_batches_and_scikit_learns() -> None:
    predicted, labels = pairs(103, 5)
    metric = MulticlassF1Score(5, average="macro")
    for guess, truth in zip(predicted.split(40), labels.split(40), strict=True):
        metric.update(guess, truth)
    found = values(class_scores(predicted, labels, 5))
    assert found["macro_f1"] == pytest.approx(metric.compute().item(), abs=1e-6)
    assert found["macro_f1"] == pytest.approx(f1_score(labels, predicted, average="macro"))
    assert found["top1"] == pytest.approx((predicted == labels).double().mean().item())


def test_average_precision_by_hand() -> None:
    # One label, ranking: right, wrong, right, right -> (1 / 1 + 2 / 3 + 3 / 4) / 3
    scores, labels = torch.tensor([[0.9], [0.8], [0.7], [0.1]]), torch.tensor([[1], [0], [1], [1]])
    assert values(label_scores(scores, labels))["map_macro"] == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    # All scores alike are one step: the share of what is right.
    assert values(label_scores(torch.zeros(4, 1), labels))["map_micro"] == pytest.approx(0.75)


@pytest.mark.parametrize("levels", [3, 1000])
def test_label_scores_are_torchmetrics_over_uneven_batches_and_scikit_learns(levels: int) -> None:
    scores, labels = several(103, 6, levels)
    found = values(label_scores(scores, labels))
    metric = MultilabelAveragePrecision(6, average="micro")
    for guess, truth in zip(scores.split(40), labels.split(40), strict=True):
        metric.update(guess, truth)
    assert found["map_micro"] == pytest.approx(metric.compute().item(), abs=1e-6)
    y, s = labels.numpy(), scores.numpy()
    assert found["map_micro"] == pytest.approx(average_precision_score(y, s, average="micro"))
    single = [average_precision_score(y[:, k], s[:, k]) for k in range(5)]  # the last label is never there
    assert found["map_macro"] == pytest.approx(np.mean(single))


def test_a_mean_of_batches_is_another_number() -> None:
    scores, labels = several(103, 6, 3)
    parts = [values(label_scores(s, y))["map_micro"] for s, y in zip(scores.split(40), labels.split(40), strict=True)]
    assert abs(np.mean(parts) - values(label_scores(scores, labels))["map_micro"]) > 1e-3


def test_pixel_scores_are_those_of_the_summed_matrix_and_torchmetrics() -> None:
    predicted, labels = pairs(7 * 50, 4)
    confusion = torch.stack(
        [
            torch.bincount(4 * y + p, minlength=16).view(4, 4)
            for p, y in zip(predicted.split(50), labels.split(50), strict=True)
        ]
    )
    found, plain = values(pixel_scores(confusion, list("abcd"))), dense_scores(confusion)
    assert found["miou"] == pytest.approx(plain.miou) and found["accuracy"] == pytest.approx(plain.accuracy)
    assert [found[f"iou/{name}"] for name in "abcd"] == pytest.approx(list(plain.iou))
    assert found["miou"] == pytest.approx(multiclass_jaccard_index(predicted, labels, 4).item(), abs=1e-6)


@pytest.mark.parametrize("kind", ["classes", "labels", "pixels"])
def test_draws_are_the_scores_of_the_samples_drawn(kind: str) -> None:
    """The fast form of the bootstrap against scoring every draw anew."""
    if kind == "classes":
        one, two = pairs(31, 4)
        make = lambda i: class_scores(one[i], two[i], 4)  # noqa: E731
    elif kind == "labels":
        one, two = several(31, 5, 3)
        make = lambda i: label_scores(one[i], two[i])  # noqa: E731
    else:
        one = torch.randint(9, (31, 3, 3), generator=torch.Generator().manual_seed(0))
        make = lambda i: pixel_scores(one[i], list("abc"))  # noqa: E731
    drawn = bootstrap_draws(make(torch.arange(31)), draws=12, seed=5)
    generator = torch.Generator().manual_seed(5)
    for row in range(12):
        expected = values(make(torch.randint(31, (31,), generator=generator)))
        assert {name: float(column[row]) for name, column in drawn.items()} == pytest.approx(expected)


def test_intervals_are_percentiles_seeded_and_shrink_with_the_samples() -> None:
    few, many = (estimates(class_scores(*pairs(count, 5), 5)) for count in (50, 800))
    drawn = bootstrap_draws(class_scores(*pairs(50, 5), 5))["top1"].numpy()
    assert len(drawn) == 1000
    assert few["top1"].interval == pytest.approx(tuple(np.percentile(drawn, [2.5, 97.5])))
    assert few["top1"].error == pytest.approx(drawn.std())
    assert few == estimates(class_scores(*pairs(50, 5), 5)) and few != estimates(class_scores(*pairs(50, 5), 5), seed=1)
    for name in ("top1", "macro_f1"):
        (low, high), (lower, higher) = few[name].interval, many[name].interval
        assert low < few[name].value < high and 2 < (high - low) / (higher - lower) < 8
    # The binomial distribution's own error: sqrt(p (1 - p) / n).
    share = many["top1"].value
    assert many["top1"].error == pytest.approx((share * (1 - share) / 800) ** 0.5, rel=0.1)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    draws = torch.Generator().manual_seed(0)
    covered = 0
    for trial in range(200):
        right = (torch.rand(100, generator=draws) < 0.7).double()
        low, high = estimates(Statistic(lambda t, r=right: {"x": t @ r / t.sum(1)}, 100), seed=trial)["x"].interval
        covered += low <= 0.7 <= high
    assert 0.89 < covered / 200 < 0.99


def test_draws_do_not_depend_on_the_chunks(monkeypatch) -> None:
    whole = bootstrap_draws(class_scores(*pairs(50, 5), 5), draws=100)
    monkeypatch.setattr("xscale_lightning.evaluation.bootstrap.AT_ONCE", 700)
    torch.testing.assert_close(bootstrap_draws(class_scores(*pairs(50, 5), 5), draws=100), whole)


def test_one_sample_has_no_interval_and_draws_without_positives_are_left_out() -> None:
    assert estimates(class_scores(torch.tensor([1]), torch.tensor([1]), 2))["top1"].interval is None
    scores, labels = torch.tensor([[0.9], [0.1], [0.2]]), torch.tensor([[1], [0], [0]])
    found = estimates(label_scores(scores, labels))["map_micro"]  # a third of the draws or so have no positive
    assert found.value == 1 and found.interval == (1.0, 1.0)


def test_wrong_labels_are_named() -> None:
    check_labels(torch.tensor([0, 4]), 5, False, "x")
    check_labels(torch.tensor([[0, 1]]), 2, True, "x")
    with pytest.raises(UserError, match="labels: 5 of the training split of x is not one of the 5 classes 0 to 4"):
        check_labels(torch.tensor([0, 5]), 5, False, "the training split of x")
    with pytest.raises(UserError, match="labels: -1 of x"):
        check_labels(torch.tensor([0, -1]), 5, False, "x")
    with pytest.raises(UserError, match="labels: 2 of x is neither 0 nor 1"):
        check_labels(torch.tensor([[0, 2]]), 2, True, "x")
    with pytest.raises(UserError, match=r"labels: \[2, 3\] of x, and its data says \[N, 4\]"):
        check_labels(torch.zeros(2, 3), 4, True, "x")
    with pytest.raises(UserError, match=r"labels: \[2, 3\] of x, and its data says \[N\]"):
        check_labels(torch.zeros(2, 3), 4, False, "x")
    assert absent_labels(torch.tensor([0, 2]), 4) == [1, 3]
    assert absent_labels(torch.tensor([[0, 1], [0, 0]]), 2) == [0]
