"""Finished parts of a long command, kept beside its output until that is whole, so that a next try goes on."""

import contextlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from xscale_lightning.errors import UserError
from xscale_lightning.files import sync_folder, told, whole, write_bytes
from xscale_lightning.locks import LOCK, acquire, release
from xscale_lightning.places import put_in_place, remove_abandoned

JOB = "job.json"
REPLACED = ".replaced"  # in what an output has replaced, until that is gone
MARK = "part_"  # before every name in a file: numpy takes some, such as `file`, for arguments


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
        with told(folder, remedy="choose another output"):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = acquire(folder)
        try:
            self._begin(job, restart)
        except BaseException:
            release(self._lock)
            raise

    def _begin(self, job: Mapping[str, Any], restart: bool) -> None:
        folder = self.folder
        remove_abandoned(folder)
        self._discard_replaced()
        if not (folder / JOB).is_file() and (found := [p.name for p in folder.iterdir() if not p.name.startswith(".")]):
            raise UserError(f"'{folder}' is needed, and there is something else ({found[0]}): choose another output.")
        if restart and (folder / JOB).is_file():
            self._empty()
        wanted = json.loads(json.dumps(job))  # as it reads back: tuples are lists, for example
        if (folder / JOB).is_file():
            self._check(wanted)
            return
        with told(folder, remedy="choose another output"):
            write_bytes(folder / JOB, json.dumps(wanted, indent=2).encode())

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
        path = self.folder / f"{name}.npz"
        with told(self.folder, remedy="make room and run it again"), whole(path) as part, part.open("wb") as file:
            np.savez(file, **{MARK + key: array for key, array in parts.items()})  # type: ignore[arg-type]

    def load(self, name: str) -> dict[str, np.ndarray]:
        """A finished part.

        Raises:
            UserError: it cannot be read.
        """
        try:
            with np.load(self.folder / f"{name}.npz", allow_pickle=False) as file:
                return {key.removeprefix(MARK): array for key, array in file.items()}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise UserError(f"'{self.folder / name}.npz' is damaged; begin anew with --restart.") from error

    def become(self, target: Path, files: Collection[str]) -> None:
        """Give the folder the name of the output, whose files its parts are; what that replaces is kept until then.

        Args:
            target: the name.
            files: names of its files; all others are thrown away.

        Raises:
            UserError: it cannot be put in place.
        """
        with told(target, remedy=f"'{self.folder}' is whole, give it that name"):
            self._keep({*files, JOB})
            if target.is_dir():
                self.folder.chmod(target.stat().st_mode & 0o777)
                (target / REPLACED).touch()
            put_in_place(self.folder, target)
        for name in (JOB, LOCK):
            (target / name).unlink(missing_ok=True)
        sync_folder(target.parent)
        release(self._lock)
        with contextlib.suppress(OSError, UserError):  # the next try does
            lock = acquire(self.folder)  # what was replaced has that name now, unless it is gone
            if self._discard_replaced():
                shutil.rmtree(self.folder, ignore_errors=True)
            release(lock)

    def _discard_replaced(self) -> bool:
        if not (self.folder / REPLACED).is_file():
            return False
        self._keep({REPLACED})
        (self.folder / REPLACED).unlink()  # the last: without it the rest could be anything
        return True

    def _keep(self, files: Collection[str]) -> None:
        for path in self.folder.iterdir():
            if path.name not in (LOCK, *files):
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def _empty(self) -> None:
        self._keep({JOB})
        (self.folder / JOB).unlink()  # the last: without it the rest is no job

    def remove(self) -> None:
        """Throw all parts away; nothing else is in such a folder."""
        with contextlib.suppress(OSError):  # the next try does
            if self.folder.is_dir() and (self.folder / JOB).is_file():
                self._empty()
                shutil.rmtree(self.folder)
        release(self._lock)


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
