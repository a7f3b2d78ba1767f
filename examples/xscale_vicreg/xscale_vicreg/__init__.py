"""A plug-in for xscale_lightning: VICReg, a tokenizer by spectral region with its backbone, haze, chips of NumPy."""

from xscale_vicreg.chips import NumpyChips
from xscale_vicreg.haze import Haze
from xscale_vicreg.method import VICReg
from xscale_vicreg.regions import RegionEmbed, region_vit_tiny

__all__ = ["Haze", "NumpyChips", "RegionEmbed", "VICReg", "region_vit_tiny"]
