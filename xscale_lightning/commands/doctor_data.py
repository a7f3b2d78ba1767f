"""`xscale doctor --data CLASS --data.root FOLDER ...`: every file of a data set is read once; damaged ones are told.

With `--report FILE.json` or `FILE.csv` there is one line per file. The exit code is 1 where a file is damaged.
"""

import argparse
import csv
import io
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

from xscale_lightning.commands.data_module import data_sections, open_data
from xscale_lightning.data.inspection import Finding, check_file
from xscale_lightning.data.inventory import Item, items_of
from xscale_lightning.errors import UserError
from xscale_lightning.files import write_bytes

KINDS = (
    "missing", "unreadable", "empty", "no image", "truncated", "no data", "not finite", "constant", "bands", "dtype",
    "crs", "size", "gsd", "statistics", "classes", "sample", "checksum",
)  # fmt: skip
MAJORITY = 0.8  # share of the files that must agree before the others are told
FAR = 8.0  # times larger or smaller than the median, and as many deviations off it
_NAMED = 3


def compare(findings: Sequence[Finding]) -> None:
    """Tell files that are unlike nearly all others of their group: bands, type, system, size, gsd, statistics."""
    groups: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        if finding.kind is None:
            groups[finding.group].append(finding)
    for members in groups.values():
        for kind in ("bands", "dtype", "crs", "size", "gsd"):
            _compare(members, kind)
        _compare_statistics(members)


def _compare(members: Sequence[Finding], kind: Any) -> None:
    values = {id(f): _rounded(getattr(f, kind)) for f in members}
    usual, count = Counter(values.values()).most_common(1)[0]
    if count < MAJORITY * len(members):
        return
    for finding in members:
        if finding.kind is None and (value := values[id(finding)]) != usual:
            finding.kind, finding.detail = kind, f"{kind} {value}, where {count} files have {usual}"


def _rounded(value: Any) -> Any:
    return float(f"{value:.3g}") if isinstance(value, float) else value


def _compare_statistics(members: Sequence[Finding]) -> None:
    means = [f.mean for f in members if f.mean is not None and f.role == "image"]
    if len(means) < 8:  # too few to say what is usual
        return
    middle = median(means)
    deviation = 1.4826 * median(abs(mean - middle) for mean in means)
    for finding in members:
        mean = finding.mean
        if finding.kind is not None or mean is None or finding.role != "image":
            continue
        apart = abs(mean - middle) > FAR * deviation
        if apart and (abs(mean) > FAR * abs(middle) or abs(mean) * FAR < abs(middle)):
            finding.kind, finding.detail = "statistics", f"its mean is {mean:.4g}, that of most {middle:.4g}"


def check_all(items: Sequence[Item], workers: int, advance: Callable[[], None] = lambda: None) -> list[Finding]:
    """Look at every file, several at once; GDAL and Pillow work outside Python's lock."""

    def check(item: Item) -> Finding:
        found = item.check() if item.check else check_file(item.finding, item.read)
        advance()
        return found

    with ThreadPoolExecutor(max(1, workers)) as pool:
        findings = list(pool.map(check, items))
    compare(findings)
    return findings


def table(findings: Sequence[Finding]) -> list[str]:
    """Lines for people: how many files of every kind, and the first names."""
    lines = []
    for kind in KINDS:
        found = [f for f in findings if f.kind == kind]
        if found:
            names = "; ".join(f"{f.path}: {f.detail}" if i == 0 else f.path for i, f in enumerate(found[:_NAMED]))
            lines.append(f"{kind:<11}{len(found):>6}  {names}{' ...' if len(found) > _NAMED else ''}")
    return lines


def write_report(findings: Sequence[Finding], path: Path) -> None:
    """One line per file, as JSON or CSV, whole or not at all.

    Raises:
        UserError: another ending, or it cannot be written.
    """
    rows = [finding.plain() for finding in findings]
    if path.suffix.lower() == ".json":
        content = json.dumps(rows, indent=1)
    else:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(Finding("").plain()))
        writer.writeheader()
        writer.writerows(rows)
        content = text.getvalue()
    try:
        write_bytes(path, content.encode())
    except OSError as error:
        raise UserError(f"--report '{path}' cannot be written ({error.strerror}); choose another.") from None


def check_data(args: argparse.Namespace, options: Sequence[str]) -> int:
    """Run it; returns the exit code.

    Raises:
        UserError: wrong options, or data without files.
    """
    from rich.progress import Progress

    report = Path(args.report) if args.report else None
    if report and report.suffix.lower() not in (".json", ".csv"):
        raise UserError(f"--report '{report}' must end in .json or .csv.")
    ignored = [kind for kind in (args.ignore or "").split(",") if kind]
    if wrong := [kind for kind in ignored if kind not in KINDS]:
        raise UserError(f"--ignore {wrong[0]!r} is unknown; choose from {', '.join(KINDS)}.")
    if args.workers < 1:
        raise UserError(f"--workers must be at least 1, got {args.workers}.")
    data, _ = open_data(data_sections(args.config, "--config"), args.data, options)
    items = items_of(data)
    with Progress(transient=True) as bar:
        task = bar.add_task("files", total=len(items))
        findings = check_all(items, args.workers, lambda: bar.advance(task))
    for finding in findings:
        if finding.kind in ignored:
            finding.kind = None
    if report:
        write_report(findings, report)
    damaged = sum(finding.kind is not None for finding in findings)
    print("\n".join(table(findings)))
    where = f" ({report})" if report else ""
    print(f"{damaged} of {len(findings)} files are damaged or unlike the others{where}" if damaged
          else f"{len(findings)} files, none is damaged{where}")  # fmt: skip
    return int(bool(damaged))
