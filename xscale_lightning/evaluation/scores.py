"""Scores pooled over a whole set, never means of batches, in a form that a bootstrap over samples can repeat.

Each comes as a `Statistic`: `values` gives the scores, `estimates` the scores with intervals.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import Statistic


def class_scores(predicted: Tensor, labels: Tensor, num_classes: int) -> Statistic:
    """`top1`, and `macro_f1`: the mean F1 of the classes that are there or predicted (scikit-learn's `f1_score`).

    Args:
        predicted: `[N]` class numbers.
        labels: `[N]` class numbers.
        num_classes: number of classes.
    """
    guessed, meant = (F.one_hot(x.cpu().long(), num_classes).double() for x in (predicted, labels))  # [N, K]
    hits = guessed * meant

    def measure(times: Tensor) -> dict[str, Tensor]:
        right, said, there = times @ hits, times @ guessed, times @ meant  # [R, K]
        return {"top1": right.sum(1) / times.sum(1), "macro_f1": (2 * right / (said + there)).nanmean(1)}

    return Statistic(measure, len(labels))


def label_scores(scores: Tensor, labels: Tensor) -> Statistic:
    """Mean average precision of multi-label data: `map_micro` of all pairs of sample and label in one ranking.

    `map_macro` is the mean over the labels, each ranked for itself; a label that no sample has is left out. Average
    precision is the step-wise sum of scikit-learn and torchmetrics; samples with equal scores are one step.

    Args:
        scores: `[N, K]`, the higher the surer.
        labels: `[N, K]` of 0 and 1.
    """
    scores, truth = scores.cpu().double(), labels.cpu().double()
    count, number = scores.shape
    samples = torch.arange(count)
    micro = _average_precision(scores.flatten(), truth.flatten(), samples.repeat_interleave(number))
    single = [_average_precision(scores[:, k], truth[:, k], samples) for k in range(number)]

    def measure(times: Tensor) -> dict[str, Tensor]:
        macro = torch.stack([one(times) for one in single], dim=1).nanmean(1)
        return {"map_micro": micro(times), "map_macro": macro}

    return Statistic(measure, count, width=number)


def _average_precision(scores: Tensor, truth: Tensor, samples: Tensor) -> Callable[[Tensor], Tensor]:
    """Average precision `[R]` by multiplicities `[R, N]`; pairs `[M]` belong to `samples`. NaN where none is true."""
    order = scores.argsort(descending=True, stable=True)
    ranked, truth, samples = scores[order], truth[order], samples[order]
    ends = torch.cat([(ranked[1:] != ranked[:-1]).nonzero()[:, 0], torch.tensor([len(ranked) - 1])])

    def measure(times: Tensor) -> Tensor:
        weight = times[:, samples]
        seen, found = weight.cumsum(1)[:, ends], (weight * truth).cumsum(1)[:, ends]
        gained = torch.diff(found, dim=1, prepend=torch.zeros(len(found), 1, dtype=found.dtype))
        # Nothing seen is nothing found, so nothing gained: 0 of 0 counts as 0.
        return (gained * found / seen.clamp(min=1)).sum(1) / found[:, -1]

    return measure


def pixel_scores(confusion: Tensor, names: Sequence[str]) -> Statistic:
    """`miou` over the classes in mask or prediction, `accuracy`, and `iou/<class>` from confusion matrices per image.

    Args:
        confusion: `[N, K, K]`, mask in rows, prediction in columns.
        names: of the K classes.
    """
    flat = confusion.cpu().flatten(1).double()

    def measure(times: Tensor) -> dict[str, Tensor]:
        total = (times @ flat).view(len(times), *confusion.shape[1:])
        right = total.diagonal(dim1=1, dim2=2)
        iou = right / (total.sum(1) + total.sum(2) - right)  # 0 / 0: in neither
        single = {f"iou/{name}": iou[:, k] for k, name in enumerate(names)}
        return {"miou": iou.nanmean(1), "accuracy": right.sum(1) / total.sum((1, 2)), **single}

    return Statistic(measure, len(confusion))


def check_labels(labels: Tensor, num_classes: int, multilabel: bool, what: str) -> None:
    """Refuse labels that are no class.

    Args:
        labels: `[N]` class numbers, or `[N, K]` of 0 and 1.
        num_classes: number of classes K.
        multilabel: which of the two it should be.
        what: whose they are, for messages ("the training split of eurosat").

    Raises:
        UserError: naming the label, or the shape.
    """
    if multilabel != (labels.ndim == 2) or (multilabel and labels.shape[1] != num_classes):
        wanted = f"[N, {num_classes}] of 0 and 1" if multilabel else "[N] class numbers"
        raise UserError(
            f"labels: {list(labels.shape)} of {what}, and its data says {wanted}; mend data.multilabel or "
            "data.num_classes."
        )
    if multilabel:
        wrong = labels[(labels != 0) & (labels != 1)]
        if len(wrong):
            raise UserError(f"labels: {wrong[0].item()} of {what} is neither 0 nor 1; mend the labels.")
        return
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if len(wrong):
        raise UserError(
            f"labels: {wrong[0].item()} of {what} is not one of the {num_classes} classes 0 to {num_classes - 1}; mend "
            "the labels or data.num_classes."
        )


def absent_labels(labels: Tensor, num_classes: int) -> list[int]:
    """Classes that not one of the labels `[N]`, or `[N, K]` of 0 and 1, has."""
    seen = labels.any(0) if labels.ndim == 2 else torch.bincount(labels.long(), minlength=num_classes) > 0
    return (~seen).nonzero()[:, 0].tolist()
