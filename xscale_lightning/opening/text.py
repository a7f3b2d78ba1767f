"""JSON and YAML from strangers, and the files that a folder's configuration names."""

import json
import re
from pathlib import Path
from typing import Any

import yaml

from xscale_lightning.errors import UserError
from xscale_lightning.opening.limits import check_extent

MAX_BYTES = 16_000_000
YAML_NODES, YAML_DEPTH = 1_000_000, 100
EVENTS = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def within(folder: str | Path, name: str, what: str) -> Path:
    """The file `name` of a folder, which neither the name nor a link leads out of.

    Links of the Hugging Face cache, from its `snapshots` to its `blobs`, are allowed.

    Raises:
        UserError: it is elsewhere, or no file.
    """
    folder, file = Path(folder), Path(folder) / name
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{what} names {name[:100]!r}, which is outside of the folder.")
    if not file.is_file():
        raise UserError(f"{what} has no file {name!r}.")
    there, home = file.resolve(), folder.resolve()
    cache = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if not there.is_relative_to(home) and there.parent != cache:
        raise UserError(f"{what}: {name!r} is a link to a file outside of the folder; copy that file into it.")
    return file


def check_file(path: str | Path, what: str) -> None:
    """Refuse what is there and is no file of text that ends: a folder, a pipe, a device, or many megabytes.

    Raises:
        UserError: it is.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise UserError(f"{what} cannot be read (it is a folder, a pipe or a device): give a YAML file.")
    if path.is_file() and path.stat().st_size > MAX_BYTES:
        raise UserError(f"{what} cannot be read (it has {path.stat().st_size} bytes): give a YAML file.")


def _text(path: Path, what: str) -> str:
    problem = ""
    try:
        length = path.stat().st_size
        if path.is_file() and length <= MAX_BYTES:
            return path.read_text(encoding="utf-8")
        problem = f"has {length} bytes, far more than any" if path.is_file() else "is a folder, a pipe or a device"
    except UnicodeDecodeError:
        problem = "is no text"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    raise UserError(f"{what} {problem}.")


def read_json(path: str | Path, what: str) -> Any:
    """Content of a JSON file.

    Raises:
        UserError: it cannot be read, is too large, is nested too deeply, names a key twice, or has NaN or infinity.
    """
    text, problem = _text(Path(path), what), ""
    try:
        content = json.loads(text, object_pairs_hook=once, parse_constant=_finite)
    except RecursionError:
        problem = "is nested too deeply"
    except ValueError as error:
        problem = f"cannot be read: {str(error)[:120]}"
    if problem:
        raise UserError(f"{what} {problem}.")
    check_extent(content, what)
    return content


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A table of JSON.

    Raises:
        ValueError: a key is there twice, of which readers take one or the other.
    """
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key is there twice")
    return found


def _finite(word: str) -> float:
    raise ValueError(f"{word} is no number")


def read_yaml(path: str | Path, what: str) -> Any:
    """Content of a YAML file of plain values.

    Raises:
        UserError: it cannot be read, is no YAML, has object tags, or is nested too deeply.
    """
    text, problem = _text(Path(path), what), ""
    check_yaml(text, what)
    try:
        return yaml.load(text, EVENTS)  # a safe loader
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
    raise UserError(f"{what} is no valid YAML: {problem}.")


def check_yaml(text: str, what: str = "a configuration") -> None:
    """Refuse YAML that is small and stands for more than a reader can go through: aliases of aliases, deep nesting.

    Text that is no YAML passes: its reader says what is wrong with it.

    Raises:
        UserError: with the reason.
    """
    if "&" not in text and len(text) < MAX_BYTES and _opened(text) <= YAML_DEPTH:
        return
    problem = f"{what} is nested too deeply, or its aliases repeat one another without end: write it out."
    if _brackets(text) > 10 * YAML_DEPTH:  # even to take it apart would take minutes
        raise UserError(problem)
    sizes: dict[str, int] = {}
    stack: list[tuple[str | None, int]] = []  # anchor and values so far of every collection that is open
    try:
        for event in yaml.parse(text, Loader=EVENTS):
            anchor = getattr(event, "anchor", None)
            if isinstance(event, yaml.CollectionStartEvent):
                stack.append((anchor, 1))
                continue
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, count = stack.pop()
            elif isinstance(event, yaml.AliasEvent):
                anchor, count = None, sizes.get(event.anchor, YAML_NODES)  # an alias of what is open holds itself
            elif isinstance(event, yaml.ScalarEvent):
                count = 1
            else:
                continue
            if anchor is not None:
                sizes[anchor] = count
            if stack:
                stack[-1] = (stack[-1][0], stack[-1][1] + count)
            if count >= YAML_NODES or (stack and stack[-1][1] >= YAML_NODES) or len(stack) > YAML_DEPTH:
                break
        else:
            return
    except yaml.YAMLError:
        if _opened(text) <= YAML_DEPTH:
            return
    raise UserError(problem)


def _opened(text: str) -> int:
    """At most how deep YAML without anchors is nested: brackets, dashes and colons, and the indentation."""
    marks = sum(map(text.count, "[{")) + text.count("- ") + text.count("? ") + text.count("-\n")
    return min(marks, len(text)) if marks > YAML_DEPTH else max(marks, *map(_indent, text.split("\n")))


def _brackets(text: str) -> int:
    """How many brackets are open at once."""
    depth = deepest = 0
    for mark in re.findall(r"[\[{}\]]", text):
        depth += 1 if mark in "[{" else -1
        deepest = max(deepest, depth)
    return deepest


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))
