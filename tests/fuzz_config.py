"""Wrong configurations through `xscale fit`, drawn from the signatures of methods, tasks and data modules.

Each either trains two steps or is refused in one or two lines that name an argument that was changed, before anything
is written, in bounded time and memory. All run in one warm process.
`python tests/fuzz_config.py FOLDER SECONDS [SEED]` draws for so long (SECONDS 0: every method with every data module,
unchanged), prints what breaks the rule, and writes FOLDER/report_SEED.json.
"""

import collections
import contextlib
import io
import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_draw import Case, draw, pairs, pool
from fuzz_files import make_files, make_pack

STARTED = time.time()
LIMIT = 30  # seconds of computing for one configuration; one that sleeps has 4 times as long
TIMES = (signal.SIGALRM, signal.SIGPROF)
MEMORY = 2_000_000  # kB that one configuration may take on top of what was ever taken before


def problem(case: Case, root: Path, folder: Path) -> str:
    """Run a case; what breaks the rule, "" where nothing does."""
    return outcome(case, root, folder)[1]


def outcome(case: Case, root: Path, folder: Path) -> tuple[str, str]:
    """Run a case: `ran` or `refused`, and what breaks the rule."""
    from xscale_lightning import cli

    output, path = folder / "out", folder / "case.yaml"
    path.write_text(yaml.safe_dump(case.config(root)))
    shutil.rmtree(output, ignore_errors=True)
    out, err = io.StringIO(), io.StringIO()

    def too_long(*args: object) -> None:
        raise TimeoutError

    before, taken = [(number, signal.signal(number, too_long)) for number in TIMES], most_memory()
    signal.setitimer(signal.ITIMER_PROF, LIMIT)  # other programs on the machine do not count
    signal.alarm(4 * LIMIT)
    try:
        quiet = contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings()
        with quiet[0], quiet[1], quiet[2], without_pictures(case):
            warnings.simplefilter("ignore")
            code = cli.main(["fit", "--config", str(path), "--output", str(output)])
    except TimeoutError:
        return "hung", f"took more than {LIMIT} s"
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        return "escaped", f"{type(error).__name__} escaped: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
        for number, handler in before:
            signal.signal(number, handler)
    if (more := most_memory() - taken) > MEMORY:
        return "memory", f"took {more // 1024} MB"
    if code == 0:
        return "ran", ""
    return "refused", fault(case, code, err.getvalue(), output)


def most_memory() -> int:
    """kB that this process has ever taken."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def fault(case: Case, code: int, text: str, output: Path) -> str:
    """What is wrong with how a configuration was refused, "" if nothing is."""
    message = text[text.rfind("xscale: error: ") :].strip() if "xscale: error: " in text else text.strip()[-300:]
    if "TimeoutError" in message:
        return f"took more than {LIMIT} s"
    if code == 1 or "Traceback" in text:
        return f"no user's error: {message[:300]}"
    if len(message.splitlines()) > 2:
        return f"more than two lines: {message[:300]}"
    words = {part for _, name, _ in case.changes for part in (name.split(".")[-1], name.split(".")[0])}
    words |= {word.replace("_", " ") for word in words}
    if not any(word in message for word in words):
        return f"names none of {sorted(words)}: {message[:300]}"
    return f"something was written: {message[:200]}" if output.exists() and any(output.iterdir()) else ""


@contextlib.contextmanager
def warm() -> Iterator[None]:
    """One parser for all configurations; nothing of it changes but its list of callbacks."""
    from xscale_lightning.commands.train import CLI

    names = ("parser", "_subcommand_parsers", "_subcommand_method_arguments")
    make, made, keys = CLI.setup_parser, {}, []

    def setup_parser(self: CLI, *args: Any, **kwargs: Any) -> None:
        if not made:
            make(self, *args, **kwargs)
            made.update({name: getattr(self, name) for name in names})
            keys.extend(self._subcommand_parsers["fit"].callback_keys)
        for name in names:
            setattr(self, name, made[name])
        self._subcommand_parsers["fit"].callback_keys[:] = keys

    CLI.setup_parser = setup_parser  # type: ignore[method-assign]
    try:
        yield
    finally:
        CLI.setup_parser = make  # type: ignore[method-assign]


@contextlib.contextmanager
def without_pictures(case: Case) -> Iterator[None]:
    """They take most of the time of a run of two steps; drawn only where their options were changed."""
    from xscale_lightning.callbacks.pictures import ReconstructionPictures

    draw_all = ReconstructionPictures.probe
    if not any(section == "pictures" for section, _, _ in case.changes):
        ReconstructionPictures.probe = lambda *args, **kwargs: None  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        ReconstructionPictures.probe = draw_all  # type: ignore[method-assign]


def main(folder: Path, seconds: float, seed: int) -> int:
    """Draw until the time is up; prints every case that breaks the rule, and writes the report."""
    logging.disable(logging.CRITICAL)
    root, elsewhere = (folder / "files").absolute(), folder.absolute() / "cwd"
    folder = folder.absolute()
    if not root.exists():
        make_files(root)
        make_pack(root)
    elsewhere.mkdir(exist_ok=True)
    os.chdir(elsewhere)  # what is written beside the output folder is seen, too
    everything, choice, start = pool(), random.Random(seed), STARTED
    kinds, methods, data = collections.Counter(), collections.Counter(), collections.Counter()
    broken, slowest = [], []
    unchanged = iter([Case(*pair, []) for pair in pairs()] if not seconds else [])
    while time.time() - start < seconds or not seconds:
        case = next(unchanged, None) if not seconds else draw(choice, everything)
        if case is None:
            break
        (folder / "now.txt").write_text(f"{seed} {case}")  # told where the process is killed
        begun = time.time()
        kind, found = outcome(case, root, folder)
        slowest = sorted([*slowest, (round(time.time() - begun, 2), str(case))], reverse=True)[:10]
        if not found and (left := list(elsewhere.iterdir())):
            found = f"wrote {left[0].name} into the working directory"
            shutil.rmtree(left[0]) if left[0].is_dir() else left[0].unlink()
        kinds[kind], methods[case.method], data[case.data] = (
            kinds[kind] + 1,
            methods[case.method] + 1,
            data[case.data] + 1,
        )
        if found:
            broken.append({"case": str(case), "problem": found})
            print(f"{case.method} {case.data} {case.changes}: {found}", flush=True)
        report = {
            "seed": seed, "configurations": kinds.total(), "seconds": round(time.time() - start, 1),
            "most_memory_mb": most_memory() // 1024, "outcomes": kinds, "methods": methods, "data": data,
            "broken": broken, "slowest": slowest,
        }  # fmt: skip
        (folder / f"report_{seed}.json").write_text(json.dumps(report, indent=1))
    print(f"seed {seed}: {kinds.total()} configurations ({dict(kinds)}), {len(broken)} break the rule")
    return int(bool(broken))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    with warm():
        sys.exit(main(place, float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
