"""I-JEPA against a second statement of the paper with explicit loops; its target network; what is refused."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from xscale_lightning.data.bands import generic
from xscale_lightning.data.datamodule import Collate
from xscale_lightning.data.synthetic import SyntheticDataset
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.masking_blocks import BlockMasks, Blocks
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig, Plan, parameter_groups
from xscale_lightning.schedules import Schedule

BANDS, PATCH, GRID, HEADS, DIM, NARROW = 4, 8, (2, 3), 3, 24, 12
PLACES = GRID[0] * GRID[1]
SMALL = BackboneConfig("vit_tiny_patch8", dim=DIM, depth=2, num_heads=HEADS, class_token=False)
# Two contexts of two images, of different lengths, and three target blocks of two tokens.
CONTEXTS = [[4, 0, 2], [1], [5, 3, 0, 1], [2, 3, 4]]
MIXED = [[4, 0], [5, 3, 0, 1], [1], [2, 3, 4]]  # sorting these and sorting back are two permutations
TARGETS = torch.tensor([[[3, 5], [0, 4]], [[1, 2], [2, 5]], [[0, 1], [1, 2]]])


def make(**options) -> IJEPA:
    """A small I-JEPA in float64 whose weights are sines of their index; the target is not the student."""
    model = IJEPA(
        bands=generic(BANDS),
        views=Views(scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        **{"backbone": SMALL, "predictor": PredictorConfig(NARROW, 2), **options},
    ).double()
    with torch.no_grad():
        for number, (name, p) in enumerate(model.named_parameters()):
            wave = torch.sin(0.37 * torch.arange(p.numel(), dtype=torch.float64) ** 1.3 + number).view(p.shape)
            if p.ndim == 1:
                p.copy_(0.1 * wave + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                p.copy_(1.2 * wave / math.sqrt(p[0].numel() if p[0].numel() > 1 else 1))
    return model


def pictures(count: int = 2) -> Tensor:
    sizes = (count, BANDS, GRID[0] * PATCH, GRID[1] * PATCH)
    b, c, y, x = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in sizes), indexing="ij")
    return torch.sin(0.3 * x + 0.5 * y + c + 2 * b) + 0.3 * torch.cos(0.05 * x * y * (1 + c))


def position(dim: int, place: int) -> Tensor:
    row, column = divmod(place, GRID[1])
    quarter = [1 / 10000 ** (k / (dim // 4)) for k in range(dim // 4)]
    parts = [f(at * omega) for at in (column, row) for f in (math.sin, math.cos) for omega in quarter]
    return torch.tensor(parts, dtype=torch.float64).float().double()  # published tables are float32


def block(w: dict[str, Tensor], prefix: str, x: Tensor) -> Tensor:
    """Pre-norm transformer block on one sequence `[N, D]`."""
    dim = x.shape[-1]
    h = F.layer_norm(x, (dim,), w[f"{prefix}.norm1.weight"], w[f"{prefix}.norm1.bias"], 1e-6)
    qkv = h @ w[f"{prefix}.attn.qkv.weight"].T + w[f"{prefix}.attn.qkv.bias"]
    out = []
    for head in range(HEADS):
        width = dim // HEADS
        q, k, v = (qkv[:, part * dim + head * width : part * dim + (head + 1) * width] for part in range(3))
        weights = torch.exp(q @ k.T / math.sqrt(width))
        out.append(weights / weights.sum(-1, keepdim=True) @ v)
    x = x + torch.cat(out, -1) @ w[f"{prefix}.attn.proj.weight"].T + w[f"{prefix}.attn.proj.bias"]
    h = F.layer_norm(x, (dim,), w[f"{prefix}.norm2.weight"], w[f"{prefix}.norm2.bias"], 1e-6)
    h = h @ w[f"{prefix}.mlp.fc1.weight"].T + w[f"{prefix}.mlp.fc1.bias"]
    h = 0.5 * h * (1 + torch.erf(h / math.sqrt(2)))
    return x + h @ w[f"{prefix}.mlp.fc2.weight"].T + w[f"{prefix}.mlp.fc2.bias"]


def encode(w: dict[str, Tensor], prefix: str, image: Tensor, places: list[int]) -> Tensor:
    rows = []
    for place in places:
        row, column = divmod(place, GRID[1])
        cut = image[:, row * PATCH : (row + 1) * PATCH, column * PATCH : (column + 1) * PATCH]
        kernel, bias = w[f"{prefix}.patch_embed.proj.weight"], w[f"{prefix}.patch_embed.proj.bias"]
        rows.append((kernel * cut).sum((1, 2, 3)) + bias + position(DIM, place))
    x = torch.stack(rows)
    for i in range(2):
        x = block(w, f"{prefix}.blocks.{i}", x)
    return F.layer_norm(x, (DIM,), w[f"{prefix}.norm.weight"], w[f"{prefix}.norm.bias"], 1e-6)


def reference(w: dict[str, Tensor], images: Tensor, contexts: list[list[int]], targets: Tensor) -> Tensor:
    """The loss, one pair of a target block and a context at a time."""
    terms = []
    for i, places in enumerate(contexts):
        image = images[i % len(images)]
        seen = encode(w, "backbone", image, places) @ w["predictor.embed.weight"].T + w["predictor.embed.bias"]
        seen = seen + torch.stack([position(NARROW, place) for place in places])
        whole = encode(w, "target.module", image, list(range(PLACES))).detach()
        mean, var = whole.mean(1, keepdim=True), whole.var(1, correction=0, keepdim=True)
        whole = (whole - mean) / torch.sqrt(var + 1e-5)
        for wanted in targets[:, i % len(images)].tolist():
            masks = torch.stack([w["predictor.mask_token"][0, 0] + position(NARROW, place) for place in wanted])
            x = torch.cat([seen, masks])
            for k in range(2):
                x = block(w, f"predictor.blocks.{k}", x)
            x = F.layer_norm(x, (NARROW,), w["predictor.norm.weight"], w["predictor.norm.bias"], 1e-6)
            y = x[len(places) :] @ w["predictor.proj.weight"].T + w["predictor.proj.bias"]
            for at, place in enumerate(wanted):
                for difference in (y[at] - whole[place]).abs():
                    terms.append(0.5 * difference**2 if difference < 1 else difference - 0.5)
    return torch.stack(terms).mean()


@pytest.mark.parametrize("contexts", [CONTEXTS, [[first, 5] for first in range(4)], CONTEXTS[:2], MIXED])
def test_loss_and_gradients_agree_with_the_restatement(contexts):
    model = make()
    blocks = Blocks.of([torch.tensor(row) for row in contexts], TARGETS, PLACES)
    ours = model.loss(pictures(), blocks).loss
    ours.backward()
    w = {name: p.detach().clone().requires_grad_(p.requires_grad) for name, p in model.named_parameters()}
    theirs = reference(w, pictures(), contexts, TARGETS)
    theirs.backward()
    assert abs(ours.item() - theirs.item()) < 1e-12
    for name, p in model.named_parameters():
        assert (p.grad is None) == name.startswith("target."), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-8, atol=1e-12, msg=name)


def test_packed_and_dense_contexts_give_the_same_encoding():
    model = make()
    rows = [torch.tensor(row) for row in CONTEXTS]
    together = model.encode_context(pictures(), Blocks.of(rows, TARGETS, PLACES))
    parts, order = together.split([1, 3, 3, 4]), [1, 0, 3, 2]  # shortest first
    for part, i in zip(parts, order, strict=True):
        alone = Blocks.of([rows[i]], TARGETS[:, :1], PLACES)
        assert alone.kept is not None
        torch.testing.assert_close(part, model.encode_context(pictures()[i % 2 : i % 2 + 1], alone))


def test_tokens_for_add_ons_are_as_wide_as_the_longest_of_their_context():
    model = make()
    blocks = Blocks.of([torch.tensor(row) for row in MIXED], TARGETS, PLACES)
    rows = model.encode_context(pictures(), blocks).split(blocks.lengths)
    seen = model.loss(pictures(), blocks).student
    assert [tokens.lengths for tokens in seen] == [(2, 4), (1, 3)]
    for c, tokens in enumerate(seen):
        assert tokens.x.shape == (2, max(tokens.lengths), DIM) and tokens.kept.shape == tokens.x.shape[:2]
        for b, length in enumerate(tokens.lengths):
            assert tokens.kept[b, :length].tolist() == MIXED[2 * c + b]
            assert torch.equal(tokens.x[b, :length], rows[blocks.order[2 * c + b]])
            assert not tokens.x[b, length:].any()


def test_weight_decay_is_that_of_the_published_code():
    """Matrices and the mask token are decayed; biases and norms are not."""
    model = make()
    groups = parameter_groups(model, undecayed=model.undecayed)
    for group in groups:
        assert all(group["decay"] != ("norm" in name or name.endswith("bias")) for name in group["names"])
    assert "predictor.mask_token" in {name for group in groups if group["decay"] for name in group["names"]}


def test_gsd_positions_reach_encoder_and_predictor():
    model = make(backbone=replace(SMALL, position="gsd"))
    blocks = Blocks.of([torch.tensor(row) for row in CONTEXTS], TARGETS, PLACES)
    plain = make().loss(pictures(), blocks).loss
    ten, mixed = (model.loss(pictures(), blocks, torch.tensor(gsd)).loss for gsd in ([10.0, 10.0], [10.0, 5.0]))
    torch.testing.assert_close(ten, plain, rtol=1e-6, atol=1e-6)
    assert abs(mixed - ten) > 1e-5


def test_features_are_those_of_the_target_or_the_student():
    batch = {"image": pictures()}
    target, student = make(), make(features_from="student")
    for model, encoder in ((target, target.target.module), (student, student.backbone)):
        torch.testing.assert_close(model.features(batch), encoder(pictures()).x.mean(1).float())
    assert not torch.allclose(target.features(batch), student.features(batch))


def trained(
    accumulate: int = 1, momentum: float = 0.9, last: float | None = None
) -> tuple[IJEPA, list[dict[str, Tensor]]]:
    """Two micro-batches of training; the target's weights after each."""
    torch.manual_seed(0)
    model = IJEPA(
        bands=generic(3),
        backbone=SMALL,
        predictor=PredictorConfig(NARROW, 1),
        ema_momentum=Schedule("linear", momentum, momentum if last is None else last),
        optimizer=OptimizerConfig(lr=0.1),
        views=Views(scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=False, rot90=False),
    )
    seen: list[dict[str, Tensor]] = []

    def keep(*_: object) -> None:
        seen.append({name: p.clone() for name, p in model.target.module.named_parameters()})

    keep()
    model.on_train_batch_end = keep  # type: ignore[method-assign]
    data = SyntheticDataset(torch.tensor(model.bands.means), torch.tensor(model.bands.stds), (32, 48), 8, 4, 0)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(max_epochs=1, accelerator="cpu", devices=1, accumulate_grad_batches=accumulate, **quiet)
    trainer.fit(model, DataLoader(data, batch_size=4, collate_fn=Collate(10.0)))
    return model, seen


def test_the_target_moves_only_after_a_real_optimizer_step():
    before, first, second = trained(accumulate=2)[1]
    assert all(torch.equal(before[n], first[n]) for n in before)  # half a step
    assert any(not torch.equal(first[n], second[n]) for n in first)
    model, (before, _, last) = trained(momentum=0.0)
    assert all(torch.equal(p, last[n]) for n, p in model.backbone.named_parameters())  # follows at once
    assert any(not torch.equal(before[n], last[n]) for n in before)
    assert all(torch.equal(states[n], before[n]) for states in trained(momentum=1.0)[1] for n in states)


def test_the_momentum_of_an_update_is_that_of_its_step():
    model, (_, first, second) = trained(momentum=0.0, last=1.0)  # 0 and 0.5
    for name, p in model.backbone.named_parameters():
        torch.testing.assert_close(second[name], 0.5 * first[name] + 0.5 * p)


def test_the_schedules_are_the_published_ones():
    """Learning rate, weight decay and momentum of updates 1, 200, ... of 300 epochs of 10 iterations."""
    config = OptimizerConfig(
        lr=1e-3, scale_lr=False, warmup_lr=2e-4, min_lr=1e-6, weight_decay=0.04, final_weight_decay=0.4, first_step=1
    )
    plan, momentum = Plan(3000, 400, 1e-3, config), Schedule("linear", 0.996, 1.0)
    golden = {
        1: (2.02e-4, 0.0400001, 0.996),
        200: (6.0e-4, 0.0439334, 0.99626533),
        400: (1e-3, 0.0555618, 0.996532),
        1000: (8.743811e-4, 0.13, 0.997332),
        2000: (3.233749e-4, 0.31, 0.99866533),
        3000: (1e-6, 0.4, 0.99999867),
    }
    for number, (lr, decay, ema) in golden.items():
        assert abs(plan.lr(number - 1) - lr) < 1e-10 and abs(plan.weight_decay(number - 1) - decay) < 1e-7
        assert abs(momentum(number - 1, 3000) - ema) < 1e-8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"backbone": replace(SMALL, class_token=True)},
            "a class token is in every sequence: set backbone.class_token",
        ),
        (
            {"backbone": replace(SMALL, drop_path=0.1)},
            "drop_path would drop all of them at once: set backbone.drop_path",
        ),
        ({"backbone": BackboneConfig("timm:vit_tiny_patch16_224")}, "cannot pack: take a vit_. backbone"),
        ({"predictor": PredictorConfig(16, 1)}, "predictor.dim 16 is not divisible by its 3 heads"),
        ({"ema_momentum": Schedule("linear", 0.9, 1.1)}, "ema_momentum must be in .0, 1., got 0.9 and 1.1"),
    ],
)
def test_what_is_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_sizes_of_the_predictor_are_checked():
    for options, message in (
        ({"dim": 10}, "multiple of 4"),
        ({"depth": 0}, "predictor.depth must be at least 1"),
        ({"mlp_ratio": 0.0}, "predictor.mlp_ratio 0.0 leaves its MLPs no width"),
    ):
        with pytest.raises(UserError, match=message):
            PredictorConfig(**options)


def test_images_without_room_for_blocks_are_refused_before_the_first_step():
    with pytest.raises(UserError, match="masks: on a grid of 1 x 1 tokens"):
        make().check_size(PATCH, PATCH)
    make().check_size(4 * PATCH, 6 * PATCH)


def test_other_samplers_take_class_tokens_and_timm():
    masks = BlockMasks("balanced")
    for backbone in (replace(SMALL, class_token=True), BackboneConfig("timm:vit_tiny_patch16_224")):
        model = make(backbone=backbone, masks=masks)
        assert not model.sample_wise
        images = torch.randn(2, BANDS, 64, 96, dtype=torch.float64)
        assert model.step({"image": images}).loss.isfinite()
