"""The cells of a bench: every command that it runs, checked, with the hash that says whether it has been run."""

import gc
import hashlib
import json
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import yaml

from xscale_lightning import checkpoints
from xscale_lightning.commands.bench_file import PRETRAINING, Bench, Evaluation, Model
from xscale_lightning.commands.stage_options import take_apart
from xscale_lightning.commands.stages import StagedRun, quiet, told_of
from xscale_lightning.commands.train import CLI, build
from xscale_lightning.data.bands import Bands
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.init_from import open_source, same_bands
from xscale_lightning.methods.discovery import class_path
from xscale_lightning.opening import read_yaml
from xscale_lightning.pretrained import locate
from xscale_lightning.records import check_class_paths

Plain = dict[str, Any]
Option = Literal["--ckpt_path", "--model.init_from"]
OURS = ("output", "ckpt_path", "stages", "seed_everything")  # keys that the bench sets itself
INDIFFERENT = ("num_workers", "enable_progress_bar")  # keys whose value is no reason to compute again


@dataclass(frozen=True)
class Cell:
    """One command: the pretraining of a model, or an evaluation of it."""

    model: str
    evaluation: str
    """Its name, or `pretraining`."""
    seed: int
    key: str
    """Hash of all it depends on."""
    arguments: tuple[str, ...]
    """Command line, without output, and without the weights where those are still to be trained."""
    source: "Cell | str | None" = None
    """Where the weights come from: the pretraining, or a path; None for a pretraining."""
    option: Option = "--ckpt_path"
    """What gives them to the command."""

    @property
    def name(self) -> str:
        """For people."""
        return f"{self.model}, seed {self.seed}, {self.evaluation}"

    @property
    def folder(self) -> Path:
        """Where it is written, below the bench's `runs`."""
        return Path(self.model) / f"seed_{self.seed}" / f"{self.evaluation}-{self.key[:8]}"


@dataclass(frozen=True)
class Start:
    """A model as its evaluations find it."""

    key: str
    """Hash of the configuration or the weights."""
    base: Plain
    """Configuration that `xscale test` runs with."""
    bands: Bands | None
    """None where they are not known before it is trained."""
    path: str | None = None
    """Weights that there are already."""
    config: Plain | None = None
    """Resolved configuration of the pretraining, without seed."""
    arguments: tuple[str, ...] = ()


def plan(bench: Bench, options: Sequence[str]) -> list[Cell]:
    """Check everything that the bench would run, and list it in the order in which it runs.

    Args:
        bench: the file.
        options: options for every command.

    Raises:
        UserError: a part of it would be refused.
    """
    cells: list[Cell] = []
    seed = bench.seeds[0]
    for model in bench.models.values():
        start = told_of(f"model {model.name!r}", partial(_start, model, options, seed))
        checked = {
            e.name: told_of(f"evaluation {e.name!r} of model {model.name!r}", partial(_check, e, start, options, seed))
            for e in bench.evaluations.values()
        }
        for seed_here in bench.seeds:
            source: Cell | str | None = start.path
            if start.config is not None:
                key = _hash({**start.config, "seed_everything": seed_here, "weights": start.key})
                source = Cell(model.name, PRETRAINING, seed_here, key, _seeded(start.arguments, seed_here))
                cells.append(source)
            for evaluation in bench.evaluations.values():
                if isinstance(source, str) and evaluation.verb == "test" and seed_here != seed:
                    continue  # the same weights asked once more would pass for another run
                arguments, option, config = checked[evaluation.name]
                weights = source.key if isinstance(source, Cell) else start.key
                key = _hash({**config, "seed_everything": seed_here, "verb": evaluation.verb, "weights": weights})
                words = _seeded(arguments, seed_here)
                cells.append(Cell(model.name, evaluation.name, seed_here, key, words, source, option))
    return cells


def _seeded(arguments: Sequence[str], seed: int) -> tuple[str, ...]:
    return (*arguments, "--seed_everything", str(seed))


def _configs(paths: Sequence[str]) -> list[str]:
    return [word for path in paths for word in ("--config", path)]


def _start(model: Model, options: Sequence[str], seed: int) -> Start:
    """Check a model by itself."""
    if not model.fit:
        return _existing(str(model.init_from))
    words = [*_configs(model.fit), *model.options]
    if model.steps:
        words += ["--trainer.max_steps", str(model.steps), "--trainer.max_epochs", "-1"]
    words += options
    if model.init_from is not None:
        words += ["--model.init_from", model.init_from]
    if model.steps == 0:
        words += ["--trainer.max_steps", "0"]  # whatever the options say: it is what the model is
    config, cli = resolve(_seeded(["fit", *words], seed))
    base = config["stages"][-1]["config"] if config.get("stages") else config
    weights = "" if model.init_from is None else _weights(model.init_from)
    bands = None if cli is None else cli.model.bands
    return Start(weights, _base(base), bands, config=_lasting(config), arguments=("fit", *words))


def _existing(path: str) -> Start:
    """Weights that are there: of a run of ours, with its configuration, or of any encoder."""
    if not Path(path).exists():
        raise UserError(f"init_from {path!r} does not exist: give a checkpoint, or the folder of a run or an export.")
    file = locate(path)
    if file.suffix == ".ckpt" and file.is_file():
        _, saved = checkpoints.read_metadata(file)
        written = file.parent.parent / "config.yaml"
        if written.is_file():
            base = read_yaml(written, f"'{written}'")
            check_class_paths(base, f"'{written}'")
        else:
            base = {"model": {"class_path": saved["class_path"], "init_args": saved["init_args"]}}
        return Start(_weights(path), _base(base), Bands.from_dict(saved["bands"]), str(file))
    found = open_source(path, None, None)
    base = {"model": {"class_path": class_path("mae"), "init_args": {"backbone": checkpoints.plain(found.config)}}}
    return Start(_weights(path), base, None, path)


def _base(config: Plain) -> Plain:
    """A run's configuration without what belongs to that run alone; its starting weights are in the checkpoint."""
    config = {key: value for key, value in config.items() if key not in OURS}
    arguments = config["model"]["init_args"]
    arguments = {**arguments, "init_from": None} if "init_from" in arguments else arguments
    return {**config, "model": {**config["model"], "init_args": arguments}}


def _check(evaluation: Evaluation, start: Start, options: Sequence[str], seed: int) -> tuple[list[str], Option, Plain]:
    """Arguments of an evaluation of one model, the option that gives it the weights, and its configuration."""
    words = [*_configs(evaluation.configs), *evaluation.options, *options]
    frozen = evaluation.verb == "test"
    arguments = ["test", "--config", json.dumps(start.base), *words] if frozen else ["fit", *words]
    shape: list[str] = []  # of an encoder that is not trained yet, so that it cannot be given to the recipe itself
    if not frozen and start.path is None and (backbone := start.base["model"]["init_args"].get("backbone")):
        shape = ["--config", json.dumps({"model": {"init_args": {"backbone": backbone}}})]
    config, cli = resolve(_seeded([*arguments, *shape], seed))
    if cli is None:
        raise UserError("a recipe with stages cannot be an evaluation: leave its stages out.")
    option: Option = "--model.init_from"
    if frozen:
        _check_probes(cli)
        if start.bands is not None and _like(start.bands, cli.model.bands):
            option = "--ckpt_path"  # the whole method; below the encoder alone, with the statistics it was trained with
    elif not hasattr(cli.model, "test_after_fit"):
        raise UserError(f"{type(cli.model).__name__} is no fine-tuning task: see configs/finetune, or use test.")
    elif cli.datamodule.dataset("test") is None and not cli.datamodule.downloads:
        raise UserError(f"{cli.datamodule.name} has no test split, so there would be no score of the test split.")
    if option == "--model.init_from" and start.bands is not None:
        _check_bands(start.bands, cli)
    if start.path is not None:
        config, _ = resolve(_seeded([*arguments, option, start.path], seed))
    config["model"]["init_args"].pop("init_from", None)  # its content counts, not its path
    return arguments, option, _lasting(config)


def _check_probes(cli: CLI) -> None:
    """Open the data that probes have of their own, which a run does not before its weights are there."""
    for probe in cli.trainer.callbacks:  # type: ignore[attr-defined]
        data = getattr(probe, "data", None)
        if not isinstance(data, XScaleDataModule) or data.downloads:
            continue
        data.setup("test")
        if difference := cli.model.bands.difference(data.bands):
            raise UserError(
                f"{type(probe).__name__}.data: the bands of {data.name} are not the model's ({difference}); choose the "
                "same ones."
            )


def _like(there: Bands, here: Bands) -> bool:
    """Whether a checkpoint of one record can be taken as it is with data of the other."""
    statistics = [[(band.mean, band.std) for band in bands.bands] for bands in (there, here)]
    return not there.difference(here) and statistics[0] == statistics[1]


def _check_bands(there: Bands, cli: CLI) -> None:
    """What the command would refuse once the weights are there."""
    here = cli.model.bands
    if cli._get(cli.config, "model").init_args.get("adapt_bands") or same_bands(there, here):
        return
    raise UserError(
        f"the model is trained on other bands than this data's: {there.difference(here) or 'wavelengths or unit'}.\n"
        "Choose the same bands with data.bands, or give the evaluation the option --model.adapt_bands true."
    )


def resolve(arguments: Sequence[str]) -> tuple[Plain, CLI | None]:
    """Make everything of a command, as a check; returns what its configuration comes to, and the command.

    Of a command in stages the configuration holds all of them, and no command is returned.
    """
    command = take_apart(list(arguments))
    gc.collect()  # what the check before has made
    if command.stages and command.verb == "fit":
        run = StagedRun(command)
        run.check(0, None)
        return run.folder.config, None
    with quiet(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="neither --ckpt_path nor")  # the weights come later
        cli = build(CLI, arguments=[command.verb, *command.common], check_only=True)
    return yaml.safe_load(cli._parser(command.verb).dump(cli.config[command.verb], skip_none=False)), cli


def _lasting(config: Plain) -> Plain:
    """A configuration without keys that differ between commands that are otherwise the same."""
    return {key: value for key, value in config.items() if key not in ("output", "ckpt_path", "seed_everything")}


def _hash(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(_different(content), sort_keys=True, default=str).encode()).hexdigest()


def _different(value: Any) -> Any:
    """`value` without the keys that make no difference."""
    if isinstance(value, Mapping):
        return {key: _different(part) for key, part in value.items() if key not in INDIFFERENT}
    return [_different(part) for part in value] if isinstance(value, (list, tuple)) else value


def _weights(source: str) -> str:
    """Hash of weights by their content; of a model of timm's by its name."""
    if not Path(source).exists():
        return source
    found = locate(source)
    digest = hashlib.sha256()
    for file in sorted(path for path in found.iterdir() if path.is_file()) if found.is_dir() else [found]:
        with file.open("rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()
