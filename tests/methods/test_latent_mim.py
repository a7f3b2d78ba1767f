"""LatentMIM against a restatement in plain formulas, and what its options do."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from xscale_lightning.data.bands import generic
from xscale_lightning.data.datamodule import Collate
from xscale_lightning.data.synthetic import SyntheticDataset
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.masking_gaps import jitter, take_patches
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.methods.latent_mim_options import Objective, Target
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig, parameter_groups
from xscale_lightning.schedules import Schedule

SMALL = {"decoder_dim": 16, "decoder_depth": 2, "decoder_heads": 2, "head_dim": 20}
CONSTRAINED = Objective(similarity_weight=0.3, similarity=Schedule("constant", 0.6, 0.6))


def make(bands=5, seed=0, **options) -> LatentMIM:
    torch.manual_seed(seed)
    backbone = BackboneConfig("vit_tiny_patch8", patch_size=4, dim=24, depth=2, num_heads=3, position="stretched")
    module = LatentMIM(bands=generic(bands), **{"backbone": backbone, **SMALL, **options})
    with torch.no_grad():  # nothing at zero or one, and a target that is not the student
        for p in module.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return module.double()


def data(bands=5, size=(12, 20), hidden=9):
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, bands, *size, generator=generator, dtype=torch.float64)
    count = size[0] * size[1] // 16
    order = torch.rand(3, count, generator=generator).argsort(1)
    return images, order[:, :4], order[:, 4 : 4 + hidden]


# ---- restatement: one image at a time, one head at a time -----------------------------------------------------------


def table(dim, rows, columns):
    def code(x):
        angles = [x / 10000 ** (4 * k / dim) for k in range(dim // 4)]
        return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]

    steps = [[i * n / (n - 1) for i in range(n)] for n in (rows, columns)]
    values = [code(x) + code(y) for y in steps[0] for x in steps[1]]
    return torch.tensor(values, dtype=torch.float64).float().double()


def norm(x, w, name, eps=1e-6):
    mean, var = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / (var + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def attention(q, k, v, heads):
    out = []
    for a, b, c in zip(q.chunk(heads, -1), k.chunk(heads, -1), v.chunk(heads, -1), strict=True):
        weights = torch.exp(a @ b.T / math.sqrt(a.shape[-1]))
        out.append(weights / weights.sum(-1, keepdim=True) @ c)
    return torch.cat(out, -1)


def mlp(x, w, name):
    return linear(gelu(linear(x, w, f"{name}.fc1")), w, f"{name}.fc2")


def encode(w, patches, places, positions):
    proj = w["backbone.patch_embed.proj.weight"].flatten(1)
    x = patches[places] @ proj.T + w["backbone.patch_embed.proj.bias"] + positions[places]
    x = torch.cat([w["backbone.cls_token"][0], x])
    for i in range(2):
        name = f"backbone.blocks.{i}"
        q, k, v = linear(norm(x, w, f"{name}.norm1"), w, f"{name}.attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, v, 3), w, f"{name}.attn.proj")
        x = x + mlp(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp")
    x = norm(x, w, "backbone.norm")
    for i in range(3):
        x = norm(linear(x, w, f"head.linear{i}"), w, f"head.norm{i}", 1e-5)
        x = gelu(x) if i < 2 else x
    return x


def decode(w, z, visible, hidden, positions):
    e = linear(z, w, "decoder.embed")
    near = torch.exp(positions[hidden] @ positions[visible].T / math.sqrt(16))
    x = w["decoder.mask_token"][0] + near / near.sum(1, keepdim=True) @ e[1:] + positions[hidden]
    x = torch.cat([w["decoder.cls_token"][0], x])
    context = torch.cat([e[:1], e[1:] + positions[visible]])
    for i in range(2):
        name = f"decoder.blocks.{i}"
        q, k, v = linear(norm(x, w, f"{name}.norm1"), w, f"{name}.self_attn.qkv").chunk(3, -1)
        x = x + linear(attention(q, k, v, 2), w, f"{name}.self_attn.proj")
        q = linear(norm(x, w, f"{name}.norm2q"), w, f"{name}.cross_attn.q_proj")
        k, v = linear(norm(context, w, f"{name}.norm2kv"), w, f"{name}.cross_attn.kv_proj").chunk(2, -1)
        x = x + linear(attention(q, k, v, 2), w, f"{name}.cross_attn.proj")
        x = x + mlp(norm(x, w, f"{name}.norm3"), w, f"{name}.mlp")
    return linear(norm(x, w, "decoder.norm"), w, "decoder.head")[1:]


def unit(x):
    return x / x.square().sum(-1, keepdim=True).sqrt()


def restated(w, images, visible, hidden, constrained, kind="patch_discrimination"):
    rows, columns = images.shape[2] // 4, images.shape[3] // 4
    teacher = {name.removeprefix("target.module."): p for name, p in w.items() if name.startswith("target.")}
    losses, similar = [], []
    for image, seen, gone in zip(images, visible, hidden, strict=True):
        patches = [
            image[:, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].flatten() for r in range(rows) for c in range(columns)
        ]
        z = encode(w, torch.stack(patches), seen, table(24, rows, columns))
        t = encode(teacher, torch.stack(patches), gone, table(24, rows, columns))[1:].detach()
        y = decode(w, z, seen, gone, table(16, rows, columns))
        similar.append([(unit(x) @ unit(x).T).mean() for x in (y, z[1:])])
        if kind == "norm_l2":
            losses.append((y - (t - t.mean(1, keepdim=True)) / (t.var(1, keepdim=True) + 1e-6).sqrt()).square().mean())
            continue
        u = unit((y - y.mean(0)) / (y.std(0) + 1e-4))
        chance = torch.exp(u @ unit(t).T / 0.2)
        losses.append(-2 * 0.2 * (chance.diagonal() / chance.sum(1)).log().mean())
    c = torch.stack([torch.stack(pair) for pair in similar]).mean(0)
    return torch.stack(losses).mean() + (0.3 * (c - 0.6).square().sum() if constrained else 0)


@pytest.mark.parametrize(
    ("objective", "kind"),
    [(Objective(), "patch_discrimination"), (CONSTRAINED, "patch_discrimination"), (Objective("norm_l2"), "norm_l2")],
)
def test_loss_and_gradients_are_those_of_the_formulas(objective, kind):
    module, (images, visible, hidden) = make(objective=objective), data()
    output = module.loss(images, visible, hidden)
    output.loss.backward()
    w = {name: p.detach().clone().requires_grad_() for name, p in module.state_dict().items()}
    expected = restated(w, images, visible, hidden, objective is CONSTRAINED, kind)
    expected.backward()
    assert abs(output.loss.item() - expected.item()) < 1e-12
    for name, p in module.named_parameters():
        if p.requires_grad:
            assert p.grad is not None and w[name].grad is not None, name
            assert (p.grad - w[name].grad).abs().max() < 1e-12, name
    assert all(p.grad is None for p in module.target.parameters())


# ---- what is seen by whom -------------------------------------------------------------------------------------------


def test_a_step_takes_jittered_patches_and_hides_the_rest():
    module = make(gap=0.5, mask_ratio=0.7)  # cells of 4 + 2 pixels
    images = torch.randn(2, 5, 12, 31, dtype=torch.float64)
    torch.manual_seed(3)
    offsets, noise = torch.rand(2, 2, 10), torch.rand(2, 10)
    torch.manual_seed(3)
    loss = module.step({"image": images}).loss
    order = noise.argsort(1)
    cut = take_patches(images, 4, 2, jitter(offsets, 2))
    assert loss == module.loss(cut, order[:, :3], order[:, 3:]).loss
    assert module.token_grid(12, 31) == (1, 2, 5)
    module.predict_ratio = 0.5
    torch.manual_seed(3)
    assert module.step({"image": images}).loss == module.loss(cut, order[:, :3], order[:, 3:7]).loss


@pytest.mark.parametrize("size", [(6, 15), (24, 30), (24, 62)])
def test_finer_images_that_nobody_asked_for_are_left_alone(size):
    """Alone on paired data: the views have resized the image, and not `image_hr`."""
    module = make(gap=0.5, mask_ratio=0.7)
    batch = {"image": torch.randn(2, 5, 12, 31, dtype=torch.float64)}
    losses = []
    for finer in ({}, {"image_hr": torch.randn(2, 5, *size, dtype=torch.float64)}):
        torch.manual_seed(3)
        output = module.step({**batch, **finer})
        losses.append(output.loss)
        assert "image_hr" not in output.encoded
    assert torch.equal(*losses)


def test_student_and_target_see_their_own_patches_alone():
    images, visible, hidden = data(hidden=11)
    spots = torch.zeros(3, 15, dtype=torch.float64).scatter(1, visible, 1.0).reshape(3, 1, 3, 5)
    spots = spots.repeat_interleave(4, 2).repeat_interleave(4, 3) > 0  # the pixels of visible patches
    module = make()
    seen = module.encode_kept(images, visible)
    assert torch.equal(seen.kept, visible)
    assert torch.equal(module.encode_kept(images.where(spots, 7.0), visible).x, seen.x)
    elsewhere = images.where(~spots, 7.0)
    assert torch.equal(module.targets(elsewhere, hidden), module.targets(images, hidden))
    module.target_tokens = "all"
    assert not torch.allclose(module.targets(elsewhere, hidden), module.targets(images, hidden))
    (student,) = module.loss(images, visible, hidden).student
    assert torch.equal(student.x, seen.x) and student.x.requires_grad


def test_shallow_targets_are_patch_embeddings_or_early_blocks():
    images, _, hidden = data()
    flat = images.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(3, 15, -1)
    module = make(target=Target(depth=0))
    proj = module.target.module.backbone.patch_embed.proj
    embedded = flat @ proj.weight.flatten(1).T + proj.bias
    assert torch.allclose(module.targets(images, hidden), embedded.gather(1, hidden[..., None].expand(-1, -1, 24)))
    module = make(target=Target(depth=1, tokens="all"))
    backbone = module.target.module.backbone
    first = backbone.blocks[0](backbone.embed(images).x)[:, 1:]
    assert torch.allclose(module.targets(images, hidden), first.gather(1, hidden[..., None].expand(-1, -1, 24)))


def test_every_option_reaches_the_loss():
    images, visible, hidden = data()
    plain = make().loss(images, visible, hidden).loss.item()
    for options in (
        {"objective": Objective(temperature=0.1)},
        {"objective": Objective(standardize=False)},
        {"objective": Objective(negatives="batch")},
        {"objective": Objective(kind="norm_l2")},
        {"objective": CONSTRAINED},
        {"target": Target(depth=1)},
        {"target": Target(tokens="all")},
    ):
        assert abs(make(**options).loss(images, visible, hidden).loss.item() - plain) > 1e-6, options


def test_gsd_positions_know_of_the_gaps():
    backbone = BackboneConfig("vit_tiny_patch8", patch_size=4, dim=24, depth=2, num_heads=3, position="gsd")
    module = make(backbone=backbone, gap=0.5, mask_ratio=0.5)
    seen = []
    module.backbone.positions.register_forward_pre_hook(lambda *a: seen.append(a[2]["gsd"]), with_kwargs=True)
    images, gsd = torch.randn(2, 5, 12, 18, dtype=torch.float64), torch.tensor([10.0, 4.0])
    module.step({"image": images, "gsd": gsd})
    assert torch.equal(seen[0], 1.5 * gsd)
    module.features({"image": images[:, :, :, :16], "gsd": gsd})
    assert torch.equal(seen[-1], gsd)


# ---- target network, optimizer --------------------------------------------------------------------------------------


def fit(module, accumulate=1):
    images = SyntheticDataset(torch.zeros(5), torch.ones(5), (16, 24), 8, classes=2, seed=0)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(
        max_epochs=1, devices=1, enable_model_summary=False, accumulate_grad_batches=accumulate, **options
    )
    trainer.fit(module, DataLoader(images, batch_size=2, collate_fn=Collate(10.0)))
    assert trainer.global_step == 4 // accumulate


def test_the_target_moves_after_real_steps_alone():
    module = make(
        views=Views(scale=(1.0, 1.0)), mask_ratio=0.5, target=Target(Schedule("constant", 0.75, 0.75))
    ).float()
    student, target = module._student[0], module.target.module
    history = []
    batch = {"image": torch.randn(2, 5, 16, 24)}
    before = [p.clone() for p in target.parameters()]
    module.step(batch).loss.backward()
    assert all(torch.equal(a, b) for a, b in zip(before, target.parameters(), strict=True))
    module.on_train_batch_end = lambda *_: history.append((student.head.linear0.weight.detach().clone(),
                                                           target.head.linear0.weight.clone()))  # fmt: skip
    expected = target.head.linear0.weight.clone()
    fit(module, accumulate=2)
    for i, (online, slow) in enumerate(history):
        expected = 0.75 * expected + 0.25 * online if i % 2 else expected
        assert torch.allclose(slow, expected, atol=1e-6)
    assert module.target.moves == 2 and not torch.equal(history[0][0], history[1][0])


def test_a_frozen_target_stays():
    module = make(
        views=Views(scale=(1.0, 1.0)), mask_ratio=0.5, target=Target(Schedule("constant", 1.0, 1.0), 0)
    ).float()
    before = [p.clone() for p in module.target.parameters()]
    student = module.backbone.patch_embed.proj.weight.detach().clone()
    fit(module)
    assert all(torch.equal(a, b) for a, b in zip(before, module.target.parameters(), strict=True))
    assert not torch.equal(student, module.backbone.patch_embed.proj.weight)


def test_weight_decay_is_that_of_the_published_code():
    module = make(optimizer=OptimizerConfig())
    groups = parameter_groups(module, undecayed=module.undecayed)
    decayed = {name for group in groups if group["decay"] for name in group["names"]}
    assert {"backbone.cls_token", "decoder.mask_token", "decoder.cls_token", "head.linear0.weight"} <= decayed
    for name in ("backbone.patch_embed.proj.weight", "decoder.embed.weight"):
        assert name not in decayed
    assert not any(name.startswith("target.") for group in groups for name in group["names"])


def test_the_similarity_that_is_asked_for_follows_the_schedule():
    module, (images, visible, hidden) = make(objective=Objective(similarity_weight=1.0)), data()
    output = module.loss(images, visible, hidden)
    c = torch.stack([output.logs["similarity_prediction"], output.logs["similarity_visible"]])
    rest = output.loss - output.logs["patch_discrimination"]
    assert torch.allclose(rest, (c - 0.75).square().sum())
    module.plan = SimpleNamespace(total_steps=0)
    assert module.value("similarity") == pytest.approx(0.75) and not module.sample_wise
    assert module._schedules["similarity"](10, 10) == pytest.approx(0.25)


# ---- wrong input ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio must be in \[0, 1\), got 1.0"),
        ({"gap": -0.5}, "gap must be 0 or more, got -0.5"),
        ({"predict_ratio": 0.0}, r"predict_ratio must be in \(0, 1\], got 0.0"),
        ({"target": Target(depth=2)}, "target.depth 2 must be below the 2 blocks"),
        ({"decoder_heads": 3}, "decoder width 16 is not divisible by its 3 heads"),
        ({"decoder_depth": 0}, "decoder width, depth and heads must be at least 1, got 16, 0 and 2"),
        ({"head_dim": 0}, "head_dim must be at least 1 and head_layers 0 or more, got 0 and 3"),
        (
            {"backbone": BackboneConfig("spectral_vit_tiny_cube3_patch8", depth=1), "bands": 6},
            "takes patches of all bands",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_wrong_parts_are_refused():
    with pytest.raises(UserError, match=r"objective\.temperature must be finite and above 0"):
        Objective(temperature=0.0)
    with pytest.raises(UserError, match="similarity_weight must be finite, 0 or more; got -1"):
        Objective(similarity_weight=-1.0)
    with pytest.raises(UserError, match=r"target.momentum must stay in \[0, 1\], got 0.9 to 1.1"):
        Target(momentum=Schedule("linear", 0.9, 1.1))
    with pytest.raises(UserError, match=r"target\.depth must be 0 or more"):
        Target(depth=-1)


@pytest.mark.parametrize(
    ("options", "size", "message"),
    [
        ({}, (4, 40), "an image of 4 x 40 pixels has no room for a patch of 4 pixels and a gap of 1"),
        ({}, (10, 20), "mask_ratio 0.897 leaves none of the 8 tokens visible"),
        ({}, (5, 5), "needs three patches, .* image of 5 x 5 pixels has 1: take larger images"),
        ({"mask_ratio": 0.1}, (10, 20), "leave 1 of the 8 patches of an image of 10 x 20 pixels to predict"),
        ({"predict_ratio": 0.05}, (20, 20), "predict_ratio 0.05 leave 1 of the 16 patches"),
        ({"gap": 0.0}, (10, 20), "patch size 4 does not divide the image of 10 x 20 pixels"),
    ],
)
def test_images_that_are_too_small_are_refused(options, size, message):
    with pytest.raises(UserError, match=message):
        make(**options).check_size(*size)


def test_images_that_features_cannot_cut_are_refused():
    module = make(views=Views(size=35))
    bands = generic(5)
    module.check_data(SimpleNamespace(bands=bands, image_size=(24, 28)), fitting=True)
    assert module.num_tokens == 7 * 7 + 1
    with pytest.raises(UserError, match="does not divide the image of 26 x 28 pixels"):
        module.check_data(SimpleNamespace(bands=bands, image_size=(26, 28)), fitting=True)
