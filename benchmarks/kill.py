"""Kill a real training again and again, and compare it with the run that was never killed, bit for bit.

    python benchmarks/kill.py --kills 5 --output kill

For every case (a method, with or without worker processes, accumulated gradients, validation inside the epoch, pairs,
scenes, stages) the command `xscale fit` runs once to its end. Then the same command with `--ckpt_path last` is started,
killed with SIGKILL, and started again, until it has been killed often enough; the last start may finish. In turn it is
killed after a random number of batches, at a random second (also while it starts, measures step 0 or goes from stage to
stage), and while a checkpoint is being written.

Both write a trace (`xscale_lightning.callbacks.Trace`): per batch the loss and the learning rate as hexadecimal floats,
hashes of the images, of the generator after the step, and of weights, target networks and AdamW's moments. Every line
of the killed run, also of batches that were run again, has to be the line of the straight one. At the end the figures
of `results.json` and everything in `last.ckpt` are compared, too, but for paths and seconds. Prints a line per case,
adds it to `results/kill.json` if asked to, and exits with 1 if anything differs or a process is left behind.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kill_cases

FIGURES = ("status", "metrics", "losses", "steps", "images_seen")  # of results.json


class Process:
    """A command of our own, in a session of its own, so that what it leaves behind can be found."""

    def __init__(self, arguments: list[str], log: Path, fork: bool) -> None:
        """Start it."""
        sys.stdout.flush()
        if not fork:
            command = [sys.executable, "-m", "xscale_lightning.cli", *arguments]
            with log.open("ab") as file:
                child = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
            self.pid = child.pid
            return
        parent, self.pid = os.getpid(), os.fork()
        if self.pid == 0:  # the imports of the parent are there already
            from xscale_lightning.launched import watch

            os.setsid()
            threading.Thread(target=watch, args=(parent, 0.2, 0.0), daemon=True).start()
            descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            code = 70
            try:
                from xscale_lightning.cli import main

                code = main(arguments)
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def wait(self, until: Callable[[], bool] = lambda: False, pause: float = 0.0005) -> int | None:
        """Its exit code once it has ended; None as soon as `until` says so."""
        while True:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            if until():
                return None
            time.sleep(pause)

    def kill(self) -> None:
        """SIGKILL, for the training process alone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)

    def left_behind(self, seconds: float = 15.0) -> list[int]:
        """Processes of its session that are still there after a while: workers look for their parent every 5 s."""
        end = time.monotonic() + seconds
        while (found := in_session(self.pid)) and time.monotonic() < end:
            time.sleep(0.1)
        return found


def in_session(session: int) -> list[int]:
    """Living processes of a session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def lines(path: Path) -> int:
    """Number of lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.is_file() else 0


def unfinished(folder: Path) -> set[Path]:
    """Checkpoints that are being written, or that never were whole."""
    return set(folder.glob("**/checkpoints/.*.part"))


def plain(value: Any, key: str = "") -> Any:
    """Content of a checkpoint without what two equal runs differ in: seconds, and the folders that they write to."""
    import torch

    if isinstance(value, torch.Tensor):
        bits = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return str(value.dtype), tuple(value.shape), hashlib.blake2b(bits, digest_size=8).hexdigest()
    if isinstance(value, Mapping):
        return {plain(name): plain(part, str(name)) for name, part in value.items() if name != "seconds"}
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if key == "dirpath":
        return None
    return Path(value).name if isinstance(value, str) and os.sep in value else value


def ends(folder: Path) -> dict[str, Any]:
    """Figures and last checkpoint of a run, of every stage if it has some."""
    import torch

    found = {}
    for path in sorted(folder.glob("**/results.json")):
        content = json.loads(path.read_text(encoding="utf-8"))
        place = path.parent.name if path.parent.name.startswith("stage_") else "run"
        found[place] = {name: content[name] for name in FIGURES}
        state = torch.load(path.parent / "checkpoints" / "last.ckpt", weights_only=True)
        found[f"{place}/last.ckpt"] = plain(state)
    return found


def first_difference(one: Any, two: Any, name: str = "") -> str | None:
    """Where two plain contents differ; None if they are equal."""
    if isinstance(one, dict) and isinstance(two, dict):
        parts = [(f"{name}/{key}", one.get(key), two.get(key)) for key in {**one, **two}]
    elif isinstance(one, list) and isinstance(two, list) and len(one) == len(two):
        parts = [(f"{name}/{number}", *pair) for number, pair in enumerate(zip(one, two, strict=True))]
    else:
        return None if one == two else f"{name}: {one} and {two}"
    return next((found for key, *pair in parts if (found := first_difference(*pair, key))), None)


def kill_once(
    process: Process, moment: str, folder: Path, draw: random.Random, length: tuple[int, float], end: float
) -> int | None:
    """Kill a process at a moment of a kind; its exit code if it was done before.

    Args:
        process: what to kill.
        moment: "batch", "second" or "write".
        folder: of the case.
        draw: for the moment.
        length: at most so many batches, or seconds, later.
        end: when `time.monotonic()` says so, it is killed in any case.
    """
    (batches, seconds), trace, stale = length, folder / "killed.txt", unfinished(folder / "killed")
    if moment == "second":
        end = min(end, time.monotonic() + draw.random() * seconds)
    target = lines(trace) + draw.randint(1, batches) if moment != "second" else sys.maxsize
    code = process.wait(lambda: lines(trace) >= target or time.monotonic() >= end)
    if code is None and moment == "write":
        code = process.wait(lambda: bool(unfinished(folder / "killed") - stale) or time.monotonic() >= end, pause=0.0)
    elif code is None and moment == "batch":
        time.sleep(draw.random() * 0.1)
    if code is None:
        process.kill()
    return code


def run_straight(arguments: list[str], folder: Path, fork: bool) -> float:
    """The run that is never killed, unless it is there; the seconds that it took."""
    done = folder / "straight.json"
    if not done.is_file():
        for path in (folder / "straight", folder / "straight.txt"):  # of one that did not come to its end
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        begun = time.monotonic()
        code = Process(arguments, folder / "straight.log", fork).wait(pause=0.02)
        if code != 0:
            raise SystemExit(f"the straight run ended with {code}: see {folder / 'straight.log'}")
        done.write_text(json.dumps(time.monotonic() - begun))
    return json.loads(done.read_text())


def run_case(name: str, kills: int, folder: Path, seed: int, fork: bool, end: float) -> dict[str, Any]:
    """Run one case, or go on with it; what came out. At `end` (of `time.monotonic()`) it is interrupted."""
    from xscale_lightning.callbacks.trace import read_rows

    arguments, state = kill_cases.arguments(name, folder), folder / "state.json"

    def command(kind: str) -> list[str]:
        return [*arguments, "--output", str(folder / kind), "--trace.file", str(folder / f"{kind}.txt")]

    seconds, trace = run_straight(command("straight"), folder, fork), folder / "killed.txt"
    straight = read_rows(folder / "straight.txt")
    count = {"killed": 0, "writing": 0, "strays": 0}
    if state.is_file():
        count = json.loads(state.read_text())
    if (folder / "found.json").is_file():
        return json.loads((folder / "found.json").read_text())
    again, code = [*command("killed"), "--ckpt_path", "last"], None
    length = (max(2, len(straight) // max(kills, 1)), 0.6 * seconds)
    while code is None and time.monotonic() < end:
        stale, number = unfinished(folder / "killed"), count["killed"]
        process, draw = Process(again, folder / "killed.log", fork), random.Random(f"{name} {seed} {number}")
        moment = ("batch", "second", "write")[number % 3] if number < kills else "none"
        code = kill_once(process, moment, folder, draw, length if moment != "none" else (sys.maxsize, 0.0), end)
        count["killed"] += code is None
        count["writing"] += code is None and bool(unfinished(folder / "killed") - stale)
        count["strays"] += len(process.left_behind())
        state.write_text(json.dumps(count))
    if code is None:
        raise TimeoutError
    rows = read_rows(trace)
    wrong, missing = set(rows) - set(straight), set(straight) - set(rows)
    differs = first_difference(ends(folder / "straight"), ends(folder / "killed")) if code == 0 else "it did not end"
    found = {
        "seed": seed,
        "kills": count["killed"],
        "kills_while_writing": count["writing"],
        "batches": len(straight),
        "lines_compared": len(rows),
        "wrong_lines": len(wrong),
        "missing_lines": len(missing),
        "end_differs_in": differs,
        "exit_code": code,
        "left_behind": count["strays"],
        "started_by": "fork" if fork else "command line",
        "straight_seconds": round(seconds, 1),
    }
    (folder / "found.json").write_text(json.dumps(found))
    return found


def is_equal(found: Mapping[str, Any]) -> bool:
    """Whether a case came out as it has to."""
    bad = ("wrong_lines", "missing_lines", "end_differs_in", "exit_code", "left_behind")
    return not any(found[name] for name in bad)


def main() -> int:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="kills per case")
    parser.add_argument("--cases", nargs="+", choices=list(kill_cases.CASES), default=list(kill_cases.CASES))
    parser.add_argument("--output", type=Path, default=Path("kill"), help="a folder; what is there is gone on with")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="of this command; then it is interrupted")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--fork", action="store_true", help="import once and fork: faster, the same code from there on")
    parser.add_argument("--results", help="folder of a kill.json to add what came out to; by default none is written")
    options = parser.parse_args()
    if options.fork:
        import xscale_lightning.commands.stages  # noqa: F401 (before the first fork)
    good, end = True, time.monotonic() + options.seconds
    for name in options.cases:
        try:
            found = run_case(name, options.kills, options.output / name, options.seed, options.fork, end)
        except TimeoutError:
            print(f"{name}: the time is over; the same command goes on with it", flush=True)
            return 3
        good &= is_equal(found)
        print(f"{name}: {'equal' if is_equal(found) else 'DIFFERENT'}; {json.dumps(found)}", flush=True)
        if options.results:
            record(name, found, options.results)
    return 0 if good else 1


def record(name: str, found: dict[str, Any], folder: str) -> None:
    """Add what came out, with machine and date, to what is there."""
    import torch
    from common import environment, merge_result

    key = f"seed {found['seed']}, {found['kills']} kills, by {found['started_by']}"
    merge_result("kill", (name, key), {**found, **environment(torch.device("cpu"))}, folder)


if __name__ == "__main__":
    sys.exit(main())
