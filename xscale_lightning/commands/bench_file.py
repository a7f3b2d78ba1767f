"""The file of `xscale bench`: which models meet which evaluations, with which seeds."""

import json
import shlex
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from xscale_lightning.commands.parser import load_yaml
from xscale_lightning.commands.stage_options import check_name
from xscale_lightning.errors import UserError
from xscale_lightning.opening import check_file

# First part of the names of metrics. Another one may be a plug-in's, unless it looks like one of these misspelt.
FAMILIES = ("knn", "linear", "dense", "geometry", "reconstruction", "alignment", "test", "val")
PRETRAINING = "pretraining"  # name of the cell in which a model is trained
KEYS = {
    "": ("seeds", "models", "evaluations"),
    "models": ("fit", "init_from", "steps", "options"),
    "evaluations": ("test", "finetune", "options", "metrics"),
}


@dataclass(frozen=True)
class Model:
    """One entry of `models`."""

    name: str
    fit: tuple[str, ...] = ()
    """Configuration files of its pretraining; empty for a checkpoint that there is already."""
    init_from: str | None = None
    """Weights: of an own checkpoint, run or export without `fit`; with it, of anything that `model.init_from` takes."""
    steps: int | None = None
    """Length of the pretraining in place of the configuration's; 0 leaves the weights as they are at the start."""
    options: tuple[str, ...] = ()
    """Options of `xscale fit`."""


@dataclass(frozen=True)
class Evaluation:
    """One entry of `evaluations`."""

    name: str
    verb: Literal["test", "finetune"]
    """`test` asks the frozen encoder, `finetune` trains it on."""
    configs: tuple[str, ...]
    """`test`: laid over the model's configuration. `finetune`: the recipe."""
    metrics: tuple[str, ...]
    """Names for the table; `*` stands for any one part between slashes."""
    options: tuple[str, ...] = ()
    """Options of `xscale test` or of the recipe's `xscale fit`."""


@dataclass(frozen=True)
class Bench:
    """Content of a file."""

    name: str
    seeds: tuple[int, ...]
    models: dict[str, Model]
    evaluations: dict[str, Evaluation]


def read_bench(path: str) -> Bench:
    """Read and check a file, as far as that goes without building anything.

    Raises:
        UserError: it cannot be read, has unknown keys or wrong values, or names configurations that do not exist.
    """
    check_file(path, f"BENCH {path!r}")
    try:
        content = load_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"BENCH {path!r} cannot be read ({error.strerror}): give a YAML file.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"BENCH {path!r} is no text: give a YAML file.") from error
    except yaml.YAMLError as error:
        raise UserError(f"BENCH {path!r} is no valid YAML: {str(error).splitlines()[0]}.") from error
    label = f"BENCH {path!r}"
    content = _mapping(label, content, "")
    seeds = content.get("seeds", [0])
    if not isinstance(seeds, list) or not seeds or not all(type(s) is int and 0 <= s < 2**32 for s in seeds):
        raise UserError(f"{label}: seeds is {seeds!r}; give a list of integers in [0, 2^32).")
    if len(set(seeds)) < len(seeds):
        raise UserError(f"{label}: seeds is {seeds!r}; give every seed once.")
    models = {name: _model(told, name, entry) for told, name, entry in _entries(label, content, "models")}
    evaluations = {
        name: _evaluation(told, name, entry) for told, name, entry in _entries(label, content, "evaluations")
    }
    if both := set(models) & set(evaluations):
        raise UserError(f"{label}: {min(both)!r} is a model and an evaluation; give each a name of its own.")
    if PRETRAINING in evaluations:
        raise UserError(f"{label}: an evaluation cannot be called {PRETRAINING!r}; give it another name.")
    return Bench(Path(path).stem, tuple(seeds), models, evaluations)


def _entries(label: str, content: dict[str, Any], key: str) -> list[tuple[str, str, dict[str, Any]]]:
    """`(label, name, entry)` of every entry under a key."""
    entries = content.get(key)
    if not isinstance(entries, dict) or not entries:
        raise UserError(f"{label} has no {key}: give names, and under each one or more of {', '.join(KEYS[key])}.")
    found = []
    for name, entry in entries.items():
        check_name(f"{label}: {key}: {str(name)!r}", str(name))
        told = f"{label}: {key}.{name}"
        found.append((told, str(name), _mapping(told, entry, key)))
    return found


def _mapping(label: str, content: Any, kind: str) -> dict[str, Any]:
    """A mapping without keys that nothing reads."""
    if not isinstance(content, dict):
        raise UserError(f"{label} is {str(content)[:80]!r}; give one or more of {', '.join(KEYS[kind])}.")
    for key in content:
        if key not in KEYS[kind]:
            near = get_close_matches(str(key), KEYS[kind], n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(KEYS[kind])}."
            raise UserError(f"{label} has an unknown key {key!r}: {hint}")
    return content


def _model(label: str, name: str, entry: dict[str, Any]) -> Model:
    source, steps = entry.get("init_from"), entry.get("steps")
    if "fit" not in entry and source is None:
        raise UserError(f"{label} has neither fit (configurations to pretrain with) nor init_from (a checkpoint).")
    if source is not None and not isinstance(source, str):
        raise UserError(f"{label}: init_from is {source!r}; give a path.")
    if steps is not None and (type(steps) is not int or steps < 0):
        raise UserError(f"{label}: steps is {steps!r}; give 0 (untrained) or more.")
    if "fit" not in entry and (rest := [key for key in ("steps", "options") if key in entry]):
        raise UserError(f"{label} has {rest[0]} without fit: nothing is trained. Give fit, too, or leave it out.")
    fit = _files(f"{label}: fit", entry["fit"]) if "fit" in entry else ()
    return Model(name, fit, source, steps, _words(f"{label}: options", entry.get("options")))


def _evaluation(label: str, name: str, entry: dict[str, Any]) -> Evaluation:
    verbs = [verb for verb in ("test", "finetune") if verb in entry]
    if len(verbs) != 1:
        raise UserError(f"{label} has {' and '.join(verbs) or 'neither test nor finetune'}; give one of the two.")
    verb: Literal["test", "finetune"] = "test" if verbs[0] == "test" else "finetune"
    metrics = entry.get("metrics")
    if not isinstance(metrics, list) or not metrics or not all(isinstance(metric, str) for metric in metrics):
        raise UserError(f"{label}: metrics is {metrics!r}; give a list of names such as knn/*/top1.")
    for metric in metrics:
        _check_metric(label, verb, metric)
    # The frozen encoder may be asked on its own data: then nothing is laid over.
    configs = _files(f"{label}: {verb}", entry[verb], empty=verb == "test")
    return Evaluation(name, verb, configs, tuple(metrics), _words(f"{label}: options", entry.get("options")))


def _check_metric(label: str, verb: str, metric: str) -> None:
    family, slash, rest = metric.partition("/")
    if not slash or not rest:
        raise UserError(f"{label}: metrics: {metric!r} is no metric; give names such as knn/*/top1 or test/top1.")
    if verb == "finetune" and family not in ("test", "val", "*"):
        raise UserError(f"{label}: metrics: {metric!r} is none of a task's, which begin with test/ or val/.")
    near = get_close_matches(family, FAMILIES, n=1, cutoff=0.7)
    if near and family not in FAMILIES:
        raise UserError(f"{label}: metrics: {metric!r}: did you mean {near[0]}/{rest}?")


def _files(label: str, value: Any, empty: bool = False) -> tuple[str, ...]:
    """Paths of configuration files, all of which exist."""
    paths = [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not (paths or empty) or not all(isinstance(path, str) for path in paths):
        raise UserError(f"{label} is {value!r}; give a list of configuration files.")
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"{label}: {path!r} does not exist; paths are relative to the working directory.")
    return tuple(paths)


def _words(label: str, value: Any) -> tuple[str, ...]:
    """Options as words of a command line."""
    words = shlex.split(value) if isinstance(value, str) else [] if value is None else value
    if not isinstance(words, list) or any(isinstance(word, (dict, list)) for word in words):
        raise UserError(f'{label} is {value!r}; give one line, such as "--trainer.max_epochs 10".')
    words = [word if isinstance(word, str) else json.dumps(word) for word in words]
    for word in words:
        key = word.split("=")[0]
        if key in ("--output", "--seed_everything", "--ckpt_path", "--print_config", "--help", "-h"):
            raise UserError(f"{label} has {key}, which the bench sets itself: leave it out.")
    return tuple(words)
