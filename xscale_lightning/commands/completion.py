"""`xscale completion SHELL`: a script by which bash, zsh or fish complete verbs, options, their values and files.

The script holds everything it offers and starts no Python, so that an answer takes milliseconds. Write it again after
an upgrade or a new plug-in.
"""

import contextlib
import importlib
import io
import re
import shlex
import types
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Union, get_args, get_origin

from xscale_lightning.commands.arguments import Parser

TRAINING = ("fit", "validate", "test", "predict")
PARTS = ("FineTune", "HostedMethod", "WrappedData")  # what others are made of; no configuration names them
TAKE_FIT_OPTIONS = ("sweep", "bench")
FILES = ("-c", "--config", "--ckpt_path", "--model.init_from")
INSTALL = {
    "bash": "xscale completion bash > ~/.local/share/bash-completion/completions/xscale",
    "zsh": "xscale completion zsh > ~/.xscale.zsh && echo 'source ~/.xscale.zsh' >> ~/.zshrc",
    "fish": "xscale completion fish > ~/.config/fish/completions/xscale.fish",
}


@dataclass
class Offer:
    """What can be completed.

    Attributes:
        verbs: options of every verb.
        classes: for `model` and `data`: by the names of a class, those options that it has.
        values: words after an option.
    """

    verbs: dict[str, list[str]] = field(default_factory=dict)
    classes: dict[str, dict[tuple[str, ...], list[str]]] = field(default_factory=dict)
    values: dict[str, list[str]] = field(default_factory=dict)


def main(argv: list[str]) -> None:
    """Print the script."""
    lines = "\n".join(f"  {line}" for line in INSTALL.values())
    parser = Parser(
        prog="xscale completion",
        usage=f"xscale completion {{bash,zsh,fish}}\n\n{__doc__}\nInstall it:\n{lines}\n",
        allow_abbrev=False,
    )
    parser.add_argument("shell", choices=tuple(INSTALL))
    shell = parser.parse_args(argv[1:]).shell
    from xscale_lightning.commands.completion_scripts import bash, fish

    print(fish(collect()) if shell == "fish" else bash(collect(), zsh=shell == "zsh"))


def collect() -> Offer:
    """Ask the parsers of all verbs."""
    from xscale_lightning.cli import COMMANDS
    from xscale_lightning.commands.parser import BASES, import_methods
    from xscale_lightning.methods.discovery import method_entries

    offer = Offer()
    import_methods()
    for verb, parser in training_parsers().items():
        offer.verbs[verb] = _note(parser, offer.values)
    for verb in COMMANDS:
        if verb not in offer.verbs:
            offer.verbs[verb] = shown_options(verb) + (offer.verbs["fit"] if verb in TAKE_FIT_OPTIONS else [])
    short = {entry.attr: name for name, entry in method_entries().items()}
    for section, base in BASES.items():
        found: dict[tuple[str, ...], list[str]] = {}
        for cls in public_subclasses(base):
            names = tuple(filter(None, (short.get(cls.__name__), cls.__name__)))
            found[names] = [o for o in class_options(cls, section, offer.values) if not o.startswith("--model.bands")]
        offer.classes[section] = found
        offer.values[f"--{section}"] = offer.values[f"--{section}.help"] = sorted({names[0] for names in found})
    offer.verbs["stats"] = [*offer.verbs["stats"], *_all(offer.classes["data"])]
    offer.verbs["embed"] = [*offer.verbs["embed"], *_all(offer.classes["data"])]
    offer.values.update(known_values())
    return offer


def known_values() -> dict[str, list[str]]:
    """Words that no type tells."""
    from xscale_lightning.commands.new_method import KINDS
    from xscale_lightning.data.bands import SENSORS
    from xscale_lightning.models.registry import list_backbones

    return {
        "--model.backbone.name": list_backbones(),
        "--data.bands.sensor": ["generic", *SENSORS],
        "--trainer.precision": ["bf16-mixed", "32-true", "16-mixed", "64-true"],
        "--trainer.accelerator": ["auto", "cpu", "gpu", "mps"],
        "--trainer.strategy": ["auto", "ddp", "ddp_spawn", "fsdp"],
        "--split": ["train", "val", "test"],
        "--kind": list(KINDS),
    }


def training_parsers() -> dict[str, Any]:
    """The parsers of the verbs that LightningCLI makes."""
    from xscale_lightning.commands import train

    class Stopped(Exception):
        """Stops the constructor that would go on to train."""

    found: dict[str, Any] = {}

    class ParserCLI(train.CLI):
        def parse_arguments(self, parser: Any, args: Any) -> None:
            found.update(self._subcommand_parsers)
            raise Stopped

    with contextlib.suppress(Stopped):
        train.build(ParserCLI)
    return {verb: found[verb] for verb in TRAINING}


def public_subclasses(base: type) -> Iterator[type]:
    """Classes below `base` that a configuration may name."""
    for cls in base.__subclasses__():
        if not cls.__name__.startswith("_") and cls.__name__ not in PARTS:
            yield cls
        yield from public_subclasses(cls)


def class_options(cls: type, section: str, values: dict[str, list[str]]) -> list[str]:
    """Options of the constructor of a class, nested ones with dots."""
    from xscale_lightning.commands.parser import Parser as LightningParser

    parser = LightningParser()
    with contextlib.suppress(Exception):  # a plug-in whose constructor cannot be described completes without
        parser.add_class_arguments(cls, section, fail_untyped=False)
    return _note(parser, values)


def _note(parser: Any, values: dict[str, list[str]]) -> list[str]:
    """Options of a parser; what its types say of their values goes into `values`."""
    options = []
    for action in parser._actions:
        for option in action.option_strings:
            if option.endswith("+") or option == "-h":
                continue
            options.append(option)
            words = list(dict.fromkeys(_words(getattr(action, "_typehint", None))))
            if words:
                values.setdefault(option, words)
    return options


def _words(hint: Any) -> Iterator[str]:
    """Words that a type allows: of Literal and bool, inside unions too."""
    if hint is bool:
        yield from ("true", "false")
    elif get_origin(hint) is Literal:
        yield from (str(value) for value in get_args(hint))
    elif get_origin(hint) in (Union, types.UnionType):
        for part in get_args(hint):
            yield from _words(part)


def shown_options(verb: str) -> list[str]:
    """Options that the help of a verb shows."""
    from xscale_lightning.cli import COMMANDS

    text = io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
        importlib.import_module(COMMANDS[verb][0]).main([verb, "--help"])
    return list(dict.fromkeys(re.findall(r"(?<![\w.-])(-c|--[a-z][a-z-]*[a-z])(?![\w.-]*\.)", text.getvalue())))


def _all(classes: dict[tuple[str, ...], list[str]]) -> list[str]:
    return list(dict.fromkeys(option for options in classes.values() for option in options))


def quoted(words: Iterable[str]) -> str:
    """Words for a shell, as one quoted string."""
    return shlex.quote(" ".join(words))
