"""`xscale fit | validate | test | predict`, and progressive pretraining: `fit` in stages, one after the other.

Every stage is a run of its own (its data, schedule, folder and checkpoints) that starts from the weights of the one
before, in the same process.
"""

import gc
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_only

from xscale_lightning import checkpoints, unwritten
from xscale_lightning.callbacks.event_log import RunLogger
from xscale_lightning.callbacks.probe import is_sharded
from xscale_lightning.commands.carry import CarryMoments, EndState, carry_weights, check_architecture, moments_by_name
from xscale_lightning.commands.folders import logger_of
from xscale_lightning.commands.optional_args import settle_optional_args
from xscale_lightning.commands.resume import LAST, Found, find, first_stage, is_finished, is_finished_run
from xscale_lightning.commands.run_folder import RunFolder
from xscale_lightning.commands.stage_options import ONE_FOR_ALL, StagedCommand, last_given, take_apart
from xscale_lightning.commands.train import CLI, build, prepare
from xscale_lightning.errors import Stopped, UserError, describe, is_users
from xscale_lightning.methods.base import SSLModule

Result = TypeVar("Result")
LIGHTNING_LOGGERS = ("lightning.pytorch", "lightning.fabric")


def main(argv: list[str]) -> int:
    """Run one of the four verbs; returns 1 if a file that belongs to the run could not be written."""
    unwritten.forget()
    args, before = prepare(argv), sys.argv
    sys.argv = [sys.argv[0], *args]  # Lightning starts its DDP processes from sys.argv: they go through all stages too
    try:
        run(take_apart(args))
        return unwritten.tell()
    except Stopped as stopped:
        stopped.code = unwritten.tell() or stopped.code
        raise
    finally:
        sys.argv = before


def run(command: StagedCommand) -> None:
    """Run a command with or without stages."""
    if any(map(_only_shows, command.common)) and any(command.own.values()):
        raise UserError("--print_config shows all stages: for one alone give --stages.NAME.print_config.")
    if not command.stages or any(map(_only_shows, command.common)):
        build(CLI, arguments=[command.verb, *command.common])
        return
    for index, stage in enumerate(command.stages):
        if any(map(_only_shows, command.own[stage.name])):
            build(CLI, arguments=command.arguments(index))
    if command.verb == "fit":
        StagedRun(command).run()
    else:
        start, _ = first_stage(command, default=len(command.stages) - 1)
        build(CLI, arguments=command.arguments(start))


def _only_shows(word: str) -> bool:
    name = word.split("=")[0]
    return name in ("-h", "--help", "--print_config") or (name.startswith("--") and name.endswith(".help"))


class StageCLI(CLI):
    """The command line of one stage.

    Args:
        run: what the stages share.
        index: number of the stage, from 0.
        end: where the stage before ended; None at the start and after a checkpoint.
    """

    def __init__(self, *args: Any, run: "StagedRun", index: int, end: EndState | None = None, **kwargs: Any) -> None:
        self.run, self.index, self.end = run, index, end
        super().__init__(*args, **kwargs)

    def before_instantiate_classes(self) -> None:
        """A stage of a run that goes on has its folder, with what it has begun there and never saved."""
        if begin := self.run.begin:
            config = self.config[self.config.subcommand]
            self.begin, config.ckpt_path = begin if config.ckpt_path else None, None
            self.save_config_kwargs = {"overwrite": begin.stay}
        super().before_instantiate_classes()

    def after_instantiate_classes(self) -> None:
        """Take over from the stage before, besides all checks of a run."""
        command = self.run.command
        stage = command.stages[self.index]
        if self.end or self.index:
            self.model._start = (None, False)  # init_from is where the first stage starts
        self.model.stage = {"number": self.index + 1, "of": len(command.stages), "name": stage.name}
        super().after_instantiate_classes()
        if is_sharded(self.trainer):
            raise UserError("stages carry whole weights: trainer.strategy must be one device, ddp or auto.")
        if stage.optimizer == "carry" and type(self.model).configure_optimizers is not SSLModule.configure_optimizers:
            raise UserError(f"optimizer 'carry' needs the usual AdamW, and {type(self.model).__name__} makes its own.")
        if self.end:
            check_architecture(self.model, self.end.arguments)
        changed = carry_weights(self.model, self.end.weights, stage.tables) if self.end else []
        if self.end and stage.optimizer == "carry":
            kept = {name: state for name, state in self.end.moments.items() if name not in changed}
            self.trainer.callbacks.insert(0, CarryMoments(kept))  # type: ignore[attr-defined]
        if not self.check_only:
            rank_zero_info("\n" + self._announcement(changed))

    def _announcement(self, changed: list[str]) -> str:
        stage, label = self.run.command.stages[self.index], self.run.command.label(self.index)
        if self.end is None:
            return label
        verb = "resized" if stage.tables == "resize" else "initialised anew"
        tables = f"; {verb}: {', '.join(changed)}" if changed else ""
        moments = "AdamW's moments carried over" if stage.optimizer == "carry" else "a fresh optimizer"
        return f"{label}: weights of stage {self.index}{tables}; {moments}"

    def _resumed(self) -> Path | None:
        begin = self.run.begin
        return begin.run if begin and begin.stay else None

    def _logger(self) -> RunLogger:
        output = Path(self._get(self.config_init, "output"))
        folder, begin = self.run.folder, self.run.begin
        version = f"stage_{self.index + 1}_{self.run.command.stages[self.index].name}"
        if begin and begin.stay:
            folder.hold()
            return logger_of(begin.run / version, begin.step if self.begin else -1)
        name = folder.claim(output, self.model.method_name) if rank_zero_only.rank == 0 else self.model.method_name
        return RunLogger(str(output), name=name, version=version, default_hp_metric=False)


class StagedRun:
    """`fit` in stages.

    Args:
        command: the command line, taken apart.
    """

    def __init__(self, command: StagedCommand) -> None:
        self.command = command
        self.folder = RunFolder()
        self.begin: Found | None = None  # the run that `--ckpt_path last` goes on with

    def run(self) -> None:
        """Check every stage, then train one after the other.

        Raises:
            UserError: with the stage it is about; before the first step wherever that is possible.
            Stopped: with code 0: `--ckpt_path last` is of a run that is finished.
        """
        if last_given(self.command.common, "ckpt_path") == LAST:
            self._find_last()
        start, path = first_stage(self.command, default=0)
        start, end = self.check(start, path)
        try:
            for index in range(start, len(self.command.stages)):
                end = self._train(index, end, resume=path is not None and index == start and end is None)
        finally:
            self.folder.remove_if_unused()

    def _find_last(self) -> None:
        """Find the run to go on with, and put the file of its checkpoint, or null, into the command."""
        fresh = replace(self.command, common=[*self.command.common, "--ckpt_path=null"])
        with quiet():
            first = told_of(fresh.label(0), lambda: build(CLI, arguments=fresh.arguments(0), check_only=True))
        configs = [
            self._config(first, first.parser.parse_args(settle_optional_args(fresh.arguments(index))))
            for index in range(len(fresh.stages))
        ]
        self.begin = find(self._staged_config(configs), self.command.common)
        given = "null" if self.begin is None else str(self.begin.checkpoint)
        self.command = replace(self.command, common=[*self.command.common, f"--ckpt_path={given}"])
        if self.begin and self.begin.stay:
            self.folder.take(self.begin.run)

    def check(self, start: int, path: str | None) -> tuple[int, EndState | None]:
        """Make every stage as for a run, and throw it away. Returns the stage to begin with, and from where."""
        with quiet():
            return self._check(start, path)

    def _check(self, start: int, path: str | None) -> tuple[int, EndState | None]:
        begin, end, before, configs = start, None, None, {}
        last = len(self.command.stages) - 1
        for index in range(start, last + 1):
            cli = self._build(index, before and EndState.of(before.model, {}), resume=index == start, check=True)
            if before is not None and cli.trainer.world_size != before.trainer.world_size:
                there, here = before.trainer.world_size, cli.trainer.world_size
                raise UserError(
                    f"{self.command.label(index)}: {here} processes after {there}: give all stages as many."
                )
            if path is not None and index == start and index < last:
                checkpoint, _ = checkpoints.read_metadata(path)
                stay = self.begin is not None and self.begin.stay  # else its last figures are in another folder
                done = not stay or is_finished_run(Path(path).parent.parent, {})
                if done and is_finished(checkpoint, cli.trainer):
                    begin, end = index + 1, self._end_of(checkpoint, cli, index)
            configs[index] = self._config(cli, cli.config)
            before = cli
        for index in range(start):
            assert before is not None
            earlier = settle_optional_args(self.command.arguments(index, resume=False))
            configs[index] = self._config(before, before.parser.parse_args(earlier))
        self.folder.config = self._staged_config([configs[index] for index in range(last + 1)])
        return begin, end

    def _train(self, index: int, end: EndState | None, resume: bool) -> EndState | None:
        cli = self._build(index, end, resume=resume, check=False)
        if cli.trainer.interrupted:
            raise KeyboardInterrupt
        following = self.command.stages[index + 1 :]
        if not following:
            return None
        moments = {}
        if following[0].optimizer == "carry":
            moments = moments_by_name(cli.model, cli.trainer.optimizers[0].state_dict())
        state = EndState.of(cli.model, moments)
        del cli
        gc.collect()  # the stage's loaders and their workers, its copy of the data, its memory on the device
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return state

    def _end_of(self, checkpoint: dict[str, Any], cli: CLI, index: int) -> EndState:
        moments = {}
        if self.command.stages[index + 1].optimizer == "carry":
            moments = moments_by_name(cli.model, checkpoint["optimizer_states"][0])
        return EndState(checkpoint["state_dict"], checkpoint[checkpoints.KEY]["init_args"], moments)

    def _build(self, index: int, end: EndState | None, resume: bool, check: bool) -> StageCLI:
        arguments = self.command.arguments(index, resume)

        def make() -> StageCLI:
            return build(StageCLI, run=self, index=index, end=end, arguments=arguments, check_only=check)

        return told_of(self.command.label(index), make)

    def _config(self, cli: CLI, config: Any) -> dict[str, Any]:
        return yaml.safe_load(cli._parser("fit").dump(config.fit, skip_none=False))

    def _staged_config(self, configs: list[dict[str, Any]]) -> dict[str, Any]:
        """The whole run as one configuration, in which every stage says everything."""
        stages = [
            {
                "name": stage.name,
                "tables": stage.tables,
                "optimizer": stage.optimizer,
                "config": {key: value for key, value in config.items() if key not in ONE_FOR_ALL},
            }
            for stage, config in zip(self.command.stages, configs, strict=True)
        ]
        return {**configs[0], "ckpt_path": None, "stages": stages}


def check(command: StagedCommand) -> None:
    """Make everything of a `fit`, with or without stages, and throw it away; nothing is written.

    Raises:
        UserError: it would be refused.
    """
    if command.stages:
        StagedRun(command).check(0, None)
    else:
        with quiet():
            build(CLI, arguments=[command.verb, *command.common], check_only=True)


def told_of(label: str, work: Callable[[], Result]) -> Result:
    """Result of `work`; what the user has to mend is told with the stage or variant it is about."""
    try:
        return work()
    except Exception as error:
        if not is_users(error):
            raise
        told = UserError(f"{label}: {describe(error)}").with_traceback(error.__traceback__)
    raise told  # outside of `except`: of errors inside one another the innermost is shown


@contextmanager
def quiet() -> Iterator[None]:
    """Without Lightning's notes of what it found and chose: they come again when the stage runs."""
    loggers = [logging.getLogger(name) for name in LIGHTNING_LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
