"""The switches of Cross-Scale MAE: where the published code, the paper's figure and our comparisons differ."""

from dataclasses import dataclass, fields, replace
from typing import Literal, get_args

from xscale_lightning.data.scale_view import CropPer
from xscale_lightning.errors import UserError
from xscale_lightning.models.blocks import BlockNorm
from xscale_lightning.models.predictors import PredictorNorm
from xscale_lightning.models.registry import BackboneConfig

Preset = Literal["recommended", "published", "paper"]
Reduction = Literal["sum", "mean"]
Align = Literal["index", "ground"]


@dataclass(frozen=True)
class Recipe:
    """A preset, and switches that differ from it; a switch that is null is the preset's."""

    preset: Preset = "recommended"
    """`published`: what the authors' launch script runs; `paper`: the paper's figure where it differs from that code;
    `recommended`: as good as `paper` in one seed, and takes any grid (docs/methods/cross_scale_mae.md)."""
    block_norm: BlockNorm | None = None
    """LayerNorm before (`pre`) or after (`post`, as the published launch script builds it) attention and MLP."""
    norm_eps: float | None = None
    """Epsilon of these LayerNorms: 1e-5 in the published post-norm blocks, 1e-6 in the pre-norm ones."""
    encoder_norm: bool | None = None
    """Apply the LayerNorm after the encoder's last block (figure); the published code discards its result."""
    reconstruction: Reduction | None = None
    """L_re is the sum (code) or the mean (figure) of the two views' losses."""
    positive_in_denominator: bool | None = None
    """NT-Xent as in SimCLR; the published code leaves the positive out (decoupled)."""
    predictor_norm: PredictorNorm | None = None
    """Batch norm per patch position (`bn_position`, code; it ties the predictor to one grid), batch norm per hidden
    unit (`bn_channel`), or LayerNorm (`ln`)."""
    stop_gradient: bool | None = None
    """Keep L_cp from moving its target y_A."""
    crop_per: CropPer | None = None
    """One scale crop per `batch` (code) or per `sample`."""
    shared_mask: bool | None = None
    """The same mask for both views; the published trainer draws two."""
    align: Align | None = None
    """Token i of B predicts token i of A (`index`, code), or A at the same place on the ground (`ground`)."""

    def __post_init__(self) -> None:
        """Refuse values that a switch does not have."""
        for name, kind in CHOICES.items():
            value = getattr(self, name)
            if value not in get_args(kind) and (value is not None or name == "preset"):
                raise UserError(f"recipe.{name}: {value!r} is unknown; choose from {', '.join(get_args(kind))}.")
        if self.norm_eps is not None and not self.norm_eps > 0:
            raise UserError(f"recipe.norm_eps must be above 0, got {self.norm_eps}.")

    def resolve(self) -> "Recipe":
        """This recipe with every switch set."""
        given = {f.name: value for f in fields(self) if (value := getattr(self, f.name)) is not None}
        if self.block_norm is not None:  # published: another epsilon for each kind of block
            given.setdefault("norm_eps", 1e-5 if self.block_norm == "post" else 1e-6)
        return replace(PRESETS[self.preset], **given)

    def apply(self, backbone: BackboneConfig) -> BackboneConfig:
        """`backbone` with the norms of this (resolved) recipe.

        Raises:
            UserError: the backbone's configuration asks for others, or a timm backbone cannot have them.
        """
        wanted = {"block_norm": self.block_norm, "norm_eps": self.norm_eps, "final_norm": self.encoder_norm}
        own = [name for name, value in wanted.items() if value != getattr(BackboneConfig, name)]
        if backbone.name.startswith("timm:") and own:
            raise UserError(
                "timm backbones are pre-norm with a final norm: use recipe.preset recommended, or vit_* "
                f"(recipe.preset {self.preset}, {own[0]} {wanted[own[0]]}, backbone.name {backbone.name})."
            )
        for name, value in wanted.items():
            asked = getattr(backbone, name)
            if asked not in (value, getattr(BackboneConfig, name)):
                switch = "encoder_norm" if name == "final_norm" else name
                raise UserError(f"backbone.{name} is {asked} and the recipe's {value}: set recipe.{switch} instead.")
        return replace(backbone, **wanted)


CHOICES = {
    "preset": Preset,
    "block_norm": BlockNorm,
    "reconstruction": Reduction,
    "predictor_norm": PredictorNorm,
    "crop_per": CropPer,
    "align": Align,
}
PUBLISHED = Recipe(
    preset="published",
    block_norm="post",
    norm_eps=1e-5,
    encoder_norm=False,
    reconstruction="sum",
    positive_in_denominator=False,
    predictor_norm="bn_position",
    stop_gradient=False,
    crop_per="batch",
    shared_mask=False,
    align="index",
)
PRESETS: dict[Preset, Recipe] = {
    "published": PUBLISHED,
    "paper": replace(
        PUBLISHED, preset="paper", block_norm="pre", norm_eps=1e-6, encoder_norm=True, reconstruction="mean"
    ),
    "recommended": Recipe(
        preset="recommended",
        block_norm="pre",
        norm_eps=1e-6,
        encoder_norm=True,
        reconstruction="mean",
        positive_in_denominator=False,
        predictor_norm="ln",
        stop_gradient=True,
        crop_per="sample",
        shared_mask=False,
        align="ground",
    ),
}
