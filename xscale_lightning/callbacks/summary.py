"""The end of a run: a table, one plain sentence, and `results.json`."""

import time
from dataclasses import asdict, replace
from datetime import UTC, datetime
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from rich import get_console
from rich.console import Console
from rich.table import Table

from xscale_lightning import unwritten
from xscale_lightning.callbacks.leftovers import damage_lines, damage_record, remove_unused_run
from xscale_lightning.callbacks.probe import Measurement, run_folder
from xscale_lightning.callbacks.provenance import device_record, provenance, versions
from xscale_lightning.callbacks.steps import checkpoint_record, current_step, is_base_line
from xscale_lightning.callbacks.throughput import batch_images
from xscale_lightning.callbacks.verdict import Record, format_value, interval_text, verdict
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.errors import Stopped, find_user_error
from xscale_lightning.files import reason, write_json


class RunSummary(Callback):
    """Collects every probe's figures with their step-0 values, and reports them at the end of the run.

    Prints a table (metric, step 0, last with its interval, best base line) and one sentence that says whether the run
    learned, and writes `<run>/results.json` whole or not at all. Step-0 values travel in the checkpoint: a resumed run
    has them, and so have `validate` and `test` with `--ckpt_path`. An interrupted or failed run is reported as such.
    Without a logger there is no run folder and only the table is printed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.records: dict[str, Record] = {}
        self.images_seen = 0
        self._seconds_before = 0.0
        self._started = time.perf_counter()
        self._first_loss: torch.Tensor | float | None = None
        self._validated: dict[str, torch.Tensor | float] = {}  # losses of the last validation; of a resumed run all
        self._trainer: Trainer | None = None  # that trains
        self._recalled = False
        self._made = time.time()
        self._first_step: int | None = None
        self._fitted: dict[str, Any] | None = None

    def record_probe(self, trainer: Trainer, measurement: Measurement) -> None:
        """Take note of figures measured now; in `fit` those before the first step are the base line."""
        self._recall(trainer)
        for name, value in measurement.metrics.items():
            record = self.records.setdefault(name, Record())
            if is_base_line(trainer):
                record.step_0, record.step_0_split = value, measurement.split
            record.last, record.split = value, measurement.split
            record.last_step = current_step(trainer)
            record.baselines = dict(measurement.baselines.get(name, {}))
            record.error = measurement.errors.get(name, 0.0)
            interval = measurement.intervals.get(name)
            record.interval = None if interval is None else list(interval)
            record.protocol = dict(measurement.protocols.get(name, {}))

    def step_zero(self, name: str, split: str) -> str | None:
        """Step-0 value of a metric for people, with its split if that is not `split`; None if it was not measured."""
        record = self.records.get(name)
        return None if record is None or record.step_0 is None else replace(record, split=split).step_0_text()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start the clock."""
        self._started = time.perf_counter()
        self._recalled = stage == "fit" or self._fitted is not None
        self._first_step = None

    def _recall(self, trainer: Trainer) -> None:
        """Outside `fit` Lightning does not restore callbacks: look up the step-0 values in the checkpoint, once."""
        if self._recalled:
            return
        self._recalled = True
        state = checkpoint_record(trainer)[1].get(self.state_key)
        if state:
            self.load_state_dict(state)
            self._seconds_before = 0.0  # the time of this command alone

    def state_dict(self) -> dict[str, Any]:
        """Plain types only, so that the checkpoint opens with `weights_only=True`."""
        loss = self._first_loss
        metrics = {} if self._trainer is None else self._trainer.callback_metrics
        trained = {
            name: value for name, value in metrics.items() if name.startswith("train/") and name.endswith("/loss")
        }
        return {
            "records": {name: asdict(record) for name, record in self.records.items()},
            "images_seen": self.images_seen,
            "seconds": self._seconds(),
            "first_loss": loss.item() if isinstance(loss, torch.Tensor) else loss,
            "validated": {name: float(value) for name, value in {**self._validated, **trained}.items()},
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        self.records = {name: Record(**record) for name, record in state_dict["records"].items()}
        self.images_seen = state_dict["images_seen"]
        self._seconds_before = state_dict["seconds"]
        self._first_loss = state_dict["first_loss"]
        self._validated = dict(state_dict.get("validated", {}))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A new run (not a resumed one) starts from nothing; what step 0 measured just now is kept."""
        self._first_step, self._trainer = trainer.global_step, trainer
        if trainer.global_step == 0:
            self.records = {name: record for name, record in self.records.items() if record.last_step == 0}
            self.images_seen, self._seconds_before, self._first_loss, self._validated = 0, 0.0, None, {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count images; keep the first loss (as a tensor: no waiting for the device)."""
        self.images_seen += batch_images(batch) * trainer.world_size
        if self._first_loss is None:
            loss = trainer.callback_metrics.get("train/loss")
            self._first_loss = None if loss is None else loss.detach().clone()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask all processes how many damaged samples they have met."""
        if isinstance(data := getattr(trainer, "datamodule", None), XScaleDataModule):
            data.count_skipped()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report; comes after every probe's last measurement (`on_train_end`)."""
        self._report(trainer, pl_module, "fit", "finished")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report in `validate`; in `fit` keep the losses, for a run resumed after its last validation."""
        if trainer.state.fn == TrainerFn.FITTING:
            found = {name: value.detach().clone() for name, value in trainer.callback_metrics.items()}
            self._validated = {name: value for name, value in found.items() if name.startswith("val/")}
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._report(trainer, pl_module, "validate", "finished")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report in `test`; after `fit` in the same process the test is part of that run's results."""
        self._report(trainer, pl_module, "fit" if self._fitted else "test", "finished")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Report what a run that was stopped or failed has reached; one refused before its first step leaves no file.

        What a checkpoint says of steps and images does not count: only what this process has trained is news.
        """
        if self._first_step is not None and trainer.global_step > self._first_step:
            status = "interrupted" if isinstance(exception, (KeyboardInterrupt, Stopped)) else "failed"
            self._report(trainer, pl_module, "fit", status)
        elif trainer.is_global_zero and find_user_error(exception) is not None:
            remove_unused_run(trainer, self._made)

    def _seconds(self) -> float:
        return self._seconds_before + time.perf_counter() - self._started

    def _report(self, trainer: Trainer, pl_module: LightningModule, command: str, status: str) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self._recall(trainer)
        sentence = verdict(self.records)
        self._print(trainer, sentence, status)
        folder = run_folder(trainer)
        if folder is None:
            rank_zero_info("RunSummary: no logger, so no run folder; results.json is not written.")
            return
        content = self._results(trainer, pl_module, command, status, sentence)
        if trainer.state.fn == TrainerFn.TESTING and self._fitted:
            tested = {name: content[name] for name in ("verdict", "metrics", "finished_at")}
            losses = {**self._fitted["losses"], **content["losses"]}
            content = {**self._fitted, **tested, "losses": losses, "tested_checkpoint": str(trainer.ckpt_path or "")}
        elif command == "fit":
            self._fitted = content
        path = folder / "results.json"
        try:
            write_json(content, path)
        except OSError as error:
            unwritten.note(str(path), f"'{path}' is not written ({reason(error, path)}).")
        else:
            unwritten.made_good(str(path))
            rank_zero_info(f"results: {path}")

    def _print(self, trainer: Trainer, sentence: str, status: str) -> None:
        console = get_console()
        if not console.is_terminal:
            console = Console(width=130)
        if self.records:
            table = Table(title=None if status == "finished" else status)
            counted = trainer.state.fn != TrainerFn.FITTING  # then samples matter more than the step, which is one
            for title in ("metric", "step 0", "last", "samples" if counted else "at step", "best base line"):
                table.add_column(title, justify="left" if title in ("metric", "best base line") else "right")
            for name, record in self.records.items():
                rival = record.best_baseline()
                table.add_row(
                    name,
                    record.step_0_text(),
                    format_value(record.last) + interval_text(record),
                    str(record.protocol.get("samples", "") if counted else record.last_step),
                    f"{rival[0]} {format_value(rival[1])}" if rival else "",
                )
            console.print(table)
        console.print(sentence, markup=False, highlight=False)
        for line in (*damage_lines(trainer), *unwritten.lost().values()):
            console.print(line, markup=False, highlight=False)

    def _results(
        self, trainer: Trainer, pl_module: LightningModule, command: str, status: str, sentence: str
    ) -> dict[str, Any]:
        values = {name: float(value) for name, value in trainer.callback_metrics.items()}
        known = {name: float(value) for name, value in self._validated.items()} if command == "fit" else {}
        losses = {name: {"last": value} for name, value in {**known, **values}.items() if name.endswith("/loss")}
        if "train/loss" in losses and self._first_loss is not None:
            losses["train/loss"]["first"] = float(self._first_loss)
        return {
            "command": command,
            "status": status,
            "verdict": sentence,
            "method": getattr(pl_module, "method_name", type(pl_module).__name__),
            **({"stage": stage} if (stage := getattr(pl_module, "stage", None)) else {}),
            "metrics": {name: asdict(record) for name, record in self.records.items()},
            "losses": losses,
            "speed": {name.removeprefix("speed/"): v for name, v in values.items() if name.startswith("speed/")},
            "steps": current_step(trainer),
            "images_seen": self.images_seen,
            "flops_per_image": getattr(pl_module, "flops_per_image", 0) or None,
            **damage_record(trainer),
            **({"unwritten": lost} if (lost := unwritten.lost()) else {}),
            **provenance(trainer, pl_module),
            "seconds": round(self._seconds(), 3),
            "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": versions(),
            "device": device_record(trainer, pl_module.device),
        }
