"""Kill a real training again and again, and compare it with the run that was never killed, bit for bit.

    python benchmarks/kill.py --kills 5 --output kill

For every case (a method, with or without worker processes, accumulated gradients, validation inside the epoch, stages)
the command `xscale fit` runs once to its end. Then the same command with `--ckpt_path last` is started, killed with
SIGKILL at a random moment, every third time while a checkpoint is being written, and started again, until it has been
killed often enough; the last start may finish. Both write a trace (`xscale_lightning.callbacks.Trace`): per batch the
loss and the learning rate as hexadecimal floats, hashes of the images, of the generator after the step, and of
weights, target networks and AdamW's moments. Every line of the killed run, also of batches that were run again, has to
be the line of the straight one. Prints a line per case and exits with 1 if any differs or a process is left behind.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = {
    "model": {
        "optional_args": {
            "decoder_dim": 32,
            "decoder_depth": 1,
            "decoder_heads": 2,
            "head_dim": 64,
            "predictor": {"dim": 24, "depth": 1, "num_heads": 3},
        },
        "init_args": {"backbone": {"dim": 48, "depth": 2, "num_heads": 3, "image_size": 32}},
    },
    "data": {"init_args": {"image_size": 32, "batch_size": 8, "samples_per_epoch": 104}},  # 13 batches
    "trainer": {"max_epochs": 3, "precision": "32-true", "accelerator": "cpu", "log_every_n_steps": 1},
    "checkpoint": {"minutes": 0.001},
    "knn": {"every_n_epochs": 0, "max_train": 64, "max_test": 32},
    "geometry": {"every_n_epochs": 0, "max_samples": 32},
    "pictures": {"every_n_epochs": 0, "num_images": 1, "num_score_images": 8},
    "affinity": {"every_n_epochs": 0},
}
STAGES = [
    {"name": "one", "config": {"trainer": {"max_epochs": 2}}},
    {"name": "two", "optimizer": "carry", "config": {"data": {"init_args": {"batch_size": 16}}}},
]
CASES = {
    "mae": ("mae", {}),
    "mae_workers_accumulate": (
        "mae",
        {
            "data": {"init_args": {"num_workers": 2}},
            "trainer": {"accumulate_grad_batches": 3, "val_check_interval": 5},
            "checkpoint": {"every_n_train_steps": 2},
        },
    ),
    "latent_mim": (
        "latent_mim",
        {
            "model": {"init_args": {"backbone": {"image_size": 64}}},  # its mask leaves nothing of 16 tokens
            "data": {"init_args": {"image_size": 64, "num_workers": 2}},
        },
    ),
    "ijepa": ("ijepa", {"trainer": {"accumulate_grad_batches": 2}}),
    "s2mae": ("s2mae", {"trainer": {"val_check_interval": 4}}),
    "s2mae_stages": ("s2mae", {"stages": STAGES}),
}


class Process:
    """A command of our own, in a session of its own, so that what it leaves behind can be found."""

    def __init__(self, arguments: list[str], log: Path, fork: bool) -> None:
        """Start it."""
        self.fork = fork
        sys.stdout.flush()
        if not fork:
            command = [sys.executable, "-m", "xscale_lightning.cli", *arguments]
            self.pid = subprocess.Popen(
                command, stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True
            ).pid
            return
        self.pid = os.fork()
        if self.pid == 0:  # the imports of the parent are there already
            os.setsid()
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
            time.sleep(0.2)
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


def run_case(name: str, kills: int, folder: Path, draw: random.Random, fork: bool) -> bool:
    """Run one case; returns whether both runs are equal and nothing was left behind."""
    from xscale_lightning.callbacks.trace import read_rows

    folder.mkdir(parents=True)
    method, extra = CASES[name]
    (folder / "small.yaml").write_text(yaml.safe_dump(SMALL))
    (folder / "case.yaml").write_text(yaml.safe_dump(extra))
    files = [CONFIGS / f"{method}.yaml", CONFIGS / "quickstart.yaml", folder / "small.yaml", folder / "case.yaml"]
    arguments = ["fit", *(word for file in files for word in ("--config", str(file)))]

    def command(kind: str) -> list[str]:
        return [*arguments, "--output", str(folder / kind), "--trace.file", str(folder / f"{kind}.txt")]

    begun = time.monotonic()
    code = Process(command("straight"), folder / "straight.log", fork).wait(pause=0.02)
    if code != 0:
        print(f"{name}: the straight run ended with {code}: see {folder / 'straight.log'}")
        return False
    straight = read_rows(folder / "straight.txt")
    seconds = time.monotonic() - begun
    trace, killed, writing, strays = folder / "killed.txt", 0, 0, list[int]()
    again, code, total = [*command("killed"), "--ckpt_path", "last"], None, len(straight)
    while code is None:
        stale = unfinished(folder / "killed")
        process = Process(again, folder / "killed.log", fork)
        if killed == kills:
            code = process.wait(pause=0.02)
            strays += process.left_behind()
            break
        target, while_writing = lines(trace) + draw.randint(1, max(2, total // max(kills, 1))), killed % 3 == 2
        code = process.wait(lambda target=target: lines(trace) >= target)
        if code is None and while_writing:
            code = process.wait(lambda stale=stale: bool(unfinished(folder / "killed") - stale), pause=0.0)
        if code is not None:
            break  # it finished before its turn
        time.sleep(0.0 if while_writing else draw.random() * 0.1)
        process.kill()
        killed, writing = killed + 1, writing + bool(unfinished(folder / "killed") - stale)
        strays += process.left_behind()
    rows = read_rows(trace)
    wrong = [row for row in rows if row not in set(straight)]
    missing = [row for row in straight if row not in set(rows)]
    equal = code == 0 and not wrong and not missing
    print(
        f"{name}: {'equal' if equal and not strays else 'DIFFERENT'}; killed {killed} times, {writing} of them while a "
        f"checkpoint was being written; {len(straight)} batches, {len(rows) - len(straight)} run again; "
        f"exit code {code}; {len(wrong)} wrong and {len(missing)} missing lines; {len(strays)} processes left behind; "
        f"straight run {seconds:.0f} s",
        flush=True,
    )
    return equal and not strays


def main() -> int:
    """Run the cases that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5, help="kills per case")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--output", type=Path, default=Path("kill"), help="a folder that does not exist yet")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--fork", action="store_true", help="import once and fork: faster, the same code from there on")
    options = parser.parse_args()
    if options.fork:
        import xscale_lightning.commands.stages  # noqa: F401 (before the first fork)
    draw = random.Random(options.seed)
    good = [run_case(name, options.kills, options.output / name, draw, options.fork) for name in options.cases]
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
