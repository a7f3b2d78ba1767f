"""Processes of a distributed run that the first of them has started: none stays when that one is gone.

Lightning's launcher ends the first process where another one dies. The other way round nobody looks: a process that is
still importing, or waits for a partner that is gone, may wait for half an hour.
"""

import os
import threading
import time

LAUNCHER = "XSCALE_LAUNCHER"  # environment variable: process id of the first process
GRACE = 10.0  # seconds in which a process may end by itself


def leave_with_launcher() -> None:
    """In the first process of a command, say so to those that it starts; in one of those, watch the first one."""
    launcher, rank = os.environ.get(LAUNCHER), os.environ.get("LOCAL_RANK")
    if rank is None:
        os.environ[LAUNCHER] = str(os.getpid())
    elif rank != "0" and launcher is not None and hasattr(os, "getppid"):
        threading.Thread(target=watch, args=(int(launcher),), daemon=True, name="launcher-watch").start()


def watch(launcher: int, pause: float = 1.0, grace: float = GRACE) -> None:
    """End this process, whatever it is doing, some time after its parent `launcher` has gone."""
    while os.getppid() == launcher:
        time.sleep(pause)
    time.sleep(grace)
    os._exit(1)
