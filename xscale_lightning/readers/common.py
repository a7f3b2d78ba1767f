"""What the readers of published checkpoints share: opening, renaming, fused projections, strict loading."""

import argparse
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.resizing import Tables, fit_tables
from xscale_lightning.opening import check_names, load_torch

State = dict[str, Tensor]
Rule = tuple[str, str]  # pattern of a whole name, replacement


def open_published(path: str | Path) -> State:
    """The state dict of a checkpoint file, without running code from it.

    Published files hold the weights at the top, or under `model` or `state_dict`, beside the run's arguments; where
    each network has a state dict of its own (I-JEPA), names begin with that of the network.

    Raises:
        UserError: no such file, damaged, with content that could run code, or without weights.
    """
    content = load_torch(path, also=(argparse.Namespace,))  # holds plain values only
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    content = content if isinstance(content, dict) else {}
    state = {n: v for n, v in content.items() if isinstance(v, Tensor)}
    if not state:
        networks = {part: weights for part, weights in content.items() if isinstance(weights, dict)}
        state = {
            f"{part}.{str(name).removeprefix('module.')}": value
            for part, weights in networks.items()
            for name, value in weights.items()
            if isinstance(value, Tensor)
        }
    if not state:
        raise UserError(f"checkpoint {str(path)!r} holds no weights.")
    check_names(state, f"checkpoint {str(path)!r}")
    return {str(name).removeprefix("module."): value for name, value in state.items()}


def rename(state: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[State, list[str]]:
    """Names by the first rule whose pattern matches the whole name; and the names that no rule knows."""
    renamed, unknown = {}, []
    for name, value in state.items():
        for pattern, replacement in rules:
            if re.fullmatch(pattern, name):
                renamed[re.sub(pattern, replacement, name)] = value
                break
        else:
            unknown.append(name)
    return renamed, unknown


def fuse(state: Mapping[str, Tensor], parts: Sequence[str], whole: str) -> State:
    """Join tensors whose names differ in one of `parts` (say `q_proj`, `k_proj`, `v_proj`) row-wise into `whole`.

    Raises:
        UserError: one of the parts is missing.
    """
    fused: State = {}
    for name, value in state.items():
        found = next((part for part in parts if f".{part}." in name), None)
        if found is None:
            fused[name] = value
        elif found == parts[0]:
            siblings = [name.replace(f".{found}.", f".{part}.") for part in parts]
            missing = [sibling for sibling in siblings if sibling not in state]
            if missing:
                raise UserError(f"the checkpoint has {name!r} and lacks {missing[0]!r}.")
            fused[name.replace(f".{found}.", f".{whole}.")] = torch.cat([state[sibling] for sibling in siblings])
    return fused


def split(state: Mapping[str, Tensor], whole: str, parts: Sequence[str]) -> State:
    """Undo `fuse`."""
    out: State = {}
    for name, value in state.items():
        if f".{whole}." in name:
            for part, rows in zip(parts, value.chunk(len(parts)), strict=True):
                out[name.replace(f".{whole}.", f".{part}.")] = rows
        else:
            out[name] = value
    return out


@dataclass(frozen=True)
class Report:
    """What became of every tensor of a published checkpoint and of the module, under the module's names."""

    matched: list[str]
    """Loaded as they are."""
    resized: list[str]
    """Position tables that were brought to the module's size (or left as initialised, if asked for)."""
    missing: list[str]
    """In the module and not in the checkpoint: left as they were."""
    unexpected: list[str]
    """In the checkpoint and not in the module: not used."""

    def __str__(self) -> str:
        parts = {"resized": self.resized, "missing": self.missing, "unexpected": self.unexpected}
        named = [f"{len(names)} {what} ({_some(names)})" for what, names in parts.items() if names]
        return "; ".join([f"{len(self.matched)} tensors matched", *named])


def _some(names: Sequence[str], count: int = 8) -> str:
    """Names for a line of text: all of a few, or the first of many."""
    return ", ".join([*names[:count], *(["..."] if len(names) > count else [])])


def load_state(
    module: nn.Module,
    state: Mapping[str, Tensor],
    unknown: Sequence[str],
    source: str,
    tables: Tables | None = None,
    strict: bool = True,
) -> Report:
    """Load tensors under the module's names; if a tensor does not fit, nothing at all is loaded.

    Args:
        module: what to load into.
        state: tensors by the module's names.
        unknown: names of `source` that have no counterpart.
        source: what the tensors are of, for messages.
        tables: what to do with learned position tables of another size; None refuses them.
        strict: refuse missing and unexpected tensors, too.

    Raises:
        UserError: the first tensors of `source` that are unknown, missing or of another shape, and how many there are.
    """
    ours = module.state_dict()
    state, resized = fit_tables(module, state, tables) if tables else (state, [])
    unexpected = [*unknown, *(name for name in state if name not in ours)]
    missing = [name for name in ours if name not in state]
    problems = {
        "unknown": unexpected if strict else [],
        "missing": missing if strict else [],
        "of another shape": [
            f"{name} is {list(value.shape)} there and {list(ours[name].shape)} here"
            for name, value in state.items()
            if name in ours and value.shape != ours[name].shape
        ],
    }
    found = [f"{len(names)} {what}, first {names[0]}" for what, names in problems.items() if names]
    if found:
        raise UserError(f"{source} does not fit {type(module).__name__}: tensors {'; '.join(found)}.")
    module.load_state_dict({name: value for name, value in state.items() if name in ours}, strict=False)
    return Report([n for n in state if n in ours and n not in resized], resized, missing, unexpected)


def width_ratio(width: int, dim: int) -> float:
    """Ratio with which a module of width `dim` gets MLPs of exactly `width`, which it finds as `int(dim * ratio)`."""
    ratio = width / dim
    return ratio if int(dim * ratio) == width else (width + 0.5) / dim  # 471 / 108 * 108 is just below 471


def block_count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Number of blocks `prefix<i>.` in a state dict."""
    return len({name[len(prefix) :].split(".")[0] for name in state if name.startswith(prefix)})
