"""How a bench is told: `table.md`, `results.json`, `bench.png`, and a table on the console."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

from rich import get_console
from rich.console import Console
from rich.table import Table

from xscale_lightning.callbacks.verdict import format_value
from xscale_lightning.commands.bench_file import PRETRAINING, Bench
from xscale_lightning.commands.bench_plot import draw
from xscale_lightning.commands.bench_results import GIVEN, Record, Score, missing, summarise
from xscale_lightning.files import strict_json, write_together


def report(bench: Bench, records: Sequence[Record], folder: Path, show: bool = False) -> list[tuple[str, str]]:
    """Write `results.json`, `table.md` and `bench.png`, all or none; returns what went wrong, by cell."""
    scores, problems = summarise(bench, records), missing(bench, records)
    content = {
        "bench": bench.name,
        "seeds": list(bench.seeds),
        "scores": [asdict(score) for score in scores],
        "cells": [asdict(record) for record in records],
        "problems": [text for _, text in problems],
    }
    table = "\n".join([*_score_lines(bench, scores), *_budget_lines(bench, records), *_open_lines(records, problems)])
    folder.mkdir(parents=True, exist_ok=True)
    files = {folder / "results.json": strict_json(content), folder / "table.md": (table + "\n").encode()}
    if scores:
        files[folder / "bench.png"] = draw(scores, list(bench.models))
    write_together(files)
    if show:
        _print(bench, scores)
        print(f"bench: {folder / 'table.md'}")
    return problems


def text_of(score: Score) -> str:
    """Mean and interval, the best one in bold."""
    text = format_value(score.mean)
    if score.interval:
        text += f" [{format_value(score.interval[0])}, {format_value(score.interval[1])}]"
    return f"**{text}**" if score.best else text


def _cells(bench: Bench, scores: Sequence[Score], evaluation: str) -> tuple[list[str], dict[str, list[str]]]:
    """Metrics of an evaluation, and by model the text of each."""
    names = list(dict.fromkeys(score.metric for score in scores if score.evaluation == evaluation))
    texts = {(s.model, s.metric): f"{text_of(s)} | {len(s.values)}" for s in scores if s.evaluation == evaluation}
    return names, {model: [texts.get((model, name), "- | 0") for name in names] for model in bench.models}


def _score_lines(bench: Bench, scores: Sequence[Score]) -> list[str]:
    lines = [
        f"# {bench.name}",
        "",
        "Mean over the seeds and 95 % interval: Student's t over the seeds where there are several, else the run's own",
        "over its test samples. Bold: the best, if its interval overlaps with no other.",
    ]
    for evaluation in bench.evaluations:
        names, rows = _cells(bench, scores, evaluation)
        lines += ["", f"## {evaluation}", ""]
        if not names:
            lines.append("Nothing is finished.")
            continue
        lines += ["| model | " + " | ".join(f"{name} | seeds" for name in names) + " |"]
        lines += ["| --- |" + " --- | ---: |" * len(names)]
        lines += [f"| {model} | " + " | ".join(texts) + " |" for model, texts in rows.items()]
    return lines


def _budget_lines(bench: Bench, records: Sequence[Record]) -> list[str]:
    lines = ["", "## Compute", "", "Per run, the mean of those that are finished. FLOPs: of training, forward and"]
    lines += ["backward, without evaluations; hours: wall clock, evaluations included.", ""]
    lines += [
        "| model | run | runs | images seen | FLOPs | hours | device |",
        "| --- | --- |" + " ---: |" * 4 + " --- |",
    ]
    for model in bench.models:
        for name in (PRETRAINING, *bench.evaluations):
            mine = [r for r in records if (r.model, r.evaluation) == (model, name)]
            known = [record.budget for record in mine if record.status in ("finished", GIVEN)]
            if known:
                devices = ", ".join(dict.fromkeys(budget.device or "unknown" for budget in known))
                figures = [_mean([b.images_seen for b in known], ",.0f"), _mean([b.flops for b in known], ".3g")]
                figures += [_mean([b.hours for b in known], ".3g"), devices]
                lines.append(f"| {model} | {name} | {len(known)} | " + " | ".join(figures) + " |")
    return lines


def _mean(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(fmean(known), form) if len(known) == len(values) else "unknown"


def _open_lines(records: Sequence[Record], problems: Sequence[tuple[str, str]]) -> list[str]:
    lines = [f"- {text}" for _, text in problems]
    for record in records:
        if record.status not in ("finished", "failed", GIVEN):
            lines.append(f"- {record.model}, seed {record.seed}, {record.evaluation}: {record.status}")
    return ["", "## Not finished", "", *lines] if lines else []


def _print(bench: Bench, scores: Sequence[Score]) -> None:
    console = get_console()
    if not console.is_terminal:
        console = Console(width=120)
    for evaluation in bench.evaluations:
        names, rows = _cells(bench, scores, evaluation)
        table = Table(title=evaluation)
        for title in ("model", *names):
            table.add_column(title)
        for model, texts in rows.items():
            table.add_row(model, *[text.partition(" |")[0].replace("**", "") for text in texts])
        if names:
            console.print(table)
