"""`xscale bench BENCH.yaml`: several models, several evaluations, several seeds, one table.

Every cell is an `xscale fit` or `xscale test` in a process of its own, in a folder whose name holds the hash of
everything the cell depends on. What is there already is not computed again.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from xscale_lightning import checkpoints
from xscale_lightning.commands.bars import left
from xscale_lightning.commands.bench_cells import Cell, plan
from xscale_lightning.commands.bench_file import PRETRAINING, Bench, read_bench
from xscale_lightning.commands.bench_report import report
from xscale_lightning.commands.bench_results import Record, collect, given
from xscale_lightning.commands.train import check_writable, prepare
from xscale_lightning.errors import UserError
from xscale_lightning.files import told, write_json
from xscale_lightning.locks import held

Launch = Callable[[list[str]], tuple[int, str]]
CELL = "cell.json"
SIGNALLED = (130, -2)  # exit codes after Ctrl-C


def main(argv: list[str], launch: Launch | None = None) -> int:
    """Check the whole bench, run what is missing, and report; returns 1 if a cell failed or a metric is missing.

    Args:
        argv: the command line, verb first.
        launch: runs `xscale` with its arguments and returns the exit code and, if it failed, the error; by default in a
            new process.

    Raises:
        UserError: the file is malformed, or a cell would be refused; nothing has been written then.
    """
    parser = argparse.ArgumentParser(
        prog="xscale bench",
        usage="xscale bench BENCH.yaml [--output DIR] [--only NAME,NAME] [--check] [options of xscale fit]",
        description="Run every model of a YAML file through every evaluation in it, with every seed, and compare them. "
        "All is checked before anything runs; what has been computed is not computed again. Options of `xscale fit` "
        "hold for every command.",
        allow_abbrev=False,
    )
    parser.add_argument("--output", default=None, metavar="DIR", help="folder to write to; runs/bench_NAME by default")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="run these models or evaluations and no others")
    parser.add_argument("--check", action="store_true", help="check everything, say what would run, and stop")
    if len(argv) < 2 or argv[1].startswith("-"):
        parser.parse_args(argv[1:] if argv[1:] in (["-h"], ["--help"]) else [])
        raise UserError("missing: the file of the bench. Give it first: xscale bench BENCH.yaml")
    own, rest = parser.parse_known_args(argv[2:])
    bench, options = read_bench(argv[1]), prepare(rest)
    folder = Path(own.output or Path("runs") / f"bench_{bench.name}")
    wanted = choose(bench, own.only)
    check_writable(folder)
    cells = plan(bench, options)
    chosen = [cell for cell in cells if is_chosen(cell, wanted)]
    if own.check:
        for cell in chosen:
            print(f"{'computed already' if is_finished(cell, folder) else 'to run':<16}  {cell.name}")
        return 0
    with held(folder, "bench folder"):
        return run(bench, cells, chosen, folder, launch or in_new_process)


def choose(bench: Bench, only: str) -> tuple[set[str], set[str]]:
    """Models and evaluations of `--only`; all of a kind of which none is named."""
    names = {name.strip() for name in only.split(",") if name.strip()}
    known = [*bench.models, *bench.evaluations]
    for name in sorted(names):
        if name not in known:
            raise UserError(f"--only {name}: there is no such model or evaluation; known are {', '.join(known)}.")
    return names & set(bench.models) or set(bench.models), names & set(bench.evaluations) or set(bench.evaluations)


def is_chosen(cell: Cell, wanted: tuple[set[str], set[str]]) -> bool:
    """Whether `--only` asks for a cell; pretraining belongs to every evaluation."""
    models, evaluations = wanted
    return cell.model in models and cell.evaluation in {PRETRAINING, *evaluations}


def run(bench: Bench, cells: Sequence[Cell], chosen: Sequence[Cell], folder: Path, launch: Launch) -> int:
    """Run what is missing and keep the report up to date; what was finished stays on Ctrl-C."""
    skipped = [cell for cell in chosen if is_finished(cell, folder)]
    for cell in skipped:
        print(f"computed already: {cell.name} ({place(cell, folder)})")
    waiting, started = [cell for cell in chosen if cell not in skipped], time.monotonic()
    try:
        for number, cell in enumerate(waiting, start=1):
            rest = left(number - 1, len(waiting), time.monotonic() - started)
            print(f"\ncell {number} of {len(waiting)}: {cell.name}{rest}", flush=True)
            run_cell(cell, folder, launch)
            report(bench, records(cells, folder), folder)
    finally:
        problems = report(bench, records(cells, folder), folder, show=True)
    mine = {cell.name for cell in chosen}
    for name, text in problems:
        if name in mine:
            print(f"xscale: error: {text}", file=sys.stderr)
    unfinished = [cell.name for cell in chosen if not is_finished(cell, folder)]
    if unfinished:
        print(f"xscale: error: {len(unfinished)} of {len(chosen)} cells are not finished", file=sys.stderr)
    return int(bool(unfinished) or any(name in mine for name, _ in problems))


def run_cell(cell: Cell, folder: Path, launch: Launch) -> None:
    """Run one cell and write down how it ended; an interrupted training is taken up where it stopped."""
    here = place(cell, folder)
    words = [*cell.arguments, "--output", str(here)]
    weights = cell.source
    if isinstance(weights, Cell):
        trained, done = place(weights, folder), is_finished(weights, folder)
        weights = newest(trained) if done else None
        if weights is None:
            why = "no checkpoint of it can be read; remove" if done else "it is not finished; see"
            print(f"left out: the pretraining of {cell.model} with seed {cell.seed}: {why} {trained}")
            return
    if weights is not None:
        words += [cell.option, str(weights)]
    before = read_cell(here).get("status")
    begun = newest(here) if before == "interrupted" and cell.arguments[0] == "fit" else None
    if begun is not None:
        print(f"goes on from {begun}")
        words += ["--ckpt_path", str(begun)]
    content = {"cell": cell.name, "key": cell.key, "status": "interrupted", "command": words}
    with told(here / CELL):
        write_json(content, here / CELL)  # true until it has ended, however that happens
    code, error = launch(words)
    if code in SIGNALLED:
        raise KeyboardInterrupt
    content["status"] = "failed" if code else "finished"
    if code:
        content["error"] = error or f"exit code {code}"
    with told(here / CELL):
        write_json(content, here / CELL)


def place(cell: Cell, folder: Path) -> Path:
    """Folder of a cell."""
    return folder / "runs" / cell.folder


def read_cell(here: Path) -> dict[str, Any]:
    """What is written down of the cell in a folder; nothing if it was never begun."""
    try:
        return json.loads((here / CELL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def is_finished(cell: Cell, folder: Path) -> bool:
    """Whether a cell has been computed, from the same configuration and weights."""
    content = read_cell(place(cell, folder))
    return content.get("status") == "finished" and content.get("key") == cell.key


def newest(here: Path) -> Path | None:
    """The last checkpoint of a cell that can be read: a process that was killed may leave half of one."""
    for path in sorted(here.rglob("checkpoints/last.ckpt"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            checkpoints.read_metadata(path)
        except UserError:
            continue
        return path
    return None


def records(cells: Sequence[Cell], folder: Path) -> list[Record]:
    """How every cell stands, with its figures."""
    sources = {cell.model: given(cell.model, cell.seed, cell.source) for cell in cells if isinstance(cell.source, str)}
    found = list(sources.values())
    for cell in cells:
        here = place(cell, folder)
        content = read_cell(here)
        found.append(collect(cell, content.get("status", "not run"), content.get("error", ""), here))
    return found


def in_new_process(arguments: list[str]) -> tuple[int, str]:
    """Run `xscale` in a process of its own; returns its exit code and the error that it has told, if any."""
    command = [sys.executable, "-m", "xscale_lightning.cli", *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, errors="replace")
    assert process.stderr is not None
    last = deque[str](maxlen=50)
    try:
        for line in process.stderr:
            sys.stderr.write(line)
            last.append(line.rstrip())
        code = process.wait()
    except KeyboardInterrupt:  # it reaches the process, too, which ends by itself
        process.communicate()
        raise
    told = [i for i, line in enumerate(last) if line.startswith("xscale: error: ")]
    return code, " ".join(list(last)[told[-1] :]).removeprefix("xscale: error: ") if told else ""
