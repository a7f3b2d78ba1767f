"""What `init_from` can name: a checkpoint, a run, an export, a published file, or a model of timm's."""

import argparse
from dataclasses import dataclass, field, replace
from pathlib import Path

from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.scaling import Scale
from xscale_lightning.models.vit import Encoder
from xscale_lightning.opening import load_torch
from xscale_lightning.pretrained import load_backbone, locate
from xscale_lightning.readers.encoders import read_foreign


@dataclass(frozen=True)
class Source:
    """An encoder with weights, before it is fitted to anything."""

    what: str
    """Words for messages."""
    encoder: Encoder
    config: BackboneConfig
    bands: Bands | None
    """None where the weights do not say."""
    unused: list[str] = field(default_factory=list)
    """Tensors beside the encoder's, such as a head."""
    resized: list[str] = field(default_factory=list)
    """Tensors that were changed on the way, with the reason."""
    scaling: Scale | None = None
    """How it scales raw images; None where the weights do not say."""


def open_source(source: str | Path, chans: int | None, reader: str | None) -> Source:
    """Read a source of any kind; a model of timm's is built for `chans` bands.

    Raises:
        UserError: it cannot be read, or is nothing of what there is.
    """
    text = str(source)
    if text.startswith("timm:") or (not Path(text).exists() and _is_timm_name(text)):
        return _from_timm(text.removeprefix("timm:"), chans or 3)
    path = Path(text)
    if not path.exists():
        raise UserError(
            f"init_from {text!r} does not exist: give a checkpoint, the folder of a run or of an export, or timm:NAME."
        )
    path = locate(path)
    if path.is_dir() or (reader is None and _is_ours(path)):
        ours = load_backbone(path)
        return Source(f"init_from {text!r}", ours.encoder, ours.config, ours.bands, scaling=ours.scaling)
    encoder, config, unused = read_foreign(path, reader, chans)
    return Source(f"init_from {text!r}", encoder, config, None, unused)


def _is_ours(path: Path) -> bool:
    """Whether a file is a checkpoint of this package; damaged ones are told of by the reader that comes next."""
    if path.suffix == ".safetensors":
        return False
    try:
        content = load_torch(path, mmap=True, also=(argparse.Namespace,))
    except UserError:
        return path.suffix == ".ckpt"
    return isinstance(content, dict) and "xscale" in content


def _is_timm_name(text: str) -> bool:
    if "/" in text or Path(text).suffix in (".ckpt", ".pth", ".pt", ".safetensors"):
        return False
    import timm

    return timm.is_model(text.split(".")[0])


def _from_timm(name: str, chans: int) -> Source:
    config = BackboneConfig(name=f"timm:{name}", pretrained=True)
    try:
        encoder = config.build(chans)
    except UserError:
        raise
    except Exception as error:  # downloads raise whatever their libraries raise
        raise UserError(
            f"init_from 'timm:{name}': its weights cannot be fetched ({type(error).__name__}).\n"
            "Without a network, download the file elsewhere and give its path (.safetensors, .pth)."
        ) from error
    resized = [] if chans == 3 else [f"model.patch_embed.proj.weight (timm's RGB filters, repeated over {chans} bands)"]
    return Source(f"init_from 'timm:{name}'", encoder, replace(config, pretrained=False), None, resized=resized)
