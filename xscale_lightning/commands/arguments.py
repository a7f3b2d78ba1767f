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
