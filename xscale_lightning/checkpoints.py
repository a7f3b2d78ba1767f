"""What a checkpoint says about itself, and how a method comes back out of it.

Files from others are opened with `weights_only=True`: loading never runs code.
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities.parsing import AttributeDict

from xscale_lightning import __version__
from xscale_lightning.data.bands import Bands
from xscale_lightning.errors import UserError
from xscale_lightning.opening import load_torch, read_record
from xscale_lightning.records import check_arguments, check_record, check_state, trusted_class

if TYPE_CHECKING:
    from xscale_lightning.methods.base import SSLModule

KEY = "xscale"
# Arguments that may change when a run is resumed. Rates and weights (floats, such as a mask ratio) may, too; names,
# sizes and switches may not: heads or positions, for example, leave no trace in the shapes of the weights.
FREE = ("optimizer", "views", "attention", "activation_checkpointing", "compile_blocks")
FREE += ("init_from", "adapt_bands", "test")
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
    checkpoint = load_torch(path, mmap=True)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"{str(path)!r} is no training checkpoint: it has no 'state_dict'.")
    check_state(checkpoint, str(path))
    return checkpoint


def read_metadata(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """`(checkpoint, metadata)` of a checkpoint written by this package.

    Raises:
        UserError: as `read`, or a checkpoint of another program.
    """
    checkpoint = read(path)
    if KEY not in checkpoint:
        raise UserError(f"checkpoint {str(path)!r} was not written by xscale: it says nothing of its method.")
    check_record(checkpoint[KEY], str(path))
    return checkpoint, checkpoint[KEY]


def by_position(files: Iterable[Path], skipped: Callable[[str], None] | None = None) -> list[Path]:
    """Checkpoints by how far their training had come, the furthest first; only among equals the time of a file counts.

    Times say nothing once a folder has been copied. The records alone are read: that the weights are whole is for
    `read_metadata` to say.

    Args:
        files: checkpoints.
        skipped: is told of each whose record cannot be read, which is left out; None leaves them out in silence.
    """
    found = []
    for path in files:
        try:
            found.append((_position(path), path.stat().st_mtime_ns, path.name, path))
        except UserError as error:
            if skipped is not None:
                skipped(str(error))
        except OSError:  # gone since it was listed
            continue
    return [path for *_, path in sorted(found, reverse=True)]


def _position(path: Path) -> tuple[int, ...]:
    """Optimizer steps, epochs, batches and batches of validation that lie behind a checkpoint."""
    record = read_record(path)
    if not isinstance(record, dict):
        raise UserError(f"{str(path)!r} is no training checkpoint: it is a {type(record).__name__}.")
    loop = ("loops", "fit_loop")
    counts = [
        ("global_step",),
        (*loop, "epoch_progress", "current", "processed"),
        (*loop, "epoch_loop.batch_progress", "total", "processed"),
        (*loop, "epoch_loop.val_loop.batch_progress", "total", "processed"),
    ]
    numbers = [_within(record, keys) for keys in counts]
    return tuple(number if type(number) is int else 0 for number in numbers)


def _within(value: Any, keys: Sequence[str]) -> Any:
    """What stands under some keys, one in the other; None where one is missing."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


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

    The class named in the file is imported only if it is one of ours or of an announced plug-in, or if the program has
    imported its module already. What its arguments would build is compared with the weights before memory is asked for.

    Raises:
        UserError: as `read_metadata`, the class cannot be found, or its arguments are not of these weights.
    """
    checkpoint, saved = read_metadata(path)
    label = f"checkpoint {str(path)!r}"
    cls = trusted_class(saved["class_path"], label)
    arguments = {**_without_download(saved["init_args"]), "bands": saved["bands"]}
    check_arguments(arguments, checkpoint["state_dict"], label)
    problem = ""
    try:
        problem = _difference(checkpoint["state_dict"], _shapes(cls, arguments))
        if not problem:
            module = build_method(cls, arguments, strange=True)
            module.load_state_dict(checkpoint["state_dict"])
            return module.eval()
    except UserError:
        raise
    except Exception as error:  # argparse's, and whatever classes raise of arguments that they do not expect
        problem = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise UserError(f"{label} cannot be rebuilt as {saved['class_path']}: {problem}")


def _shapes(cls: type["SSLModule"], arguments: Mapping[str, Any]) -> Mapping[str, torch.Tensor] | None:
    """Tensors that a method would have, without memory; None of a plug-in that needs some to be built."""
    try:
        with torch.device("meta"):
            return build_method(cls, arguments, strange=True).state_dict()
    except (RuntimeError, NotImplementedError):
        if cls.__module__.split(".")[0] == __name__.split(".")[0]:
            raise
        return None


def _difference(state: Mapping[str, torch.Tensor], ours: Mapping[str, torch.Tensor] | None) -> str:
    """The first tensor by which two state dicts differ in name or shape; "" if none does."""
    if ours is None:
        return ""
    for name in sorted(set(state) ^ set(ours)):
        return f"tensor {name!r} is {'only in the file' if name in state else 'missing from it'}."
    for name, tensor in state.items():
        if tensor.shape != ours[name].shape:
            return f"tensor {name!r} is {list(tensor.shape)} there and {list(ours[name].shape)} by its arguments."
    return ""


def _without_download(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a method whose weights are at hand: timm's need not be fetched."""
    backbone = arguments.get("backbone")
    fixed = {"backbone": {**backbone, "pretrained": False}} if isinstance(backbone, Mapping) else {}
    return {**arguments, **fixed}


def build_method(cls: type["SSLModule"], arguments: Mapping[str, Any], strange: bool = False) -> "SSLModule":
    """A method of arguments in plain types, as they stand in configurations and checkpoints.

    Raises:
        ArgumentError: (argparse's) an argument that the method does not have, or of another type.
        UserError: in a stranger's (`strange`) a text stands for a group of options, which would be read from that file.
    """
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(cls, "method")
    groups = {action.dest.split(".")[1] for action in parser._actions if action.dest.count(".") > 1} if strange else ()
    if given := [name for name in groups if isinstance(arguments.get(name), str)]:
        raise UserError(f"{cls.__name__}: {given[0]!r} is a text where options belong: it is not rebuilt.")
    return parser.instantiate(parser.parse_object({"method": dict(arguments)})).method
