"""Wrong and borderline configurations, drawn from the signatures of methods and data modules, through `xscale fit`.

Each either trains two steps or is refused in one or two lines that name an argument that was changed, before anything
is written. `python tests/fuzz_config.py FOLDER SECONDS [SEED]` draws for so long and prints what breaks the rule.
"""

import contextlib
import copy
import dataclasses
import inspect
import io
import logging
import math
import random
import shutil
import signal
import sys
import types
import typing
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import rasterio
import yaml
from rasterio.transform import from_origin

LIMIT = 60  # seconds for one configuration
NUMBERS = [0, -1, 1, 2, 3, 7, 10**9, 2**63, 10**30, 0.5, 1.5, -0.5, 1e-300, 1e300, math.nan, math.inf, -math.inf]
OTHERS = [
    "",
    "nonsense",
    "1",
    [],
    [0],
    [1, 2, 3, 4, 5],
    ["a", "a"],
    {},
    {"a": 1},
    None,
    True,
    "../..",
    "é" * 300,
]
TINY = {"name": "vit_tiny_patch8", "depth": 1, "dim": 16, "num_heads": 2}
SMALL = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
CUBES = {**TINY, "name": "spectral_vit_tiny_cube3_patch8", "pad": "edge", "image_size": 32}
METHODS = {
    "mae": {"backbone": TINY, **SMALL},
    "cross_scale_mae": {"backbone": TINY, "predictor_dim": 16, **SMALL},
    "s2mae": {"backbone": CUBES, **SMALL},
    "ijepa": {"backbone": {**TINY, "class_token": False}, "predictor": {"dim": 48, "depth": 1}},
    "latent_mim": {"backbone": {**TINY, "position": "stretched"}, "head_dim": 16, "mask_ratio": 0.5, **SMALL},
    "spatial_affinity": {
        "backbone": TINY, "host": "mae", "host_args": SMALL, "teacher": "own", "source": "interpolated"
    },
}  # fmt: skip
RGB = {"sensor": "generic", "names": ["R", "G", "B"], "mean": [1700.0] * 3, "std": [700.0] * 3}
SCENES = {"bands": RGB, "file_bands": ["R", "G", "B"], "image_size": 32, "samples_per_epoch": 8}


def make_files(root: Path) -> None:
    """A few small files for every data module."""
    rng = np.random.default_rng(0)

    def write(path: Path, pixels: np.ndarray, gsd: float = 10.0) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        options = {"crs": "EPSG:32632", "transform": from_origin(3e5, 5e6, gsd, gsd), "dtype": pixels.dtype}
        count, height, width = pixels.shape
        with rasterio.open(path, "w", "GTiff", width, height, count, **options) as file:
            file.write(pixels)

    def image(side: int = 64) -> np.ndarray:
        return rng.integers(500, 3000, (3, side, side)).astype("uint16")

    for number in range(4):
        write(root / "scenes" / f"s{number}.tif", image())
        write(root / "fine" / f"s{number}.tif", image(128), 5.0)
        write(root / "masks" / f"s{number}.tif", rng.integers(0, 2, (1, 64, 64)).astype("uint8"))
        write(root / "labelled" / ("a" if number % 2 else "b") / f"i{number}.tif", image(32))
        write(root / "labelled" / ("a" if number % 2 else "b") / f"j{number}.tif", image(32))
        for name in ("A.tif", "B.tif"):
            write(root / "changes" / f"p{number}" / name, image())
        write(root / "changes" / f"p{number}" / "label.tif", rng.integers(1, 3, (1, 64, 64)).astype("uint8"))


def data_modules(root: Path) -> dict[str, dict[str, Any]]:
    """Arguments of every data module with which it works."""
    scenes = {"root": str(root / "scenes"), **SCENES}
    return {
        "SyntheticData": {"length": 8, "image_height": 32, "image_width": 32, "bands": {"names": ["B02", "B03"]}},
        "SampleScene": {"image_size": 32, "samples_per_epoch": 8},
        "SceneFolder": scenes,
        "MaskFolder": {**scenes, "root_masks": str(root / "masks"), "num_classes": 2},
        "PairedFolders": {
            **scenes, "root_hr": str(root / "fine"), "bands_hr": RGB, "file_bands_hr": ["R", "G", "B"],
        },
        "ImageFolderData": {
            "root": str(root / "labelled"), "bands": RGB, "channels": ["R", "G", "B"], "image_size": 32,
            "holdout": 0.25,
        },
        "ChangeFolder": {"root": str(root / "changes"), "bands": RGB, "image_size": 32, "label": "label.tif"},
    }  # fmt: skip


def arguments(cls: type, prefix: str = "", seen: tuple[type, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Dotted names and types of a class's arguments, those of its bases and of dataclasses among them included."""
    names = set()
    for owner in cls.__mro__ if not dataclasses.is_dataclass(cls) else (cls,):
        if "__init__" not in owner.__dict__ or owner is object:
            continue
        try:
            hints = typing.get_type_hints(owner.__init__)
        except (NameError, TypeError):
            hints = {}
        parameters = list(inspect.signature(owner.__init__).parameters.values())[1:]
        for parameter in parameters:
            if parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL) or parameter.name in names:
                continue
            names.add(parameter.name)
            hint = hints.get(parameter.name, Any)
            yield prefix + parameter.name, hint
            options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
            for option in options:
                if isinstance(option, type) and dataclasses.is_dataclass(option) and option not in seen:
                    yield from arguments(option, f"{prefix}{parameter.name}.", (*seen, option))
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            return


def wrong_values(hint: Any) -> list[Any]:
    """Values for an argument, half of them of its own kind."""
    literals = [value for part in (hint, *typing.get_args(hint)) for value in _literals(part)]
    return [*NUMBERS, *OTHERS, *literals * 3]


def _literals(hint: Any) -> list[Any]:
    return list(typing.get_args(hint)) if typing.get_origin(hint) is typing.Literal else []


@dataclasses.dataclass
class Case:
    """One configuration: where it comes from, and what was changed in it."""

    method: str
    data: str
    changes: list[tuple[str, str, Any]]
    """Section ("model", "data" or a callback's key), dotted name, value."""

    def config(self, root: Path) -> dict[str, Any]:
        """As a file."""
        built: dict[str, Any] = {
            "seed_everything": 3,
            "model": {"class_path": self.method, "init_args": copy.deepcopy(METHODS[self.method])},
            "data": {
                "class_path": self.data,
                "init_args": {"batch_size": 4, "num_workers": 0, **copy.deepcopy(data_modules(root)[self.data])},
            },
            "trainer": {
                "max_steps": 2, "max_epochs": 1, "limit_train_batches": 2, "accelerator": "cpu", "devices": 1,
                "enable_progress_bar": False,
                "limit_val_batches": 1, "log_every_n_steps": 1,
            },
            "knn": {"k": 2, "max_train": 8, "max_test": 2, "every_n_epochs": 0},
            "geometry": {"max_samples": 2, "every_n_epochs": 0},
            "pictures": {"num_images": 1, "num_score_images": 1, "every_n_epochs": 0},
        }  # fmt: skip
        for section, name, value in self.changes:
            place = built.setdefault(section, {})
            place = place["init_args"] if section in ("model", "data") else place
            *parents, leaf = name.split(".")
            for parent in parents:
                inner = place.get(parent)
                place[parent] = inner if isinstance(inner, dict) else {}
                place = place[parent]
            place[leaf] = value
        return built


def pool() -> dict[tuple[str, str], list[tuple[str, Any]]]:
    """All arguments: by section and class."""
    from xscale_lightning.commands import train
    from xscale_lightning.methods.discovery import load_method_class

    found = {("model", name): list(arguments(load_method_class(name))) for name in METHODS}
    children = {}
    waiting = [train.XScaleDataModule]
    while waiting:
        cls = waiting.pop()
        children[cls.__name__] = cls
        waiting += cls.__subclasses__()
    found |= {("data", name): list(arguments(children[name])) for name in data_modules(Path())}
    found |= {("callback", key): list(arguments(cls)) for key, cls in train.CALLBACKS.items() if key in OURS}
    return found


OURS = ("guard", "knn", "linear", "geometry", "pictures", "summary", "throughput", "affinity", "alignment")
TRAINER = [("precision", typing.Literal["16-mixed", "bf16-mixed", "64-true"]), ("max_steps", int),
           ("accumulate_grad_batches", int), ("gradient_clip_val", float), ("limit_val_batches", float),
           ("log_every_n_steps", int), ("check_val_every_n_epoch", int)]  # fmt: skip


def draw(choice: random.Random, everything: dict[tuple[str, str], list[tuple[str, Any]]]) -> Case:
    """One to three changes to a configuration that works."""
    method, data = choice.choice(list(METHODS)), choice.choice(list(data_modules(Path())))
    changes = []
    for _ in range(choice.choice([1, 1, 1, 2, 3])):
        section = choice.choice(["model"] * 4 + ["data"] * 4 + ["callback", "trainer"])
        if section == "callback":
            section = choice.choice(OURS)
            options = everything["callback", section]
        elif section == "trainer":
            options = TRAINER
        else:
            options = everything[section, method if section == "model" else data]
        if options:
            name, hint = choice.choice(options)
            changes.append((section, name, choice.choice(wrong_values(hint))))
    return Case(method, data, changes)


def problem(case: Case, root: Path, folder: Path) -> str:
    """Run a case; what breaks the rule, "" where nothing does."""
    from xscale_lightning import cli

    output, path = folder / "out", folder / "case.yaml"
    path.write_text(yaml.safe_dump(case.config(root)))
    shutil.rmtree(output, ignore_errors=True)
    out, err = io.StringIO(), io.StringIO()

    def too_long(*args: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(LIMIT)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            code = cli.main(["fit", "--config", str(path), "--output", str(output)])
    except TimeoutError:
        return f"took more than {LIMIT} s"
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException as error:
        return f"{type(error).__name__} escaped: {str(error)[:200]}"
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    if code == 0:
        return ""
    text = err.getvalue()
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
    return f"something was written: {message[:200]}" if output.exists() else ""


def main(folder: Path, seconds: float, seed: int) -> int:
    """Draw until the time is up; prints every case that breaks the rule."""
    import time

    logging.disable(logging.CRITICAL)
    root = folder / "files"
    make_files(root)
    everything, choice, end, count, broken = pool(), random.Random(seed), time.time() + seconds, 0, 0
    while time.time() < end:
        case = draw(choice, everything)
        found = problem(case, root, folder)
        count += 1
        if found:
            broken += 1
            print(f"{case.method} {case.data} {case.changes}: {found}", flush=True)
    print(f"{count} configurations, {broken} break the rule")
    return int(bool(broken))


if __name__ == "__main__":
    place = Path(sys.argv[1])
    place.mkdir(parents=True, exist_ok=True)
    sys.exit(main(place, float(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0))
