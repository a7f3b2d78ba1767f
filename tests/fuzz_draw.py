"""Draws configurations with wrong and borderline values, from the signatures of methods, tasks and data modules."""

import copy
import dataclasses
import inspect
import math
import random
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_files import LABELLED, METHODS, TASKS, data_modules

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
            "model": {"class_path": self.method, "init_args": copy.deepcopy({**METHODS, **TASKS}[self.method])},
            "data": {
                "class_path": self.data,
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
        for section, name, value in self.changes:
            place = built.setdefault(section, {})
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
    children = {}
    waiting = [train.XScaleDataModule]
    while waiting:
        cls = waiting.pop()
        children[cls.__name__] = cls
        waiting += cls.__subclasses__()
    found |= {("data", name): list(arguments(children[name])) for name in data_modules(Path())}
    found |= {("callback", key): list(arguments(cls)) for key, cls in train.CALLBACKS.items() if key in OURS}
    return found


OURS = ("guard", "knn", "linear", "geometry", "pictures", "summary", "throughput", "affinity", "alignment")
TRAINER = [("precision", typing.Literal["16-mixed", "bf16-mixed", "64-true"]), ("max_steps", int),
           ("accumulate_grad_batches", int), ("gradient_clip_val", float), ("limit_val_batches", float),
           ("log_every_n_steps", int), ("check_val_every_n_epoch", int)]  # fmt: skip


def pairs() -> list[tuple[str, str]]:
    """Every method with every data module, and every task with data that has its labels."""
    found = [(method, data) for method in METHODS for data in data_modules(Path())]
    return found + [(task, data) for task in TASKS for data in LABELLED[task.rpartition(".")[2]]]


def draw(choice: random.Random, everything: dict[tuple[str, str], list[tuple[str, Any]]]) -> Case:
    """One to three changes to a configuration that works."""
    method, data = choice.choice(pairs())
    changes = []
    for _ in range(choice.choice([1, 1, 1, 2, 3])):
        section = choice.choice(["model"] * 4 + ["data"] * 4 + ["callback", "trainer"])
        if section == "callback":
            section = choice.choice(OURS)
            options = everything["callback", section]
        elif section == "trainer":
            options = TRAINER
        else:
            options = everything[section, method if section == "model" else data]
        if options:
            name, hint = choice.choice(options)
            changes.append((section, name, choice.choice(wrong_values(hint))))
    return Case(method, data, changes)
