"""Every method passes the contract suite."""

from dataclasses import replace

import pytest

from xscale_lightning.data.scale_view import ScaleView
from xscale_lightning.masking_blocks import BlockMasks
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.methods.latent_mim_options import Objective, Target
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import PAPER, S2MAE
from xscale_lightning.methods.spatial_affinity import SpatialAffinity
from xscale_lightning.models.jepa_predictor import PredictorConfig
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.schedules import Schedule
from xscale_lightning.testing import check_method

SPECTRAL = replace(PAPER, name="spectral_vit_tiny_cube3_patch8", depth=2, pad="edge", image_size=32)
SMALL_DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}


@pytest.mark.parametrize("options", [{}, {"norm_pix_loss": True, "mask_ratio": 0.5}])
def test_mae_passes_the_contract_suite(options):
    check_method(MAE, **SMALL_DECODER, **options)


@pytest.mark.parametrize("options", [{}, {"scale_view": ScaleView(scale=(1.0, 1.0), sizes=[16, 32])}])
def test_cross_scale_mae_passes_the_contract_suite(options):
    check_method(CrossScaleMAE, **SMALL_DECODER, predictor_dim=16, **options)


@pytest.mark.parametrize("preset", ["published", "paper"])
def test_cross_scale_mae_as_published_passes_the_contract_suite(preset):
    backbone = BackboneConfig("vit_tiny_patch8", depth=2, image_size=32)
    options = {"recipe": Recipe(preset=preset), "backbone": backbone, "predictor_dim": 16}
    check_method(CrossScaleMAE, size=(32, 32), **SMALL_DECODER, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"spectral_loss": "sum"},
        {"norm_pix_loss": True, "mask_ratio": 0.5, "normalize": "standardize", "target": "minmax"},
        {"predict_ratio": 0.3},
    ],
)
def test_s2mae_passes_the_contract_suite(options):
    check_method(S2MAE, backbone=SPECTRAL, **SMALL_DECODER, **options)


@pytest.mark.parametrize("masks", [BlockMasks(), BlockMasks("balanced", contexts=2), BlockMasks("legacy", min_keep=1)])
def test_ijepa_passes_the_contract_suite(masks):
    backbone = BackboneConfig("vit_tiny_patch8", depth=2, class_token=False)
    check_method(IJEPA, backbone=backbone, predictor=PredictorConfig(48, 1), masks=masks)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gap": 0.0, "predict_ratio": 0.5, "objective": Objective(negatives="batch", similarity_weight=0.1)},
        {"head_layers": 0, "target": Target(Schedule("constant", 1.0, 1.0), depth=0, tokens="all")},
        {"objective": Objective("norm_l2"), "target": Target(depth=1)},
    ],
)
def test_latent_mim_passes_the_contract_suite(options):
    backbone = BackboneConfig("vit_tiny_patch8", depth=2, position="stretched")
    check_method(LatentMIM, backbone=backbone, **SMALL_DECODER, head_dim=32, **options)


AFFINE_HOSTS = {
    "ijepa": ({"predictor": {"dim": 48, "depth": 1}}, False, "sincos", "host"),
    "latent_mim": ({**SMALL_DECODER, "head_dim": 32}, True, "stretched", "host"),
    "mae": (SMALL_DECODER, True, "sincos", "own"),
}


@pytest.mark.parametrize("host", AFFINE_HOSTS)
def test_spatial_affinity_passes_the_contract_suite(host):
    host_args, class_token, position, teacher = AFFINE_HOSTS[host]
    backbone = BackboneConfig("vit_tiny_patch8", depth=2, class_token=class_token, position=position)
    options = {"host": host, "host_args": host_args, "teacher": teacher, "source": "interpolated", "warmup": 0.5}
    check_method(SpatialAffinity, backbone=backbone, **options)
