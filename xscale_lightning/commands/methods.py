"""`xscale methods`: which methods can be trained, ours and those of installed plug-ins."""

import argparse
import ast
import importlib.util
from pathlib import Path

from xscale_lightning.methods.discovery import BUILT_IN, method_entries


def first_line(module: str) -> str:
    """First line of a module's docstring, read from its source without importing it."""
    try:
        spec = importlib.util.find_spec(module)
        source = Path(spec.origin).read_text(encoding="utf-8") if spec and spec.origin else ""
        return (ast.get_docstring(ast.parse(source)) or "").split("\n")[0] or "(no description)"
    except (ImportError, OSError, SyntaxError, ValueError) as error:
        return f"cannot be imported: {error}"


def main(argv: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="xscale methods", description=__doc__)
    parser.parse_args(argv[1:])
    from rich.console import Console
    from rich.table import Table

    table = Table("name", "class", "from", "what", title="methods: xscale fit --model NAME")
    for name, entry in method_entries().items():
        origin = "xscale_lightning" if name in BUILT_IN else entry.dist.name if entry.dist else "plug-in"
        table.add_row(name, entry.attr, origin, first_line(entry.module))
    Console().print(table)
