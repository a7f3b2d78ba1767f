"""`xscale sweep VARIANTS.yaml`: `fit` in variants, one after the other, and a table that compares them.

Every variant is a process of its own: one that crashes or runs out of memory leaves the others alone.
"""

import argparse
import gc
import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich import get_console
from rich.console import Console
from rich.table import Table

from xscale_lightning.callbacks.verdict import format_value
from xscale_lightning.commands.bars import left
from xscale_lightning.commands.parser import load_yaml
from xscale_lightning.commands.stage_options import check_name, insert_configs, last_given, take_apart
from xscale_lightning.commands.stages import check, told_of
from xscale_lightning.commands.train import claim, prepare
from xscale_lightning.errors import UserError
from xscale_lightning.files import told, write_bytes, write_json
from xscale_lightning.locks import held
from xscale_lightning.opening import check_file

Launch = Callable[[list[str]], int]
Variants = dict[str, dict[str, Any]]
ON_CONSOLE = ("/loss", "/top1", "/map_micro", "reconstruction/psnr")  # endings of what is shown; the files have all


def main(argv: list[str], launch: Launch | None = None) -> int:
    """Check all variants, run them, and report; returns 1 if one of them failed.

    Args:
        argv: the command line, verb first.
        launch: runs `xscale` with its arguments and returns the exit code; by default in a new process.

    Raises:
        UserError: the file of variants is malformed, or a variant would be refused; nothing has been written then.
    """
    parser = argparse.ArgumentParser(
        prog="xscale sweep",
        usage="xscale sweep VARIANTS.yaml [--only NAME,NAME] [options of xscale fit]",
        description="Run `xscale fit` once for every variant: a YAML file of names and what differs under each. "
        "All variants are checked before the first one trains. Options of `xscale fit` hold for every variant.",
        allow_abbrev=False,
    )
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="run these variants and no others")
    parser.add_argument("--check", action="store_true", help="check every variant and stop: nothing is run or written")
    if len(argv) < 2 or argv[1].startswith("-"):
        parser.parse_args(argv[1:] if argv[1:] in (["-h"], ["--help"]) else [])
        raise UserError("missing: the file of variants. Give it first: xscale sweep VARIANTS.yaml --config CONFIG.yaml")
    own, rest = parser.parse_known_args(argv[2:])
    variants, options = choose(read_variants(argv[1]), own.only), prepare(rest)
    for name, overlay in variants.items():
        told_of(f"variant {name!r}", partial(check_variant, options, overlay))
    if own.check:
        print(f"{len(variants)} variants can run: {', '.join(variants)}")
        return 0
    output = Path(last_given(options, "output") or "runs")
    folder = output / claim(output, time.strftime("sweep_%Y-%m-%d_%H-%M-%S"))
    with held(folder):
        return run(variants, options, folder, launch or in_new_process)


def read_variants(path: str) -> Variants:
    """What differs, by the name of the variant.

    Raises:
        UserError: no such file, or it is not a mapping of names to configurations.
    """
    check_file(path, f"VARIANTS {path!r}")
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"VARIANTS {path!r} cannot be read ({error.strerror}): give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"VARIANTS {path!r} is no text: give a YAML file.") from error
    except yaml.YAMLError as error:
        raise UserError(f"VARIANTS {path!r} is no valid YAML: {str(error).splitlines()[0]}.") from error
    if not isinstance(content, dict) or not content:
        raise UserError(f"VARIANTS {path!r} holds no variants: give names, and under each what differs.")
    for name, overlay in content.items():
        check_name(f"VARIANTS {path!r}: {str(name)!r}", str(name))
        if overlay is not None and not isinstance(overlay, dict):
            raise UserError(f"VARIANTS {path!r}: {name} is {str(overlay)[:80]!r}; give the keys of a configuration.")
        if "output" in (overlay or {}):
            raise UserError(f"VARIANTS {path!r}: {name} has 'output', which is for all: give --output.")
    return {str(name): overlay or {} for name, overlay in content.items()}


def choose(variants: Variants, only: str) -> Variants:
    """Those of `--only`, in the order of the file; all without it."""
    names = [name.strip() for name in only.split(",") if name.strip()]
    for name in names:
        if name not in variants:
            raise UserError(f"--only {name}: there is no such variant; known are {', '.join(variants)}.")
    return {name: overlay for name, overlay in variants.items() if not names or name in names}


def check_variant(options: list[str], overlay: dict[str, Any]) -> None:
    """Make everything of the variant's run and throw it away."""
    check(take_apart(["fit", *insert_configs(options, ["--config", json.dumps(overlay, default=str)])]))
    gc.collect()


def run(variants: Variants, options: list[str], folder: Path, launch: Launch) -> int:
    """Run the variants and keep `sweep.json` and `sweep.md` up to date; what was finished stays on Ctrl-C."""
    records = {name: {"status": "not run", "config": overlay} for name, overlay in variants.items()}
    started = time.monotonic()
    try:
        for number, (name, overlay) in enumerate(variants.items(), start=1):
            rest = left(number - 1, len(variants), time.monotonic() - started)
            print(f"\nvariant {number} of {len(variants)}: {name}{rest}", flush=True)
            place = folder / name
            file = place / "variant.yaml"
            with told(file):
                place.mkdir()
                write_bytes(file, yaml.safe_dump(overlay, sort_keys=False).encode())
            arguments = insert_configs(options, ["--config", str(file)])
            records[name]["status"] = "interrupted"  # until it returns
            code = launch(["fit", *arguments, "--output", str(place)])
            records[name] = {"status": "failed" if code else "finished", "config": overlay, **read_results(place)}
            report(records, folder)
    except KeyboardInterrupt:
        for name, record in records.items():
            if record["status"] == "interrupted":
                record.update(read_results(folder / name))
        raise
    finally:
        report(records, folder)
        show(records)
        print(f"sweep: {folder / 'sweep.md'}")
    failed = [name for name, record in records.items() if record["status"] == "failed"]
    if failed:
        print(f"xscale: error: {len(failed)} of {len(records)} variants failed: {', '.join(failed)}", file=sys.stderr)
    return int(bool(failed))


def in_new_process(arguments: list[str]) -> int:
    """Run `xscale` in a process of its own and wait for it; Ctrl-C reaches it too, and it is waited for."""
    process = subprocess.Popen([sys.executable, "-m", "xscale_lightning.cli", *arguments])
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise


def read_results(place: Path) -> dict[str, Any]:
    """Figures of the newest `results.json` below `place`, of a run in stages the last stage's; nothing without one."""
    found = [(json.loads(path.read_text(encoding="utf-8")), path) for path in place.rglob("results.json")]
    if not found:
        return {}
    content, path = max(found, key=lambda pair: (pair[0].get("stage", {}).get("number", 0), pair[0]["finished_at"]))
    metrics = {name: {"step_0": m["step_0"], "last": m["last"]} for name, m in content["metrics"].items()}
    losses = {name: {"step_0": None, "last": loss["last"]} for name, loss in content["losses"].items()}
    stage = {"stage": content["stage"]} if "stage" in content else {}
    figures = {"metrics": {**losses, **metrics}, "steps": content["steps"], "seconds": content["seconds"]}
    return {**figures, **stage, "run": path.parent.relative_to(place.parent).as_posix()}


def report(records: dict[str, dict[str, Any]], folder: Path) -> None:
    """Write `sweep.json` and `sweep.md`, each whole or not at all."""
    with told(folder / "sweep.json"):
        write_json({"variants": records}, folder / "sweep.json")
    names = columns(records)
    lines = [
        "# Sweep",
        "",
        "Last value, and in brackets that of step 0. Losses compare only where mask and target agree.",
    ]
    lines += ["", "| variant | " + " | ".join(["status", *names]) + " |", "| --- " * (len(names) + 2) + "|"]
    lines += [
        "| " + " | ".join([name, record["status"], *cells(record, names)]) + " |" for name, record in records.items()
    ]
    with told(folder / "sweep.md"):
        write_bytes(folder / "sweep.md", ("\n".join(lines) + "\n").encode())


def columns(records: dict[str, dict[str, Any]]) -> list[str]:
    """Names of all metrics, in the order of their first appearance."""
    return list(dict.fromkeys(name for record in records.values() for name in record.get("metrics", {})))


def cells(record: dict[str, Any], names: list[str]) -> list[str]:
    """Text of a variant's figures; empty where it has none."""
    figures = [record.get("metrics", {}).get(name, {}) for name in names]
    pairs = [(figure.get("last"), figure.get("step_0")) for figure in figures]
    return [
        "" if x is None else format_value(x) + ("" if zero is None else f" ({format_value(zero)})") for x, zero in pairs
    ]


def show(records: dict[str, dict[str, Any]]) -> None:
    """Print the table with the figures that tell most."""
    console = get_console()
    if not console.is_terminal:
        console = Console(width=120)
    names = [name for name in columns(records) if name.endswith(ON_CONSOLE)]
    table = Table(title="last (step 0)")
    for title in ("variant", "status", *names):
        table.add_column(title)
    for name, record in records.items():
        table.add_row(name, record["status"], *cells(record, names))
    console.print(table)
