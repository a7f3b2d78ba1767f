"""A configuration is made in bounded time and memory: a network that no machine can hold is refused at once."""

import contextlib
import inspect
import math
import os
import sys
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch
from torch.nn.modules import module as hooks

from xscale_lightning.errors import UserError, find_user_error

MAX_MODULES = 100_000  # layers of one model; the largest published encoders have some thousands
COPIES = 4  # of the parameters in training: themselves, gradients, two moments of AdamW
LARGE = 10**5  # a number from here on is told as unusual
MAX_WORKERS = 1024
MAX_BATCH = 2**31 - 1  # samples; libraries count them in 64 bits, tensors' elements too
_SHOWN = 3


def available_memory() -> int:
    """Bytes that this machine can still give; without a number from the system, no bound."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        with open("/proc/meminfo") as file:
            found = {line.split(":")[0]: int(line.split()[1]) for line in file if ":" in line}
        return found["MemAvailable"] * 1024
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return 2**62


def unusual(config: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Numbers of a configuration that are very large, negative or not finite, by dotted name."""
    if isinstance(config, Mapping) or hasattr(config, "as_dict"):
        content = config if isinstance(config, Mapping) else config.as_dict()
        return [pair for key, value in content.items() for pair in unusual(value, f"{prefix}.{key}" if prefix else key)]
    if isinstance(config, (list, tuple)):
        return [pair for value in config for pair in unusual(value, prefix)]
    number = isinstance(config, (int, float)) and not isinstance(config, bool)
    odd = number and (not math.isfinite(config) or config < 0 or config >= LARGE or 0 < abs(config) < 1e-30)
    return [(prefix.replace(".init_args", ""), config)] if odd else []


def told(config: Any) -> str:
    """The unusual numbers of a configuration for people: `model.backbone.depth 1000000000`; "" if there is none."""
    parts = {key: config.get(key) for key in ("model", "data") if config.get(key) is not None}
    return ", ".join(f"{name} {value:g}" for name, value in unusual(parts)[:_SHOWN])


def made_with(error: BaseException) -> str:
    """What the part of ours that could not be made was given, other than its defaults: `MAE.decoder_heads 0`; or ""."""
    trace = error.__traceback__
    found: list[str] = []
    while trace is not None:
        frame = trace.tb_frame
        owner = type(frame.f_locals.get("self"))
        ours = owner.__module__.startswith("xscale_lightning.") and frame.f_code.co_name in (
            "__init__",
            "__post_init__",
        )
        if ours and owner.__name__ not in ("Parser", "CLI", "StageCLI"):
            found += [text for text in _given(owner, frame) if text not in found]
        trace = trace.tb_next
    return ", ".join(found[-2 * _SHOWN :])


def _given(owner: type, frame: types.FrameType) -> list[str]:
    """Arguments of a constructor that are not its defaults, in a few words each."""
    given = []
    for name, parameter in inspect.signature(owner).parameters.items():
        value = frame.f_locals.get(name, getattr(frame.f_locals["self"], name, parameter.default))
        if isinstance(value, (int, float, str, list, tuple, type(None))) and value != parameter.default:
            given.append(f"{owner.__name__}.{name} {str(value)[:40]}")
    return given


def check_groups(config: Any) -> None:
    """Refuse what the parser lets pass: one value for a group of options, as `data.bands: 0`, and null for a number.

    Raises:
        UserError: naming the argument.
    """
    for section in ("model", "data"):
        part = config.get(section)
        arguments = part.get("init_args") if hasattr(part, "get") else None
        module, _, name = str(part.get("class_path") if arguments is not None else "").rpartition(".")
        cls = getattr(sys.modules.get(module), name, None)
        hints: dict[str, Any] = {}
        for owner in reversed(getattr(cls, "__mro__", ())):
            hints |= _hints(owner)
        for key, hint in hints.items():
            options = get_args(hint) or (hint,)
            value = arguments.get(key) if arguments is not None else None
            if isinstance(value, (int, float, str, list)) and all(map(_is_group, options)):
                raise UserError(f"{section}.{key}: {value!r} is not possible; give its fields, by name.")
            if arguments is not None and key in arguments:
                _check_null(value, hint, f"{section}.{key}")


def _check_null(value: Any, hint: Any, name: str) -> None:
    """Refuse null where the type has none, in the fields of a group too."""
    options = get_args(hint) or (hint,)
    if value is None and hint is not Any and type(None) not in options and get_origin(hint) is not Literal:
        raise UserError(f"{name}: null is not possible; give a value of type {getattr(hint, '__name__', hint)}.")
    groups = [option for option in options if isinstance(option, type) and is_dataclass(option)]
    if value is None or not hasattr(value, "keys"):
        return
    for group in groups:
        for key, part in get_type_hints(group).items():
            if key in value.keys():  # noqa: SIM118 (a Namespace has no other)
                _check_null(value[key], part, f"{name}.{key}")


def _hints(owner: type) -> dict[str, Any]:
    try:
        return get_type_hints(owner.__dict__.get("__init__", object))
    except (NameError, TypeError):
        return {}


def _is_group(hint: Any) -> bool:
    return hint is type(None) or (isinstance(hint, type) and is_dataclass(hint))


@contextlib.contextmanager
def bounded(config: Any) -> Iterator[None]:
    """Make the parts of a configuration: stop at too many layers or parameters, and name what was unusual.

    Raises:
        UserError: it takes more memory than there is, or something broke where a number is unusual.
    """
    check_groups(config)
    copies = 1 if torch.cuda.is_available() else COPIES
    limit, counted = available_memory(), {"modules": 0, "bytes": 0}

    def too_large(what: str) -> UserError:
        names = told(config) or "model.backbone and the decoder's arguments"
        return UserError(f"the model is too large for this machine ({what}): lower {names}.")

    def on_module(module: Any, name: str, child: Any) -> None:
        counted["modules"] += 1
        if counted["modules"] > MAX_MODULES:
            raise too_large(f"more than {MAX_MODULES} layers")

    def on_parameter(module: Any, name: str, parameter: Any) -> None:
        if parameter is not None:
            counted["bytes"] += parameter.numel() * parameter.element_size()
            if counted["bytes"] * copies > limit:
                raise too_large(f"more than {limit / copies / 2**30:.1f} GiB of parameters")

    handles = [
        hooks.register_module_module_registration_hook(on_module),
        hooks.register_module_parameter_registration_hook(on_parameter),
    ]
    try:
        yield
    except (ArithmeticError, ValueError, RuntimeError, MemoryError, TypeError, RecursionError, LookupError) as error:
        names = told(config) or made_with(error)
        if find_user_error(error) is not None or not names:
            raise
        reason = (str(error).strip().splitlines() or ["no reason given"])[0][:160]
        raise UserError(
            f"the configuration cannot be used: {names} ({type(error).__name__}: {reason}).\n"
            "--debug shows the traceback, to report it if these values are meant so."
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def check_trainer(config: Any) -> None:
    """Refuse options of the Trainer that it would only stumble over in the first steps.

    Raises:
        UserError: naming the option.
    """
    _check_path(config.get("ckpt_path"))
    clip, every, precision = (
        config.trainer.get(name) for name in ("gradient_clip_val", "check_val_every_n_epoch", "precision")
    )
    if clip is not None and not clip >= 0:
        raise UserError(f"trainer.gradient_clip_val must be 0 or more, got {clip}.")
    batches = config.trainer.get("limit_train_batches")
    if batches is not None and batches == 0:
        raise UserError("trainer.limit_train_batches: 0 leaves nothing to train on; give batches, a share, or null.")
    if every is not None and every < 1:
        raise UserError(f"trainer.check_val_every_n_epoch must be at least 1, got {every}.")
    optimizer = (config.get("model") or {}).get("init_args.optimizer.kind", "adamw")
    if clip and str(precision) in ("16-mixed", "16") and optimizer == "adamw":
        raise UserError(
            f"trainer.gradient_clip_val {clip} does not go with trainer.precision {precision}: the fused optimizer "
            "takes the loss scale away itself, after clipping. Take bf16-mixed, or no clipping."
        )


def _check_path(path: Any) -> None:
    """Refuse a checkpoint that is not there; Lightning has some words of its own."""
    if path is None or str(path) in ("last", "best", "hpc") or str(path).startswith("registry"):
        return
    try:
        there = path != "" and Path(path).exists()
    except OSError:  # a name that no file can have
        there = False
    if not there:
        shown = str(path)[:100]
        raise UserError(f"--ckpt_path: checkpoint '{shown}' does not exist: give the path of a .ckpt file, or last.")


def check_batch(data: Any, view: int | None = None) -> None:
    """Refuse batches that do not fit into memory, and more worker processes than any machine has use for.

    Args:
        data: the data module, set up.
        view: `views.size` of the model.

    Raises:
        UserError: naming the argument.
    """
    workers = getattr(data, "num_workers", 0)
    if workers > MAX_WORKERS:
        raise UserError(f"data.num_workers: {workers} is not possible; give at most {MAX_WORKERS}.")
    if data.batch_size > MAX_BATCH:
        raise UserError(f"data.batch_size: {data.batch_size} is not possible; give at most {MAX_BATCH}.")
    height, width = getattr(data, "image_size", None) or (0, 0)
    count = data.batch_size
    with contextlib.suppress(TypeError, KeyError, AttributeError, OverflowError):
        count = min(count, len(data.dataset("train")))
    size, limit = count * len(data.bands) * height * width * 4, available_memory()
    if size > limit:
        raise UserError(
            f"data.batch_size: {count} images of {height} x {width} pixels and {len(data.bands)} bands take "
            f"{size / 2**30:.3g} GiB, and there are {limit / 2**30:.3g} GiB: lower data.batch_size or data.image_size "
            "(image_height, image_width)."
        )
    if view is not None and count * len(data.bands) * view * view * 4 > limit:
        raise UserError(
            f"model.views.size: {count} views of {view} x {view} pixels do not fit into {limit / 2**30:.3g} GiB: "
            "lower model.views.size or data.batch_size."
        )
