"""Wrong command lines for the verbs beside `fit`: each works, or is refused in a few lines, and leaves nothing behind.

`python tests/fuzz_verbs.py FOLDER SECONDS [SEED]` takes command lines that work, changes one to three of their words,
runs them in one process, prints what breaks the rule, and writes FOLDER/verbs_SEED.json; 0 seconds: each as it is.
"""

import collections
import contextlib
import io
import json
import logging
import os
import random
import shutil
import signal
import sys
import time
import warnings
from pathlib import Path

import yaml

sys.path.insert(0, str(Path(__file__).parent))
from fuzz_config import LIMIT
from fuzz_draw import Case
from fuzz_files import make_files, make_pack

WORDS = ["", "nonsense", "0", "-1", "1", "7", "1e300", "nan", "-inf", "9" * 30, "0.5", "é" * 300, "../..", "/dev/null",
         "/proc/self/mem", "/", ".", "[1", "{a: 1}", "null", "--", "-x", "--nonsense", "a,b", "a\x1b[2Jb", "http://x/y",
         "*", "~", "mae", "B02", "train", "\\", "'", "%s", "{}"]  # fmt: skip
OUT = "OUT"


def command_lines(root: Path) -> list[list[str]]:
    """Command lines that work; `OUT` stands for a folder that is emptied before each."""
    ckpt, scene = str(root / "run" / "last.ckpt"), str(root / "scenes" / "s0.tif")
    config, sweep, bench = (str(root / name) for name in ("case.yaml", "sweep.yaml", "bench.yaml"))
    folder = [
        "--data",
        "SceneFolder",
        f"--data.root={root / 'scenes'}",
        "--data.bands.sensor=generic",
        "--data.gsd",
        "10",
    ]
    folder += ["--data.bands.names=[R, G, B]", "--data.file_bands=[R, G, B]", "--data.num_workers", "0"]
    labelled = ["--data", "ImageFolderData", f"--data.root={root / 'labelled'}", "--data.channels=[R, G, B]"]
    labelled += ["--data.bands.sensor=generic", "--data.bands.names=[R, G, B]", "--data.image_size=32", "--data.gsd=10"]
    return [
        ["test", "--config", config, "--ckpt_path", ckpt, "--output", OUT],
        ["validate", "--config", config, "--ckpt_path", ckpt, "--output", OUT, "--trainer.limit_val_batches", "1"],
        ["predict", "--config", config, "--ckpt_path", ckpt, "--output", OUT],
        ["export", ckpt, f"{OUT}/export", "--image-size", "32", "--overwrite"],
        ["embed", ckpt, scene, "--map", f"{OUT}/map.tif", "--size", "32", "--stride", "16", "--pca", "2", "--gsd", "10",
         "--file-bands", "R,G,B", "--nodata", "0", "--min-valid", "0.5", "--batch-size", "4"],
        ["reconstruct", ckpt, scene, "--out", f"{OUT}/picture.png", "--ratios", "0.5", "0.75", "--size", "32", "--row",
         "0", "--col", "0", "--seed", "1", "--tif", f"{OUT}/r.tif", "--tif-ratio", "0.5", "--file-bands", "R,G,B"],
        ["stats", *folder, "--split", "train", "--samples", "8", "--nodata", "0", "--batch-size", "4", "--write",
         f"{OUT}/stats.yaml"],
        ["pack", f"{OUT}/pack", *labelled, "--splits", "train,val", "--shard-mb", "1", "--batch-size", "4"],
        ["pack", str(root / "packed"), "--check"],
        ["doctor", *folder, "--report", f"{OUT}/report.csv", "--workers", "1", "--ignore", "crs,size"],
        ["sweep", sweep, "--check", "--only", "a", "--config", config],
        ["bench", bench, "--check", "--only", "one", "--output", f"{OUT}/bench"],
        ["schema", f"{OUT}/schema.json"],
        ["methods", "mae", "--verbose"], ["backbones", "--bands", "4"], ["completion", "bash"],
        ["new-method", "my_method", "--kind", "denoising", "--into", OUT],
    ]  # fmt: skip


def prepare(root: Path) -> None:
    """Files, a checkpoint, a sweep and a bench."""
    from xscale_lightning import cli

    make_files(root)
    make_pack(root)
    content = Case("mae", "SceneFolder", []).config(root)
    (root / "case.yaml").write_text(yaml.safe_dump(content))
    (root / "sweep.yaml").write_text(yaml.safe_dump({"variants": {"a": {"model.init_args.mask_ratio": 0.5}}}))
    (root / "bench.yaml").write_text(yaml.safe_dump({"models": {"one": {}}, "evaluations": {}}))
    if cli.main(["fit", "--config", str(root / "case.yaml"), "--output", str(root / "runs")]):
        raise RuntimeError("the checkpoint could not be made")
    (root / "run").mkdir()
    shutil.copy(next((root / "runs").rglob("last.ckpt")), root / "run" / "last.ckpt")


def draw(choice: random.Random, lines: list[list[str]], root: Path) -> list[str]:
    """One of the command lines with one to three words changed, taken out or put in."""
    words = list(choice.choice(lines))
    names = ("scenes", "scenes/s1.tif", "run", "case.yaml", "masks/s0.tif", "nowhere", "case.yaml/x")
    files = [*(str(root / name) for name in names), f"{OUT}/a/b/c"]
    for _ in range(choice.choice([1, 1, 2, 3])):
        place, word = choice.randrange(1, len(words) + 1), choice.choice(WORDS * 2 + files * 4)
        kind = choice.choice(["change", "change", "change", "drop", "add"])
        words[place : place + (kind != "add")] = [] if kind == "drop" else [word]
    return words


def outcome(words: list[str], out: Path) -> tuple[str, str]:
    """Run a command line: `ran` or `refused`, and what breaks the rule, "" where nothing does."""
    from xscale_lightning import cli

    def too_long(*args: object) -> None:
        raise TimeoutError

    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    words = [word.replace(OUT, str(out)) for word in words]
    text = io.StringIO()
    for number in (signal.SIGALRM, signal.SIGPROF):
        signal.signal(number, too_long)
    signal.setitimer(signal.ITIMER_PROF, LIMIT)
    signal.alarm(4 * LIMIT)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(text), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main(words)
    except TimeoutError:
        return "hung", f"took more than {LIMIT} s"
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        return "escaped", f"{type(error).__name__} escaped: {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.alarm(0)
    said = text.getvalue()
    message = said[said.rfind("xscale: error: ") :].strip()
    if code == 0 or (code == 1 and words[0] in ("doctor", "pack") and "xscale: error" not in said):
        return "ran", ""
    left = [path.name for path in out.rglob("*") if path.is_file()]
    if code == 1 or "Traceback" in said or "TimeoutError" in message:
        return "refused", f"no user's error: {message[:300]}"
    if len(message.splitlines()) > 3 or "\x1b" in message:
        return "refused", f"more than three lines, or marks that steer a terminal: {message[:300]}"
    return "refused", f"left {left[:3]}: {message[:200]}" if left else ""


def main(folder: Path, seconds: float, seed: int) -> int:
    """Draw until the time is up; prints what breaks the rule, and writes the report."""
    logging.disable(logging.CRITICAL)
    root, elsewhere = folder.absolute() / "files", folder.absolute() / "cwd"
    if not root.exists():
        prepare(root)
    elsewhere.mkdir(exist_ok=True)
    os.chdir(elsewhere)
    choice, lines, start = random.Random(seed), command_lines(root), time.time()
    kinds, verbs, broken = collections.Counter(), collections.Counter(), []
    unchanged = iter(lines if not seconds else [])
    while time.time() - start < seconds or not seconds:
        words = next(unchanged, None) if not seconds else draw(choice, lines, root)
        if words is None:
            break
        kind, found = outcome(words, folder.absolute() / "out")
        found = found or ("" if seconds or kind == "ran" else "an unchanged command line is refused")
        kinds[kind], verbs[words[0]] = kinds[kind] + 1, verbs[words[0]] + 1
        if found:
            broken.append({"words": words, "problem": found})
            print(words, found, flush=True)
        report = {"seed": seed, "command lines": kinds.total(), "outcomes": kinds, "verbs": verbs, "broken": broken}
        (folder.absolute() / f"verbs_{seed}.json").write_text(json.dumps(report, indent=1))
    print(f"seed {seed}: {kinds.total()} command lines ({dict(kinds)}), {len(broken)} break the rule")
    return int(bool(broken))


if __name__ == "__main__":
    place = Path(sys.argv[1]).absolute()
    place.mkdir(parents=True, exist_ok=True)
    sys.exit(main(place, float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
