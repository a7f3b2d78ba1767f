"""Run golden cases (format "golden-case/1") through our modules: `python tests/parity/run_case.py CASE.json ...`.

A case holds a configuration, closed-form weights, inputs and index lists, and the numbers that a reference
implementation produced with them. Each run of a case builds our module at that configuration, loads the weights through
the public reader of published checkpoints, and passes the inputs through the loss code that training uses. Every number
is printed beside the golden one; the exit status is 1 if one is off, or if a case or a run fails.
"""

import importlib
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
sys.path.append(str(Path(__file__).parents[2]))  # where the package is not installed
import fill
import torch

TOLERANCE = 1e-9  # float64; relative to numbers above 1
# Some references compute position tables in float32: their numbers with exact tables (`golden_formula_tables`) are
# compared in place of the plain ones, and what the case has with their own tables only, more loosely.
FORMULA_TABLES, OWN_TABLES = 1e-8, 1e-6


class Number(NamedTuple):
    """One number of ours beside the golden one; None says that there is none (no gradient, or a name not known)."""

    name: str
    ours: float | None
    golden: float | None
    tolerance: float = TOLERANCE

    @property
    def difference(self) -> float:
        """Absolute, or relative where the golden number is above 1."""
        if self.ours is None or self.golden is None:
            return 0.0 if self.ours is self.golden else float("inf")
        return abs(self.ours - self.golden) / max(1.0, abs(self.golden))

    @property
    def good(self) -> bool:
        """Whether both agree."""
        return self.difference <= self.tolerance  # false for nan

    def __str__(self) -> str:
        values = [f"{'none' if v is None else format(v, '.15g'):>22}" for v in (self.ours, self.golden)]
        return f"  {self.name:44} {' '.join(values)}  {self.difference:8.1e} {'' if self.good else 'OFF'}"


def numbers(case: dict[str, Any], run: str) -> Iterator[Number]:
    """All numbers of one run, with the tolerances that its golden numbers allow."""
    method = importlib.import_module(f"parity_{case['method']}")
    entry = case["runs"][run]
    exact = entry.get("golden_formula_tables")
    if not exact:
        yield from method.numbers(case, run)
        return
    entry = {**entry, "golden": {**entry["golden"], **exact}}
    for number in method.numbers({**case, "runs": {**case["runs"], run: entry}}, run):
        known = any(number.name == name or number.name.startswith((f"{name}.", f"{name}[")) for name in exact)
        yield number._replace(tolerance=FORMULA_TABLES if known else OWN_TABLES)


def compare_all(ours: Mapping[str, Any], golden: Mapping[str, Any], prefix: str = "") -> Iterator[Number]:
    """`compare` for every golden name; one that we do not have is off and does not end the run."""
    for name, value in golden.items():
        yield from compare(f"{prefix}{name}", ours.get(name), value)


def compare(name: str, ours: Any, golden: Any) -> Iterator[Number]:
    """Numbers of a golden entry: a number, a list of them, or a tensor's summary (sum, l2, first4, shape)."""
    if ours is None:
        yield Number(name, None, golden if golden is None or isinstance(golden, int | float) else float("nan"))
    elif isinstance(golden, dict):
        yield from compare_summary(name, fill.summary(ours), golden)
    elif isinstance(golden, list):
        if isinstance(ours, torch.Tensor) and ours.ndim:
            ours = ours.tolist()
        values = ours if isinstance(ours, list) else [ours]
        if len(values) != len(golden):
            yield Number(f"{name}: values", len(values), len(golden))
        for i, (mine, theirs) in enumerate(zip(values, golden, strict=False)):
            yield from compare(f"{name}[{i}]", mine, theirs)
    else:
        yield Number(name, ours.item() if isinstance(ours, torch.Tensor) else ours, golden)


def compare_summary(name: str, ours: dict[str, Any], golden: dict[str, Any]) -> Iterator[Number]:
    """Numbers of a tensor's summary."""
    if "shape" in golden and ours["shape"] != golden["shape"]:
        yield Number(f"{name}: shape {ours['shape']}, not {golden['shape']}", None, float("nan"))
    for key in golden:
        if key != "shape":
            yield from compare(f"{name}.{key}", ours.get(key), golden[key])


def run_file(path: str) -> int:
    """Print every number of a case; how many are off, failures of a run counted as one."""
    case = fill.load(path)
    bad = 0
    try:
        fill.self_check(case)
    except Exception as error:  # the file contradicts itself; its runs are still worth seeing
        bad += 1
        print(f"{path}: {_short(error)} OFF")
    for run in fill.runs(case):
        print(f"{case['method']}/{case['case']}/{run}")
        try:
            for number in numbers(case, run):
                bad += not number.good
                print(number)
        except Exception as error:  # the other runs and cases still have their say
            bad += 1
            print(f"  {_short(error)} OFF")
    return bad


def _short(error: Exception) -> str:
    text = str(error)
    return f"{type(error).__name__}: {text if len(text) < 500 else text[:500] + ' ...'}"


def main(paths: list[str]) -> int:
    """Run every case; 0 if all numbers agree."""
    bad = 0
    for path in paths:
        try:
            bad += run_file(path)
        except Exception as error:  # no such file, or another format
            bad += 1
            print(f"{path}: {_short(error)} OFF")
    print(f"{bad} numbers are off, or runs that failed" if bad else "all numbers agree")
    return int(bad > 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: run_case.py CASE.json [CASE.json ...]")
    sys.exit(main(sys.argv[1:]))
