"""Scores over a whole split, with base lines and bootstrap intervals; never a mean of batches.

The arithmetic is that of `evaluation.scores`; what is kept from batch to batch is what a bootstrap over images needs:
the score of every class for every image, or a confusion matrix per image.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.functional.classification import multilabel_average_precision
from torchmetrics.utilities import dim_zero_cat

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import DRAWS, Statistic, estimates
from xscale_lightning.evaluation.scores import class_scores, label_scores, pixel_scores


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

    @classmethod
    def of(cls, *statistics: Statistic, intervals: bool, baselines: dict[str, dict[str, float]]) -> "Summary":
        """What these statistics say of all images, with intervals where wanted."""
        found = {k: v for one in statistics for k, v in estimates(one, DRAWS if intervals else 0).items()}
        spread = {name: estimate.interval for name, estimate in found.items() if estimate.interval is not None}
        return cls({name: estimate.value for name, estimate in found.items()}, baselines, intervals=spread)


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
        counts = torch.bincount(meant, minlength=self.num_classes)
        baselines = {"top1": {"most frequent class": share(counts.max(), counts.sum())}}
        statistic = class_scores(guessed, meant, self.num_classes)
        summary = Summary.of(statistic, intervals=intervals, baselines=baselines)
        top1 = summary.values["top1"]
        summary.errors["top1"] = math.sqrt(top1 * (1 - top1) / max(len(meant), 1))
        return summary


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

        frequency = meant.float().mean(0)
        chance = {"map_micro": float(frequency.mean()), "map_macro": nan_mean(frequency.where(frequency > 0, math.nan))}
        baselines = {name: {"chance": value} for name, value in chance.items()}
        ranked, decided = label_scores(guessed, meant), decisions(guessed > 0.5, meant)
        summary = Summary.of(ranked, decided, intervals=intervals, baselines=baselines)
        summary.values["map_batch_micro"] = float(batches.mean())
        return summary


class PixelScores(Scores):
    """A class for every pixel: `miou` over the classes that occur, `accuracy`, and `iou/<class>`.

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
        statistic = pixel_scores(matrices, names) if self.positive is None else one_class(matrices, self.positive)
        return Summary.of(statistic, intervals=intervals, baselines=self._baselines(matrices.sum((0, 2))))

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


def decisions(guessed: Tensor, meant: Tensor) -> Statistic:
    """`f1_micro` and `f1_macro` of yes-or-no answers `[N, K]`; a label that nothing has or is given counts as 0."""
    said, there = guessed.double(), meant.double()
    both = said * there

    def measure(times: Tensor) -> dict[str, Tensor]:
        hits, sums = times @ both, times @ (said + there)  # [R, K]
        micro = 2 * hits.sum(1) / sums.sum(1)
        return {"f1_micro": micro, "f1_macro": (2 * hits / sums.clamp(min=1)).mean(1)}

    return Statistic(measure, len(meant))


def one_class(matrices: Tensor, positive: int) -> Statistic:
    """`f1`, `precision`, `recall` and `iou` of one class, pooled over all pixels; 0 where it is nowhere."""
    counts = [matrices[:, positive, positive], matrices[:, :, positive].sum(1), matrices[:, positive].sum(1)]
    counts = torch.stack(counts, dim=1).double()  # [N, 3]: hits, said, there

    def measure(times: Tensor) -> dict[str, Tensor]:
        hits, said, there = (times @ counts).unbind(1)
        return {
            "f1": 2 * hits / (said + there).clamp(min=1),
            "precision": hits / said.clamp(min=1),
            "recall": hits / there.clamp(min=1),
            "iou": hits / (said + there - hits).clamp(min=1),
        }

    return Statistic(measure, len(matrices))


def share(part: Tensor, whole: Tensor) -> float:
    """`part / whole`; 0 where there is nothing."""
    return float(part) / float(whole) if whole else 0.0


def nan_mean(values: Tensor) -> float:
    """Mean of what is a number; NaN if nothing is."""
    return float(values.nanmean())
