"""`xscale schema`: the JSON schema of `xscale fit` configurations, with which editors complete and check YAML."""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jsonargparse._completions_jsonschema as completions
from lightning.pytorch.cli import ArgsType

from xscale_lightning.commands import train
from xscale_lightning.commands.parser import Parser, import_methods
from xscale_lightning.errors import UserError
from xscale_lightning.files import told, write_bytes

listed = completions.get_all_subclass_paths


class SchemaCLI(train.CLI):
    """The command line of `fit`, stopped once its parser is built."""

    schema: dict[str, Any]

    def parse_arguments(self, parser: Parser, args: ArgsType) -> None:  # type: ignore[override]
        """Take the schema of the `fit` parser instead of parsing."""
        self.schema = completions.config_jsonschema(self._subcommand_parsers["fit"])
        raise _Built(self.schema)


class _Built(Exception):
    """Carries the schema out of the constructor that would go on to train."""


def list_what_can_be_listed(cls: type, **options: Any) -> list[str]:
    """Subclasses of `cls`; none for the few classes of other packages whose subclasses jsonargparse stumbles over.

    It fails at `type` itself, and at lazily loaded attributes that some modules announce and do not have.
    """
    try:
        return [] if issubclass(cls, type) else listed(cls, **options)
    except (AttributeError, ImportError, TypeError, ValueError):
        return []


def fit_schema() -> dict[str, Any]:
    """JSON schema of a `fit` configuration, plug-ins included."""
    import_methods()
    completions.get_all_subclass_paths = list_what_can_be_listed
    try:
        train.build(SchemaCLI)
    except _Built as built:
        return built.args[0]
    finally:
        completions.get_all_subclass_paths = listed
    raise UserError("the installed jsonargparse gives no schema: install the version in requirements.lock.")


def main(argv: list[str]) -> None:
    """Write the schema whole or not at all."""
    parser = argparse.ArgumentParser(prog="xscale schema", description=__doc__)
    parser.add_argument("file", help="where to write it, for example xscale.schema.json")
    file = Path(parser.parse_args(argv[1:]).file)
    sys.argv = [sys.argv[0]]
    print("describing all classes that a configuration can name: half a minute ...", file=sys.stderr, flush=True)
    text = json.dumps(fit_schema())
    with told(file, "FILE "):
        write_bytes(file, text.encode())
    print(f"wrote {file} ({len(text) / 1e6:.1f} MB). Put this line on top of a configuration:")
    print(f"# yaml-language-server: $schema={file.absolute().as_uri()}")
