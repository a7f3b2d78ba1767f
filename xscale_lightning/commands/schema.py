"""`xscale schema`: the JSON schema of `xscale fit` configurations, with which editors complete and check YAML."""

import argparse
import contextlib
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
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.discovery import method_entries

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
    with contextlib.suppress(ImportError):  # data sets that a configuration may name are described once they are known
        import xscale_lightning.data.oscd
        import xscale_lightning.data.ucmerced  # noqa: F401 (and with them TorchGeo's own)
    completions.get_all_subclass_paths = list_what_can_be_listed
    try:
        train.build(SchemaCLI, arguments=["fit"])
    except _Built as built:
        return loosened(built.args[0], short_names())
    finally:
        completions.get_all_subclass_paths = listed
    raise UserError("the installed jsonargparse gives no schema: install the version in requirements.lock.")


def short_names() -> dict[str, list[str]]:
    """Other names of a class, by its path: the announced ones of methods."""
    names: dict[str, list[str]] = {}
    for name, entry in method_entries().items():
        names.setdefault(entry.value.replace(":", "."), []).append(name)
    return names


def is_method(path: str) -> bool:
    """Whether a class path is that of a method or task."""
    module, _, name = path.rpartition(".")
    cls = getattr(sys.modules.get(module), name, None)
    return isinstance(cls, type) and issubclass(cls, SSLModule)


def loosened(schema: Any, names: dict[str, list[str]]) -> Any:
    """The schema for files that are laid over one another, and that name classes as people do.

    A file may leave out what another one says, so nothing is required; a class goes by its path, its own name or an
    announced name; a model may have `optional_args`.
    """
    if isinstance(schema, list):
        return [loosened(part, names) for part in schema]
    if not isinstance(schema, dict):
        return schema
    changed = {
        key: loosened(part, names) for key, part in schema.items() if key != "required" or isinstance(part, dict)
    }
    properties = changed.get("properties")
    path = properties.get("class_path", {}).get("const") if isinstance(properties, dict) else None
    if isinstance(properties, dict) and path:
        properties["class_path"] = {"enum": [*names.get(path, []), path.rsplit(".", 1)[-1], path]}
        if is_method(path):
            properties["optional_args"] = {"type": "object"}
    return changed


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
