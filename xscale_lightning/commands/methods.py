"""`xscale methods`: which methods can be trained, ours and those of installed plug-ins; `--verbose` says more."""

import argparse
import ast
import importlib.util
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

from xscale_lightning.methods.discovery import BUILT_IN, method_entries

SHARED = ("bands", "backbone", "optimizer", "views", "attention", "init_from", "adapt_bands")  # what every method has
# Of those that ask for more than images; a plug-in says it in its docstring.
NEEDS = {
    "CrossScaleMAE": "single images (it makes its own pair)",
    "SpatialAffinity": "pairs of two resolutions (image_hr), or a source that needs none",
    "S2MAE": "single images; bands that fill its spectral cubes, or backbone.pad",
}


def docstring(module: str) -> str:
    """A module's docstring, read from its source without importing it."""
    try:
        spec = importlib.util.find_spec(module)
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        return ast.get_docstring(ast.parse(source)) or "(no description)"
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        return f"cannot be imported: {error}"


def first_line(module: str) -> str:
    """First line of a module's docstring."""
    return docstring(module).split("\n")[0]


def origin(name: str, entry: EntryPoint) -> str:
    """The package that announces a method."""
    return "xscale_lightning" if name in BUILT_IN else entry.dist.name if entry.dist else "plug-in"


def main(argv: list[str]) -> None:
    """Print the table, or a paragraph for each."""
    parser = argparse.ArgumentParser(prog="xscale methods", description=__doc__)
    parser.add_argument("name", nargs="*", metavar="NAME", help="these methods only")
    parser.add_argument("--verbose", action="store_true", help="needs, options, configurations and page of each")
    args = parser.parse_args(argv[1:])
    entries = {name: entry for name, entry in method_entries().items() if not args.name or name in args.name}
    unknown = sorted(set(args.name) - set(entries))
    if unknown:
        from xscale_lightning.errors import UserError

        raise UserError(f"NAME {unknown[0]!r}: there is no such method; known are {', '.join(method_entries())}.")
    if args.verbose:
        print("\n\n".join("\n".join(described(name, entry)) for name, entry in entries.items()))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "class", "from", "what", title="methods: xscale fit --model NAME")
    for name, entry in entries.items():
        table.add_row(name, entry.attr, origin(name, entry), first_line(entry.module))
    Console().print(table)


def described(name: str, entry: EntryPoint) -> Iterator[str]:
    """Lines about a method: what it is, what it needs, its options with their defaults, where its files are."""
    from xscale_lightning.errors import UserError
    from xscale_lightning.methods.discovery import load_method_class

    yield f"{name}: {first_line(entry.module)}"
    yield f"  class     {entry.value.replace(':', '.')} ({origin(name, entry)})"
    try:
        cls = load_method_class(name)
    except UserError as error:
        yield f"  broken    {error}"
        return
    yield f"  needs     {'; '.join(needs(cls))}"
    for number, line in enumerate(options(cls)):
        yield f"  {'options' if not number else '':<9} {line}"
    for title, paths in (("configs", configurations(name, entry)), ("page", pages(name))):
        if paths:
            yield f"  {title:<9} {', '.join(paths)}"


def needs(cls: type) -> list[str]:
    """What a method asks of the data."""
    found = [NEEDS.get(cls.__name__, "single images"), "any number of bands"]
    if not getattr(cls, "sample_wise", True):
        found.append("large batches (its loss compares samples)")
    return found


def options(cls: type) -> list[str]:
    """Arguments of a method beside those that all share: `--model.NAME DEFAULT`."""
    import inspect

    found = []
    for parameter in inspect.signature(cls).parameters.values():
        if parameter.name in SHARED or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            continue
        default = "required" if parameter.default is parameter.empty else shown(parameter.default)
        found.append(f"--model.{parameter.name} {default}")
    return found


def shown(value: object) -> str:
    """A default for people: the fields of a dataclass, words without quotes."""
    import dataclasses

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{field.name}: {shown(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return "{" + ", ".join(fields) + "}"
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def configurations(name: str, entry: EntryPoint) -> list[str]:
    """Configurations that name the method, below the working directory's `configs`."""
    path = entry.value.replace(":", ".")
    found = []
    for file in sorted(Path("configs").glob("**/*.yaml")):
        text = file.read_text(encoding="utf-8", errors="replace")
        lines = (line.split("#")[0].strip() for line in text.splitlines())
        if any(line in (f"class_path: {name}", f"class_path: {path}", f"class_path: {entry.attr}") for line in lines):
            found.append(file.as_posix())
    return found


def pages(name: str) -> list[str]:
    """Page of the documentation below the working directory, if it is there."""
    return [path.as_posix() for path in [Path("docs") / "methods" / f"{name}.md"] if path.is_file()]
