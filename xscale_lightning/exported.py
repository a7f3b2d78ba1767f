"""How an export folder is read: nothing in it is run, and it is as it was written or it is refused."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.models.pos_embed import LearnedPositions
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.scaling import Scale
from xscale_lightning.models.timm_vit import TimmViT
from xscale_lightning.models.vit import Encoder
from xscale_lightning.opening import load_safetensors, read_json, within
from xscale_lightning.pretrained import BANDS, CONFIG, WEIGHTS, Origin, Pretrained
from xscale_lightning.records import check_arguments, check_bands

BLOCK = "xscale"  # key of our own part of the configuration
FORMAT = 1

State = dict[str, Tensor]


def read_export(folder: str | Path) -> Pretrained:
    """What `write_export` wrote, in evaluation mode.

    Raises:
        UserError: not written by xscale, damaged, or files that do not belong together.
    """
    folder = Path(folder)
    label = f"export '{folder}'"
    files = {name: within(folder, name, label) for name in (CONFIG, BANDS, WEIGHTS)}
    config, record = (read_json(files[name], f"{label}: {name}") for name in (CONFIG, BANDS))
    own = config.get(BLOCK) if isinstance(config, dict) else None
    if not isinstance(own, dict) or not isinstance(own.get("backbone"), dict):
        raise UserError(f"export '{folder}' was not written by xscale: its {CONFIG} has no '{BLOCK}'.")
    if own.get("format") != FORMAT:
        raise UserError(
            f"export '{folder}' has format {own.get('format')} and this version reads {FORMAT}: take a newer "
            "xscale_lightning."
        )
    check_sums(files, own, label)
    check_bands(record, f"{label}: its {BANDS}")
    bands, state = Bands.from_dict(record), load_safetensors(files[WEIGHTS], f"{label}: {WEIGHTS}")
    known = {field.name for field in fields(BackboneConfig)}
    if unknown := sorted(set(own["backbone"]) - known):
        raise UserError(f"export '{folder}': its {CONFIG} has the backbone option {unknown[0]!r}, which is unknown.")
    check_arguments({"backbone": own["backbone"]}, state, label)
    image_size, scaling = own.get("image_size"), own.get("scaling", "standardize")
    if scaling not in get_args(Scale) or not (image_size is None or (type(image_size) is int and image_size > 0)):
        raise UserError(f"{label}: its {CONFIG} has scaling {scaling!r} and image_size {image_size!r}.")
    problem = ""
    try:
        backbone = build_config({**own["backbone"], "pretrained": False})  # the weights are here
        with torch.device("meta"):  # refused before memory is asked for, if it is not of these weights
            shapes = backbone.build(len(bands), bands.wavelengths).state_dict()
            wanted = sum(tensor.numel() for tensor in shapes.values())
        if wanted <= 2 * sum(tensor.numel() for tensor in state.values()):
            encoder = backbone.build(len(bands), bands.wavelengths)
            load_into(encoder, state, bool(own.get("timm")), folder)
            origin = Origin(str(folder), str(own.get("method", "")), image_size, str(own.get("trained_with", "")))
            return Pretrained(encoder, bands, backbone, scaling, origin)
        problem = f"{WEIGHTS} is not of its {CONFIG}: that is of {wanted} numbers."
    except UserError:
        raise
    except Exception as error:  # whatever values of wrong types do
        problem = f"its {CONFIG} is damaged ({(str(error).splitlines() or [type(error).__name__])[0][:120]})."
    raise UserError(f"{label}: {problem}")


def build_config(options: Mapping[str, Any]) -> BackboneConfig:
    """Options of an encoder, each of its type.

    Raises:
        ArgumentError: (argparse's) a value of another type.
    """
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(BackboneConfig, "backbone")
    return parser.instantiate(parser.parse_object({"backbone": dict(options)})).backbone


def sums(folder: Path, own: Mapping[str, Any]) -> dict[str, str]:
    """SHA-256 of the files beside the configuration, and of our own part of it."""
    found = {}
    for name in (WEIGHTS, BANDS):
        with open(folder / name, "rb") as file:
            found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    content = json.dumps({key: value for key, value in own.items() if key != "sha256"}, sort_keys=True)
    return {**found, BLOCK: hashlib.sha256(content.encode()).hexdigest()}


def check_sums(files: Mapping[str, Path], own: Mapping[str, Any], label: str) -> None:
    """Refuse an export that is not as it was written; those of earlier versions do not say how that was.

    Raises:
        UserError: naming the file.
    """
    written = own.get("sha256")
    if written is None:
        return
    now = sums(files[WEIGHTS].parent, own)
    for name, digest in now.items():
        if not isinstance(written, dict) or written.get(name) != digest:
            part = f"'{BLOCK}' in its {CONFIG}" if name == BLOCK else f"its {name}"
            raise UserError(f"{label}: {part} is not as it was written: damaged or changed; export it again.")


def load_into(encoder: Encoder, state: State, timm_names: bool, folder: Path) -> None:
    """Load the weights of a folder, under our names or timm's, into their encoder.

    Raises:
        UserError: they are another's.
    """
    if timm_names and isinstance(encoder, TimmViT):
        state = {f"model.{name}": value for name, value in state.items()}
    elif timm_names:
        table = state.pop("pos_embed", None)
        if isinstance(getattr(encoder, "positions", None), LearnedPositions) and table is not None:
            state["positions.table"] = table
    try:
        encoder.to(next(iter(state.values())).dtype).load_state_dict(state)
    except (RuntimeError, StopIteration) as error:
        line = [text.strip() for text in str(error).splitlines() if text.strip()][-1:] or ["no weights"]
        raise UserError(f"export '{folder}': {WEIGHTS} is not of its {CONFIG}: {line[0]}") from error
