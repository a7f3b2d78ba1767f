"""The parser of verbs with a few options of their own."""

import argparse
from typing import NoReturn

from xscale_lightning.errors import UserError


class Parser(argparse.ArgumentParser):
    """Parser whose errors are `UserError`s."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong in one line."""
        raise UserError(f"{message}; `{self.prog} --help` shows the options.")
