"""k-nearest-neighbour classification of frozen features.

Two votes: the plain majority (what scikit-learn's `KNeighborsClassifier(metric="cosine")` does) and the weighted vote
of Wu et al. 2018 (Non-Parametric Instance Discrimination) that DINO (Caron et al. 2021) made the usual one, where a
neighbour with cosine similarity s counts exp(s / T).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import Statistic, values
from xscale_lightning.evaluation.scores import class_scores, label_scores


def _check(train_features: Tensor, train_labels: Tensor, features: Tensor, k: int, temperature: float | None) -> None:
    if k < 1:
        raise UserError(f"k: {k} neighbours are not possible; give at least 1.")
    if k > len(train_features):
        raise UserError(f"k: {k} neighbours asked for, but there are only {len(train_features)} training samples.")
    if temperature is not None and temperature <= 0:
        raise UserError(f"temperature: {temperature} is not possible; give a number above 0, or null for a plain vote.")
    if len(train_labels) != len(train_features):
        raise UserError(f"train_labels: {len(train_labels)} labels for {len(train_features)} training features.")
    if train_features.shape[1:] != features.shape[1:]:
        raise UserError(
            f"features: {tuple(features.shape)} does not go with training features {tuple(train_features.shape)}."
        )


def _vote(labels: Tensor, weights: Tensor, num_classes: int) -> Tensor:
    """Class with the most weight among the neighbours; labels and weights `[M, k]`, nearest first -> `[M]`."""
    votes = weights.new_zeros(len(labels), num_classes).scatter_add_(1, labels, weights)
    # Among classes with the same weight the one whose own nearest neighbour comes first: rank 0 is the nearest.
    ranks = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    first = torch.full((len(labels), num_classes), labels.shape[1], device=labels.device)
    first.scatter_reduce_(1, labels, ranks, reduce="amin")
    best = votes.amax(dim=1, keepdim=True)
    return first.masked_fill(votes < best, labels.shape[1] + 1).argmin(dim=1)


@torch.no_grad()
def knn_predict(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    k: int = 5,
    temperature: float | None = None,
    chunk: int = 1024,
) -> Tensor:
    """Predict from the k training features with the highest cosine similarity.

    Args:
        train_features: `[N, D]`.
        train_labels: `[N]` int64 class numbers, or `[N, K]` 0/1 for multi-label data.
        features: `[M, D]`, the samples to classify.
        k: number of neighbours.
        temperature: None counts every neighbour once, and a draw goes to the class whose own nearest neighbour is
            nearer; a number T counts a neighbour exp(similarity / T) (0.07 in the published protocols).
        chunk: rows of `features` compared at a time; memory is chunk x N similarities.

    Returns:
        `[M]` int64 class numbers, or for multi-label data `[M, K]` scores in 0..1: the (weighted) mean of the
        neighbours' labels.

    Raises:
        UserError: if k is below 1 or above N, the temperature is not positive, or the shapes do not go together.
    """
    _check(train_features, train_labels, features, k, temperature)
    # float32 even inside an autocast region: in bfloat16 (8 bits) distinct neighbours become equal.
    with torch.autocast(features.device.type, enabled=False):
        bank = F.normalize(train_features.float(), dim=1)
        labels = train_labels.to(bank.device)
        multilabel = labels.ndim == 2
        num_classes = 0 if multilabel else int(labels.max()) + 1
        predictions = []
        for part in features.to(bank.device).split(chunk):
            similarity, index = (F.normalize(part.float(), dim=1) @ bank.T).topk(k, dim=1)  # [m, k]
            # The maximum is subtracted so that exp cannot overflow at a low temperature; it cancels in every vote.
            weights = (
                torch.ones_like(similarity)
                if temperature is None
                else ((similarity - similarity[:, :1]) / temperature).exp()
            )
            if multilabel:
                share = (weights / weights.sum(dim=1, keepdim=True)).unsqueeze(-1)  # [m, k, 1]
                predictions.append((labels[index].float() * share).sum(dim=1))
            else:
                predictions.append(_vote(labels[index], weights, num_classes))
        return torch.cat(predictions) if predictions else labels[:0]


def knn_scores(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    k: int = 5,
    temperature: float | None = None,
    chunk: int = 1024,
) -> Statistic:
    """Scores of `knn_predict` over the whole set; arguments as there, `labels` `[M]` or `[M, K]` like `train_labels`.

    Returns:
        `class_scores` for class numbers, `label_scores` for multi-label data.

    Raises:
        UserError: as `knn_predict`, and if there is nothing to score or only one of the label sets is multi-label.
    """
    if len(features) == 0 or len(labels) != len(features):
        raise UserError(f"labels: {len(labels)} labels for {len(features)} features; give as many, and at least one.")
    if labels.shape[1:] != train_labels.shape[1:]:
        raise UserError(
            f"labels: shape {tuple(labels.shape)} does not go with training labels {tuple(train_labels.shape)}."
        )
    predicted = knn_predict(train_features, train_labels, features, k, temperature, chunk)
    if labels.ndim == 2:
        return label_scores(predicted, labels)
    return class_scores(predicted, labels, 1 + max(int(train_labels.max()), int(labels.max())))


def knn_evaluate(
    train_features: Tensor,
    train_labels: Tensor,
    features: Tensor,
    labels: Tensor,
    k: int = 5,
    temperature: float | None = None,
    chunk: int = 1024,
) -> dict[str, float]:
    """Score `knn_predict` over the whole set; arguments and errors as `knn_scores`.

    Returns:
        `{"top1", "macro_f1"}` for class numbers; `{"map_micro", "map_macro"}` for multi-label data, where classes
        without a single positive among `labels` are left out of the macro mean.
    """
    return values(knn_scores(train_features, train_labels, features, labels, k, temperature, chunk))
