"""What a checkpoint from a stranger says of itself is checked before anything is built of it."""

import importlib
import math
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import yaml
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.methods.discovery import BUILT_IN, method_entries
from xscale_lightning.opening import check_names, check_yaml

if TYPE_CHECKING:
    from xscale_lightning.methods.base import SSLModule

OURS = "xscale_lightning"
LIBRARIES = ("torchgeo", "lightning", "torch")  # whose classes a run's configuration may have
# Arguments that say nothing of the sizes of tensors.
WITHOUT_TENSORS = ("optimizer", "views", "test", "seed", "bands")
VERSION = re.compile(r"\d{1,4}(\.\d{1,6}){1,3}[A-Za-z0-9.+-]{0,40}")
TIMM_NAME = re.compile(r"timm:[A-Za-z0-9_.]{1,200}")
ARGUMENTS, TEXT = 10_000, 1_000  # values of a method, and characters of each
MOST_STEPS = 10**12  # no run gets there, and loggers count in 64 bits
MOST_BANDS = 4_096
ROOM = 65_536  # a size may be at least this, as an image's in pixels
# Type of a checkpoint's parts, as Lightning reads them when it resumes.
STATE = {
    "state_dict": dict,
    "global_step": int,
    "epoch": int,
    "loops": dict,
    "callbacks": dict,
    "optimizer_states": list,
    "lr_schedulers": list,
    "hyper_parameters": dict,
    "pytorch-lightning_version": str,
}


def check_state(checkpoint: Mapping[str, Any], path: str) -> None:
    """Refuse a checkpoint whose parts are of other types than Lightning writes.

    Raises:
        UserError: naming the part.
    """
    for name, kind in STATE.items():
        value = checkpoint.get(name)
        if value is not None and not (isinstance(value, kind) and not isinstance(value, bool)):
            raise UserError(f"checkpoint {path!r} is damaged: its {name!r} is {_short(value)}.")
        if kind is int and value is not None and not 0 <= value < MOST_STEPS:
            raise UserError(f"checkpoint {path!r} is damaged: its {name!r} is {value}.")
    version = checkpoint.get("pytorch-lightning_version")
    if version is not None and not VERSION.fullmatch(version):
        raise UserError(f"checkpoint {path!r} is damaged: its version of Lightning is {version[:40]!r}.")
    state = checkpoint.get("state_dict") or {}
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise UserError(f"checkpoint {path!r} is damaged: {str(name)[:80]!r} of its 'state_dict' is no tensor.")
    check_names(state, f"checkpoint {path!r}")


def check_record(saved: Any, path: str) -> None:
    """Refuse metadata of other types than `checkpoints.metadata` gives.

    Raises:
        UserError: naming the entry.
    """
    label = f"checkpoint {path!r} is damaged: its record"
    if not isinstance(saved, dict):
        raise UserError(f"{label} is {_short(saved)}.")
    for name, kind in (("class_path", str), ("init_args", dict), ("bands", dict)):
        if not isinstance(saved.get(name), kind):
            raise UserError(f"{label} has {_short(saved.get(name))} as {name!r}.")
    for name in ("versions", "stage"):
        if saved.get(name) is not None and not isinstance(saved[name], dict):
            raise UserError(f"{label} has {_short(saved[name])} as {name!r}.")
    stage = saved.get("stage")
    if stage is not None and not (type(stage.get("number")) is int and isinstance(stage.get("name"), str)):
        raise UserError(f"{label} has {_short(stage)} as 'stage'.")
    if not saved["class_path"].isprintable() or len(saved["class_path"]) > TEXT:
        raise UserError(f"{label} has {saved['class_path'][:60]!r} as 'class_path', which is the name of no class.")
    for number, (key, value) in enumerate(_leaves(saved["init_args"])):
        if number >= ARGUMENTS or len(key) > TEXT or (isinstance(value, str) and len(value) > TEXT):
            raise UserError(f"{label} has arguments of a size that no method takes, such as {key[:60]!r}.")
        if isinstance(value, str):  # a parser would read a text as YAML where a group of options belongs
            check_yaml(value, f"{label}, in {key!r},")
        plain = isinstance(value, (str, bool, int, float, type(None)))
        if not plain or (isinstance(value, int) and abs(value) > 2**63):
            raise UserError(f"{label} has {_short(value)} as {key!r}.")
    check_bands(saved["bands"], label)


def check_bands(record: Any, label: str) -> None:
    """Refuse a record of bands with values that no band can have.

    Raises:
        UserError: naming the value.
    """
    bands = record.get("bands") if isinstance(record, dict) else None
    if not isinstance(bands, list) or not 0 < len(bands) <= MOST_BANDS:
        raise UserError(f"{label} has {_short(bands)} as bands.")
    for band in bands:
        if not isinstance(band, dict) or not isinstance(band.get("name"), str):
            raise UserError(f"{label} has {_short(band)} as a band.")
        for name, value in band.items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if name != "name" and not (number or (value is None and name not in ("mean", "std"))):
                raise UserError(f"{label} has {_short(value)} as {str(name)[:40]!r} of band {band['name'][:40]!r}.")


def trusted_class(path: str, label: str) -> type["SSLModule"]:
    """The method class that a file names.

    To import a module is to run it, so a file may only name modules of this package, those that installed packages
    announce as methods, and those that the user's own program (or `--model`) has imported.

    Raises:
        UserError: any other module, or no method.
    """
    from xscale_lightning.methods.base import SSLModule

    module, _, name = path.rpartition(".")
    if not is_trusted(module):
        raise UserError(
            f"{label} names {path[:120]!r}, of no announced plug-in, so it is not imported: it could run code.\n"
            "If it is yours, name it with --method, announce it (entry point xscale_lightning.methods), or import it."
        )
    problem, cls = "", None
    try:
        cls = vars(importlib.import_module(module)).get(name)
    except Exception as error:  # whatever a plug-in raises when it is imported
        problem = f" ({type(error).__name__}: {str(error)[:80]})"
    if cls is None:
        raise UserError(f"{label} needs {path[:120]!r}{problem}: install its package.")
    if not (isinstance(cls, type) and issubclass(cls, SSLModule)):
        raise UserError(f"{label} names {path[:120]!r}, which is no method.")
    return cls


def is_trusted(module: str) -> bool:
    """Whether a module may be imported because a file names it."""
    announced = {entry.value.partition(":")[0] for entry in method_entries().values()}
    return module in sys.modules or module in announced or module.split(".")[0] == OURS


def check_class_paths(config: Any, label: str) -> None:
    """Refuse a configuration found beside a stranger's weights that is none, or whose classes are not known.

    Raises:
        UserError: naming the class.
    """
    if not isinstance(config, dict):
        raise UserError(f"{label} is no configuration of a run.")
    for key, value in _leaves(config):
        module = str(value).rpartition(".")[0]
        known = not module or module.split(".")[0] in LIBRARIES or is_trusted(module)
        if key.rsplit(".", 1)[-1] == "class_path" and not known:
            raise UserError(f"{label} names {str(value)[:100]!r}, of no announced plug-in: it could run code.")


def check_arguments(arguments: Mapping[str, Any], state: Mapping[str, Tensor], label: str) -> None:
    """Refuse arguments of a method that import other modules, read other files, or build far more than there is.

    Args:
        arguments: plain ones, from a file.
        state: its weights.
        label: words for the file.

    Raises:
        UserError: naming the argument.
    """
    numbers = sum(tensor.numel() for tensor in state.values())
    for key, value in _leaves(arguments):
        last = key.rsplit(".", 1)[-1]
        if last in ("class_path", "host") and isinstance(value, str) and value not in (*BUILT_IN, *method_entries()):
            trusted_class(value, label)
        if isinstance(value, str):
            _check_text(last, value, label)
        if key.split(".")[0] in WITHOUT_TENSORS or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        most = len(state) if "depth" in last and last != "cube_depth" else max(numbers, ROOM)
        if math.isfinite(value) and abs(value) > most:
            raise UserError(f"{label} has {key} {value:g}, and its weights are of no such size: it is not rebuilt.")


def _check_text(name: str, value: str, label: str) -> None:
    """Refuse a text among arguments that a parser or a registry would follow: to a file, a module, a network.

    Raises:
        UserError: naming the text.
    """
    module, colon, _ = value.rpartition(":")
    if value.startswith("timm:") and not TIMM_NAME.fullmatch(value):  # timm takes folders and addresses for names
        raise UserError(f"{label} names files outside of it, {value[:100]!r}: it is not rebuilt.")
    if name == "name" and colon and module != "timm" and not is_trusted(module):
        raise UserError(
            f"{label} names the backbone {value[:100]!r}, of no announced plug-in: it could run code.\n"
            "If it is yours, name it with --method, announce a method beside it (entry point), or import it."
        )
    if name != "init_from" and isinstance(read_text(value), (dict, list)):
        raise UserError(f"{label} has the text {value[:60]!r} where options belong: it is not rebuilt.")


def read_text(text: str) -> Any:
    """What a parser of options makes of a text: itself, where it is no YAML or far longer than an option."""
    if len(text) > TEXT:
        return text
    try:
        check_yaml(text)
        return yaml.safe_load(text)
    except (UserError, yaml.YAMLError, ValueError, RecursionError):
        return text


def _leaves(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Single values of nested dicts and lists, with the path of keys to each."""
    if isinstance(value, Mapping):
        for name, part in value.items():
            yield from _leaves(part, f"{key}.{name}".removeprefix("."))
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _leaves(part, key)
    else:
        yield key, value


def _short(value: Any) -> str:
    text = "missing" if value is None else f"a {type(value).__name__}"
    return f"{text} {str(value)[:40]!r}" if isinstance(value, (str, int, float)) else text
