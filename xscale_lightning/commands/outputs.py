"""Files that a command writes: several at once, whole or not at all, and JSON that every reader understands."""

import json
import math
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xscale_lightning.errors import UserError


def strict_json(content: Mapping[str, Any]) -> bytes:
    """Content of a JSON file; numbers that are not finite become null."""
    return (json.dumps(_strict(content), indent=2, allow_nan=False) + "\n").encode()


def _strict(value: Any) -> Any:
    """Numbers that are not finite as null."""
    if isinstance(value, dict):
        return {key: _strict(part) for key, part in value.items()}
    if isinstance(value, list):
        return [_strict(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_together(contents: Mapping[Path, bytes]) -> None:
    """Write all files, or none: every one is complete under another name before the first gets its own.

    Raises:
        UserError: a file cannot be written.
    """
    parts: dict[Path, str] = {}
    path = Path()
    try:
        for path, content in contents.items():
            handle, parts[path] = tempfile.mkstemp(suffix=".part", dir=path.absolute().parent)
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.chmod(parts[path], 0o644)  # mkstemp's files are for the owner alone
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        raise UserError(f"'{path}' cannot be written ({error.strerror}); choose another.") from error
    finally:
        for part in parts.values():
            Path(part).unlink(missing_ok=True)
