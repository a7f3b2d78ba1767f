"""Every registered backbone keeps the contract."""

import pytest
import timm
import torch

from xscale_lightning.errors import UserError
from xscale_lightning.masking import random_mask
from xscale_lightning.models.blocks import set_checkpointing
from xscale_lightning.models.registry import SIZES, create_backbone, list_backbones, register_backbone
from xscale_lightning.models.tokenizers import patchify, unpatchify


def build(name, in_chans=3, **options):
    torch.manual_seed(0)
    return create_backbone(name, in_chans, **options).eval()


@pytest.mark.parametrize("name", [n for n in list_backbones() if "tiny" in n])
@pytest.mark.parametrize("in_chans", [1, 3, 4, 13])
def test_shapes_at_any_size_and_band_count(name, in_chans):
    groups = -(-in_chans // 3) if name.startswith("spectral_") else 1
    backbone = build(name, in_chans, depth=1, **({"pad": "edge"} if name.startswith("spectral_") else {}))
    patch = backbone.patch_size
    images = torch.randn(2, in_chans, 2 * patch, 3 * patch)
    tokens = backbone(images)
    assert tokens.grid == (groups, 2, 3) and tokens.patches.shape == (2, 6 * groups, backbone.num_features)
    assert tokens.feature_map().shape == (2, groups * backbone.num_features, 2, 3)
    assert backbone.pool(tokens).shape == (2, backbone.num_features)


@pytest.mark.parametrize("size", SIZES)
def test_sizes_are_timms(size):
    with torch.device("meta"):
        ours = create_backbone(f"vit_{size}_patch16", 3, position="learned")
        name = "vit_huge_patch14_224" if size == "huge" else f"vit_{size}_patch16_224"
        theirs = timm.create_model(name, num_classes=0)
    blocks = {n: p.shape for n, p in ours.named_parameters() if n.startswith("blocks")}
    assert blocks == {n: p.shape for n, p in theirs.named_parameters() if n.startswith("blocks")}


@pytest.mark.parametrize("options", [{}, {"position": "learned", "image_size": 32}, {"class_token": False}])
def test_keeping_tokens_equals_choosing_embedded_ones(options):
    backbone = build("vit_tiny_patch8", depth=2, **options).double()
    images = torch.randn(2, 3, 32, 24, dtype=torch.float64)
    kept, _ = random_mask(torch.rand(2, 12), 0.5)
    direct = backbone(images, keep=kept)
    chosen = backbone.encode(backbone.embed(images).keep(kept))
    assert (direct.x - chosen.x).abs().max() < 1e-12
    assert torch.equal(direct.kept, kept)


def test_gsd_positions_change_the_output_and_need_gsd():
    backbone = build("vit_tiny_patch8", depth=1, position="gsd")
    images = torch.randn(2, 3, 32, 32)
    near, far = (backbone.pool(backbone(images, gsd=torch.full((2,), g))) for g in (10.0, 40.0))
    assert (near - far).abs().max() > 1e-3
    with pytest.raises(UserError, match="gsd"):
        backbone(images)


def test_packed_encoding_equals_separate_encoding():
    backbone = build("vit_tiny_patch8", depth=2).double()
    a, b = torch.randn(2, 3, 32, 32).double(), torch.randn(3, 3, 16, 40).double()
    packed = backbone.encode_together([backbone.embed(a), backbone.embed(b)])
    for tokens, images in zip(packed, (a, b), strict=True):
        assert (tokens.x - backbone(images).x).abs().max() < 1e-12


def test_timm_weights_load_by_name_and_give_equal_features():
    torch.manual_seed(0)
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=5, img_size=64).eval()
    torch.nn.init.normal_(theirs.pos_embed)
    ours = build("vit_tiny_patch16", position="learned", image_size=64)
    unused = ours.load_timm_state_dict(theirs.state_dict())
    assert sorted(unused) == ["head.bias", "head.weight"]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert (ours(images).x - theirs.forward_features(images)).abs().max() < 1e-5


def test_timm_weights_of_another_size_are_refused():
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=0, in_chans=4)
    with pytest.raises(UserError, match="do not fit"):
        build("vit_tiny_patch16", position="learned").load_timm_state_dict(theirs.state_dict())


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2"])
def test_timm_backbone_passes_through(name):
    torch.manual_seed(0)
    backbone = build(f"timm:{name}", in_chans=4)
    patch = backbone.patch_size
    images = torch.randn(2, 4, 2 * patch, 3 * patch)
    tokens = backbone(images)
    assert tokens.patches.shape == (2, 6, backbone.num_features)
    with torch.no_grad():
        assert (tokens.x - backbone.model.forward_features(images)).abs().max() < 1e-5
    kept = torch.tensor([[0, 5], [3, 1]])
    assert backbone(images, keep=kept).patches.shape == (2, 2, backbone.num_features)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit_smal_patch16", {}, "vit_small_patch16"),
        ("timm:resnet18", {}, "ResNet"),
        ("timm:vit_nonsense", {}, "cannot be built"),
        ("vit_tiny_patch8", {"pretrained": True}, "no weights"),
        ("vit_tiny_patch8", {"pool": "cls", "class_token": False}, "class token"),
        ("vit_tiny_patch8", {"depth": 0}, "at least 1"),
        ("vit_tiny_patch8", {"width": 3}, "width"),
        ("vit_tiny_patch14", {"position": "learned", "image_size": 100}, "14"),
    ],
)
def test_wrong_names_and_options(name, options, message):
    with pytest.raises(UserError, match=message):
        create_backbone(name, 3, **options)


def test_wrong_images():
    backbone = build("vit_tiny_patch8", depth=1)
    with pytest.raises(UserError, match="8 does not divide the image of 30 x 32"):
        backbone(torch.zeros(1, 3, 30, 32))
    with pytest.raises(UserError, match="3 bands"):
        backbone(torch.zeros(1, 4, 32, 32))


def test_registering_a_backbone():
    @register_backbone("test_narrow_vit")
    def narrow(in_chans, config):
        return create_backbone("vit_tiny_patch8", in_chans, depth=config.depth or 1)

    assert build("test_narrow_vit", 2).depth == 1
    with pytest.raises(UserError, match="taken"):
        register_backbone("test_narrow_vit")(narrow)


def test_layer_index_runs_from_embedding_to_norm():
    backbone = build("vit_tiny_patch8", depth=3)
    index = {name: backbone.layer_index(name) for name, _ in backbone.named_parameters()}
    assert index["patch_embed.proj.weight"] == index["cls_token"] == 0
    assert index["blocks.0.attn.qkv.weight"] == 1 and index["blocks.2.mlp.fc1.bias"] == 3
    assert index["norm.weight"] == 4


def test_patchify_orders_and_inverse():
    images = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    patches = patchify(images, 2)
    assert torch.equal(unpatchify(patches, 2, (2, 3)), images)
    row_column_channel = images[0, :, 2:4, 2:4].permute(1, 2, 0)
    assert torch.equal(patches[0, 4].reshape(2, 2, 3), row_column_channel)
    kernel_order = patchify(images, 2, channels_last=False)
    assert torch.equal(kernel_order[0, 4].reshape(3, 2, 2), images[0, :, 2:4, 2:4])


def test_activation_checkpointing_gives_the_same_gradients_and_keeps_less():
    torch.manual_seed(0)
    vit = build("vit_tiny_patch8", 4, depth=3, drop_path=0.5).train().double()
    images = torch.randn(3, 4, 16, 24, dtype=torch.float64)
    gradients, kept = [], []
    for on in (False, True):
        set_checkpointing(vit, on)
        vit.zero_grad()
        saved: list[int] = []
        torch.manual_seed(1)  # stochastic depth draws the same in both passes
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):  # noqa: B023
            loss = vit(images).x.square().sum()
        loss.backward()
        gradients.append([p.grad.clone() for p in vit.parameters() if p.grad is not None])
        kept.append(sum(saved))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert kept[1] < 0.2 * kept[0]
