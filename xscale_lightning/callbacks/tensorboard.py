"""TensorBoard as a story: charts that belong together, the configuration, the verdict, and runs side by side."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from xscale_lightning.callbacks.probe import run_folder
from xscale_lightning.callbacks.steps import current_step
from xscale_lightning.callbacks.summary import RunSummary
from xscale_lightning.callbacks.verdict import Record, format_value, interval_text, verdict

# Chapter -> chart -> what its tags match. A chart without a tag of its own run is left out.
CHAPTERS: dict[str, dict[str, str]] = {
    "1 does it learn": {
        "nearest neighbours, by scale": r"knn/.*/(top1|map_micro)$",
        "linear probe": r"linear/.*/(top1|macro_f1|map_micro)$",
        "dense probe, beside mean spectra": r"dense/[^/]*/miou(_mean_spectrum)?$",
        "masked PSNR (dB), beside base lines": r"reconstruction/psnr(_bilinear|_mean_fill)?$",
        "PSNR (dB) by share hidden": r"reconstruction/psnr_at_[0-9.]+$",
        "spectral angle (degrees), beside base lines": r"reconstruction/spectral_angle(_bilinear|_mean_fill)?$",
    },
    "2 losses by term": {"training": r"train/.*", "held out": r"val/.*"},
    "3 is it collapsing": {
        "effective rank": r"geometry/rank$",
        "uniformity and mean cosine": r"geometry/(uniformity|cosine)$",
    },
    "4 spatial affinity": {
        "error of the Gram matrices": r"affinity/gram$",
        "mean cosine of different patches": r"affinity/(student|teacher)$",
        "rank of the tokens": r"affinity/rank_.*",
    },
    "5 schedules": {"learning rate": r"schedule/lr$", "all others": r"schedule/(?!lr$).*"},
    "6 speed": {
        "images per second": r"speed/images_per_s$",
        "share of the time spent waiting for data": r"speed/data_wait$",
        "10^12 operations per second": r"speed/tflops$",
    },
}
ALWAYS = ("train/loss", "val/loss", "schedule/lr", "schedule/weight_decay", "speed/images_per_s", "speed/data_wait")
ALWAYS += ("speed/tflops",)  # these come with the first steps, after the layout is written
GUIDE = """
| look at | for |
| --- | --- |
| **Custom Scalars** | the run on one page: does it learn, losses by term, collapse, schedules, speed |
| **Images** | the same held-out images at step 0 and later; drag the slider above a picture |
| **Text** | `run/1_verdict` says in a sentence whether it learned, `run/3_config` is the whole configuration |
| **HParams** | runs side by side: options that differ first, beside the newest value of every curve |

Step 0 is the model before its first step: the base line of every curve. Untick *Ignore outliers in chart scaling*,
which cuts it off, and set *Smoothing* to 0 for curves of few points.
"""


class TensorBoardReport(Callback):
    """Arranges a run's TensorBoard; without a `TensorBoardLogger` it does nothing.

    Before the first step it writes a layout for the Custom Scalars tab (chapters of charts with several curves each),
    the run's options for the HParams tab, and two texts: `run/2_guide` and `run/3_config`. At the end
    `run/1_verdict`: the sentence of `results.json` over a table of all figures with their step-0 values.

    Args:
        enabled: false writes none of it.
    """

    def __init__(self, enabled: bool = True) -> None:
        super().__init__()
        self.enabled = enabled

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what is known before the first step; probes have measured step 0 by now."""
        options = run_options(trainer, pl_module)
        for logger in self._loggers(trainer):
            writer = logger.experiment
            writer.add_custom_scalars(layout([*trainer.callback_metrics, *ALWAYS]))
            writer._get_file_writer().add_summary(_hparams(options)[1])
            writer.add_text("run/2_guide", GUIDE, current_step(trainer))
            code = (f"    {line}" for line in _config(trainer, pl_module).splitlines())
            writer.add_text("run/3_config", "\n".join(code), current_step(trainer))

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the verdict; comes after every probe's last measurement (`on_train_end`)."""
        records = _records(trainer)
        for logger in self._loggers(trainer):
            writer = logger.experiment
            if records:
                writer.add_text("run/1_verdict", f"**{verdict(records)}**\n\n{table(records)}", current_step(trainer))
            writer._get_file_writer().add_summary(_hparams({})[2])

    def _loggers(self, trainer: Trainer) -> list[TensorBoardLogger]:
        ours = self.enabled and trainer.is_global_zero and not trainer.fast_dev_run  # type: ignore[attr-defined]
        return [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)] if ours else []


def layout(tags: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """The charts that `tags` give something to, as `SummaryWriter.add_custom_scalars` wants them."""
    known = list(tags)
    chapters = {
        chapter: {title: ["Multiline", [p]] for title, p in charts.items() if any(re.match(p, tag) for tag in known)}
        for chapter, charts in CHAPTERS.items()
    }
    return {chapter: charts for chapter, charts in chapters.items() if charts}


def table(records: Mapping[str, Record]) -> str:
    """All figures as a Markdown table."""
    lines = ["| metric | step 0 | last | at step | best base line |", "| --- | ---: | ---: | ---: | --- |"]
    for name, record in records.items():
        rival = record.best_baseline()
        against = f"{rival[0]} {format_value(rival[1])}" if rival else ""
        newest = format_value(record.last) + interval_text(record)
        lines.append(f"| {name} | {record.step_0_text()} | {newest} | {record.last_step} | {against} |")
    return "\n".join(lines)


def run_options(trainer: Trainer, pl_module: LightningModule) -> dict[str, float | str]:
    """A run's options in one flat dict, nested names joined by dots; bands are their number and sensor."""
    options = {name: value for name, value in pl_module.hparams.items() if name != "bands"}
    data, seed = getattr(trainer, "datamodule", None), os.environ.get("PL_GLOBAL_SEED")
    bands = getattr(pl_module, "bands", None)
    found: dict[str, Any] = {"method": getattr(pl_module, "method_name", type(pl_module).__name__)}
    found |= _flat(options)
    found |= {f"data.{name}": getattr(data, name, None) for name in ("name", "batch_size")}
    found |= {"data.bands": bands and len(bands), "data.sensor": getattr(bands, "sensor", None)}
    names = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "world_size")
    found |= {f"trainer.{name}": getattr(trainer, name, None) for name in names}
    found["seed"] = int(seed) if seed else None
    return {name: v if type(v) in (int, float) else str(v) for name, v in found.items() if v is not None}


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in options.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _hparams(options: dict[str, Any]) -> Any:
    """Summaries for the HParams tab: experiment, start and end of a run.

    The first one is not written: TensorBoard would take that of one run for all. Without it the tab has the options of
    all runs, those that differ first, and all curves as metrics.
    """
    from torch.utils.tensorboard.summary import hparams  # takes a while: only where it is needed

    return hparams(options, {})


def _records(trainer: Trainer) -> dict[str, Record]:
    summaries = (c for c in trainer.callbacks if isinstance(c, RunSummary))  # type: ignore[attr-defined]
    return next((summary.records for summary in summaries), {})


def _config(trainer: Trainer, pl_module: LightningModule) -> str:
    """The run's `config.yaml`; of runs without the command line, their options."""
    file = Path(run_folder(trainer) or ".") / "config.yaml"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    return json.dumps(run_options(trainer, pl_module), indent=2)
