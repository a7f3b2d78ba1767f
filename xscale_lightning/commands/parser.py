"""The argument parser: announced names for class paths, no abbreviations, and errors of one or two lines."""

import dataclasses
import difflib
import inspect
import re
from collections.abc import Iterator
from typing import Any, NoReturn

from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import yaml_load
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from xscale_lightning.commands.bounds import bounded
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError, find_user_error
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.discovery import class_path, load_method_class, method_entries
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.opening import check_yaml
from xscale_lightning.optim import OptimizerConfig

BASES: dict[str, type] = {"model": SSLModule, "data": XScaleDataModule}
CONFIGS: dict[str, type] = {
    "model.backbone": BackboneConfig,
    "model.optimizer": OptimizerConfig,
    "model.views": Views,
    "data.bands": BandSelection,
}


def load_yaml(text: str) -> Any:
    """YAML in which `model: NAME` or `model: {class_path: NAME}` may give a method by its announced name."""
    check_yaml(text)
    problem = ""
    try:
        value = yaml_load(text)
    except ValueError as error:  # a number of thousands of digits, a day that is none
        problem = str(error)[:120]
    if problem:
        raise UserError(f"a configuration has a value that cannot be read: {problem}.")
    if isinstance(value, dict) and "model" in value:
        model = value["model"]
        if isinstance(model, str):
            value["model"] = {"class_path": class_path(model)}
        elif isinstance(model, dict) and isinstance(model.get("class_path"), str):
            model["class_path"] = class_path(model["class_path"])
    return value


set_loader("yaml", load_yaml)


def resolve_method_names(argv: list[str]) -> list[str]:
    """Replace `--model NAME`, `--model=NAME` and `--model.class_path NAME` by the announced class path."""
    out = list(argv)
    for i, word in enumerate(out):
        if word in ("--model", "--model.class_path", "--model.help") and i + 1 < len(out):
            out[i + 1] = class_path(out[i + 1])
        for option in ("--model=", "--model.class_path=", "--model.help="):
            if word.startswith(option):
                out[i] = option + class_path(word[len(option) :])
    return out


def import_methods() -> None:
    """Import every announced method, so that its class name is a valid `class_path`; broken plug-ins only warn."""
    for name in method_entries():
        try:
            load_method_class(name)
        except UserError as error:
            rank_zero_warn(str(error))


UNKNOWN = "unknown option"


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are short `UserError`s and which takes no abbreviated options."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        """`--trainer.max_epoch` must be an error, not a guess."""
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def instantiate(self, namespace: Any, *args: Any, **kwargs: Any) -> Any:
        """As the base, in bounded time and memory (`bounds`)."""
        chosen = namespace.get("subcommand")
        with bounded(namespace[chosen] if chosen else namespace):
            return super().instantiate(namespace, *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the user's error inside `ex`, or the parser's message made short, as a `UserError`."""
        ours = find_user_error(ex) if ex is not None else None
        if ours is not None and (key := _key_of(message)) and str(ours).startswith(UNKNOWN):
            ours.args = (f"{key}: {ours}",)  # the innermost is told, and it does not know where it stands
        raise ours or UserError(concise(message, sorted(set(self._known())))) from ex

    def _known(self) -> Iterator[str]:
        yield from (action.dest for action in self._actions)
        for parser in self._subcommands_action.choices.values() if self._subcommands_action else ():
            yield from (action.dest for action in parser._actions)


def _key_of(message: str) -> str:
    """Key in which a part could not be parsed; "" for a whole section, which the part's own names lie in."""
    found = re.search(r"Parser key \"([\w.]+)\"", message)
    return found.group(1) if found and found.group(1) not in BASES else ""


def concise(message: str, options: list[str]) -> str:
    """What a user needs of a parser's message: which key, which value, what to do.

    Args:
        message: the parser's own, of any length.
        options: options known to the parser, for "did you mean".
    """
    flat = re.sub(r"\s+", " ", message).strip()
    if found := re.search(r"(?:unrecognized arguments: -*|Option '|does not accept option ')([\w.\-]+)", flat, re.I):
        name = found.group(1)
        group = re.search(r"Group '([\w.]+)' does not accept", flat)
        full = f"{group.group(1)}.{name}" if group and group.group(1) not in BASES else name
        return f"{UNKNOWN} {full!r}: {_hint(name, options)}"
    if found := re.search(r"Parser key \"(model|data|knn\.data|dense\.data)\".*Given value: (\S+)$", flat):
        key, value = found.groups()
        names = [cls.__name__ for cls in _subclasses(BASES[key.rsplit(".", 1)[-1]])]
        near = difflib.get_close_matches(value, names, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]!r}? " if near else ""
        return f"{key}: {value!r} is no class that can be imported: {hint}Known are {', '.join(names)}."
    if found := re.search(r"Parser key \"([\w.]+)\": (.*)", flat):
        text = re.sub(r"<class '(?:[\w]+\.)*(\w+)'>", r"\1", found.group(2))
        return f"{found.group(1)}: {text[:240]}"
    if found := re.search(r"the following arguments are required: (.*)", flat):
        names = [re.sub(r"^(fit|validate|test|predict)\.", "", key.strip()) for key in found.group(1).split(",")]
        keys, option = ", ".join(names), f" or as an option, such as --data.{names[0]}" * ("." not in names[0])
        if {"model", "data"} & set(names):
            return f"missing: {keys}. Give a configuration, for example --config configs/mae.yaml."
        return f"missing: {keys}. Give it in the configuration{option}."
    return flat[:300]


def _hint(name: str, options: list[str]) -> str:
    """Where an unknown option belongs, if there is one of its name, else one of a similar name."""
    leaf = name.rsplit(".", 1)[-1]
    places = [option for option in options if option.rsplit(".", 1)[-1] == leaf]
    places += [f"{path}.{leaf}" for path, config in CONFIGS.items() if leaf in config.__dataclass_fields__]
    if places := [place for place in places if place != name]:
        return f"did you mean {places[0]!r}?"
    for key, base in BASES.items():
        owners = [cls.__name__ for cls in _subclasses(base) if leaf in inspect.signature(cls).parameters]
        if owners:
            host = "; that of a host goes into model.host_args" if key == "model" else ""
            return f"it is an argument of {', '.join(dict.fromkeys(owners))}{host}."
    near = difflib.get_close_matches(leaf, [option.rsplit(".", 1)[-1] for option in options] + list(_arguments()), n=1)
    return f"did you mean {near[0]!r}?" if near else "`--help` and --print_config show what there is."


def _subclasses(cls: type) -> Iterator[type]:
    for child in cls.__subclasses__():
        yield child
        yield from _subclasses(child)


def _arguments() -> Iterator[str]:
    """Names of all constructor arguments of the classes a configuration can name."""
    for base in BASES.values():
        for cls in (base, *_subclasses(base)):
            yield from inspect.signature(cls).parameters
    for config in CONFIGS.values():
        yield from (field.name for field in dataclasses.fields(config))
