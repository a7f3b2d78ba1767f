"""Scores over a whole split: by hand, against torchmetrics, and with uneven last batches."""

import math

import pytest
import torch
from torchmetrics.classification import (
    MulticlassAccuracy,
    MulticlassF1Score,
    MulticlassJaccardIndex,
    MultilabelAveragePrecision,
)

from xscale_lightning.errors import UserError
from xscale_lightning.tasks.scores import ClassScores, LabelScores, PixelScores, confusion
from xscale_lightning.tasks.weights import class_weights, count_classes, missing_classes

NAMES = ["a", "b", "c"]


def feed(scores, logits, target, sizes=(5, 5, 2)):
    for part, meant in zip(logits.split(sizes), target.split(sizes), strict=True):
        scores.update(part, meant)
    return scores


@pytest.fixture
def draws():
    return torch.Generator().manual_seed(0)


def test_classes_agree_with_torchmetrics_whatever_the_batches(draws):
    logits, target = torch.randn(12, 3, generator=draws), torch.randint(3, (12,), generator=draws)
    found = feed(ClassScores(3), logits, target).summary(NAMES)
    whole = feed(ClassScores(3), logits, target, (12,)).summary(NAMES)
    assert found.values == whole.values
    assert found.values["top1"] == pytest.approx(float(MulticlassAccuracy(3, average="micro")(logits, target)))
    assert found.values["macro_f1"] == pytest.approx(float(MulticlassF1Score(3, average="macro")(logits, target)))
    assert found.errors["top1"] == pytest.approx(math.sqrt(found.values["top1"] * (1 - found.values["top1"]) / 12))


def test_classes_by_hand():
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 2])]
    found = feed(ClassScores(3), logits, torch.tensor([0, 1, 1, 1]), (3, 1)).summary(NAMES)
    assert found.values["top1"] == 0.5
    assert found.values["macro_f1"] == pytest.approx((2 / 3 + 1 / 2 + 0) / 3)
    assert found.baselines["top1"] == {"most frequent class": 0.75}


def test_labels_agree_with_torchmetrics_and_are_no_mean_of_batches(draws):
    logits, target = torch.randn(12, 3, generator=draws), torch.randint(2, (12, 3), generator=draws)
    found = feed(LabelScores(3), logits, target).summary(NAMES).values
    for average in ("micro", "macro"):
        expected = float(MultilabelAveragePrecision(3, average=average)(logits.sigmoid(), target))
        assert found[f"map_{average}"] == pytest.approx(expected)
    means = [
        float(MultilabelAveragePrecision(3, average="micro")(a.sigmoid(), b))
        for a, b in zip(logits.split((5, 5, 2)), target.split((5, 5, 2)), strict=True)
    ]
    assert found["map_batch_micro"] == pytest.approx(sum(means) / 3)
    assert found["map_batch_micro"] != pytest.approx(found["map_micro"])


def test_a_label_that_nothing_has_is_left_out_of_the_macro_mean():
    logits = torch.tensor([[2.0, 1.0, 5.0], [-2.0, -1.0, 5.0]])
    found = feed(LabelScores(3), logits, torch.tensor([[1, 1, 0], [0, 0, 0]]), (2,)).summary(NAMES)
    assert found.values["map_macro"] == 1.0
    assert found.baselines["map_micro"] == {"chance": pytest.approx(2 / 6)}


def test_pixels_agree_with_torchmetrics_and_ignore_what_is_below_zero(draws):
    logits = torch.randn(12, 3, 4, 5, generator=draws)
    target = torch.randint(-1, 3, (12, 4, 5), generator=draws)
    found = feed(PixelScores(3), logits, target).summary(NAMES).values
    single = MulticlassJaccardIndex(3, average="none", ignore_index=-1)(logits, target)
    assert [found[f"iou/{name}"] for name in NAMES] == pytest.approx(single.tolist())
    assert found["miou"] == pytest.approx(float(single.mean()))


def test_pixels_by_hand():
    guessed = torch.tensor([[[0, 1], [1, 1]]])
    logits = torch.nn.functional.one_hot(guessed, 3).movedim(-1, 1).float()
    scores = PixelScores(3)
    scores.update(logits, torch.tensor([[[0, 1], [0, -1]]]))
    found = scores.summary(NAMES).values
    assert (found["iou/a"], found["iou/b"]) == (0.5, 0.5) and math.isnan(found["iou/c"])
    assert found["miou"] == 0.5 and found["accuracy"] == pytest.approx(2 / 3)


def test_change_is_pooled_over_all_pixels():
    first = torch.tensor([[[1, 1, 0, 0]]])  # 1 hit, 1 false alarm
    second = torch.tensor([[[1, 0, 0, 0]]])  # 1 hit, 2 missed
    scores = PixelScores(2, positive=1)
    for guessed, target in ((first, [[[1, 0, -1, 0]]]), (second, [[[1, 1, 1, -1]]])):
        scores.update(torch.nn.functional.one_hot(guessed, 2).movedim(-1, 1).float(), torch.tensor(target))
    found = scores.summary(["unchanged", "changed"])
    assert found.values == pytest.approx({"f1": 4 / 7, "precision": 2 / 3, "recall": 1 / 2, "iou": 2 / 5})
    assert found.baselines["f1"]["all positive"] == pytest.approx(2 * (4 / 6) / (1 + 4 / 6))


def test_nothing_but_ignored_pixels_is_refused():
    scores = PixelScores(2)
    scores.update(torch.zeros(1, 2, 2, 2), torch.full((1, 2, 2), -1))
    with pytest.raises(UserError, match="every pixel of this split is ignored"):
        scores.summary(NAMES)


def test_intervals_hold_the_value_and_are_the_same_every_time(draws):
    logits, target = torch.randn(60, 3, generator=draws), torch.randint(3, (60,), generator=draws)
    one, two = (feed(ClassScores(3), logits, target, (60,)).summary(NAMES, intervals=True) for _ in range(2))
    assert one.intervals == two.intervals
    assert one.intervals["top1"][0] < one.values["top1"] < one.intervals["top1"][1]


def test_confusion_is_of_every_image_alone():
    matrices = confusion(torch.tensor([[[0, 1]], [[1, 1]]]), torch.tensor([[[0, -1]], [[0, 1]]]), 2)
    assert matrices.tolist() == [[[1, 0], [0, 0]], [[0, 1], [0, 1]]]


def test_class_weights():
    assert class_weights(torch.tensor([30, 10, 0]), "balanced").tolist() == pytest.approx([40 / 90, 40 / 30, 1.0])
    assert class_weights(torch.tensor([95, 5]), "oscd").tolist() == pytest.approx([1.0, 1.9])
    assert count_classes(torch.tensor([[0, 2], [-1, 2]]), 4).tolist() == [1, 0, 2, 0]
    assert missing_classes(torch.tensor([1, 0, 2]), NAMES) == ["b"]
    assert missing_classes(torch.zeros(12), [str(i) for i in range(12)])[-1] == "and 4 more"
