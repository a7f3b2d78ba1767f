"""Draws configurations with wrong and borderline values, from the signatures of methods, tasks and data modules."""

import copy
import dataclasses
import importlib
import inspect
import math
import pkgutil
import random
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_files import LABELLED, METHODS, SMALL_PATCHES, TASKS, data_modules

NUMBERS = [0, -1, 1, 2, 3, 7, 10**9, 2**63, 10**30, 0.5, 1.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf]
OTHERS = [
    "",
    "nonsense",
    "1",
    [],
    [0],
    [1, 2, 3, 4, 5],
    ["a", "a"],
    {},
    {"a": 1},
    None,
    True,
    "../..",
    "é" * 300,
]


def arguments(cls: type, prefix: str = "", seen: tuple[type, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted names and types of a class's arguments, those of its bases and of dataclasses among them included."""
    names = set()
    for owner in cls.__mro__ if not dataclasses.is_dataclass(cls) else (cls,):
        if "__init__" not in owner.__dict__ or owner is object:
            continue
        try:
            hints = typing.get_type_hints(owner.__init__)
        except (NameError, TypeError):
            hints = {}
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in names:
                continue
            names.add(parameter.name)
            hint = hints.get(parameter.name, Any)
            yield prefix + parameter.name, hint
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            for option in options:
                if isinstance(option, type) and dataclasses.is_dataclass(option) and option not in seen:
                    yield from arguments(option, f"{prefix}{parameter.name}.", (*seen, option))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return


def wrong_values(hint: Any) -> list[Any]:
    """Values for an argument, half of them of its own kind."""
    literals = [value for part in (hint, *typing.get_args(hint)) for value in _literals(part)]
    return [*NUMBERS, *OTHERS, *literals * 3]


def _literals(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else []


@dataclasses.dataclass
class Case:
    """One configuration: where it comes from, and what was changed in it."""

    method: str
    data: str
    changes: list[tuple[str, str, Any]]
    """Section ("model", "data" or a callback's key), dotted name, value."""

    def config(self, root: Path) -> dict[str, Any]:
        """As a file."""
        built: dict[str, Any] = {
            "seed_everything": 3,
            "model": {
                "class_path": self.method,
                "init_args": copy.deepcopy({**METHODS, **TASKS}[self.method]),
            },
            "data": {
                "class_path": self.data.partition(":")[0],
                "init_args": {"batch_size": 4, "num_workers": 0, **copy.deepcopy(data_modules(root)[self.data])},
            },
            "trainer": {
                "max_steps": 2, "max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu", "devices": 1,
                "enable_progress_bar": False,
                "limit_val_batches": 1, "log_every_n_steps": 1,
            },
            "knn": {"k": 2, "max_train": 8, "max_test": 2, "every_n_epochs": 0},
            "geometry": {"max_samples": 2, "every_n_epochs": 0},
            "pictures": {"num_images": 1, "num_score_images": 1, "every_n_epochs": 0},
        }  # fmt: skip
        if self.data in SMALL_PATCHES:
            built["model"]["init_args"]["backbone"]["patch_size"] = SMALL_PATCHES[self.data]
        for section, name, value in self.changes:
            place = built.setdefault(section, {}) if section else built
            place = place["init_args"] if section in ("model", "data") else place
            *parents, leaf = name.split(".")
            for parent in parents:
                inner = place.get(parent)
                place[parent] = inner if isinstance(inner, dict) else {}
                place = place[parent]
            place[leaf] = value
        return built


def pool() -> dict[tuple[str, str], list[tuple[str, Any]]]:
    """All arguments: by section and class."""
    from xscale_lightning.commands import train
    from xscale_lightning.methods.discovery import load_class

    found = {("model", name): list(arguments(load_class(name))) for name in (*METHODS, *TASKS)}
    modules = {cls.__name__: cls for cls in concrete(train.XScaleDataModule, "data")}
    found |= {("data", name): list(arguments(modules[class_name(name)])) for name in data_modules(Path())}
    return found | {("callback", key): list(arguments(cls)) for key, cls in train.CALLBACKS.items()}


def concrete(base: type, *packages: str) -> list[type]:
    """Classes below `base` in these packages of ours that a configuration can name: all but the bases of others."""
    for package in packages:
        place = importlib.import_module(f"xscale_lightning.{package}")
        for module in pkgutil.iter_modules(place.__path__):
            importlib.import_module(f"{place.__name__}.{module.name}")
    found, waiting = [], [base]
    while waiting:
        cls = waiting.pop()
        waiting += cls.__subclasses__()
        ours = any(cls.__module__.startswith(f"xscale_lightning.{package}.") for package in packages)
        found += [cls] * (ours and cls is not base and cls.__name__ not in BASES)
    return found


def class_name(data: str) -> str:
    """Name of the class of a data module of `data_modules`."""
    return data.partition(":")[0].rpartition(".")[2]


BASES = ("WrappedData", "ChangeData", "HostedMethod", "FineTune")  # not for configurations
WRITES = (
    "model.bands",
    "checkpoint.dirpath",
    "trace.file",
    "cache_dir",
)  # linked; folders to write into
TRAINER = [("precision", typing.Literal["16-mixed", "bf16-mixed", "64-true"]), ("max_steps", int),
           ("accumulate_grad_batches", int), ("gradient_clip_val", float), ("limit_val_batches", float),
           ("log_every_n_steps", int), ("check_val_every_n_epoch", int), ("limit_train_batches", float),
           ("gradient_clip_algorithm", typing.Literal["norm", "value"]), ("val_check_interval", float),
           ("num_sanity_val_steps", int), ("overfit_batches", float),
           ("accelerator", typing.Literal["cpu", "gpu"]),
           ("max_time", str), ("min_steps", int), ("min_epochs", int), ("max_epochs", int), ("profiler", str),
           ("deterministic", typing.Literal["warn"]), ("detect_anomaly", bool), ("enable_checkpointing", bool),
           ("reload_dataloaders_every_n_epochs", int), ("use_distributed_sampler", bool)]  # fmt: skip
TOP = [("seed_everything", int), ("ckpt_path", typing.Literal["last", "best"]), ("stages", list)]


def pairs() -> list[tuple[str, str]]:
    """Every method with every data module, and every task with data that has its labels."""
    found = [(method, data) for method in METHODS for data in data_modules(Path())]
    return found + [(task, data) for task in TASKS for data in LABELLED[task.rpartition(".")[2]]]


def draw(choice: random.Random, everything: dict[tuple[str, str], list[tuple[str, Any]]]) -> Case:
    """One to three changes to a configuration that works."""
    method, data = choice.choice(pairs())
    changes = []
    for _ in range(choice.choice([1, 1, 1, 2, 3])):
        section = choice.choice(["model"] * 8 + ["data"] * 8 + ["callback"] * 3 + ["trainer"] * 2 + [""])
        if section == "callback":
            section = choice.choice([key for kind, key in everything if kind == "callback"])
            options = everything["callback", section]
        elif section in ("trainer", ""):
            options = TRAINER if section else TOP
        else:
            options = everything[section, method if section == "model" else data]
        options = [option for option in options if not f"{section}.{option[0]}".endswith(WRITES)]
        if options:
            name, hint = choice.choice(options)
            changes.append((section, name, choice.choice(wrong_values(hint))))
    return Case(method, data, changes)
