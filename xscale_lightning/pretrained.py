"""`load_backbone`: a trained encoder with everything it needs to take raw imagery."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from xscale_lightning import checkpoints
from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.scaling import Scale, image_scaling
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.models.vit import Encoder

if TYPE_CHECKING:
    from xscale_lightning.methods.base import SSLModule

CONFIG, WEIGHTS, BANDS = "config.json", "model.safetensors", "bands.json"


@dataclass(frozen=True)
class Origin:
    """Where an encoder comes from."""

    path: str
    """Checkpoint or export folder."""
    method: str = ""
    """Short name of the method that trained it."""
    image_size: int | None = None
    """Pixels per side of the images it was trained on, if known."""
    version: str = ""
    """Version of xscale_lightning that wrote the weights."""


class Pretrained(nn.Module):
    """Normalise -> encode -> pool, sealed: images go in as they come from the files.

    `encoder, bands = load_backbone(PATH)` takes it apart.

    Args:
        encoder: the encoder.
        bands: record of the bands that images must have, in this order.
        config: the options that the encoder was built of.
        scaling: how images are normalised: by the record's mean and deviation (`standardize`), every band of every
            image to [0, 1] (`minmax`), or not (`none`).
        origin: where the weights come from.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, encoder: Encoder, bands: Bands, config: BackboneConfig, scaling: Scale, origin: Origin) -> None:
        super().__init__()
        self.encoder, self.bands, self.config = encoder, bands, config
        self.scaling: Scale = scaling
        self.origin = origin
        self.register_buffer("mean", torch.tensor(bands.means).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(bands.stds).view(1, -1, 1, 1), persistent=False)
        self.eval()

    def __iter__(self) -> Iterator[Any]:
        """Yield encoder and bands."""
        yield from (self.encoder, self.bands)

    def normalise(self, images: Tensor) -> Tensor:
        """Raw images `[B, C, H, W]` as the encoder wants them.

        Raises:
            UserError: another number of bands than the record has.
        """
        if images.ndim != 4 or images.shape[1] != len(self.bands):
            raise UserError(
                f"images of shape {tuple(images.shape)}: the encoder takes [B, {len(self.bands)}, H, W], the bands "
                f"{', '.join(self.bands.names)}."
            )
        offset, scale = image_scaling(images, self.scaling, self.mean, self.std)
        return (images.to(self.mean.dtype) - offset) / scale

    def forward(self, images: Tensor, gsd: Tensor | float | None = None) -> Tokens:
        """Tokens of raw images `[B, C, H, W]`; `gsd [B]`, or one number for all, in metres per pixel."""
        if gsd is not None and not isinstance(gsd, Tensor):
            gsd = torch.full((len(images),), float(gsd), device=images.device)
        return self.encoder(self.normalise(images), gsd=gsd)

    @torch.no_grad()
    def features(self, images: Tensor, gsd: Tensor | float | None = None) -> Tensor:
        """One vector per raw image: `[B, D]` float32, without gradients."""
        return self.encoder.pool(self(images, gsd)).float()

    @torch.no_grad()
    def patch_features(self, images: Tensor, gsd: Tensor | float | None = None) -> Tensor:
        """Feature map of raw images: `[B, D, h, w]` float32, without gradients."""
        return self(images, gsd).feature_map().float()


def load_backbone(path: str | Path) -> Pretrained:
    """The encoder of a checkpoint, a run's folder or an export folder, in evaluation mode.

    It is the encoder that the method says its features come from: of I-JEPA, for example, the target encoder.

    Args:
        path: a `.ckpt` file, the folder of a run (its last checkpoint), or what `xscale export` wrote.

    Raises:
        UserError: nothing of the kind, damaged, or content that could run code.
    """
    found = locate(path)
    if found.is_dir():
        from xscale_lightning.exported import read_export

        return read_export(found)
    return of_method(checkpoints.load_method(found), found)


def locate(path: str | Path) -> Path:
    """The checkpoint that a path means, or the export folder.

    Raises:
        UserError: no such file or folder, or a folder with neither an export nor a checkpoint in it.
    """
    path = Path(path)
    if not path.is_dir():
        return path  # files have their own errors
    if (path / CONFIG).is_file() and (path / WEIGHTS).is_file():
        return path
    found = list(path.glob("*.ckpt")) or list(path.glob("checkpoints/*.ckpt"))
    if not found:
        stages = [stage for stage in path.glob("stage_*") if stage.name.split("_")[1].isdigit()]
        stages.sort(key=lambda stage: int(stage.name.split("_")[1]))
        found = [file for stage in stages[-1:] for file in stage.glob("checkpoints/*.ckpt")]
    if not found:
        raise UserError(
            f"folder '{path}' holds neither a checkpoint (.ckpt, checkpoints/*.ckpt) nor an export "
            f"({CONFIG} and {WEIGHTS}): give init_from, or SOURCE, the folder of a run, of an export, or a file."
        )
    last = [file for file in found if file.name.startswith("last")]
    if len(last or found) == 1:
        return (last or found)[0]
    return next(iter(checkpoints.by_position(last or found)), (last or found)[0])  # the latter tells what is wrong


def of_method(method: "SSLModule", path: Path) -> Pretrained:
    """The encoder of a method with its bands and scaling, as it is; nothing is copied.

    Raises:
        UserError: a method that scales its images in a way of its own.
    """
    size = method.views.size or _seen_size(path)
    learned = method.backbone_config.position == "learned"
    origin = Origin(
        str(path), method.method_name, size or (method.backbone_config.image_size if learned else None), _version(path)
    )
    config = replace(method.backbone_config, pretrained=False)
    return Pretrained(method.feature_encoder, method.bands, config, scaling_of(method), origin)


def scaling_of(method: "SSLModule") -> Scale:
    """How a method scales raw images.

    Raises:
        UserError: in a way of its own, which nothing outside of it can repeat.
    """
    from xscale_lightning.methods.base import SSLModule

    inner = getattr(method, "host", method)
    if type(inner).scaling is SSLModule.scaling:
        return "standardize"
    kind = getattr(inner, "normalize", None)
    if kind in ("minmax", "standardize", "none"):
        return kind
    raise UserError(
        f"method {method.method_name} scales its images in a way of its own: use it through "
        "xscale_lightning.checkpoints.load_method."
    )


def _seen_size(path: Path) -> int | None:
    """Side of the images that the run's `ReconstructionPictures` saw."""
    for key, state in checkpoints.read(path).get("callbacks", {}).items():
        sides = state.get("image_size") if isinstance(state, dict) else None
        sides = [side for side in sides if type(side) is int and side > 0] if isinstance(sides, list) else []
        if str(key).startswith("ReconstructionPictures") and sides:
            return min(sides)
    return None


def _version(path: Path) -> str:
    return str((checkpoints.read_metadata(path)[1].get("versions") or {}).get("xscale_lightning", ""))
