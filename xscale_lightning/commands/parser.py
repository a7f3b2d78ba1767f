"""The argument parser: names of methods for class paths, and errors of one or two lines."""

import difflib
import re
from typing import Any, NoReturn

from jsonargparse import set_loader
from jsonargparse._loaders_dumpers import yaml_load
from lightning.pytorch.cli import LightningArgumentParser

from xscale_lightning.errors import UserError
from xscale_lightning.methods.discovery import class_path, load_method_class, method_entries


def load_yaml(text: str) -> Any:
    """YAML in which `model: NAME` or `model: {class_path: NAME}` may give a method by its announced name."""
    value = yaml_load(text)
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
        if word in ("--model", "--model.class_path") and i + 1 < len(out):
            out[i + 1] = class_path(out[i + 1])
        for option in ("--model=", "--model.class_path="):
            if word.startswith(option):
                out[i] = option + class_path(word[len(option) :])
    return out


def concise(message: str) -> str:
    """The part of a parser's message that a user needs: which key, which value, what to do."""
    message = re.sub(r"\s+", " ", message)
    found = re.search(r"Key '([^']+)' is not expected", message) or re.search(
        r"(?:Unrecognized arguments|No action for key|Option '?)[:\s\"']*([\w.\-]+)", message
    )
    if found:
        return found.group(1)
    return message


class Parser(LightningArgumentParser):
    """Lightning's parser, whose errors are `UserError`s."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise the message, shortened, as a `UserError`."""
        cause: BaseException | None = ex
        while cause is not None:
            if isinstance(cause, UserError):
                raise cause
            cause = cause.__cause__ or cause.__context__
        raise UserError(message) from ex


def import_methods() -> None:
    """Import every announced method, so that its class name alone is a valid `class_path`; broken plug-ins only warn."""
    from lightning.pytorch.utilities.rank_zero import rank_zero_warn

    for name in method_entries():
        try:
            load_method_class(name)
        except UserError as error:
            rank_zero_warn(str(error))


__all__ = ["Parser", "concise", "difflib", "import_methods", "resolve_method_names"]
