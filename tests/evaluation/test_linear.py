import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.linear import LinearRecipe, fit_linear, logistic_regression


def clusters(n: int, classes: int, seed: int, noise: float = 1.5) -> tuple[Tensor, Tensor]:
    centres = torch.randn(classes, 12, generator=torch.Generator().manual_seed(0))
    draws = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (n,), generator=draws)
    spread = torch.linspace(0.1, 30, 12)  # features of very different scale, as an encoder's are
    return (centres[labels] + noise * torch.randn(n, 12, generator=draws)) * spread + 5, labels


def several(n: int, seed: int) -> tuple[Tensor, Tensor]:
    x, labels = clusters(n, 4, seed)
    hot = torch.nn.functional.one_hot(labels, 5)
    hot[:, 3] |= (x[:, 0] > 5).long()
    return x, hot  # label 4: nothing has it


@pytest.mark.parametrize("classes", [2, 5])
@pytest.mark.parametrize("c", [1e-3, 0.1, 10.0])
def test_agrees_with_scikit_learn(classes: int, c: float) -> None:
    x, y = clusters(240, classes, 1)
    asked, _ = clusters(60, classes, 2)
    scaler = StandardScaler().fit(x.double())
    reference = LogisticRegression(C=c, tol=1e-10, max_iter=10_000).fit(scaler.transform(x.double()), y)
    weight, bias = logistic_regression(torch.tensor(scaler.transform(x.double())), y, classes, c)
    if classes == 2:  # scikit-learn has the second class's alone
        weight, bias = weight[1:], bias[1:]
    np.testing.assert_allclose(weight.numpy(), reference.coef_, atol=1e-4)
    np.testing.assert_allclose(bias.numpy(), reference.intercept_, atol=1e-4)
    head = fit_linear(x, y, classes, LinearRecipe(c=[c])).head
    assert head.weight.dtype == torch.float64
    expected = reference.predict_proba(scaler.transform(asked.double()))
    np.testing.assert_allclose(head.probabilities(asked).numpy(), expected, atol=1e-4)


def test_several_labels_are_scikit_learns_logistic_regressions() -> None:
    x, y = several(240, 1)
    asked, _ = several(60, 2)
    scaler = StandardScaler().fit(x.double())
    found = fit_linear(x, y, 5, LinearRecipe(c=[0.1])).head.probabilities(asked)
    for k in range(4):
        reference = LogisticRegression(C=0.1, tol=1e-10, max_iter=10_000).fit(scaler.transform(x.double()), y[:, k])
        expected = reference.predict_proba(scaler.transform(asked.double()))[:, 1]
        np.testing.assert_allclose(found[:, k].numpy(), expected, atol=1e-4)
    assert found[:, 4].unique().tolist() == pytest.approx([0.5 / 241])


def test_what_is_best_on_the_selection_is_chosen_and_a_path_ends_where_each_alone_does() -> None:
    x, y = clusters(60, 4, 1, noise=3.0)
    val, truth = clusters(200, 4, 2, noise=3.0)
    recipe = LinearRecipe(c=[1e-6, 1e-2, 1e4])
    found = fit_linear(x, y, 4, recipe, (val, truth))
    alone = {c: fit_linear(x, y, 4, LinearRecipe(c=[c])).head for c in recipe.c}
    assert found.swept == pytest.approx({c: head.score(val, truth) for c, head in alone.items()}, abs=0.006)
    assert found.chosen == max(sorted(found.swept), key=lambda c: found.swept[c])
    torch.testing.assert_close(found.head.weight, alone[found.chosen].weight, atol=1e-3, rtol=1e-3)
    assert len(set(found.swept.values())) > 1  # or nothing was to be chosen


def test_equal_scores_choose_the_smallest() -> None:
    x, y = clusters(80, 3, 1, noise=0.01)
    assert fit_linear(x, y, 3, LinearRecipe(c=[10.0, 0.1, 1.0]), (x, y)).chosen == 0.1


@pytest.mark.parametrize("solver", ["lbfgs", "sgd"])
def test_without_a_selection_a_fifth_is_held_out_and_all_are_trained_on(solver: str) -> None:
    x, y = clusters(200, 4, 1)
    recipe = LinearRecipe(solver=solver, c=[1e-2, 1.0], lr=[0.01, 0.1], epochs=10)
    found = fit_linear(x, y, 4, recipe)
    assert all(math.isclose(score * 40, round(score * 40)) for score in found.swept.values())
    again = fit_linear(x, y, 4, LinearRecipe(solver=solver, c=[found.chosen], lr=[found.chosen], epochs=10))
    torch.testing.assert_close(found.head.weight, again.head.weight)


@pytest.mark.parametrize("kind", ["classes", "labels"])
def test_sgd_comes_near_the_best_c_and_every_rate_is_a_run_of_its_own(kind: str) -> None:
    (x, y), (val, truth) = (
        (clusters(300, 4, 1), clusters(200, 4, 2)) if kind == "classes" else map(several, (300, 200), (1, 2))
    )
    number = 4 if kind == "classes" else 5
    recipe = LinearRecipe(solver="sgd", lr=[0.001, 0.1], epochs=30, batch_size=64)
    found = fit_linear(x, y, number, recipe, (val, truth))
    assert (
        abs(max(found.swept.values()) - fit_linear(x, y, number, LinearRecipe(), (val, truth)).head.score(val, truth))
        < 0.03
    )
    alone = fit_linear(x, y, number, LinearRecipe(solver="sgd", lr=[found.chosen], epochs=30, batch_size=64))
    torch.testing.assert_close(found.head.weight, alone.head.weight, atol=1e-5, rtol=1e-4)
    assert found.head.weight.dtype == torch.float32


def test_absent_and_single_classes_are_never_and_always_predicted() -> None:
    x, y = clusters(100, 3, 1)
    head = fit_linear(x, 2 * y, 6, LinearRecipe(c=[1.0])).head  # classes 1, 3 and 5 are absent
    assert set(head.probabilities(x).argmax(1).tolist()) == {0, 2, 4}
    assert head.probabilities(x)[:, [1, 3, 5]].abs().max() == 0
    only = fit_linear(x, torch.full((100,), 3), 6, LinearRecipe(c=[1.0])).head
    assert only.probabilities(x)[:, 3].min() == 1


def test_constant_features_and_inference_mode_do_no_harm() -> None:
    x, y = clusters(100, 3, 1)
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        padded = torch.cat([x, torch.full((100, 2), 7.0)], dim=1)
        found = fit_linear(padded, y, 3, LinearRecipe(c=[0.1])).head
    expected = fit_linear(x, y, 3, LinearRecipe(c=[0.1])).head
    torch.testing.assert_close(found.probabilities(padded), expected.probabilities(x), atol=1e-6, rtol=1e-6)


def test_wrong_input_is_named() -> None:
    x, y = clusters(10, 2, 1)
    for name, value in (("c", []), ("c", [0.0]), ("lr", [-1.0]), ("epochs", 0), ("max_iter", 0), ("batch_size", 0)):
        with pytest.raises(UserError, match=f"linear.{name}"):
            LinearRecipe(**{name: value})
    with pytest.raises(UserError, match="features"):
        fit_linear(x, y[:4], 2)
    with pytest.raises(UserError, match="features"):
        fit_linear(x[:1], y[:1], 2)
