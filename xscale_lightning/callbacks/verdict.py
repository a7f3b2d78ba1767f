"""What a run's figures say, in one plain sentence. Pure functions on records."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

KINDS = {"knn": "kNN", "linear": "linear probe", "dense": "dense probe"}


@dataclass
class Record:
    """One metric over a run."""

    step_0: float | None = None
    """Value before the first step; None if it was not measured."""
    step_0_split: str | None = None
    """What step 0 was measured on."""
    last: float = math.nan
    """Newest value."""
    last_step: int = 0
    """Optimizer step of the newest value."""
    split: str = "val"
    """What the newest value was measured on."""
    baselines: dict[str, float] = field(default_factory=dict)
    """What simple methods reach on the same data."""
    error: float = 0.0
    """Standard error of the newest value; 0 if it is not known."""
    interval: list[float] | None = None
    """95 % interval of the newest value; None if it is not known."""
    protocol: dict[str, Any] = field(default_factory=dict)
    """How the newest value was measured: data, number of samples, k, scale ..., as far as it is known."""

    def best_baseline(self) -> tuple[str, float] | None:
        """Name and value of the strongest base line (all of ours are better when higher)."""
        finite = {name: value for name, value in self.baselines.items() if not math.isnan(value)}
        return max(finite.items(), key=lambda item: item[1]) if finite else None

    @property
    def only_step_0(self) -> bool:
        """Whether the newest value is that of step 0, as in a run that was interrupted before its next measurement."""
        return self.step_0 is not None and self.last_step == 0 and self.last == self.step_0

    def step_0_text(self) -> str:
        """Step-0 value for people; says so if it is missing or was measured on another split."""
        if self.step_0 is None:
            return "not measured"
        return format_value(self.step_0) + (f" on {self.step_0_split}" if self.step_0_split != self.split else "")


def format_value(value: float) -> str:
    """Three decimals, fewer for large numbers."""
    if not math.isfinite(value):
        return str(value)
    return f"{value:.3f}" if abs(value) < 10 else f"{value:.1f}"


def interval_text(record: Record) -> str:
    """` [low, high]` of the newest value; "" if it is not known."""
    return f" [{format_value(record.interval[0])}, {format_value(record.interval[1])}]" if record.interval else ""


def is_knn(name: str) -> bool:
    """Whether a metric tells by itself whether neighbours share labels.

    One per data set, that of the native size: scores of the same images at other scales are no further evidence.
    """
    scaled = re.fullmatch(r"knn/.+/(scale_[^/]+|mean_over_scales)/[^/]+", name)
    return name.startswith("knn/") and name.endswith(("/top1", "/map_micro")) and not scaled


def is_task_score(name: str) -> bool:
    """Whether a metric is the headline of a fine-tuning task on a split."""
    return re.fullmatch(r"(val|test)/(top1|map_micro|miou|f1)", name) is not None


def is_dense(name: str) -> bool:
    """Whether a metric tells by itself whether a linear layer finds land covers in the patch features."""
    return name.startswith("dense/") and name.endswith("/miou")


def is_linear(name: str) -> bool:
    """Whether a metric tells by itself whether a linear layer tells the classes apart."""
    return name.startswith("linear/") and name.endswith(("/top1", "/map_micro"))


def verdict(records: Mapping[str, Record]) -> str:
    """Say in one line whether the run learned, or that nothing measured it."""
    findings, later = [], False
    for name, record in records.items():
        known = len(findings)
        if name == "reconstruction/psnr":
            findings.append(_reconstruction(record))
        elif is_knn(name) or is_dense(name) or is_linear(name):
            findings.append(_score(name, record))
        elif is_task_score(name):
            findings.append(_task(name, record))
        later = later or (len(findings) > known and not record.only_step_0)
    if findings and not later:
        return "Nothing was measured after step 0, so nothing here says whether it learned."
    if not findings:
        return (
            "Nothing here measures whether it learned: give OnlineKNN.data labelled data or "
            "OnlineDenseProbe.data masks, or use a method that reconstructs pixels with ReconstructionPictures."
        )
    decided = [finding for finding, _ in findings if finding is not None]
    if not decided:
        lead = "These figures do not show whether it learned"
    elif all(decided):
        lead = "It learned"
    else:
        lead = "Mixed" if any(decided) else "It has not learned, as far as these figures show"
    return f"{lead}: " + "; ".join(text for _, text in findings) + "."


def _reconstruction(record: Record) -> tuple[bool, str]:
    text = f"masked PSNR {record.last:.1f} dB"
    zero = record.step_0_text()
    rival = record.best_baseline()
    if rival is None:
        if record.step_0 is not None and record.step_0_split != record.split:
            return False, f"{text} on {record.split} cannot be compared with step 0 ({zero})"
        better = record.step_0 is not None and record.last > record.step_0
        return better, f"{text} {'is above' if better else 'is not above'} its step-0 value ({zero})"
    better = record.last > rival[1]
    return better, f"{text} {'beats' if better else 'does not beat'} {rival[0]} {rival[1]:.1f} dB (step 0: {zero})"


def _task(name: str, record: Record) -> tuple[bool, str]:
    """Better or not than an answer that does not look at the images."""
    text = f"{name} {record.last:.3f}{interval_text(record)}"
    rival = record.best_baseline()
    if rival is None:
        return False, f"{text} has nothing to compare with"
    better = (record.interval[0] if record.interval else record.last) > rival[1]
    return better, f"{text} {'beats' if better else 'does not beat'} {rival[0]} {rival[1]:.3f}"


def _score(name: str, record: Record) -> tuple[bool | None, str]:
    """Better or not than at step 0; None where the difference is smaller than two standard errors.

    Where step 0 cannot be compared, better or not than the base line, and None where that lies in the interval.
    """
    kind, rest = name.split("/", 1)
    data, metric = rest.rsplit("/", 1)
    score = {"top1": "top-1", "miou": "mIoU"}.get(metric, "mAP")
    what = f"{KINDS[kind]} {score}"
    text = f"{what} on {data} {record.last:.3f}"
    if record.step_0 is None or record.step_0_split != record.split:
        return _against_base_line(text, record)
    if abs(record.last - record.step_0) < 2 * record.error:
        return None, f"{text} is within the noise (± {2 * record.error:.3f}) of its step-0 value {record.step_0:.3f}"
    better = record.last > record.step_0
    return better, f"{text} is {'above' if better else 'not above'} its step-0 value {record.step_0:.3f}"


def _against_base_line(text: str, record: Record) -> tuple[bool | None, str]:
    """Better or not than the best base line, for a score without a step-0 value of the same split."""
    text += interval_text(record)
    rival = record.best_baseline()
    if rival is None or record.interval is None:
        if record.step_0 is None:
            return False, f"{text} (step 0: not measured)"
        return False, f"{text} on {record.split} cannot be compared with step 0 ({record.step_0_text()})"
    low, high = record.interval
    if low <= rival[1] <= high:
        return None, f"{text} does not differ from {rival[0]} {rival[1]:.3f}"
    return low > rival[1], f"{text} is {'above' if low > rival[1] else 'below'} {rival[0]} {rival[1]:.3f}"
