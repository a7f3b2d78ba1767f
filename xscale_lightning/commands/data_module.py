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


def data_sections(paths: Sequence[str], argument: str) -> list[dict[str, Any]]:
    """The `data` sections of configurations that are laid over one another; those that have none are passed over.

    Raises:
        UserError: no such file, or none of them has one.
    """
    contents = [read_yaml(path, f"{argument} '{path}'") for path in paths]
    having = [path for path, part in zip(paths, contents, strict=True) if isinstance(part, dict) and part.get("data")]
    return [data_section(path, argument) for path in having or paths]


def open_data(
    sections: Sequence[Mapping[str, Any]], cls: str | None, options: Sequence[str], batch_size: int | None = None
) -> tuple[XScaleDataModule, str]:
    """The data module of `data` sections, a class and options, and its configuration as one line.

    They are laid over one another in this order, as `fit` does it.

    Args:
        sections: `{class_path, init_args}` of configurations, of the later ones what differs.
        cls: name of the class.
        options: `--data.NAME VALUE`.
        batch_size: of its loaders; what the configuration says if None.

    Raises:
        UserError: no such class, or arguments that it does not have.
    """
    from jsonargparse import ActionConfigFile

    from xscale_lightning.commands import train  # its imports make the data modules known by their short names
    from xscale_lightning.commands.parser import Parser

    parser = Parser()
    parser.add_argument("--config", action=ActionConfigFile)
    parser.add_subclass_arguments(train.XScaleDataModule, "data", required=True)
    words = [word for part in sections for word in ("--config", json.dumps({"data": part}, default=str))]
    config = parser.parse_args([*words, *(["--data", cls] if cls else []), *options])
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
