"""`--ckpt_path last`: which run goes on, from which of its checkpoints, and in which folder."""

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from xscale_lightning import checkpoints
from xscale_lightning.callbacks.start_record import StartRecord
from xscale_lightning.commands.stage_options import CONFIG_OPTIONS, StagedCommand, last_given, options
from xscale_lightning.errors import Stopped, UserError
from xscale_lightning.files import write_bytes
from xscale_lightning.opening import read_json, read_yaml

LAST = "last"
CONFIG = "config.yaml"
LENGTHS = ("max_epochs", "min_epochs", "max_steps", "min_steps", "max_time")
# Keys that may differ between a run and the command that goes on with it: they do not change what is trained.
FREE = (
    *("ckpt_path", "output", "weights_only", "progress", "trace", "preemption", "data.init_args.num_workers"),
    *(f"trainer.{name}" for name in (*LENGTHS, "enable_progress_bar", "enable_model_summary", "log_every_n_steps")),
)


@dataclass
class Found:
    """A run that can go on.

    Attributes:
        run: its folder; of a run in stages that of the whole run.
        checkpoint: the newest one that is whole.
        step: its optimizer step.
        config: the run's configuration.
        stay: whether it goes on in its folder; else, because it had been finished, in a new one.
    """

    run: Path
    checkpoint: Path
    step: int
    config: dict[str, Any]
    stay: bool


def find(config: Mapping[str, Any], arguments: list[str], fitting: bool = True) -> Found | None:
    """The run that `--ckpt_path last` means; None where it has yet to be started, which is said.

    It is the run whose own `config.yaml` is among the arguments; else the newest below the output folder that has this
    configuration, but for `FREE`.

    Args:
        config: of the command, plain, as a run's `config.yaml` would have it.
        arguments: the command line.
        fitting: whether the run is to go on. Else it is evaluated, and its model and data are all that has to agree.

    Raises:
        UserError: the run that was named has no checkpoint that can be read, or there is none to evaluate.
        Stopped: with code 0: the run is finished.
    """
    named = named_run(arguments)
    if named is not None:
        if path := newest_checkpoint(named):
            return settle(named, path, config, fitting)
        remedy = "leave out --ckpt_path to start anew" if fitting else "give the file of a checkpoint"
        raise UserError(f"--ckpt_path last: no checkpoint that can be read is in {where(named)}: {remedy}.")
    output, reason = Path(config["output"]), ""
    for run, saved in runs_of(output, config):
        if difference := differs(saved, config, fitting):
            key, old, new = difference
            reason = reason or f"no run has this configuration (in '{run}', {key} is {shown(old)}, not {shown(new)})"
        elif path := newest_checkpoint(run):
            return settle(run, path, config, fitting)
        else:
            reason = f"the run in '{run}' was stopped before its first checkpoint"
    reason = f"{reason or 'there is no run'} below '{output}'"
    if not fitting:
        raise UserError(f"--ckpt_path last: {reason}: give the file of a checkpoint.")
    say(f"--ckpt_path last: {reason}: starting from the beginning.")
    return None


def settle(run: Path, path: Path, config: Mapping[str, Any], fitting: bool) -> Found:
    """Decide where the run goes on.

    Raises:
        Stopped: with code 0: it is finished, and no longer one is asked for.
    """
    saved = load(run / CONFIG)
    checkpoint, _ = checkpoints.read_metadata(path)
    finished = is_finished_run(run, saved)
    longer = first_difference(lengths(saved), lengths(config), free=()) is not None
    if finished and not longer and fitting:
        raise Stopped(
            f"the run in '{run}' is finished, so there is nothing to go on with; to train on, give a larger "
            "trainer.max_epochs or max_steps; to start anew, leave out --ckpt_path.",
            0,
        )
    found = Found(run, path, int(checkpoint["global_step"]), saved, stay=not finished)
    place = "" if found.stay else ", which was finished, in a new folder"
    what = f"going on with the run in '{run}'{place}, from " if fitting else ""
    say(f"--ckpt_path last: {what}'{path}' (step {found.step}).")
    return found


def named_run(arguments: list[str]) -> Path | None:
    """Folder of the last run whose `config.yaml` is among the arguments, or None."""
    found = None
    for option, text, _, _ in options(arguments):
        if option in CONFIG_OPTIONS and text and Path(text).name == CONFIG:
            folder = Path(text).parent
            if (folder / "checkpoints").is_dir() or stage_folders(folder) or any(folder.glob("events.out.*")):
                found = folder
    return found


def stage_folders(run: Path) -> list[Path]:
    """Folders of a run's stages, in order; none for a run without stages."""
    folders = [path for path in run.glob("stage_*_*") if path.is_dir() and path.name.split("_")[1].isdigit()]
    return sorted(folders, key=lambda path: int(path.name.split("_")[1]))


def where(run: Path) -> str:
    """Where the checkpoints of a run are, for people."""
    folders = stage_folders(run) or [run]
    return ", ".join(f"{folder / 'checkpoints'}" for folder in folders)


def newest_checkpoint(run: Path) -> Path | None:
    """The checkpoint of a run that is furthest on and whole; of a run in stages of its last stage that has one."""
    for folder in [*reversed(stage_folders(run)), run]:
        files = [path for path in (folder / "checkpoints").glob("*.ckpt") if path.is_file()]
        for path in checkpoints.by_position(files, pass_over):
            try:
                checkpoints.read_metadata(path)
                return path
            except UserError as error:
                pass_over(error)
    return None


def pass_over(problem: object) -> None:
    """Say that a checkpoint cannot be read."""
    say(f"warning: --ckpt_path last passes over a file. {problem}")


def runs_of(output: Path, config: Mapping[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    """`(folder, configuration)` of the runs below `output` of the same method, the newest first."""
    name = config["model"]["class_path"]
    files = sorted(output.glob(f"*/*/{CONFIG}"), key=lambda path: (path.parent.name, path), reverse=True)
    for file in files:
        try:
            if name not in file.read_text(encoding="utf-8"):
                continue
        except (OSError, UnicodeDecodeError):
            continue
        saved = load(file)
        if saved.get("model", {}).get("class_path") == name and "trainer" in saved:
            yield file.parent, saved


def load(file: Path) -> dict[str, Any]:
    """Content of a run's `config.yaml`; nothing where it cannot be read, or is not what a run writes."""
    try:
        content = read_yaml(file, str(file))
    except UserError:
        return {}
    return content if _is_config(content) and all(map(_is_stage, content.get("stages") or [])) else {}


def _is_config(content: Any) -> bool:
    parts = {"model": dict, "trainer": dict, "data": dict, "stages": list}
    return isinstance(content, dict) and all(isinstance(content.get(k) or kind(), kind) for k, kind in parts.items())


def _is_stage(stage: Any) -> bool:
    return isinstance(stage, dict) and isinstance(stage.get("name"), str) and _is_config(stage.get("config"))


def is_finished_run(run: Path, config: Mapping[str, Any]) -> bool:
    """Whether a run has come to its end: of a run in stages the last one has."""
    stages = config.get("stages") or []
    folder = run / f"stage_{len(stages)}_{stages[-1]['name']}" if stages else run
    try:
        content = read_json(folder / "results.json", "results.json")
    except UserError:
        return False
    return isinstance(content, dict) and (content.get("command"), content.get("status")) == ("fit", "finished")


def lengths(config: Mapping[str, Any]) -> dict[str, Any]:
    """How long a configuration trains, stage by stage."""
    parts = [config, *(stage.get("config", {}) for stage in config.get("stages") or [])]
    return {"lengths": [{name: part.get("trainer", {}).get(name) for name in LENGTHS} for part in parts]}


def differs(saved: Mapping[str, Any], now: Mapping[str, Any], fitting: bool = True) -> tuple[str, Any, Any] | None:
    """First key, with both values, by which a run is another one than the command asks for."""
    before, after = saved.get("stages") or [], now.get("stages") or []
    names = [[stage["name"] for stage in stages] for stages in (before, after)]
    if names[0] != names[1]:
        return "stages", names[0], names[1]
    parts = [(saved, now)]
    for one, two in zip(before, after, strict=True):
        parts += [({**one, "config": None}, {**two, "config": None}), (one["config"], two["config"])]
    kept = None if fitting else ("model", "data")
    for one, two in parts:
        old = {key: value for key, value in one.items() if key != "stages" and (kept is None or key in kept)}
        if found := first_difference(old, two):
            return found
    return None


def first_difference(saved: Any, now: Any, free: tuple[str, ...] = FREE, key: str = "") -> tuple[str, Any, Any] | None:
    """First key, with both values, by which two configurations differ; keys that only `now` has do not count.

    A key of the present version that a run of an earlier one does not have has its default value.
    """
    if key in free:
        return None
    if isinstance(saved, Mapping) and isinstance(now, Mapping):
        parts = [(f"{key}.{name}" if key else str(name), saved[name], now.get(name)) for name in saved]
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        parts = [(key, *pair) for pair in zip(saved, now, strict=True)]
    else:
        return None if saved == now else (key, saved, now)
    return next((found for name, old, new in parts if (found := first_difference(old, new, free, name))), None)


@rank_zero_only
def say(text: str) -> None:
    """One line for the user; once, however many processes there are."""
    print(f"xscale: {text}", file=sys.stderr, flush=True)


def shown(value: Any) -> str:
    """A value in a message."""
    text = repr(value)
    return text if len(text) <= 40 else text[:37] + "..."


def first_stage(command: StagedCommand, default: int) -> tuple[int, str | None]:
    """`(index of the stage of --ckpt_path, its path)`; `(default, None)` without a checkpoint.

    Outside of `fit` a checkpoint of a run without stages takes the default, too.

    Raises:
        UserError: the checkpoint cannot be read, or is of a stage that there is not.
    """
    path = last_given(command.common, "ckpt_path")
    if path is None:
        return default, None
    known = ", ".join(f"{number} {stage.name!r}" for number, stage in enumerate(command.stages, start=1))
    if path == LAST and command.verb != "fit" and (run := named_run(command.common)):
        path = newest_checkpoint(run) or path
    path = str(path)
    if path in ("best", "last", "hpc", "registry"):
        if command.verb != "fit":
            return default, None
        raise UserError(f"--ckpt_path {path!r} names no stage: give the file of a checkpoint.")
    _, saved = checkpoints.read_metadata(path)
    stage = saved.get("stage")
    if stage is None:
        if command.verb != "fit":
            return default, path
        raise UserError(f"--ckpt_path {path!r} is of a run without stages; the configuration has stages {known}.")
    index = stage["number"] - 1
    if not (0 <= index < len(command.stages) and command.stages[index].name == stage["name"]):
        raise UserError(
            f"--ckpt_path {path!r} is of stage {stage['number']} {stage['name']!r}; the configuration has stages "
            f"{known}: give the stages of that run."
        )
    return index, path


def is_finished(checkpoint: dict[str, Any], trainer: Trainer) -> bool:
    """Whether the run of a checkpoint had reached the length that `trainer` has."""
    epochs = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["processed"]
    if trainer.max_steps != -1 and checkpoint["global_step"] >= trainer.max_steps:
        return True
    return trainer.max_epochs not in (None, -1) and epochs >= trainer.max_epochs  # type: ignore[operator]


class SavedConfig(StartRecord):
    """Writes the run's `config.yaml`, whole or not at all; a run that goes on keeps its own if that says the same."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it on the first process, before anything is trained."""
        folder = trainer.log_dir  # all processes take part in this
        if folder is None or not trainer.is_global_zero:
            return
        file = Path(folder) / CONFIG
        text = self.parser.dump(self.config, skip_none=False).encode()
        if not file.is_file() or (self.overwrite and file.read_bytes() != text):
            file.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(file, text)
        self.save_config(trainer, pl_module, stage)
