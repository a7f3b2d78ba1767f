"""Runs scripts one after another, each in a process forked from this one: one import serves all of them.

`run_all.py FOLDER SCRIPT...` leaves `SCRIPT.json` in the folder: exit code and output. Nothing is computed before the
fork, so that no thread of torch is lost in it: a script forks its own two processes from there.
"""

import json
import os
import runpy
import sys
import traceback
from pathlib import Path

import lightning.pytorch  # noqa: F401 (what the scripts need is there before they are forked)
import torch.distributed.fsdp  # noqa: F401

import xscale_lightning.testing  # noqa: F401


def run(folder: Path, script: Path) -> None:
    """In a child process: never returns."""
    code = 1
    try:
        output = os.open(folder / f"{script.stem}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(output, 1)
        os.dup2(output, 2)
        sys.argv = [str(script), str(folder)]
        runpy.run_path(str(script), run_name="__main__")
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for script in map(Path, sys.argv[2:]):
        child = os.fork()
        if not child:
            run(folder, script)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        record = {"code": code, "output": (folder / f"{script.stem}.txt").read_text()}
        (folder / f"{script.stem}.json").write_text(json.dumps(record))
