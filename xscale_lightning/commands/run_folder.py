"""The folder of a run in stages: one folder per stage in it, and the configuration of the whole run."""

import contextlib
import json
import time
from pathlib import Path
from typing import Any

import yaml

from xscale_lightning.commands.train import claim
from xscale_lightning.files import told, write_bytes
from xscale_lightning.locks import acquire, release


class RunFolder:
    """`OUTPUT/method/time`, made when the first stage is about to run.

    Attributes:
        config: what goes into its `config.yaml`.
    """

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self._path: Path | None = None
        self._name = ""
        self._lock: Path | None = None

    def claim(self, output: Path, method: str) -> str:
        """Make the folder, unless an earlier stage has; returns its path below `output`."""
        if self._path is None:
            name = claim(output / method, time.strftime("%Y-%m-%d_%H-%M-%S"))
            self._name, self._path = f"{method}/{name}", output / method / name
            self.hold()
            plain = json.loads(json.dumps(self.config))  # without YAML's anchors for what stages have in common
            file = self._path / "config.yaml"
            with told(file):
                write_bytes(file, yaml.safe_dump(plain, sort_keys=False).encode())
        return self._name

    def take(self, run: Path) -> None:
        """Go on in the folder of a run that was stopped; its `config.yaml` stays."""
        self._path, self._name = run, f"{run.parent.name}/{run.name}"

    def hold(self) -> None:
        """Keep other processes out of the folder until `remove_if_unused`.

        Raises:
            UserError: one writes into it.
        """
        if self._lock is None and self._path is not None:
            self._lock = acquire(self._path, "run folder")

    def remove_if_unused(self) -> None:
        """Remove the folder if no stage has left anything in it: a run that was refused leaves nothing behind."""
        release(self._lock)
        self._lock = None
        if self._path is None or {path.name for path in self._path.iterdir()} - {"config.yaml"}:
            return
        with contextlib.suppress(OSError):  # tidying up must not hide the error that is on its way to the user
            (self._path / "config.yaml").unlink(missing_ok=True)
            self._path.rmdir()
            self._path.parent.rmdir()
