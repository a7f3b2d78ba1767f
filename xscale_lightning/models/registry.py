"""Backbones by name: `create_backbone("vit_small_patch8", in_chans=13)`, `timm:NAME`, and your own."""

import difflib
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

from xscale_lightning.errors import UserError
from xscale_lightning.models.blocks import MAX_DEPTH, BlockNorm
from xscale_lightning.models.cubes import CubeEmbed, Pad
from xscale_lightning.models.spectral_vit import Spectral, SpectralViT, cube_positions
from xscale_lightning.models.timm_vit import TimmViT
from xscale_lightning.models.vit import Encoder, Pool, Position, ViT


@dataclass
class BackboneConfig:
    """The encoder, by name and options."""

    name: str = "vit_small_patch16"
    """Registered name (`xscale backbones` lists them), `timm:NAME`, or `package.module:NAME`, which first imports the
    module that registers NAME."""
    position: Position = "sincos"
    """`sincos` (fixed, MAE), `gsd` (fixed, scaled by metres per pixel), `stretched` (fixed, LatentMIM: n coordinates
    from 0 to n) or `learned` (a table that resizes)."""
    image_size: int = 224
    """Pixels per side that a learned position table is made for; other positions do not need it."""
    class_token: bool = True
    """Prepend a class token."""
    patch_size: int | None = None
    """Pixels per side of a patch, when another than the name's."""
    dim: int | None = None
    """Width, when another than the name's."""
    depth: int | None = None
    """Number of blocks, when another than the name's."""
    num_heads: int | None = None
    """Number of attention heads, when another than the name's."""
    mlp_ratio: float = 4.0
    """Width of the MLPs over that of the blocks."""
    block_norm: BlockNorm = "pre"
    """LayerNorm before (`pre`) or after (`post`) attention and MLP of every block."""
    norm_eps: float = 1e-6
    """Epsilon of the blocks' LayerNorms."""
    final_norm_eps: float = 1e-6
    """Epsilon of the LayerNorm after the last block, in the encoder and in S2MAE's decoder."""
    final_norm: bool = True
    """Apply the LayerNorm after the last block; without, it stays in checkpoints as a frozen, unused parameter."""
    drop_path: float = 0.0
    """Stochastic depth rate of the last block."""
    pool: Pool = "mean"
    """One vector per image: `mean` of the patch tokens or the `cls` token."""
    reference_gsd: float = 10.0
    """Metres per pixel at which `gsd` positions equal plain sin-cos."""
    cube_depth: int | None = None
    """Bands per token of a `spectral_vit_*` backbone, when another than the name's."""
    pad: Pad | None = None
    """What fills the last cube of a `spectral_vit_*` backbone: the `mean` of all bands, the last band again (`edge`) or
    `zero`; null refuses bands that do not fill it."""
    spectral: Spectral = "sincos"
    """Spectral positions of a `spectral_vit_*` backbone: `learned` (one vector per group), `sincos` (of the group's
    number), `joint` (one sin-cos over space and spectrum) or `wavelength` (a learned curve that all sensors share)."""
    wavelengths: list[float | None] | None = None
    """Centre wavelength of every band in micrometres; null takes the band record's."""
    pretrained: bool = False
    """Load timm's weights (`timm:` names only; downloads them)."""

    def __post_init__(self) -> None:
        """Refuse values that no backbone can have."""
        for name in ("patch_size", "dim", "depth", "num_heads", "cube_depth"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"backbone.{name} must be at least 1, got {value}.")
        if self.depth is not None and self.depth > MAX_DEPTH:
            raise UserError(f"backbone.depth must be at most {MAX_DEPTH}, got {self.depth}.")
        for name in ("mlp_ratio", "norm_eps", "final_norm_eps"):
            if not getattr(self, name) > 0:
                raise UserError(f"backbone.{name} must be above 0, got {getattr(self, name)}.")
        if not 0 <= self.drop_path < 1:
            raise UserError(f"backbone.drop_path must be in [0, 1), got {self.drop_path}.")

    def build(self, in_chans: int, wavelengths: Sequence[float | None] | None = None) -> Encoder:
        """The encoder for `in_chans` bands, whose `wavelengths` in micrometres count unless the options name others."""
        return create_backbone(in_chans=in_chans, **self.options(wavelengths))

    def options(self, wavelengths: Sequence[float | None] | None = None) -> dict[str, Any]:
        """All fields by name, with the band record's `wavelengths` where this has none."""
        chosen = {f.name: getattr(self, f.name) for f in fields(self)}
        if self.wavelengths is None and wavelengths is not None:
            chosen["wavelengths"] = list(wavelengths)
        return chosen


Factory = Callable[[int, BackboneConfig], Encoder]
_FACTORIES: dict[str, Factory] = {}


def register_backbone(name: str) -> Callable[[Factory], Factory]:
    """Decorator that registers `factory(in_chans, config) -> Encoder` under `name`.

    Raises:
        UserError: the name is taken.
    """

    def register(factory: Factory) -> Factory:
        if name in _FACTORIES:
            raise UserError(f"backbone name {name!r} is taken: choose another one.")
        _FACTORIES[name] = factory
        return factory

    return register


def list_backbones() -> list[str]:
    """Registered names in order."""
    return list(_FACTORIES)


def create_backbone(name: str, in_chans: int, **options: object) -> Encoder:
    """Build the backbone `name` for `in_chans` bands.

    Args:
        name: a registered name, `timm:NAME`, or `package.module:NAME`.
        in_chans: number of bands.
        **options: fields of `BackboneConfig`.

    Raises:
        UserError: unknown name (with the nearest ones) or option, or options that the backbone cannot have.
    """
    unknown = set(options) - {f.name for f in fields(BackboneConfig)}
    if unknown:
        raise UserError(f"unknown backbone option {sorted(unknown)[0]!r}: see BackboneConfig.")
    config = BackboneConfig(name=name, **options)  # type: ignore[arg-type]
    if in_chans < 1:
        raise UserError(f"a backbone needs at least one band, got in_chans={in_chans}.")
    if config.wavelengths is not None and len(config.wavelengths) != in_chans:
        raise UserError(f"backbone.wavelengths: {len(config.wavelengths)} values for {in_chans} bands: one per band.")
    changed = [n for n in _CUBES if getattr(config, n) != getattr(BackboneConfig, n)]
    if changed and name in _FACTORIES and name.startswith("vit_"):
        raise UserError(f"backbone {name!r} has no spectral cubes: leave {changed[0]} out, or take spectral_{name}.")
    if name.startswith("timm:"):
        changed = [n for n in (*_OWN, *_CUBES) if getattr(config, n) != getattr(BackboneConfig, n)]
        if changed:
            raise UserError(f"backbone {name!r} brings its own {changed[0]}: leave this option out.")
        return TimmViT(name[5:], in_chans, config.pretrained, config.drop_path, config.pool)
    name = import_backbone(name)
    if name not in _FACTORIES:
        near = difflib.get_close_matches(name, _FACTORIES, n=3) or list(_FACTORIES)[:3]
        raise UserError(f"unknown backbone {name!r}: did you mean {', '.join(near)}? `xscale backbones` lists all.")
    if config.pretrained:
        raise UserError(f"backbone {name!r} has no weights of its own: pretrained is for 'timm:NAME' backbones.")
    return _FACTORIES[name](in_chans, config)


def import_backbone(name: str) -> str:
    """Import the module before the colon of a name, if it has one; returns the name after it.

    Raises:
        UserError: it cannot be imported.
    """
    module, colon, own = name.rpartition(":")
    if not colon:
        return name
    try:
        importlib.import_module(module)
        return own
    except ImportError as error:
        reason = str(error)
    raise UserError(f"backbone {name!r}: module {module!r} cannot be imported ({reason}): is its folder on PYTHONPATH?")


# What a timm model decides by itself.
_OWN = (
    *("position", "class_token", "patch_size", "dim", "depth", "num_heads"),
    *("mlp_ratio", "block_norm", "norm_eps", "final_norm", "final_norm_eps"),
)
_CUBES = ("cube_depth", "pad", "spectral")

# timm's sizes: width, depth, heads.
SIZES = {
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
PATCHES = (4, 8, 14, 16, 32)


def _vit(in_chans: int, config: BackboneConfig, size: str, patch: int) -> ViT:
    return ViT(in_chans, config.patch_size or patch, *_sizes(config, size), **_options(config))


def _spectral_vit(in_chans: int, config: BackboneConfig, size: str, patch: int, cube: int) -> SpectralViT:
    dim, depth, heads = _sizes(config, size)
    patch = config.patch_size or patch
    embed = CubeEmbed(patch, in_chans, dim, config.cube_depth or cube, config.pad)
    positions = cube_positions(dim, embed, config)
    options = {**_options(config), "position": "sincos", "patch_embed": embed, "positions": positions}
    return SpectralViT(in_chans, patch, dim, depth, heads, **options)


def _sizes(config: BackboneConfig, size: str) -> tuple[int, int, int]:
    dim, depth, heads = SIZES[size]
    return config.dim or dim, config.depth or depth, config.num_heads or heads


def _options(config: BackboneConfig) -> dict[str, Any]:
    same = ("position", "class_token", "drop_path", "pool", "reference_gsd")
    same += ("mlp_ratio", "block_norm", "norm_eps", "final_norm", "final_norm_eps")
    return {**{n: getattr(config, n) for n in same}, "image_size": (config.image_size, config.image_size)}


for _size in SIZES:
    for _patch in PATCHES:
        register_backbone(f"vit_{_size}_patch{_patch}")(partial(_vit, size=_size, patch=_patch))
    register_backbone(f"spectral_vit_{_size}_cube3_patch8")(partial(_spectral_vit, size=_size, patch=8, cube=3))
