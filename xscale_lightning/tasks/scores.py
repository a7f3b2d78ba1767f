"""Scores over a whole split, with base lines and bootstrap intervals; never a mean of batches.

The arithmetic is torchmetrics'; what is kept from batch to batch is what a bootstrap over images needs: the score of
every class for every image, or a confusion matrix per image.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision, multilabel_f1_score
from torchmetrics.utilities import dim_zero_cat

from xscale_lightning.errors import UserError

ROUNDS = 1000  # of the bootstrap; mAP sorts all scores every time and gets fewer
ROUNDS_RANKED = 200


@dataclass
class Summary:
    """Scores by name."""

    values: dict[str, float]
    """Over the whole split."""
    baselines: dict[str, dict[str, float]] = field(default_factory=dict)
    """What an answer that does not look at the images reaches."""
    errors: dict[str, float] = field(default_factory=dict)
    """Standard errors, where they are known."""
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)
    """95 % intervals."""


class Scores(Metric):
    """Base of the scores: two lists, of predictions and of what they are compared with."""

    full_state_update = False
    guessed: list[Tensor]
    meant: list[Tensor]
    of_batches: list[Tensor]
    matrices: list[Tensor]

    def summary(self, names: Sequence[str], intervals: bool = False) -> Summary:
        """All scores of what was seen since the last reset; `names` are those of the classes."""
        raise TypeError(f"{type(self).__name__} must implement summary(names, intervals).")

    def compute(self) -> dict[str, float]:
        """The scores alone, by name."""
        return self.summary([]).values


class ClassScores(Scores):
    """One label per image: `top1`, `macro_f1` over the classes that occur."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("guessed", default=[], dist_reduce_fx="cat")
        self.add_state("meant", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take a batch: `logits [B, K]`, `target [B]`."""
        self.guessed.append(logits.argmax(1))
        self.meant.append(target)

    def summary(self, names: Sequence[str], intervals: bool = False) -> Summary:
        """`top1`, `macro_f1`."""
        with self.sync_context():
            guessed, meant = dim_zero_cat(self.guessed).cpu(), dim_zero_cat(self.meant).cpu()
        pairs = meant * self.num_classes + guessed

        def measure(chosen: Tensor) -> dict[str, float]:
            matrix = torch.bincount(pairs[chosen], minlength=self.num_classes**2).view(self.num_classes, -1)
            return {"top1": share(matrix.diagonal().sum(), matrix.sum()), "macro_f1": nan_mean(f1_of(matrix))}

        values = measure(torch.arange(len(pairs)))
        counts = torch.bincount(meant, minlength=self.num_classes)
        error = math.sqrt(values["top1"] * (1 - values["top1"]) / max(len(pairs), 1))
        spread = bootstrap(measure, len(pairs), ROUNDS) if intervals else {}
        return Summary(
            values, {"top1": {"most frequent class": share(counts.max(), counts.sum())}}, {"top1": error}, spread
        )


class LabelScores(Scores):
    """Several labels per image: `map_micro`, `map_macro`, `f1_micro`, `f1_macro` (at 0.5), pooled over all images.

    `map_batch_micro`, the mean of the batches' micro mAP, is what several published codes report; it is biased upwards,
    and is here for comparison with them alone.
    """

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.add_state("guessed", default=[], dist_reduce_fx="cat")
        self.add_state("meant", default=[], dist_reduce_fx="cat")
        self.add_state("of_batches", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take a batch: `logits [B, K]`, `target [B, K]` of 0 and 1."""
        self.guessed.append(logits.sigmoid())
        self.meant.append(target.long())
        if target.any():
            scores = multilabel_average_precision(self.guessed[-1], self.meant[-1], self.num_classes, average="micro")
            self.of_batches.append(scores.view(1).to(logits))

    def summary(self, names: Sequence[str], intervals: bool = False) -> Summary:
        """All five."""
        with self.sync_context():
            guessed, meant = dim_zero_cat(self.guessed).cpu(), dim_zero_cat(self.meant).cpu()
            batches = dim_zero_cat(self.of_batches).cpu() if self.of_batches else torch.tensor([math.nan])

        def measure(chosen: Tensor) -> dict[str, float]:
            scores, truth = guessed[chosen], meant[chosen]
            single = multilabel_average_precision(scores, truth, self.num_classes, average="none")
            single = torch.where(truth.any(0), single, math.nan)  # a label that nothing has tells nothing
            return {
                "map_micro": float(multilabel_average_precision(scores, truth, self.num_classes, average="micro")),
                "map_macro": nan_mean(single),
                "f1_micro": float(multilabel_f1_score(scores, truth, self.num_classes, average="micro")),
                "f1_macro": float(multilabel_f1_score(scores, truth, self.num_classes, average="macro")),
            }

        values = measure(torch.arange(len(meant)))
        frequency = meant.float().mean(0)
        chance = {"map_micro": float(frequency.mean()), "map_macro": nan_mean(frequency.where(frequency > 0, math.nan))}
        values["map_batch_micro"] = float(batches.mean())
        spread = bootstrap(measure, len(meant), ROUNDS_RANKED) if intervals else {}
        return Summary(values, {name: {"chance": value} for name, value in chance.items()}, intervals=spread)


class PixelScores(Scores):
    """A class for every pixel: `miou` over the classes that occur, `pixel_accuracy`, and `iou/<class>`.

    Args:
        num_classes: number of classes; targets below 0 are ignored.
        positive: a class whose `precision`, `recall`, `f1` and `iou`, pooled over all pixels, are the scores instead.
    """

    def __init__(self, num_classes: int, positive: int | None = None) -> None:
        super().__init__()
        self.num_classes, self.positive = num_classes, positive
        self.add_state("matrices", default=[], dist_reduce_fx="cat")

    def update(self, logits: Tensor, target: Tensor) -> None:
        """Take a batch: `logits [B, K, H, W]`, `target [B, H, W]`."""
        self.matrices.append(confusion(logits.argmax(1), target, self.num_classes))

    def summary(self, names: Sequence[str], intervals: bool = False) -> Summary:
        """All scores."""
        with self.sync_context():
            matrices = dim_zero_cat(self.matrices).cpu()  # [N, K, K]
        if not matrices.sum():
            raise UserError("every pixel of this split is ignored: check the data's masks and ignore_index.")
        measure = self._of_class if self.positive is not None else self._of_all
        values = measure(matrices.sum(0), names)
        spread = (
            bootstrap(lambda chosen: measure(matrices[chosen].sum(0), names), len(matrices), ROUNDS)
            if intervals
            else {}
        )
        return Summary(values, self._baselines(matrices.sum((0, 2))), intervals=spread)

    def _of_all(self, matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
        iou = iou_of(matrix)
        single = {f"iou/{name}": float(value) for name, value in zip(names, iou, strict=False)}
        accuracy = share(matrix.diagonal().sum(), matrix.sum())
        return {"miou": nan_mean(iou), "pixel_accuracy": accuracy, **single}

    def _of_class(self, matrix: Tensor, names: Sequence[str]) -> dict[str, float]:
        hits, said, there = (
            matrix[self.positive, self.positive],
            matrix[:, self.positive].sum(),
            matrix[self.positive].sum(),
        )
        return {
            "f1": share(2 * hits, said + there),
            "precision": share(hits, said),
            "recall": share(hits, there),
            "iou": share(hits, said + there - hits),
        }

    def _baselines(self, counts: Tensor) -> dict[str, dict[str, float]]:
        """What one class everywhere reaches: the most frequent one, or the positive one."""
        frequency = counts.double() / counts.sum().clamp(min=1)
        if self.positive is not None:
            found = float(frequency[self.positive])
            return {"f1": {"all positive": 2 * found / (1 + found)}}
        return {"miou": {"most frequent class": float(frequency.max()) / max(int((counts > 0).sum()), 1)}}


def confusion(guessed: Tensor, target: Tensor, num_classes: int) -> Tensor:
    """Confusion matrices `[B, K, K]` (row: target, column: guessed) of maps `[B, H, W]`; targets < 0 do not count."""
    size = num_classes**2
    places = target * num_classes + guessed + size * torch.arange(len(target), device=target.device).view(-1, 1, 1)
    return torch.bincount(places[target >= 0], minlength=size * len(target)).view(-1, num_classes, num_classes)


def iou_of(matrix: Tensor) -> Tensor:
    """Intersection over union of every class `[K]`; NaN where it is neither there nor guessed."""
    hits = matrix.diagonal().double()
    return hits / (matrix.sum(0) + matrix.sum(1) - hits)


def f1_of(matrix: Tensor) -> Tensor:
    """F1 of every class `[K]`; NaN where it is neither there nor guessed."""
    return 2 * matrix.diagonal().double() / (matrix.sum(0) + matrix.sum(1))


def share(part: Tensor, whole: Tensor) -> float:
    """`part / whole`; 0 where there is nothing."""
    return float(part) / float(whole) if whole else 0.0


def nan_mean(values: Tensor) -> float:
    """Mean of what is a number; NaN if nothing is."""
    return float(values.nanmean())


def bootstrap(
    measure: Callable[[Tensor], dict[str, float]], count: int, rounds: int, seed: int = 0
) -> dict[str, tuple[float, float]]:
    """95 % percentile intervals of scores over `count` images, drawn with replacement.

    Source: Efron and Tibshirani 1993, chapter 13.

    Args:
        measure: scores of the images at these indices `[count]`.
        count: number of images; one alone has no interval.
        rounds: number of draws.
        seed: of the draws.
    """
    if count < 2:
        return {}
    draws = torch.Generator().manual_seed(seed)
    found = [measure(torch.randint(count, (count,), generator=draws)) for _ in range(rounds)]
    columns = {name: torch.tensor([scores[name] for scores in found], dtype=torch.float64) for name in found[0]}
    ends = torch.tensor([0.025, 0.975], dtype=torch.float64)
    return {name: tuple(values.nanquantile(ends).tolist()) for name, values in columns.items()}  # type: ignore[misc]
