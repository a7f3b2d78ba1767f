"""Run golden cases (format "golden-case/1") through our modules: `python tests/parity/run_case.py CASE.json ...`.

A case holds a configuration, closed-form weights, inputs and index lists, and the numbers that a reference
implementation produced with them. Each run of a case builds our module at that configuration, loads the weights through
the public reader of published checkpoints, and passes the inputs through the loss code that training uses. Every number
is printed beside the golden one; the exit status is 1 if one is off.
"""

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent))
import fill
import torch

TOLERANCE = 1e-9  # float64; relative to numbers above 1


class Number(NamedTuple):
    """One number of ours beside the golden one; None says that there is no gradient."""

    name: str
    ours: float | None
    golden: float | None

    @property
    def difference(self) -> float:
        """Absolute, or relative where the golden number is above 1."""
        if self.ours is None or self.golden is None:
            return 0.0 if self.ours is self.golden else float("inf")
        return abs(self.ours - self.golden) / max(1.0, abs(self.golden))


def numbers(case: dict[str, Any], run: str) -> Iterator[Number]:
    """All numbers of one run."""
    return importlib.import_module(f"parity_{case['method']}").numbers(case, run)


def compare(name: str, ours: Any, golden: Any) -> Iterator[Number]:
    """Numbers of a golden entry: a number, a list of them, or a tensor's summary (sum, l2, first4, shape)."""
    if isinstance(golden, dict):
        yield from compare_summary(name, fill.summary(ours), golden)
    elif isinstance(golden, list):
        values = ours if isinstance(ours, list) else [ours]
        assert len(values) == len(golden), f"{name}: {len(values)} values, the case has {len(golden)}"
        for i, (mine, theirs) in enumerate(zip(values, golden, strict=True)):
            yield from compare(f"{name}[{i}]", mine, theirs)
    else:
        ours = ours.item() if isinstance(ours, torch.Tensor) else ours
        yield Number(name, ours, golden)


def compare_summary(name: str, ours: dict[str, Any], golden: dict[str, Any]) -> Iterator[Number]:
    """Numbers of a tensor's summary."""
    assert ours["shape"] == golden["shape"], f"{name}: shape {ours['shape']}, the case has {golden['shape']}"
    for key in golden.keys() - {"shape"}:
        yield from compare(f"{name}.{key}", ours[key], golden[key])


def main(paths: list[str]) -> int:
    """Run every case; 0 if all numbers agree."""
    failures = 0
    for path in paths:
        case = fill.load(path)
        fill.self_check(case)
        for run in fill.runs(case):
            print(f"{case['method']}/{case['case']}/{run}")
            try:
                found = list(numbers(case, run))
            except Exception as error:  # the other runs and cases still have their say
                failures += 1
                print(f"  {type(error).__name__}: {error}")
                continue
            for number in found:
                good = number.difference <= TOLERANCE
                failures += not good
                values = [f"{'none' if v is None else format(v, '.15g'):>22}" for v in (number.ours, number.golden)]
                print(f"  {number.name:44} {' '.join(values)}  {number.difference:8.1e} {'' if good else 'OFF'}")
    print(
        f"{failures} numbers are off by more than {TOLERANCE:g}, or runs that failed"
        if failures
        else "all numbers agree"
    )
    return int(failures > 0)


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit("usage: run_case.py CASE.json [CASE.json ...]")
    sys.exit(main(sys.argv[1:]))
