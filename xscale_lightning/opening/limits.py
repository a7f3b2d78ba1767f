"""How much a file of plain values may hold: what refers to itself, or a hundred times to the same, is counted out."""

from collections.abc import Iterable
from typing import Any

from xscale_lightning.errors import UserError

NODES, DEPTH = 5_000_000, 100  # far above any checkpoint or configuration
NAME = 500  # characters of a tensor's name


def check_extent(value: Any, what: str, nodes: int = NODES, depth: int = DEPTH) -> None:
    """Refuse nested values that are more than a reader can go through, however little memory they take.

    Args:
        value: of dicts, lists, tuples, sets and anything else.
        what: words for the file.
        nodes: most values, those that are there twice counted twice.
        depth: most levels.

    Raises:
        UserError: there are more.
    """
    waiting, count = [(value, 0)], 0
    while waiting:
        current, level = waiting.pop()
        if isinstance(current, dict):
            parts: Any = [*current.keys(), *current.values()]
        elif isinstance(current, (list, tuple, set, frozenset)):
            parts = current
        else:
            continue
        count += len(parts)
        if level >= depth or count > nodes:
            raise UserError(f"{what} is not opened: its content is nested too deeply, or repeats itself without end.")
        waiting += [(part, level + 1) for part in parts if isinstance(part, (dict, list, tuple, set, frozenset))]


def check_names(names: Iterable[Any], what: str) -> None:
    """Refuse names of tensors that no network gives: they are told in messages, one line each.

    Raises:
        UserError: a name is no text, too long, or has characters that cannot be printed.
    """
    for name in names:
        if not isinstance(name, str) or len(name) > NAME or not name.isprintable():
            raise UserError(f"{what} has a tensor with the name {str(name)[:60]!r}, which no network gives.")
