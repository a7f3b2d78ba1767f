"""Finished parts of a long command, kept beside its output until that is whole, so that a next try goes on."""

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xscale_lightning.errors import UserError

JOB = "job.json"


class Journal:
    """A folder of finished parts, all of the same job.

    Args:
        folder: where they are.
        job: everything the parts depend on, in plain types.
        restart: throw away the parts of another job, or of an earlier try.

    Raises:
        UserError: parts of another job are there, or the folder cannot be written.
    """

    def __init__(self, folder: Path, job: Mapping[str, Any], restart: bool = False) -> None:
        self.folder = folder
        if restart:
            self.remove()
        wanted = json.loads(json.dumps(job))  # as it reads back: tuples are lists, for example
        if (folder / JOB).is_file():
            self._check(wanted)
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write(JOB, json.dumps(wanted, indent=2).encode())
        except OSError as error:
            raise UserError(f"'{folder}' cannot be written ({error.strerror}); choose another output.") from error

    def _check(self, wanted: Mapping[str, Any]) -> None:
        try:
            begun = json.loads((self.folder / JOB).read_text())
        except (OSError, ValueError):
            raise UserError(f"'{self.folder}' is damaged; begin anew with --restart.") from None
        for key in {**begun, **wanted}:
            there, here = begun.get(key), wanted.get(key)
            if there != here:
                raise UserError(
                    f"'{self.folder}' holds parts that were begun with {key} {_short(there)}, and now it is "
                    f"{_short(here)}.\nFinish those with the same options, choose another output, or throw them away "
                    "with --restart."
                )

    def __contains__(self, name: str) -> bool:
        """Whether a part is finished."""
        return (self.folder / f"{name}.npz").is_file()

    def save(self, name: str, parts: Mapping[str, np.ndarray]) -> None:
        """Keep a finished part; it is there whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        try:
            handle, part = tempfile.mkstemp(suffix=".part", dir=self.folder)
            try:
                with os.fdopen(handle, "wb") as file:
                    np.savez(file, **parts)  # type: ignore[arg-type]
                os.replace(part, self.folder / f"{name}.npz")
            finally:
                Path(part).unlink(missing_ok=True)
        except OSError as error:
            raise UserError(
                f"'{self.folder}' cannot be written ({error.strerror}); make room and run it again."
            ) from error

    def load(self, name: str) -> dict[str, np.ndarray]:
        """A finished part.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
                return dict(file)
        except (OSError, ValueError) as error:
            raise UserError(f"'{self.folder / name}.npz' is damaged; begin anew with --restart.") from error

    def remove(self) -> None:
        """Throw all parts away; nothing else is in such a folder."""
        if self.folder.is_dir() and (self.folder / JOB).is_file():
            shutil.rmtree(self.folder, ignore_errors=True)

    def _write(self, name: str, content: bytes) -> None:
        part = self.folder / f"{name}.part"
        part.write_bytes(content)
        os.replace(part, self.folder / name)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
