"""Stand-ins for what a pickle makes, and the operations on them that a pickle may ask for."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

KEYS = (str, int, float, bool, bytes, type(None))  # of dicts: a nested tuple can take for ever to hash


class Refused(Exception):
    """Why a pickle is not opened; `code` where it asks for something that could run code."""

    def __init__(self, text: str, code: bool = False) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True)
class Claimed:
    """A tensor or a storage as the pickle claims it."""

    numbers: int
    item: int
    """Bytes of one number."""


@dataclass
class Global:
    """Something the pickle names."""

    name: str


@dataclass
class Made:
    """An object that the pickle would make of an allowed class."""

    name: str
    parts: list[Any] = field(default_factory=list)


def popped(stack: list[Any], marks: list[int]) -> list[Any]:
    """What is on the stack above the last mark, taken off it."""
    start = marks.pop()
    parts = stack[start:]
    del stack[start:]
    return parts


def whole_number(value: Any) -> int:
    """A count or a place.

    Raises:
        Refused: it is none.
    """
    if type(value) is not int or not 0 <= value < 2**62:
        raise Refused(f"a size or place is {str(value)[:40]}, which is no number of things")
    return value


def as_list(value: Any) -> list[Any]:
    """A list.

    Raises:
        Refused: it is none.
    """
    if not isinstance(value, list):
        raise Refused("its pickle is damaged")
    return value


def as_dict(value: Any) -> dict[Any, Any]:
    """A dict.

    Raises:
        Refused: it is none.
    """
    if not isinstance(value, dict):
        raise Refused("its pickle is damaged")
    return value


def pair(value: Any) -> Any:
    """A list or tuple of two.

    Raises:
        Refused: it is none.
    """
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise Refused("its pickle is damaged")
    return value


def pairs(parts: Any) -> dict[Any, Any]:
    """The dict of keys and values that follow one another.

    Raises:
        Refused: a key that can take for ever to hash.
    """
    if len(parts) % 2:
        raise Refused("its pickle is damaged")
    found = dict[Any, Any]()
    for key, value in zip(parts[::2], parts[1::2], strict=True):
        if not isinstance(key, KEYS):
            raise Refused("a key of its dictionaries is neither a text nor a number")
        found[key] = value
    return found


def flat_set(parts: Any) -> set[Any]:
    """The set of texts and numbers.

    Raises:
        Refused: another member.
    """
    if not all(isinstance(part, KEYS) for part in parts):
        raise Refused("a set has members that are neither texts nor numbers")
    return set(parts)


TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
LITERALS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
    "EMPTY_SET": set,
}
VALUES = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
}
