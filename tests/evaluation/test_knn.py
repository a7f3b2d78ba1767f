import numpy as np
import pytest
import torch
from sklearn.metrics import average_precision_score
from sklearn.neighbors import KNeighborsClassifier
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.knn import knn_evaluate, knn_predict


def clusters(n: int, classes: int, seed: int, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    centres = torch.randn(classes, 16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=generator)
    return centres[labels] + noise * torch.randn(n, 16, generator=generator), labels


@pytest.mark.parametrize("k", [1, 5, 7])
def test_majority_vote_is_scikit_learns(k: int) -> None:
    train, labels = clusters(300, 2, seed=1)  # two classes and odd k: no draws, whose order differs
    features, _ = clusters(101, 2, seed=2)
    expected = KNeighborsClassifier(k, metric="cosine").fit(train, labels).predict(features)
    assert 0.05 < np.mean(expected) < 0.95
    np.testing.assert_array_equal(knn_predict(train, labels, features, k=k, chunk=17).numpy(), expected)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_weighted_vote_is_scikit_learns_with_the_same_weights(temperature: float) -> None:
    train, labels = clusters(300, 5, seed=1)
    features, _ = clusters(64, 5, seed=2)
    weights = lambda distance: np.exp((1 - distance) / temperature)  # noqa: E731
    reference = KNeighborsClassifier(9, metric="cosine", weights=weights, algorithm="brute").fit(train, labels)
    np.testing.assert_array_equal(
        knn_predict(train, labels, features, k=9, temperature=temperature).numpy(), reference.predict(features)
    )


def test_low_temperature_does_not_overflow_and_is_the_nearest_neighbour() -> None:
    train, labels = clusters(200, 4, seed=1)
    features, _ = clusters(50, 4, seed=2)
    nearest = knn_predict(train, labels, features, k=1)
    assert torch.equal(knn_predict(train, labels, features, k=20, temperature=1e-4), nearest)


def test_a_draw_goes_to_the_class_with_the_nearer_neighbour() -> None:
    angles = torch.tensor([0.30, 0.10, 0.20, 0.40])  # nearest: class 1, then 2, then 0, then 1
    train = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 1, 2, 0])
    query = torch.tensor([[1.0, 0.0]])
    assert knn_predict(train, labels, query, k=3).tolist() == [1]
    assert knn_predict(train, labels, query, k=4).tolist() == [0]  # two against one and one: a majority
    assert knn_predict(train, torch.tensor([2, 1, 2, 1]), query, k=4).tolist() == [1]


def test_scale_of_the_features_does_not_matter() -> None:
    train, labels = clusters(100, 3, seed=1)
    features, _ = clusters(40, 3, seed=2)
    scaled = train * torch.rand(100, 1, generator=torch.Generator().manual_seed(3)).add(0.1)
    assert torch.equal(knn_predict(train, labels, features), knn_predict(scaled, labels, 100 * features))


def test_multilabel_scores_are_the_mean_of_the_neighbours_labels() -> None:
    train, numbers = clusters(120, 4, seed=1)
    labels = torch.nn.functional.one_hot(numbers, 6).clone()
    labels[:, 4] = (train[:, 0] > 0).long()  # column 5 is never positive
    features, truth_numbers = clusters(60, 4, seed=2)
    truth = torch.nn.functional.one_hot(truth_numbers, 6).clone()
    truth[:, 4] = (features[:, 0] > 0).long()
    similarity = torch.nn.functional.cosine_similarity(features[:, None], train[None], dim=2)
    expected = labels[similarity.topk(5).indices].float().mean(1)
    scores = knn_predict(train, labels, features, k=5, chunk=7)
    torch.testing.assert_close(scores, expected)
    result = knn_evaluate(train, labels, features, truth, k=5)
    y, s = truth.numpy(), expected.numpy()
    assert result["map_micro"] == pytest.approx(average_precision_score(y, s, average="micro"), abs=1e-5)
    macro = np.mean([average_precision_score(y[:, c], s[:, c]) for c in range(5)])
    assert result["map_macro"] == pytest.approx(macro, abs=1e-5)


def test_top1_over_the_whole_set() -> None:
    train, labels = clusters(300, 5, seed=1)
    features, truth = clusters(80, 5, seed=2)
    reference = KNeighborsClassifier(1, metric="cosine").fit(train, labels).score(features, truth)
    assert knn_evaluate(train, labels, features, truth, k=1, chunk=33)["top1"] == pytest.approx(reference)


def test_autocast_does_not_touch_the_similarities() -> None:
    generator = torch.Generator().manual_seed(0)
    train = torch.ones(50, 8) + 1e-2 * torch.randn(50, 8, generator=generator)  # similarities equal in bfloat16
    labels = torch.arange(50)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(knn_predict(train, labels, train, k=1), labels)


def test_wrong_input_is_named() -> None:
    train, labels = clusters(10, 2, seed=1)
    with pytest.raises(UserError, match="k: 11 neighbours asked for, but there are only 10"):
        knn_predict(train, labels, train, k=11)
    with pytest.raises(UserError, match="k: 0"):
        knn_predict(train, labels, train, k=0)
    with pytest.raises(UserError, match="temperature: 0"):
        knn_predict(train, labels, train, temperature=0.0)
    with pytest.raises(UserError, match="features"):
        knn_predict(train, labels, train[:, :3])
    with pytest.raises(UserError, match="labels"):
        knn_evaluate(train, labels, train, labels[:4])
    with pytest.raises(UserError, match="labels"):
        knn_evaluate(train, labels, train, labels[:, None])
