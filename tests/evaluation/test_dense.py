"""The dense linear probe against a plain restatement, torchmetrics and cases done by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.dense import (
    DenseHead,
    DenseRecipe,
    absent_classes,
    confusion_matrices,
    dense_scores,
    fit_dense_head,
)


def toy(count: int = 10, classes: int = 3, size: int = 8, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features `[N, 6, 4, 4]` from which a linear layer can read masks `[N, 8, 8]`; some pixels are ignored."""
    draws = torch.Generator().manual_seed(seed)
    tokens = torch.randint(classes, (count, 4, 4), generator=draws)
    directions = torch.eye(6)[:classes] * 3
    features = directions[tokens].permute(0, 3, 1, 2) + 0.1 * torch.randn(count, 6, 4, 4, generator=draws)
    masks = F.interpolate(tokens[:, None].float(), size=(size, size)).long()[:, 0]
    masks[torch.rand(masks.shape, generator=draws) < 0.1] = -1
    return features.contiguous(), masks


def plain(features, masks, classes, recipe) -> nn.Conv2d:
    """The protocol in torch's own parts: a 1 x 1 convolution, `interpolate`, `cross_entropy`."""
    draws = torch.Generator().manual_seed(recipe.seed)
    layer = nn.Conv2d(features.shape[1], classes, 1)
    with torch.no_grad():
        layer.weight.copy_(0.01 * torch.randn(classes, features.shape[1], generator=draws)[:, :, None, None])
        layer.bias.zero_()
    optimizer = torch.optim.AdamW(layer.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    weights = None if recipe.class_weights is None else torch.tensor(recipe.class_weights)
    steps, step = math.ceil(len(features) / recipe.batch_size), 0
    warmup, total = recipe.warmup_epochs * steps, recipe.epochs * steps
    for _ in range(recipe.epochs):
        for index in torch.randperm(len(features), generator=draws).split(recipe.batch_size):
            if recipe.min_lr is None:
                rate = recipe.lr
            elif step < warmup:
                rate = recipe.warmup_lr + (recipe.lr - recipe.warmup_lr) * step / warmup
            else:
                wave = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
                rate = recipe.min_lr + (recipe.lr - recipe.min_lr) * wave
            optimizer.param_groups[0]["lr"] = rate
            logits = F.interpolate(layer(features[index]), size=masks.shape[1:], mode="bilinear")
            loss = F.cross_entropy(logits, masks[index], weight=weights, ignore_index=-1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
    return layer


@pytest.mark.parametrize(
    "options", [{}, {"min_lr": None, "weight_decay": 0.1}, {"class_weights": [0.2, 0.3, 0.5], "seed": 3}]
)
@pytest.mark.parametrize("size", [8, 9])
def test_training_is_the_published_protocol(options, size):
    features, masks = toy(size=size)
    recipe = DenseRecipe(epochs=6, batch_size=4, warmup_epochs=2, lr=0.02, warmup_lr=0.002, **options)
    head, layer = fit_dense_head(features, masks, 3, recipe), plain(features, masks, 3, recipe)
    torch.testing.assert_close(head.weight, layer.weight.detach()[:, :, 0, 0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(head.bias, layer.bias.detach(), rtol=1e-4, atol=1e-5)
    assert float((head.weight - 0).abs().max()) > 0.05  # it moved
    logits = F.interpolate(layer(features), size=masks.shape[1:], mode="bilinear")
    assert torch.equal(head.predict(features, (size, size), chunk=3), logits.argmax(1))


def test_scores_are_torchmetrics_over_the_whole_set():
    features, masks = toy(count=7)
    draws = torch.Generator().manual_seed(5)
    head = DenseHead(torch.randn(3, 6, generator=draws), torch.zeros(3))
    confusion = confusion_matrices(head, features, masks, chunk=3)  # 3 + 3 + 1 images
    predicted = head.predict(features, (8, 8))
    jaccard = MulticlassJaccardIndex(3, average="none", ignore_index=-1)
    right = MulticlassAccuracy(3, average="micro", ignore_index=-1)
    scores = dense_scores(confusion)
    assert scores.iou == pytest.approx(jaccard(predicted, masks).tolist(), abs=1e-6)
    assert scores.miou == pytest.approx(float(jaccard(predicted, masks).mean()), abs=1e-6)
    assert scores.accuracy == pytest.approx(float(right(predicted, masks)), abs=1e-6)
    assert torch.equal(confusion, confusion_matrices(head, features, masks, chunk=64))
    # A mean over batches is another number, which is what the published code took for a while.
    batches = [dense_scores(part).miou for part in confusion.split(3)]
    assert abs(sum(batches) / len(batches) - scores.miou) > 1e-4


def test_scores_by_hand_leave_out_what_does_not_occur():
    head = DenseHead(torch.eye(4), torch.zeros(4))
    features = F.one_hot(torch.tensor([[[0, 0, 1, 1]], [[1, 1, 0, 2]]]), 4).permute(0, 3, 1, 2).float()
    masks = torch.tensor([[[0, 1, 1, -1]], [[1, 1, 1, 0]]])
    confusion = confusion_matrices(head, features, masks)
    assert confusion.sum(0).tolist() == [[1, 0, 1, 0], [2, 3, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    scores = dense_scores(confusion)
    assert scores.iou[:3] == pytest.approx([1 / 4, 3 / 5, 0.0])  # predicted though in no mask: counts as 0
    assert math.isnan(scores.iou[3])  # in neither: left out
    assert scores.miou == pytest.approx((1 / 4 + 3 / 5 + 0) / 3)
    assert scores.accuracy == pytest.approx(4 / 7)


def test_learns_what_is_separable_and_nothing_global_changes():
    features, masks = toy(count=30)
    asked, answers = toy(count=20, seed=1)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    recipe = DenseRecipe(epochs=30, batch_size=8, lr=0.05, warmup_epochs=3)
    with torch.no_grad():
        head = fit_dense_head(features, masks, 3, recipe)
        again = fit_dense_head(features, masks, 3, recipe)
        assert not torch.is_grad_enabled()
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(head.weight, again.weight) and torch.equal(head.bias, again.bias)
    assert dense_scores(confusion_matrices(head, asked, answers)).miou > 0.7  # edges between tokens stay blurred
    noise = torch.randn(asked.shape, generator=torch.Generator().manual_seed(0))
    assert dense_scores(confusion_matrices(head, noise, answers)).miou < 0.4


def test_trains_inside_inference_mode():
    features, masks = toy()
    with torch.inference_mode():
        head = fit_dense_head(features.clone(), masks.clone(), 3, DenseRecipe(epochs=2, warmup_epochs=1))
    expected = fit_dense_head(features, masks, 3, DenseRecipe(epochs=2, warmup_epochs=1))
    assert torch.equal(head.weight, expected.weight)


def test_images_without_a_counted_pixel_change_nothing():
    features, masks = toy(count=4)
    blank = torch.full_like(masks[:1], -1)
    recipe = DenseRecipe(epochs=3, batch_size=1, warmup_epochs=0)
    head = fit_dense_head(torch.cat([features, features[:1]]), torch.cat([masks, blank]), 3, recipe)
    assert bool(head.weight.isfinite().all())


def test_selection_keeps_the_best_epoch():
    features, masks = toy(count=20)
    wrong = torch.where(masks < 0, masks, (masks + 1) % 3)  # the better the layer, the worse it does here
    recipe = DenseRecipe(epochs=20, batch_size=8, lr=0.05, warmup_epochs=0)
    first = fit_dense_head(features, masks, 3, recipe, selection=(features, wrong))
    right = fit_dense_head(features, masks, 3, recipe, selection=(features, masks))

    def score(head):
        return dense_scores(confusion_matrices(head, features, masks)).miou

    assert score(first) < score(right)
    assert score(right) >= score(fit_dense_head(features, masks, 3, recipe))


def test_standardising_is_undone_in_the_layer():
    features, masks = toy(count=20)
    scaled = 100 * features + torch.arange(6.0).view(1, 6, 1, 1) * 50
    recipe = DenseRecipe(epochs=10, batch_size=8, lr=0.05, warmup_epochs=0, standardise=True)
    a, b = fit_dense_head(features, masks, 3, recipe), fit_dense_head(scaled, masks, 3, recipe)
    agree = a.predict(features, (8, 8)) == b.predict(scaled, (8, 8))
    assert float(agree.float().mean()) > 0.99


def test_classes_without_pixels_are_found():
    assert absent_classes(torch.tensor([[[0, -1, 2]]]), 4) == [1, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f, m: (f, m.where(m != 2, 5)), "label 5"),
        (lambda f, m: (f, torch.full_like(m, -1)), "all pixels of the training split are ignored"),
        (lambda f, m: (f[:3], m), r"\(3, 6, 4, 4\)"),
    ],
)
def test_masks_that_do_not_fit_are_refused(change, message):
    features, masks = change(*toy())
    with pytest.raises(UserError, match=message):
        fit_dense_head(features, masks, 3)


@pytest.mark.parametrize(
    "options",
    [{"epochs": 0}, {"batch_size": 0}, {"lr": 0}, {"warmup_epochs": 100}, {"class_weights": [1, math.nan]}],
)
def test_numbers_out_of_range_are_refused(options):
    (name,) = options
    with pytest.raises(UserError, match=f"dense.{name}"):
        DenseRecipe(**options)


def test_one_weight_per_class():
    with pytest.raises(UserError, match="2 weights for 3 classes"):
        fit_dense_head(*toy(), 3, DenseRecipe(class_weights=[1, 2]))
