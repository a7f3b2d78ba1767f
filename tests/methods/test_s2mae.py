"""S2MAE against a restatement of the specification, and what it adds."""

import warnings
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.data.bands import SENSORS, generic
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.masking import random_mask
from xscale_lightning.methods.s2mae import PAPER, S2MAE
from xscale_lightning.models.tokens import gather
from xscale_lightning.readers.spectralgpt import to_published

SMALL = replace(PAPER, name="spectral_vit_tiny_cube3_patch8", dim=24, num_heads=3, depth=2, image_size=16)


def make(bands: int = 12, **options) -> S2MAE:
    torch.manual_seed(0)
    backbone = replace(SMALL, **options.pop("backbone", {}))
    sizes = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return S2MAE(bands=generic(bands), backbone=backbone, **{**sizes, **options})


# ---- the arithmetic, restated from the specification --------------------------------------------------------------


def block(x: Tensor, w: dict[str, Tensor], name: str, heads: int) -> Tensor:
    batch, length, dim = x.shape

    def norm(y, n):
        return F.layer_norm(y, (dim,), w[f"{name}{n}.weight"], w[f"{name}{n}.bias"], 1e-6)

    def linear(y, n):
        return y @ w[f"{name}{n}.weight"].T + w[f"{name}{n}.bias"]

    y = norm(x, "norm1")
    q, k, v = (linear(y, f"attn.{n}").view(batch, length, heads, -1).transpose(1, 2) for n in "qkv")
    weights = (q @ k.transpose(-1, -2) * (dim // heads) ** -0.5).softmax(-1)
    x = x + linear((weights @ v).transpose(1, 2).reshape(batch, length, dim), "attn.proj")
    return x + linear(F.gelu(linear(norm(x, "norm2"), "mlp.fc1")), "mlp.fc2")


def restated(module: S2MAE, images: Tensor, kept: Tensor, heads: int, decoder_heads: int) -> tuple[Tensor, Tensor]:
    """Prediction and target of every token, in the authors' order of operations."""
    w = {name: value.detach() for name, value in to_published(module).items()}
    kernel = w["patch_embed.proj.weight"]
    depth, patch = kernel.shape[2], kernel.shape[3]
    x = F.conv3d(images[:, None], kernel, w["patch_embed.proj.bias"], stride=(depth, patch, patch))
    batch, dim, groups = x.shape[:3]
    x = x.flatten(2).transpose(1, 2)
    places = w["pos_embed_spatial"].shape[1]
    x = x + w["pos_embed_spatial"].repeat(1, groups, 1) + w["pos_embed_temporal"].repeat_interleave(places, 1)
    x = torch.stack([row[ids] for row, ids in zip(x, kept, strict=True)])
    for i in range(len(module.backbone.blocks)):
        x = block(x, w, f"blocks.{i}.", heads)
    x = F.layer_norm(x, (dim,), w["norm.weight"], w["norm.bias"], 1e-6)
    x = x @ w["decoder_embed.weight"].T + w["decoder_embed.bias"]
    full = w["mask_token"].expand(batch, groups * places, -1).clone()
    for row, ids, tokens in zip(full, kept, x, strict=True):
        row[ids] = tokens
    full = full + w["decoder_pos_embed_spatial"].repeat(1, groups, 1)
    full = full + w["decoder_pos_embed_temporal"].repeat_interleave(places, 1)
    for i in range(len(module.decoder.blocks)):
        full = block(full, w, f"decoder_blocks.{i}.", decoder_heads)
    full = F.layer_norm(full, full.shape[-1:], w["decoder_norm.weight"], w["decoder_norm.bias"], 1e-6)
    prediction = full @ w["decoder_pred.weight"].T + w["decoder_pred.bias"]
    target = torch.stack(
        [
            images[:, g : g + depth, i : i + patch, j : j + patch].flatten(1)
            for g in range(0, images.shape[1], depth)
            for i in range(0, images.shape[2], patch)
            for j in range(0, images.shape[3], patch)
        ],
        dim=1,
    )
    return prediction, target


@pytest.mark.parametrize(
    ("bands", "cube", "patch", "ratio", "norm_pix"),
    [(12, 3, 8, 0.5, False), (10, 2, 4, 0.9, True), (4, 4, 8, 0.75, False), (3, 1, 4, 0.25, True)],
)
def test_the_losses_are_those_of_the_specification(bands, cube, patch, ratio, norm_pix):
    options = {"mask_ratio": ratio, "norm_pix_loss": norm_pix, "backbone": {"cube_depth": cube, "patch_size": patch}}
    module = make(bands, spectral_loss="sum", **options).double()
    plain = make(bands, **options).double()
    for p, q in zip(module.parameters(), plain.parameters(), strict=True):
        torch.nn.init.normal_(p, std=0.3)
        q.data.copy_(p)
    images = torch.rand(2, bands, 16, 16, dtype=torch.float64)
    noise = torch.rand(2, bands // cube * (16 // patch) ** 2)
    kept, hidden = random_mask(noise, ratio)
    prediction, target = restated(module, images, kept, heads=3, decoder_heads=2)
    wanted = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    squared = (prediction - (wanted if norm_pix else target)).square().mean(-1)
    mask = torch.ones_like(squared).scatter(1, kept, 0)
    token = (squared * mask).sum() / mask.sum()
    groups = (bands // cube, (16 // patch) ** 2)
    spectral = (prediction.unflatten(1, groups).sum(1) - target.unflatten(1, groups).sum(1)).square().mean()
    output = module.loss(images, kept, hidden)
    torch.testing.assert_close(output.logs["reconstruction"], token, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.logs["spectral"], spectral, rtol=1e-12, atol=0)
    torch.testing.assert_close(output.loss, token + spectral, rtol=1e-12, atol=0)
    torch.testing.assert_close(plain.loss(images, kept, hidden).loss, token, rtol=1e-12, atol=0)


def test_the_earlier_spectral_term():
    module = make(spectral_loss="means").double()
    images, noise = torch.rand(2, 12, 16, 16, dtype=torch.float64), torch.rand(2, 16)
    kept, hidden = random_mask(noise, 0.5)
    prediction, target = restated(module, images, kept, heads=3, decoder_heads=2)
    error = (prediction - target).unflatten(1, (4, 4))
    expected = 0.5 * error.mean(1).square().mean() + 0.5 * error.mean(2).square().mean()
    torch.testing.assert_close(module.loss(images, kept, hidden).logs["spectral"], expected, rtol=1e-10, atol=0)


# ---- any band count -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm_pix", [False, True])
@pytest.mark.parametrize("spectral", ["none", "sum"])
def test_padding_takes_no_part_in_the_loss(norm_pix, spectral):
    module = make(10, norm_pix_loss=norm_pix, spectral_loss=spectral, backbone={"pad": "zero"}).double()
    images = torch.rand(2, 10, 16, 16, dtype=torch.float64)
    kept, hidden = random_mask(torch.rand(2, 16), 0.9)  # one cube is visible
    output = module.loss(images, kept, hidden)
    output.loss.backward()
    assert output.loss > 0
    values = module.decoder.pred.bias.grad.view(3, 64).abs().sum(1)
    assert (values > 0).all(), "the first cubes have three real bands"
    last = module.cubes.real_values(torch.tensor([3]))[0]
    assert last.sum() == 64
    only_last = torch.tensor([[12, 13], [14, 15]])  # cubes of the padded group
    module.zero_grad()
    module.spectral_loss = "none"
    module.loss(images, kept, only_last).loss.backward()
    values = module.decoder.pred.bias.grad.view(3, 64).abs().sum(1)
    assert values[0] > 0 and values[1:].eq(0).all(), "padded values have a gradient"
    if spectral == "sum":
        for name in ("sum", "means"):
            module.spectral_loss = name
            whole, cubes = module.decoder(module.backbone(images, keep=kept)), module.cubes.cut(images)
            error = (whole - cubes).unflatten(1, (4, 4)).detach()  # [B, G, N, V]
            error[:, -1, :, 64:] = 0  # the padded bands of the last group
            both = 0.5 * error.mean(1).square().mean() + 0.5 * error.mean(2).square().mean()
            expected = error.sum(1).square().mean() if name == "sum" else both
            found = module.loss(images, kept, hidden).logs["spectral"]
            torch.testing.assert_close(found.detach(), expected, rtol=1e-10, atol=0)
        module.spectral_loss = "none"
    if not norm_pix:
        tokens = module.backbone(images, keep=kept)
        prediction = module.decoder.forward_some(tokens, only_last)[..., :64]
        wanted = torch.stack([module.cubes.cut(images)[i, ids, :64] for i, ids in enumerate(only_last)])
        expected = (prediction - wanted).square().mean()
        torch.testing.assert_close(module.loss(images, kept, only_last).loss, expected, rtol=1e-12, atol=0)


def test_targets_per_cube_ignore_padding():
    module = make(10, norm_pix_loss=True, mask_ratio=0.5, backbone={"pad": "zero"})
    images = torch.rand(2, 10, 16, 16) + 5  # far from the zeros of the padding
    made = module.evaluate({"image": images * 100}, seed=0).reconstruction()
    prepared = module.prepare({"image": images * 100})["image"]
    band = prepared[:, 9].unflatten(2, (2, 8)).unflatten(1, (2, 8)).transpose(2, 3).flatten(3)  # [B, 2, 2, 64]
    put_back = made.prediction[:, 9].unflatten(2, (2, 8)).unflatten(1, (2, 8)).transpose(2, 3).flatten(3)
    spread = (put_back - band.mean(-1, keepdim=True)).abs().amax() / band.std(-1).mean()
    assert made.borrows and spread < 10, "the deviation of the padded cube includes its padding"


def test_a_share_of_the_hidden_cubes_is_decoded_alone():
    whole, some = make(mask_ratio=0.5), make(mask_ratio=0.5, predict_ratio=0.5)
    images = torch.rand(2, 12, 16, 16)
    kept, hidden = random_mask(torch.rand(2, 16), 0.5)
    part = hidden[:, :4]
    tokens = some.backbone(images, keep=kept)
    alone = some.decoder.forward_some(tokens, part)
    # The same numbers as a decoder over the whole grid whose attention cannot see the other hidden cubes.
    for sample in range(2):
        seen = torch.cat([kept[sample], part[sample]])
        x = some.decoder.fill(tokens)[sample : sample + 1, seen]
        for layer in some.decoder.blocks:
            x = layer(x)
        expected = some.decoder.pred(some.decoder.norm(x))[:, 8:]
        torch.testing.assert_close(alone[sample : sample + 1], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(whole.decoder.forward_some(tokens, hidden), whole.decoder(tokens, hidden))
    sizes = []
    some.decoder.blocks[0].register_forward_hook(lambda m, i, o: sizes.append(i[0].shape[1]))
    some.step({"image": images})
    assert sizes == [8 + 4], "the decoder saw cubes that it was not asked for"


@pytest.mark.parametrize("norm_pix", [False, True])
def test_pictures_of_a_decoder_trained_on_a_share(norm_pix):
    module = make(mask_ratio=0.5, predict_ratio=0.5, norm_pix_loss=norm_pix).double()
    torch.nn.init.normal_(module.decoder.pred.bias)
    sizes = []
    module.decoder.blocks[0].register_forward_hook(lambda m, i, o: sizes.append(i[0].shape[1]))
    images = torch.rand(2, 12, 16, 16, dtype=torch.float64)
    kept, hidden = random_mask(torch.rand(2, 16), 0.5)
    made = module.loss(images, kept, hidden[:, :4]).reconstruction()
    assert sizes == [12, 12, 12], "two turns of 8 visible and 4 hidden cubes after the step's own"
    torch.testing.assert_close(made.prediction[made.visible], images[made.visible])
    error = (made.prediction - images)[~made.visible].abs()
    assert error.numel() == images.numel() / 2 and (error > 1e-6).float().mean() > 0.99


def test_positions_by_wavelength_move_between_sensors():
    options = {"position": "learned", "spectral": "wavelength", "cube_depth": 1}
    sizes = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    sentinel = S2MAE(bands=SENSORS["sentinel2_l1c_12"], backbone=replace(SMALL, **options), **sizes)
    landsat = S2MAE(bands=SENSORS["landsat8"], backbone=replace(SMALL, **options), **sizes)
    landsat.load_state_dict(sentinel.state_dict())
    names = [band.name for band in landsat.bands.bands]
    batch = {"image": torch.rand(1, 12, 16, 16)}
    assert landsat.features({"image": batch["image"][:, : len(names)]}).shape == sentinel.features(batch).shape


# ---- scales -------------------------------------------------------------------------------------------------------


def test_min_max_is_per_image_and_band_before_the_crop():
    module = make(views=Views(size=16, scale=(0.2, 0.3), flip=False, rot90=False))
    raw = torch.randint(0, 10_000, (3, 12, 32, 32)).float()
    raw[0] *= 0.1
    prepared = module.prepare({"image": raw})["image"]
    assert prepared.amin((2, 3)).eq(0).all() and torch.allclose(prepared.amax((2, 3)), torch.ones(3, 12))
    expected = (raw[1, 4] - raw[1, 4].min()) / (raw[1, 4].max() - raw[1, 4].min() + 1e-10)
    assert torch.equal(prepared[1, 4], expected)
    torch.testing.assert_close(module.denormalise(prepared, raw), raw, rtol=1e-5, atol=1e-2)
    views = module.prepare({"image": raw}, augment=True)["image"]
    assert views.shape[-1] == 16 and (views.amax((2, 3)) - views.amin((2, 3))).min() < 0.999, "scaled after the crop"


def test_a_constant_band_is_said_and_makes_no_nan():
    module, raw = make(), torch.rand(2, 12, 16, 16)
    raw[:, 3] = 7.0
    with pytest.warns(UserWarning, match="nothing to learn of it: band4"):
        prepared = module.prepare({"image": raw}, augment=True)
    assert prepared["image"][:, 3].eq(0).all()
    assert module.step(prepared).loss.isfinite()
    raw[0, 5, 0, 0] = float("nan")
    with pytest.raises(UserError, match="band band6 of the first batch has values that are not finite"):
        make().prepare({"image": raw}, augment=True)


@pytest.mark.parametrize("normalize", ["minmax", "standardize", "none"])
@pytest.mark.parametrize("target", ["minmax", "standardize", "none"])
def test_the_target_may_have_another_scale_than_the_input(normalize, target):
    torch.manual_seed(0)
    bands = generic(12).with_statistics([3.0] * 12, [2.0] * 12)
    module = S2MAE(bands=bands, backbone=SMALL, normalize=normalize, target=target, decoder_dim=16, decoder_heads=2)
    raw = 3 + 2 * torch.randn(2, 12, 16, 16)
    low, high = raw.amin((2, 3), keepdim=True), raw.amax((2, 3), keepdim=True)
    scaled = {"minmax": (raw - low) / (high - low), "standardize": (raw - 3) / 2, "none": raw}
    batch = module.prepare({"image": raw})
    torch.testing.assert_close(batch["image"], scaled[normalize])
    torch.testing.assert_close(batch["image"] * batch["gain"] + batch["shift"], scaled[target], rtol=1e-4, atol=1e-5)
    torch.manual_seed(1)
    loss = module.step(batch).loss
    torch.manual_seed(1)
    kept, hidden = random_mask(torch.rand(2, 16), 0.9)
    wanted = module.cubes.cut(scaled[target]).gather(1, hidden[..., None].expand(-1, -1, 192))
    prediction = module.decoder(module.backbone(scaled[normalize], keep=kept), hidden)
    torch.testing.assert_close(loss, (prediction - wanted).square().mean(), rtol=1e-4, atol=1e-5)
    # A decoder that knows the target gives the input back, in the input's scale.
    cubes = module.cubes.cut(scaled[target])
    module.decoder.forward = lambda tokens, predict=None, gsd=None: cubes if predict is None else gather(cubes, predict)
    made = module.evaluate({"image": raw}, seed=0).reconstruction()
    torch.testing.assert_close(made.prediction, scaled[normalize], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(made.target, scaled[normalize], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("normalize", ["minmax", "standardize", "none"])
@pytest.mark.parametrize("target", [None, "minmax", "standardize"])
def test_a_constant_band_is_harmless_at_any_scale(normalize, target):
    bands = generic(12).with_statistics([1000.0] * 12, [300.0] * 12)
    module = S2MAE(bands=bands, backbone=SMALL, normalize=normalize, target=target, decoder_dim=16, decoder_heads=2)
    raw = 1000 + 300 * torch.randn(2, 12, 16, 16)
    usual = module.evaluate({"image": raw}, seed=0).loss
    raw[:, 4] = 1234.5
    output = module.evaluate({"image": raw}, seed=0)
    assert output.loss < 2 * usual
    # Some deviations of the record (300) in raw units, in which a constant band that is scaled by itself stays.
    assert output.reconstruction().prediction.abs().max() < 10 * 1234.5


def test_nothing_hidden_with_a_share_predicted():
    module = make(mask_ratio=0.0, predict_ratio=0.25)
    output = module.evaluate({"image": torch.rand(2, 12, 16, 16)}, seed=0)
    assert output.loss.isfinite() and output.reconstruction().visible.all()


def test_positions_follow_the_gsd():
    module = make(backbone={"position": "gsd"}, mask_ratio=0.5)
    images = torch.rand(2, 12, 16, 16)
    batches = [{"image": images, "gsd": torch.full((2,), gsd)} for gsd in (10.0, 3.0)]
    losses = [module.evaluate(batch, seed=0).loss for batch in batches]
    assert losses[0] != losses[1], "the gsd does not reach the positions"


def test_reconstructions_show_which_bands_were_seen():
    module = make(mask_ratio=0.75)
    made = module.evaluate({"image": torch.rand(2, 12, 16, 16)}, seed=0).reconstruction()
    cubes = made.visible.view(2, 4, 3, 2, 8, 2, 8)
    whole = cubes.float().mean((2, 4, 6))
    assert set(whole.unique().tolist()) == {0.0, 1.0} and whole.sum((1, 2, 3)).tolist() == [4, 4]
    assert not torch.equal(made.visible[:, 0], made.visible[:, 3]), "masks are drawn per band group"


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mask_ratio": 1.0}, "mask_ratio must be in"),
        ({"predict_ratio": 0.0}, "predict_ratio must be in"),
        ({"predict_ratio": 0.5, "spectral_loss": "sum"}, "needs every cube"),
        ({"backbone": {"name": "vit_tiny_patch8"}}, "has no spectral cubes"),
        ({"bands": 10}, "10 bands are not divisible by the cube depth 3"),
        ({"decoder_heads": 3}, "not divisible by its 3 heads"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_a_plain_backbone_is_refused_by_name():
    with pytest.raises(UserError, match="'vit_tiny_patch8' has none: take spectral_vit"):
        make(backbone={"name": "vit_tiny_patch8", "spectral": "sincos"})


def test_a_size_that_leaves_no_cube_visible():
    module = make(3)
    with pytest.raises(UserError, match="leaves none of the 4 tokens visible"):
        module.check_size(16, 16)
    with pytest.raises(UserError, match="patch size 8 does not divide"):
        module.check_size(20, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        module.check_size(64, 64)
