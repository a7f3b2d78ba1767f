"""Progress of long commands on the error stream: a bar in a terminal, now and then a line elsewhere."""

import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 10.0


class PlainProgress(AbstractContextManager):
    """Lines such as `windows: 300 of 1200 (25 %), 40 s left`, at most one in ten seconds and one at the end.

    Args:
        stream: where to write; the error stream if None.
        clock: seconds; for tests.
    """

    def __init__(self, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock = stream or sys.stderr, clock
        self._tasks: list[dict[str, Any]] = []

    def add_task(self, description: str, total: float, completed: int = 0) -> int:
        """A new task; `completed` is what an earlier try has done."""
        now = self._clock()
        task = {"name": description, "total": total, "done": completed, "before": completed, "start": now, "told": now}
        self._tasks.append(task)
        return len(self._tasks) - 1

    def advance(self, task_id: int, advance: float = 1) -> None:
        """So much more is done; a line when the last one is some seconds old, or at the end."""
        task, now = self._tasks[task_id], self._clock()
        task["done"] += advance
        finished = task["done"] >= task["total"]
        if not finished and now - task["told"] < SECONDS_BETWEEN_LINES:
            return
        task["told"] = now
        done, total, seconds = task["done"], task["total"], now - task["start"]
        rest = seconds * (total - done) / max(done - task["before"], 1)
        end = f"{seconds:.0f} s" if finished else f"{rest:.0f} s left"
        share = 100 * done / max(total, 1)
        print(f"{task['name']}: {done:g} of {total:g} ({share:.0f} %), {end}", file=self._stream, flush=True)

    def __exit__(self, *_: object) -> None:
        """Nothing to tidy up."""


def left(done: int, total: int, seconds: float) -> str:
    """` (about 12 min left)` when `done` of `total` runs took `seconds`; nothing before the first one."""
    if not done:
        return ""
    rest = seconds * (total - done) / done
    return f" (about {rest / 3600:.1f} h left)" if rest > 5400 else f" (about {max(rest / 60, 1):.0f} min left)"


def progress() -> Any:
    """A context manager with `add_task(text, total, completed=0)` and `advance(task, steps=1)`."""
    if not sys.stderr.isatty():
        return PlainProgress()
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, console=Console(file=sys.stderr))
