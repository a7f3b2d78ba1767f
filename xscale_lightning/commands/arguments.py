"""The parser of verbs with a few options of their own."""

import argparse
from collections.abc import Sequence
from typing import NoReturn

from xscale_lightning.errors import UserError


class Parser(argparse.ArgumentParser):
    """Parser whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        raise UserError(f"{message}; `{self.prog} --help` shows the options.")

    def add_method_option(self) -> None:
        """Add `--method`, which names the class of a checkpoint's method where no installed package announces it."""
        text = "class of CKPT's method, package.module.Class, or backbone, package.module:NAME, of your own"
        self.add_argument("--method", metavar="CLASS", help=text)


def import_method(name: str | None) -> None:
    """Import the class, or the module of the backbone, of `--method`: a checkpoint names only what the user knows of.

    Raises:
        UserError: it cannot be imported, or is no method.
    """
    if name is not None and ":" in name:
        from xscale_lightning.models.registry import import_backbone

        import_backbone(name)
    elif name is not None:
        from xscale_lightning.methods.discovery import load_class

        load_class(name)


def take_data_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into what is no `--data.NAME VALUE`, and those."""
    words, options, waiting = list[str](), list[str](), False
    for word in argv:
        if waiting or word.startswith("--data."):
            options.append(word)
            waiting = not waiting and "=" not in word
        else:
            words.append(word)
    return words, options
