"""The data module that `--config`, `--data` and `--data.NAME VALUE` describe, for verbs that do not train."""

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

from xscale_lightning.data.datamodule import Split, XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.opening import read_yaml

SPLITS: tuple[Split, ...] = ("train", "val", "test")


def is_file(text: str) -> bool:
    """Whether `--data` gives a configuration, not the name of a class."""
    return os.path.splitext(text)[1] in (".yaml", ".yml", ".json")


def data_section(path: str, argument: str) -> dict[str, Any]:
    """The `data` section of a configuration.

    Raises:
        UserError: no such file, or it has none.
    """
    content = read_yaml(path, f"{argument} '{path}'")
    section = content.get("data") if isinstance(content, dict) else None
    if isinstance(section, str):
        return {"class_path": section}
    if not isinstance(section, dict):
        raise UserError(f"{argument} '{path}' has no data section; give a configuration that has.")
    return section


def laid_over(before: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any]:
    """A `data` section over an earlier one, as `fit` does it: another class begins with its own arguments."""
    path = section.get("class_path", before.get("class_path"))
    same = path == before.get("class_path")
    arguments = _merged(before.get("init_args") or {} if same else {}, section.get("init_args") or {})
    return {"class_path": path, "init_args": arguments}


def _merged(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(before)
    for key, value in after.items():
        both = isinstance(value, Mapping) and isinstance(merged.get(key), Mapping) and "class_path" not in value
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def open_data(
    given: str | Mapping[str, Any], options: Sequence[str], batch_size: int | None = None
) -> tuple[XScaleDataModule, str]:
    """The data module of a class name or a `data` section, and its configuration as one line.

    Args:
        given: name of the class, or `{class_path, init_args}`.
        options: `--data.NAME VALUE`, over it.
        batch_size: of its loaders; what the configuration says if None.

    Raises:
        UserError: no such class, or arguments that it does not have.
    """
    from xscale_lightning.commands import train  # its imports make the data modules known by their short names
    from xscale_lightning.commands.parser import Parser

    text = given if isinstance(given, str) else json.dumps(given, default=str)
    parser = Parser()
    parser.add_subclass_arguments(train.XScaleDataModule, "data", required=True)
    config = parser.parse_args(["--data", text, *options])
    described = config.data.as_dict()
    for name in ("batch_size", "num_workers"):  # they decide nothing but the speed, or are said elsewhere
        described["init_args"].pop(name, None)
    if batch_size is not None:
        config.data.init_args.batch_size = batch_size
    return parser.instantiate(config).data, json.dumps(described, default=str, sort_keys=True)


def choose_split(data: XScaleDataModule, wanted: str | None) -> tuple[Split, Any]:
    """The split asked for, or the first there is of test, val and train, opened.

    Raises:
        UserError: there is no such split.
    """
    if data.downloads:
        data.prepare_data()
    for split in [wanted] if wanted else reversed(SPLITS):
        dataset = data.dataset(split)  # type: ignore[arg-type]
        if dataset is not None:
            return split, dataset  # type: ignore[return-value]
    raise UserError(f"--split {wanted}: {data.name} has no such split; choose another.")
