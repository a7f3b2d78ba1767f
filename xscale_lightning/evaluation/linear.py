"""Linear probe: logistic regression on frozen features, with its one free number chosen on held-out samples.

The protocol of Kornblith et al. 2019 and of CLIP (Radford et al. 2021): L-BFGS on cached features, the strength of the
L2 penalty swept. Or that of DINO (Caron et al. 2021): SGD with momentum and a cosine, the learning rate swept. Features
are brought to mean 0 and deviation 1 over the training samples first. Several labels per image are as many independent
logistic regressions.

The objective is scikit-learn's: C times the summed cross-entropy plus half the squared weights; the bias is free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import values
from xscale_lightning.evaluation.scores import class_scores, label_scores

Solver = Literal["lbfgs", "sgd"]
HELD_OUT = 0.2  # of the training samples, where there is no split to choose on
MOMENTUM = 0.9


@dataclass(frozen=True)
class LinearRecipe:
    """How the layer is trained and what is swept."""

    solver: Solver = "lbfgs"
    """`lbfgs` sweeps `c`, `sgd` sweeps `lr`."""
    c: Sequence[float] = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Inverse strengths of the penalty, as scikit-learn's C."""
    max_iter: int = 1000
    """Steps of L-BFGS per value, at most."""
    lr: Sequence[float] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    """Learning rates of SGD per 256 samples."""
    epochs: int = 100
    """Passes of SGD over the training features."""
    batch_size: int = 256
    """Samples per step of SGD."""
    seed: int = 0
    """Of the order of SGD, and of the samples held out where there is no split to choose on."""

    def __post_init__(self) -> None:
        """Refuse numbers that are out of range.

        Raises:
            UserError: naming the number.
        """
        for name in ("max_iter", "epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"linear.{name}: {getattr(self, name)} is not possible; give at least 1.")
        for name in ("c", "lr"):
            swept = getattr(self, name)
            if not swept or not all(math.isfinite(value) and value > 0 for value in swept):
                raise UserError(f"linear.{name}: {list(swept)} is not possible; give numbers above 0.")


@dataclass(frozen=True)
class LinearHead:
    """One linear layer that takes features as they are."""

    weight: Tensor
    """`[K, D]`."""
    bias: Tensor
    """`[K]`; -inf for a class that no training sample had."""
    multilabel: bool = False

    def logits(self, features: Tensor) -> Tensor:
        """`[N, K]` of features `[N, D]`, in the layer's precision."""
        return F.linear(features.to(self.weight), self.weight, self.bias)

    def probabilities(self, features: Tensor) -> Tensor:
        """`[N, K]`: of the classes, which sum to 1, or of every label."""
        logits = self.logits(features)
        return logits.sigmoid() if self.multilabel else logits.softmax(1)

    def score(self, features: Tensor, labels: Tensor) -> float:
        """Top-1 accuracy, or micro mAP of several labels."""
        logits = self.logits(features)
        if self.multilabel:
            return values(label_scores(logits, labels))["map_micro"]
        return values(class_scores(logits.argmax(1), labels, len(self.bias)))["top1"]


@dataclass(frozen=True)
class LinearFit:
    """A trained layer, and how it was chosen."""

    head: LinearHead
    chosen: float
    """C or learning rate."""
    swept: dict[float, float] = field(default_factory=dict)
    """Score of every value on the samples it was chosen on."""


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_classes: int,
    recipe: LinearRecipe = LinearRecipe(),
    selection: tuple[Tensor, Tensor] | None = None,
) -> LinearFit:
    """Train the layer and choose C, or the learning rate; of equal scores the smallest value.

    Args:
        features: `[N, D]`, frozen.
        labels: `[N]` class numbers, or `[N, K]` of 0 and 1.
        num_classes: number of classes K.
        recipe: how it is trained, and what is swept.
        selection: features and labels of the split to choose on. None holds out a fifth of the training samples for
            that, and trains on all of them with what was chosen.

    Raises:
        UserError: fewer than two training samples, or shapes that do not go together.
    """
    if features.ndim != 2 or len(features) < 2 or len(labels) != len(features):
        raise UserError(
            f"features: {tuple(features.shape)} does not go with labels {tuple(labels.shape)}; needs [N, D] and N "
            "labels, N at least 2."
        )
    grid = sorted(float(value) for value in (recipe.c if recipe.solver == "lbfgs" else recipe.lr))
    # Probes run in `no_grad`, in `test` even in `inference_mode`, whose tensors cannot be trained on.
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(features.device.type, enabled=False):
        x, y = features.detach().clone(), labels.detach().to(features.device).clone()
        if len(grid) == 1:
            return LinearFit(_heads(x, y, num_classes, recipe, grid)[0], grid[0])
        if selection is None:
            order = torch.randperm(len(x), generator=torch.Generator().manual_seed(recipe.seed)).to(x.device)
            held = order[: max(1, round(HELD_OUT * len(x)))]
            heads = _heads(x[order[len(held) :]], y[order[len(held) :]], num_classes, recipe, grid)
            scores = [head.score(x[held], y[held]) for head in heads]
        else:
            heads = _heads(x, y, num_classes, recipe, grid)
            scores = [head.score(*selection) for head in heads]
        best = max(range(len(grid)), key=lambda i: (-1.0 if math.isnan(scores[i]) else scores[i], -i))
        if selection is None:
            heads = {best: _heads(x, y, num_classes, recipe, [grid[best]])[0]}
        return LinearFit(heads[best], grid[best], dict(zip(grid, scores, strict=True)))


def _heads(x: Tensor, y: Tensor, num_classes: int, recipe: LinearRecipe, grid: list[float]) -> list[LinearHead]:
    """A layer for every value of the grid."""
    # float64 for L-BFGS, whose line search needs it to end where scikit-learn's does; Apple's GPUs have none.
    wide = recipe.solver == "lbfgs" and x.device.type != "mps"
    x = x.double() if wide else x.float()
    std = x.std(0, correction=0)
    mean, std = x.mean(0), torch.where(std > 1e-6 * x.abs().amax(0).clamp(min=1e-12), std, 1.0)
    x, multilabel = (x - mean) / std, y.ndim == 2
    if recipe.solver == "sgd":
        layers = _sgd(x, y, num_classes, recipe, grid)
    else:
        layers, start = [], None
        for c in grid:  # from the strongest penalty on, each from the one before: the path is short
            start = logistic_regression(x, y, num_classes, c, recipe.max_iter, start)
            layers.append(start)
    heads = []
    for weight, bias in layers:
        scaled = weight / std
        heads.append(LinearHead(scaled, bias - scaled @ mean, multilabel))
    return heads


def logistic_regression(
    x: Tensor,
    y: Tensor,
    num_classes: int,
    c: float,
    max_iter: int = 1000,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Weight `[K, D]` and bias `[K]` of scikit-learn's `LogisticRegression(C=c)`, in the precision of `x`.

    Multinomial from three classes on, one logistic regression for two, and one for every label of `y [N, K]`. What the
    training samples leave open is filled in: a class that none has gets the bias -inf, a label that all or none have
    the log odds of its frequency.

    Args:
        x: `[N, D]`.
        y: `[N]` class numbers, or `[N, K]` of 0 and 1.
        num_classes: number of classes K.
        c: inverse strength of the penalty.
        max_iter: steps of L-BFGS, at most.
        start: weight and bias to start from, such as those of a stronger penalty.
    """
    weight, bias = x.new_zeros(num_classes, x.shape[1]), x.new_zeros(num_classes)
    if y.ndim == 2:
        share = y.to(x).mean(0)
        smooth = (share * len(x) + 0.5) / (len(x) + 1)
        bias = smooth.logit()
        rows = ((share > 0) & (share < 1)).nonzero()[:, 0]
        target = y[:, rows].to(x)
    else:
        present = y.unique()
        bias = torch.full_like(bias, -math.inf)
        bias[present] = 0
        # Of two classes the first one's logit is 0; a single class needs no layer.
        rows = present[1:] if len(present) < 3 else present
        target = (y[:, None] == rows).to(x) if len(present) < 3 else torch.searchsorted(present, y)
    if not len(rows):
        return weight, bias
    w, b = (weight[rows], bias[rows]) if start is None else (start[0][rows], start[1][rows])
    w, b = w.clone().requires_grad_(), b.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [w, b],
        max_iter=max_iter,
        max_eval=2 * max_iter,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = _loss(F.linear(x, w, b), target) + w.square().sum() / (2 * c * len(x))
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    weight[rows], bias[rows] = w.detach(), b.detach()
    return weight, bias


def _loss(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over the samples; of labels `[N, K]` (float) the sum over the labels."""
    if target.is_floating_point():
        return F.binary_cross_entropy_with_logits(logits, target, reduction="sum") / len(target)
    return F.cross_entropy(logits, target)


def _sgd(
    x: Tensor, y: Tensor, num_classes: int, recipe: LinearRecipe, grid: list[float]
) -> list[tuple[Tensor, Tensor]]:
    """Layers of all learning rates at once, from zero, with momentum and a cosine to zero."""
    target = y.to(x) if y.ndim == 2 else y.long()
    size, count = min(recipe.batch_size, len(x)), len(grid)
    w = x.new_zeros(count, num_classes, x.shape[1], requires_grad=True)
    b = x.new_zeros(count, num_classes, requires_grad=True)
    rates = x.new_tensor(grid) * size / 256
    speeds = [torch.zeros_like(w), torch.zeros_like(b)]
    draws = torch.Generator().manual_seed(recipe.seed)
    steps = math.ceil(len(x) / size) * recipe.epochs
    step = 0
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(x), generator=draws).to(x.device).split(size):
            logits = torch.einsum("nd,gkd->gnk", x[index], w) + b[:, None]
            part = target[index].expand(count, *target[index].shape)
            loss = _loss(logits.flatten(0, 1), part.flatten(0, 1)) * count  # each has the mean of its own
            gradients = torch.autograd.grad(loss, (w, b))
            decay = 0.5 * (1 + math.cos(math.pi * step / steps))
            with torch.no_grad():
                for value, gradient, speed in zip((w, b), gradients, speeds, strict=True):
                    speed.mul_(MOMENTUM).add_(gradient)
                    value -= decay * rates.view(-1, *[1] * (value.ndim - 1)) * speed
            step += 1
    return [(w[i].detach().clone(), b[i].detach().clone()) for i in range(count)]
