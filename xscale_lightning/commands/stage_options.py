"""Stages on the command line: which there are, and what the arguments of each are."""

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

import yaml

from xscale_lightning.commands.parser import load_yaml, resolve_method_names
from xscale_lightning.errors import UserError
from xscale_lightning.models.resizing import Tables

CONFIG_OPTIONS = ("--config", "-c")
WITHOUT_VALUE = ("help", "print_config")  # options that take no word after them
ONE_FOR_ALL = ("stages", "output", "ckpt_path")  # keys that a stage cannot have to itself


@dataclass
class Stage:
    """One stage of progressive pretraining."""

    name: str
    """Short name of letters, digits, `_` and `-`: in the run folder, and for `--stages.NAME.OPTION` of this stage."""
    config: dict[str, Any] = field(default_factory=dict)
    """What differs in this stage: laid over the configuration, with the keys of any configuration file."""
    tables: Tables = "resize"
    """Learned position tables of another size: `resize` interpolates them, `reinit` starts them anew."""
    optimizer: Literal["fresh", "carry"] = "fresh"
    """`carry` takes over AdamW's moments of the stage before; the learning rate is always that of the stage's own."""


def read_stages(value: Any) -> list[Stage]:
    """Stages of a configuration's `stages` key; none for null.

    Raises:
        UserError: it is no list of stages, or one has an unknown key, a wrong value or the name of another.
    """
    if value is None:
        return []
    if not isinstance(value, list):
        raise UserError(f"stages: {str(value)[:80]!r} is no list: give entries such as {{name: a, config: {{...}}}}.")
    stages = [_read_stage(entry, number) for number, entry in enumerate(value, start=1)]
    names = [stage.name for stage in stages]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"stages: two are called {name!r}; give each a name of its own.")
    return stages


def _read_stage(entry: Any, number: int) -> Stage:
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise UserError(f"stages: entry {number} has no name: give entries such as {{name: a, config: {{...}}}}.")
    label, known = f"stages: {entry['name']!r}", [f.name for f in fields(Stage)]
    for key in entry:
        if key not in known:
            near = get_close_matches(str(key), known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}."
            raise UserError(f"{label} has an unknown key {key!r}: {hint}")
    check_name(label, entry["name"])
    for key in ("tables", "optimizer"):
        choices = get_args(get_type_hints(Stage)[key])
        if entry.get(key, choices[0]) not in choices:
            raise UserError(f"{label}: {key} is {entry[key]!r}; choose {' or '.join(choices)}.")
    config = entry.get("config") or {}
    if not isinstance(config, dict):
        raise UserError(f"{label}: config is {str(config)[:80]!r}; give the keys of a configuration file.")
    for key in ONE_FOR_ALL:
        if key in config:
            raise UserError(f"{label}: config has {key!r}, which is for all stages: give it outside of stages.")
    return Stage(**{**entry, "config": config})


def check_name(label: str, name: str) -> None:
    """Refuse a name that is part of a folder's and cannot be."""
    if not re.fullmatch(r"\w[\w-]*", name, re.ASCII):
        raise UserError(f"{label} is no name for a folder: use letters, digits, '_' and '-'.")


@dataclass(frozen=True)
class StagedCommand:
    """A command line taken apart.

    Attributes:
        verb: `fit`, `validate`, `test` or `predict`.
        common: the arguments that hold for every stage.
        stages: the stages, in order.
        own: by stage, the options that hold for it alone.
    """

    verb: str
    common: list[str]
    stages: list[Stage]
    own: dict[str, list[str]]

    def arguments(self, index: int, resume: bool = True) -> list[str]:
        """Arguments of one stage, verb included; without `resume` no checkpoint is taken up.

        The stage's overlay and its own files come right after the last configuration file, so that options win.
        """
        stage, own = self.stages[index], self.own[self.stages[index].name]
        spans = [(start, stop) for option, _, start, stop in options(own) if option in CONFIG_OPTIONS]
        files = [word for start, stop in spans for word in own[start:stop]]
        others = [word for i, word in enumerate(own) if not any(start <= i < stop for start, stop in spans)]
        overlay = ["--config", json.dumps(stage.config, default=str)]
        words = insert_configs(self.common, [*overlay, *files, "--config", '{"stages": null}'])
        without = [] if resume else ["--ckpt_path=null"]
        return [self.verb, *resolve_method_names([*words, *others, *without])]

    def label(self, index: int) -> str:
        """For people: `stage 2 of 2 (bigearthnet)`."""
        return f"stage {index + 1} of {len(self.stages)} ({self.stages[index].name})"


def take_apart(argv: list[str]) -> StagedCommand:
    """Split `argv` (verb first) by stages; without any, `common` is all there is.

    Raises:
        UserError: the stages are malformed, or an option names a stage that there is not.
    """
    verb, args = argv[0], argv[1:]
    common, rest, own = [], 0, list[tuple[str, list[str]]]()
    for option, _, start, stop in options(args):
        found = re.fullmatch(r"--stages\.([^.]+)\.(.+)", option)
        if option.startswith("--stages") and option != "--stages" and not found:
            raise UserError(f"unknown option {option!r}: an option of one stage is --stages.NAME.OPTION.")
        if found or option == "--stages":
            common, rest = [*common, *args[rest:start]], stop
        if found:
            words = args[start:stop]
            own.append((found[1], ["--" + words[0].removeprefix(f"--stages.{found[1]}."), *words[1:]]))
    stages = read_stages(last_given(args, "stages"))
    by_name: dict[str, list[str]] = {stage.name: [] for stage in stages}
    for name, words in own:
        if name not in by_name:
            known = f"known are {', '.join(by_name)}" if by_name else "the configuration has no stages"
            raise UserError(f"--stages.{name}: there is no stage {name!r}; {known}.")
        if (key := words[0].removeprefix("--").split("=")[0]) in ONE_FOR_ALL:
            raise UserError(f"--stages.{name}.{key}: {key} is for all stages; give --{key}.")
        by_name[name] += words
    return StagedCommand(verb, [*common, *args[rest:]], stages, by_name)


def options(args: list[str]) -> Iterator[tuple[str, str | None, int, int]]:
    """`(option, value, start, stop)` of every option: its words are `args[start:stop]`, its value is None without."""
    index = 0
    while index < len(args):
        word, start = args[index], index
        index += 1
        if not (word.startswith("--") or word == "-c"):
            continue
        option, equals, text = word.partition("=")
        value: str | None = text if equals else None
        takes = not equals and option.rsplit(".", 1)[-1].removeprefix("--") not in WITHOUT_VALUE
        if takes and index < len(args) and not args[index].startswith("--"):
            value = args[index]
            index += 1
        yield option, value, start, index


def insert_configs(args: list[str], words: list[str]) -> list[str]:
    """`args` with further --config options right after the last one, so that the other options win over them."""
    place = max((stop for option, _, _, stop in options(args) if option in CONFIG_OPTIONS), default=0)
    return [*args[:place], *words, *args[place:]]


def last_given(args: list[str], key: str) -> Any:
    """Last value of a top-level key among configuration files and options, in their order; None if it is not given."""
    value = None
    for option, text, _, _ in options(args):
        if option in CONFIG_OPTIONS and text:
            content = content_of(text)
            value = content.get(key, value)
        elif option == f"--{key}" and text is not None:
            value = load_yaml(text)
    return value


def content_of(text: str) -> dict[str, Any]:
    """What a --config gives; nothing where it is no file or no YAML: the parser will say so.

    Raises:
        UserError: a file that cannot be read, or is no text.
    """
    problem = ""
    try:
        content = load_yaml(Path(text).read_text(encoding="utf-8") if not text.lstrip().startswith("{") else text)
    except UnicodeDecodeError:
        problem = "is no text"
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EISDIR, errno.EACCES, errno.EINVAL):
            return {}
        problem = f"cannot be read ({error.strerror})"
    except (ValueError, UserError, yaml.YAMLError):
        return {}
    if problem:
        raise UserError(f"--config {text!r} {problem}: give a YAML file.")
    return content if isinstance(content, dict) else {}
