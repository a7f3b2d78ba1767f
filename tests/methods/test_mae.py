"""MAE against a second statement of the paper, written here with explicit loops and torch.nn.functional alone."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.data.bands import generic
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.masking import random_mask
from xscale_lightning.methods.mae import MAE
from xscale_lightning.models.registry import BackboneConfig

BANDS, PATCH, GRID, HEADS, DECODER_HEADS = 4, 8, (2, 3), 3, 2
KEPT = torch.tensor([[4, 0, 2], [1, 5, 3]])
HIDDEN = torch.tensor([[3, 5, 1], [0, 4, 2]])


def make(norm_pix_loss: bool = False, **options) -> MAE:
    """A small MAE in float64 whose weights are sines of their index."""
    model = MAE(
        bands=generic(BANDS),
        backbone=BackboneConfig("vit_tiny_patch8", depth=2),
        views=Views(scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        norm_pix_loss=norm_pix_loss,
        **{"decoder_dim": 32, "decoder_depth": 2, "decoder_heads": DECODER_HEADS, **options},
    ).double()
    with torch.no_grad():
        for number, (name, p) in enumerate(model.named_parameters()):
            wave = torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) ** 1.3 + number).view(p.shape)
            if p.ndim == 1:
                p.copy_(0.1 * wave + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                p.copy_(1.2 * wave / math.sqrt(p[0].numel() if p[0].numel() > 1 else 1))
    return model


def pictures() -> Tensor:
    b, c, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in (2, BANDS, 16, 24)), indexing="ij")
    return torch.sin(0.3 * x + 0.5 * y + c + 2 * b) + 0.3 * torch.cos(0.05 * x * y * (1 + c))


def positions(dim: int) -> Tensor:
    """Row-major sin-cos table `[L, dim]`, one number at a time."""
    table = torch.zeros(GRID[0] * GRID[1], dim, dtype=torch.float64)
    quarter = dim // 4
    for row in range(GRID[0]):
        for column in range(GRID[1]):
            for k in range(quarter):
                omega = 1 / 10000 ** (k / quarter)
                values = (
                    math.sin(column * omega),
                    math.cos(column * omega),
                    math.sin(row * omega),
                    math.cos(row * omega),
                )
                for part, value in enumerate(values):
                    table[row * GRID[1] + column, part * quarter + k] = value
    return table.float().double()  # published tables are float32


def block(w: dict[str, Tensor], prefix: str, x: Tensor, heads: int) -> Tensor:
    """Pre-norm transformer block on `[B, N, D]`."""
    dim = x.shape[-1]
    h = F.layer_norm(x, (dim,), w[f"{prefix}.norm1.weight"], w[f"{prefix}.norm1.bias"], 1e-6)
    qkv = h @ w[f"{prefix}.attn.qkv.weight"].T + w[f"{prefix}.attn.qkv.bias"]
    out = []
    for head in range(heads):
        width = dim // heads
        q, k, v = (qkv[..., part * dim + head * width : part * dim + (head + 1) * width] for part in range(3))
        weights = torch.exp(torch.einsum("bnd,bmd->bnm", q, k) / math.sqrt(width))
        out.append(torch.einsum("bnm,bmd->bnd", weights / weights.sum(-1, keepdim=True), v))
    x = x + torch.cat(out, -1) @ w[f"{prefix}.attn.proj.weight"].T + w[f"{prefix}.attn.proj.bias"]
    h = F.layer_norm(x, (dim,), w[f"{prefix}.norm2.weight"], w[f"{prefix}.norm2.bias"], 1e-6)
    h = h @ w[f"{prefix}.mlp.fc1.weight"].T + w[f"{prefix}.mlp.fc1.bias"]
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return x + h @ w[f"{prefix}.mlp.fc2.weight"].T + w[f"{prefix}.mlp.fc2.bias"]


def patches_of(images: Tensor) -> Tensor:
    """`[B, L, p * p * C]` in the order (row, column, channel)."""
    rows = []
    for image in images:
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                cut = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
                rows.append(torch.stack([cut[:, y, x] for y in range(PATCH) for x in range(PATCH)]).flatten())
    return torch.stack(rows).view(len(images), GRID[0] * GRID[1], -1)


def reference(w: dict[str, Tensor], images: Tensor, norm_pix_loss: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, prediction of every patch and target, as the paper's section 3 says."""
    dim, length = w["backbone.cls_token"].shape[-1], GRID[0] * GRID[1]
    x = F.conv2d(images, w["backbone.patch_embed.proj.weight"], w["backbone.patch_embed.proj.bias"], stride=PATCH)
    x = x.flatten(2).transpose(1, 2) + positions(dim)
    x = torch.stack([torch.stack([x[b, i] for i in KEPT[b].tolist()]) for b in range(len(images))])
    x = torch.cat([w["backbone.cls_token"].expand(len(images), 1, dim), x], 1)
    for i in range(2):
        x = block(w, f"backbone.blocks.{i}", x, HEADS)
    x = F.layer_norm(x, (dim,), w["backbone.norm.weight"], w["backbone.norm.bias"], 1e-6)

    y = x @ w["decoder.embed.weight"].T + w["decoder.embed.bias"]
    table = positions(y.shape[-1])
    rows = []
    for b in range(len(images)):
        place = {index: 1 + n for n, index in enumerate(KEPT[b].tolist())}
        grid = [y[b, place[i]] if i in place else w["decoder.mask_token"][0, 0] for i in range(length)]
        rows.append(torch.stack([y[b, 0], *(token + table[i] for i, token in enumerate(grid))]))
    y = torch.stack(rows)
    for i in range(2):
        y = block(w, f"decoder.blocks.{i}", y, DECODER_HEADS)
    y = F.layer_norm(y, (y.shape[-1],), w["decoder.norm.weight"], w["decoder.norm.bias"], 1e-6)
    prediction = (y @ w["decoder.pred.weight"].T + w["decoder.pred.bias"])[:, 1:]

    target = patches_of(images)
    if norm_pix_loss:
        mean = target.mean(-1, keepdim=True)
        var = ((target - mean) ** 2).sum(-1, keepdim=True) / (target.shape[-1] - 1)
        target = (target - mean) / torch.sqrt(var + 1e-6)
    mask = torch.zeros(len(images), length, dtype=torch.float64)
    for b in range(len(images)):
        for i in HIDDEN[b].tolist():
            mask[b, i] = 1
    per_patch = ((prediction - target) ** 2).mean(-1)
    return (per_patch * mask).sum() / mask.sum(), prediction, target


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_loss_and_every_gradient_equal_the_paper(norm_pix_loss):
    model, images = make(norm_pix_loss), pictures()
    weights = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    expected, _, _ = reference(weights, images, norm_pix_loss)
    expected.backward()
    output = model.loss(images, KEPT, HIDDEN)
    output.loss.backward()
    torch.testing.assert_close(output.loss, expected, rtol=1e-12, atol=0)
    assert set(output.logs) == {"reconstruction"} and torch.equal(output.logs["reconstruction"], output.loss)
    for name, p in model.named_parameters():
        assert weights[name].grad.norm() > 1e-8, name  # the comparison means something
        torch.testing.assert_close(p.grad, weights[name].grad, rtol=1e-7, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("norm_pix_loss", [False, True])
def test_pictures_show_what_the_decoder_predicts(norm_pix_loss):
    model, images = make(norm_pix_loss), pictures()
    picture = model.loss(images, KEPT, HIDDEN).reconstruction()
    assert torch.equal(picture.target, images) and picture.visible.dtype is torch.bool
    prediction = reference(dict(model.named_parameters()), images, norm_pix_loss)[1]
    raw, shown, seen = patches_of(images), patches_of(picture.prediction), patches_of(picture.visible)
    for b in range(2):
        for i in range(6):
            visible = i in KEPT[b].tolist()
            assert bool(seen[b, i].all()) is visible and bool(seen[b, i].any()) is visible
            expected = prediction[b, i]
            if norm_pix_loss:
                expected = expected * (raw[b, i].var() + 1e-6).sqrt() + raw[b, i].mean()
            torch.testing.assert_close(shown[b, i], expected, rtol=1e-9, atol=1e-10)
    assert picture.borrows is norm_pix_loss


def test_only_hidden_patches_count():
    model, images = make(), pictures()
    with torch.no_grad():
        model.decoder.pred.weight.zero_()
        model.decoder.pred.bias.fill_(0.25)  # the prediction no longer depends on what the encoder sees
    hidden = torch.stack([patches_of(images)[b, i] for b in range(2) for i in HIDDEN[b].tolist()])
    picture = model.loss(images, KEPT, HIDDEN).reconstruction()
    torch.testing.assert_close(model.loss(images, KEPT, HIDDEN).loss, ((hidden - 0.25) ** 2).mean())
    other = torch.where(picture.visible, images + 5.0, images)
    torch.testing.assert_close(model.loss(other, KEPT, HIDDEN).loss, model.loss(images, KEPT, HIDDEN).loss)


def test_the_encoder_does_not_see_hidden_pixels():
    model, images = make(), pictures()
    first = model.loss(images, KEPT, HIDDEN).reconstruction()
    other = torch.where(first.visible, images, images.flip(0) + 3.0)
    second = model.loss(other, KEPT, HIDDEN).reconstruction()
    torch.testing.assert_close(second.prediction[~first.visible], first.prediction[~first.visible], rtol=0, atol=0)


@pytest.mark.parametrize("ratio", [0.5, 0.75])
def test_a_step_draws_one_mask_per_sample_from_the_global_generator(ratio):
    model, images = make(mask_ratio=ratio), pictures()
    torch.manual_seed(3)
    output = model.step({"image": images, "gsd": torch.ones(2)})
    torch.manual_seed(3)
    kept, hidden = random_mask(torch.rand(2, 6), ratio)
    torch.testing.assert_close(output.loss, model.loss(images, kept, hidden).loss, rtol=1e-12, atol=0)
    visible = patches_of(output.reconstruction().visible)[..., 0]
    assert visible.sum(1).tolist() == [int(6 * (1 - ratio))] * 2
    assert not torch.equal(visible[0], visible[1])


def test_ratio_zero_trains_or_is_refused():
    """With nothing hidden the mean over hidden patches is 0 / 0: it must not reach the weights."""
    try:
        loss = make(mask_ratio=0.0).step({"image": pictures()}).loss
    except UserError as error:
        assert "mask_ratio" in str(error)
    else:
        assert loss.isfinite()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"mask_ratio": -0.5}, r"mask_ratio must be in \[0, 1\), got -0.5"),
        ({"decoder_dim": 30, "decoder_heads": 4}, "decoder width 30 is not divisible by its 4 heads"),
        ({"decoder_dim": 18, "decoder_heads": 2}, "multiple of 4, got 18"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options).step({"image": pictures()})


def test_a_ratio_that_hides_all_is_refused_at_the_first_step():
    with pytest.raises(UserError, match=r"mask_ratio 0.9 leaves none of the 6 tokens visible"):
        make(mask_ratio=0.9).step({"image": pictures()})


def test_spectral_cubes_are_refused():
    with pytest.raises(
        UserError, match=r"cuts 4 spectral cubes at every place: take a vit_\* backbone, or method s2mae"
    ):
        MAE(bands=generic(12), backbone=BackboneConfig("spectral_vit_tiny_cube3_patch8", depth=1))
