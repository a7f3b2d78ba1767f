"""What a bench found: scores with intervals over seeds, and what they cost."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from xscale_lightning.commands.bench_cells import Cell
from xscale_lightning.commands.bench_file import PRETRAINING, Bench
from xscale_lightning.errors import UserError
from xscale_lightning.opening import read_json

# Quantiles of Student's t at 97.5 %, by degrees of freedom; a series gives those that follow (error below 0.001).
T_975 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)
LOWER_IS_BETTER = ("loss", "spectral_angle")
GIVEN = "given"  # status of what was there already
NO_SCORE = "geometry"  # the family of figures of which neither more nor less is better


@dataclass(frozen=True)
class Budget:
    """What a command cost; None where it is not known."""

    images_seen: int | None = None
    flops: float | None = None
    """Floating-point operations of the training, forward and backward."""
    hours: float | None = None
    """Wall-clock time, evaluations included."""
    device: str | None = None


@dataclass(frozen=True)
class Record:
    """How a cell stands."""

    model: str
    evaluation: str
    seed: int
    key: str
    status: str
    error: str
    run: str | None
    """Folder of the run that the figures are from."""
    budget: Budget
    metrics: dict[str, dict[str, Any]] = field(default_factory=dict)


@dataclass(frozen=True)
class Score:
    """A metric of a model over the seeds."""

    evaluation: str
    metric: str
    model: str
    values: list[float]
    """One per seed."""
    mean: float
    interval: list[float] | None
    """95 %: of Student's t over the seeds, or of one run alone by the bootstrap over its test samples."""
    interval_of: str | None
    """`seeds` or `samples`."""
    best: bool = False
    """Better than all others, with an interval that overlaps with none of theirs."""


def collect(cell: Cell, status: str, error: str, here: Path) -> Record:
    """Figures of a cell from the `results.json` below its folder."""
    found = results_below(here) if status == "finished" else []
    content, folder = found[-1] if found else ({}, None)
    metrics = {**content.get("losses", {}), **content.get("metrics", {})}
    training = cell.arguments[0] == "fit"
    budget = spent([content for content, _ in found], training)
    run = None if folder is None else folder.relative_to(here).as_posix()
    return Record(cell.model, cell.evaluation, cell.seed, cell.key, status, error, run, budget, metrics)


def given(model: str, seed: int, source: str) -> Record:
    """The pretraining of a checkpoint that was there already, as far as its run says what it cost."""
    path = Path(source).parent.parent / "results.json"
    try:  # beside a checkpoint that may be a stranger's
        content = read_json(path, f"'{path}'") if path.is_file() else None
        budget = spent([content], training=True) if content else Budget()
    except (UserError, KeyError, TypeError, AttributeError, IndexError):
        budget = Budget()
    return Record(model, PRETRAINING, seed, "", GIVEN, "", source, budget)


def results_below(here: Path) -> list[tuple[dict[str, Any], Path]]:
    """`(content, folder)` of the newest `results.json` of every stage below a folder, in the order of the stages."""
    newest: dict[int, tuple[dict[str, Any], Path]] = {}
    for path in sorted(here.rglob("results.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        stage = content.get("stage", {}).get("number", 0)
        if stage not in newest or content["finished_at"] >= newest[stage][0]["finished_at"]:
            newest[stage] = (content, path.parent)
    return [newest[stage] for stage in sorted(newest)]


def spent(contents: Sequence[dict[str, Any]], training: bool) -> Budget:
    """What one command cost, its stages together; images and arithmetic count where it has trained."""
    if not contents:
        return Budget()
    hours = sum(content["seconds"] for content in contents) / 3600
    record = contents[-1].get("device", {})
    count = record.get("processes", 1)
    device = (f"{count} x " if count > 1 else "") + str(record.get("name", "unknown"))
    if not training:
        return Budget(0, 0.0, hours, device)
    images = [content["images_seen"] for content in contents]
    flops = [content.get("flops_per_image") for content in contents]
    known = all(each is not None or not seen for each, seen in zip(flops, images, strict=True))
    total = sum((each or 0) * seen for each, seen in zip(flops, images, strict=True))
    return Budget(sum(images), float(total) if known else None, hours, device)


def matches(pattern: str, name: str) -> bool:
    """Whether a name has the parts of a pattern, in which `*` stands for any one part."""
    parts, wanted = name.split("/"), pattern.split("/")
    return len(parts) == len(wanted) and all(map(fnmatchcase, parts, wanted))


def summarise(bench: Bench, records: Sequence[Record]) -> list[Score]:
    """Scores of every evaluation, in the order of the file."""
    found = []
    for evaluation in bench.evaluations.values():
        mine = [r for r in records if r.evaluation == evaluation.name and r.status == "finished"]
        known = list(dict.fromkeys(name for record in mine for name in record.metrics))
        names = dict.fromkeys(name for pattern in evaluation.metrics for name in known if matches(pattern, name))
        for name in names:
            scores = []
            for model in bench.models:
                given = [r.metrics[name] for r in mine if r.model == model and name in r.metrics]
                if given := [figure for figure in given if figure.get("last") is not None]:
                    scores.append(_score(evaluation.name, name, model, given))
            found += mark_best(scores)
    return found


def _score(evaluation: str, metric: str, model: str, figures: Sequence[dict[str, Any]]) -> Score:
    values = [float(figure["last"]) for figure in figures]
    mean, interval, kind = fmean(values), None, None
    if len(values) > 1:
        half = t_quantile(len(values) - 1) * stdev(values) / math.sqrt(len(values))
        interval, kind = [mean - half, mean + half], "seeds"
    elif figures[0].get("interval"):
        interval, kind = list(figures[0]["interval"]), "samples"
    elif figures[0].get("error"):
        half = 1.96 * figures[0]["error"]
        interval, kind = [mean - half, mean + half], "samples"
    return Score(evaluation, metric, model, values, mean, interval, kind)


def t_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t (Fisher and Cornish's series for more than nine degrees of freedom)."""
    if freedom <= len(T_975):
        return T_975[freedom - 1]
    z, terms = 1.959964, 0.0
    terms += (z**3 + z) / (4 * freedom)
    terms += (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
    terms += (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    return z + terms


def mark_best(scores: list[Score]) -> list[Score]:
    """The scores of one metric, of which the best is marked if there is one beyond doubt."""
    family, _, rest = scores[0].metric.partition("/")
    if len(scores) < 2 or family == NO_SCORE or any(score.interval is None for score in scores):
        return scores
    sign = -1 if rest.endswith(LOWER_IS_BETTER) else 1
    best = max(scores, key=lambda score: sign * score.mean)

    def clear(other: Score) -> bool:
        assert best.interval and other.interval
        return best.interval[0] > other.interval[1] if sign > 0 else best.interval[1] < other.interval[0]

    if not all(clear(other) for other in scores if other is not best):
        return scores
    return [Score(**{**asdict(score), "best": score is best}) for score in scores]


def missing(bench: Bench, records: Sequence[Record]) -> list[tuple[str, str]]:
    """`(name of the cell, what is wrong)` of every cell that failed or has no value for a metric."""
    found = []
    for record in records:
        name = f"{record.model}, seed {record.seed}, {record.evaluation}"
        if record.status == "failed":
            found.append((name, f"{name} failed: {record.error}"))
        evaluation = bench.evaluations.get(record.evaluation)
        for pattern in evaluation.metrics if evaluation and record.status == "finished" else ():
            if not any(matches(pattern, metric) for metric in record.metrics):
                known = ", ".join(record.metrics) or "none"
                found.append((name, f"{name}: nothing is called {pattern}; there are {known}"))
    return found
