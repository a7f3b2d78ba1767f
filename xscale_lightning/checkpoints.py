"""What a checkpoint says about itself, and how a method comes back out of it.

Files from others are opened with `weights_only=True`: loading never runs code.
"""

import dataclasses
import importlib
import pickle
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.parsing import AttributeDict

from xscale_lightning import __version__
from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError

if TYPE_CHECKING:
    from xscale_lightning.methods.base import SSLModule

KEY = "xscale"
# Arguments that may change when a run is resumed. Rates and weights (floats, such as a mask ratio) may, too; names,
# sizes and switches may not: heads or positions, for example, leave no trace in the shapes of the weights.
FREE = ("optimizer", "views", "attention", "activation_checkpointing", "init_from", "adapt_bands", "test")
FIXED_FLOATS = ("mlp_ratio", "norm_eps", "final_norm_eps", "reference_gsd")  # floats that belong to the architecture


def plain(value: Any) -> Any:
    """`value` in plain types (dict, list, str, float, int, bool, None), which a weights-only load accepts."""
    if isinstance(value, Bands):
        return value.to_dict()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    return str(value)


def plain_hparams(hparams: Mapping[str, Any]) -> AttributeDict:
    """Hyper-parameters as plain types under Lightning's attribute dictionary."""
    return AttributeDict(plain(dict(hparams)))


def metadata(module: "SSLModule") -> dict[str, Any]:
    """Everything needed to rebuild `module` and to say what it is."""
    stage = {} if module.stage is None else {"stage": plain(module.stage)}
    return {
        "format": 1,
        "class_path": f"{type(module).__module__}.{type(module).__qualname__}",
        "init_args": {k: v for k, v in plain(dict(module.hparams)).items() if k != "bands"},
        "bands": module.bands.to_dict(),
        **stage,
        "versions": {"xscale_lightning": __version__, "torch": str(torch.__version__)},
    }


def read(path: str | Path) -> dict[str, Any]:
    """Open a checkpoint without running code.

    Raises:
        UserError: no such file, not a checkpoint, damaged, or with content other than weights and plain types.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"checkpoint {str(path)!r} does not exist: give the path of a .ckpt file.")
    if not zipfile.is_zipfile(path):
        raise UserError(f"checkpoint {str(path)!r} is damaged or no checkpoint: torch writes another format.")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"checkpoint {str(path)!r} holds more than weights, so it is not opened: it could run code."
        ) from error
    except Exception as error:  # torch raises many types for damaged archives
        raise UserError(f"checkpoint {str(path)!r} cannot be read: {str(error).splitlines()[0]}") from error
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{str(path)!r} is no training checkpoint: it has no 'state_dict'.")
    return checkpoint


def read_metadata(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(checkpoint, metadata)` of a checkpoint written by this package.

    Raises:
        UserError: as `read`, or a checkpoint of another program.
    """
    checkpoint = read(path)
    if KEY not in checkpoint:
        raise UserError(f"checkpoint {str(path)!r} was not written by xscale: it says nothing of its method.")
    return checkpoint, checkpoint[KEY]


def check_resume(path: str | Path, module: "SSLModule") -> None:
    """Refuse to resume `module` from a checkpoint of another method, architecture or set of bands.

    Raises:
        UserError: naming what differs and the remedy.
    """
    checkpoint, saved = read_metadata(path)
    now = metadata(module)
    if saved["class_path"] != now["class_path"]:
        raise UserError(
            f"--ckpt_path {str(path)!r} holds {saved['class_path']} and the configuration asks for "
            f"{now['class_path']}: --ckpt_path only resumes the same run."
        )
    difference = Bands.from_dict(saved["bands"]).difference(module.bands)
    if difference:
        raise UserError(f"--ckpt_path {str(path)!r} was trained on other bands: {difference}.")
    for there, here in zip(Bands.from_dict(saved["bands"]).bands, module.bands.bands, strict=True):
        if (there.mean, there.std) != (here.mean, here.std):
            raise UserError(
                f"--ckpt_path {str(path)!r} was trained with mean {there.mean:g} and std {there.std:g} for band "
                f"{there.name}, and the configuration has {here.mean:g} and {here.std:g}: give data.bands the former."
            )
    if changed := other_argument(saved["init_args"], now["init_args"]):
        name, old, new = changed
        raise UserError(f"--ckpt_path {str(path)!r} is of another architecture: {name} is {old} there and {new} here.")
    for name, there, here in zip(module.bands.names, _wavelengths(saved), _wavelengths(now), strict=True):
        if there != here:
            raise UserError(
                f"--ckpt_path {str(path)!r} was trained with {there} um for band {name}, and the configuration has "
                f"{here}, which moves its spectral position: give data.bands.wavelengths the former."
            )
    state, ours = checkpoint["state_dict"], module.state_dict()
    for name in sorted(set(state) ^ set(ours)):
        side = "only in the checkpoint" if name in state else "missing from it"
        raise UserError(f"--ckpt_path {str(path)!r} is of another architecture: tensor {name!r} is {side}.")
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            raise UserError(
                f"--ckpt_path {str(path)!r} is of another architecture: {name!r} is {list(tensor.shape)} there and "
                f"{list(ours[name].shape)} here."
            )


def other_argument(
    there: Mapping[str, Any], here: Mapping[str, Any], free: Sequence[str] = FREE
) -> tuple[str, Any, Any] | None:
    """The first argument, in alphabetical order, by which two methods are of another architecture.

    Args:
        there: plain arguments of a method, as `metadata` has them.
        here: those of another one.
        free: names of arguments, or of groups of them, that may differ; so may floats but for `FIXED_FLOATS`.

    Returns:
        its name and both values, or None.
    """
    before, now = dict(_flat(there)), dict(_flat(here))
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old == new or any(name == part or name.startswith(f"{part}.") for part in free):
            continue
        if isinstance(old, float) and isinstance(new, float) and name.rsplit(".", 1)[-1] not in FIXED_FLOATS:
            continue
        return name, old, new
    return None


def _wavelengths(record: Mapping[str, Any]) -> list[float | None]:
    """Wavelength of every band that the backbone of a checkpoint's metadata takes into account; else None for each."""
    backbone, known = record["init_args"].get("backbone") or {}, Bands.from_dict(record["bands"]).wavelengths
    if backbone.get("spectral") != "wavelength":
        return [None] * len(known)
    return backbone.get("wavelengths") or known


def _flat(arguments: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def load_method(path: str | Path) -> "SSLModule":
    """Rebuild the method of a checkpoint, weights included, in evaluation mode.

    The class named in the file is imported, so it must be one of ours or of an installed plug-in: no file is executed
    that is not already installed.

    Raises:
        UserError: as `read_metadata`, or the class cannot be found.
    """
    from xscale_lightning.methods.base import SSLModule

    checkpoint, saved = read_metadata(path)
    module_name, _, class_name = saved["class_path"].rpartition(".")
    try:
        cls = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise UserError(f"checkpoint {str(path)!r} needs {saved['class_path']}: install its package.") from error
    if not (isinstance(cls, type) and issubclass(cls, SSLModule)):
        raise UserError(f"checkpoint {str(path)!r} names {saved['class_path']}, which is no method.")
    module = build_method(cls, {**_without_download(saved["init_args"]), "bands": saved["bands"]})
    module.load_state_dict(checkpoint["state_dict"])
    return module.eval()


def _without_download(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a method whose weights are at hand: timm's need not be fetched."""
    backbone = arguments.get("backbone")
    fixed = {"backbone": {**backbone, "pretrained": False}} if isinstance(backbone, Mapping) else {}
    return {**arguments, **fixed}


def build_method(cls: type["SSLModule"], arguments: Mapping[str, Any]) -> "SSLModule":
    """A method of arguments in plain types, as they stand in configurations and checkpoints.

    Raises:
        ArgumentError: (argparse's) an argument that the method does not have, or of another type.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "method")
    return parser.instantiate(parser.parse_object({"method": dict(arguments)})).method
