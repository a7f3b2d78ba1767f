"""Files of safetensors: no code can be in them; what their header claims is checked against the bytes after it."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from xscale_lightning.errors import UserError
from xscale_lightning.opening.limits import check_extent, check_names
from xscale_lightning.opening.text import once

MAX_HEADER = 32_000_000  # bytes; a tensor takes some hundred of them


def load_safetensors(path: str | Path, what: str) -> dict[str, Tensor]:
    """Tensors of a file by name.

    Raises:
        UserError: no such file, damaged, or a header that claims anything else than the bytes after it.
    """
    problem = _problem(Path(path))
    if not problem:
        try:
            return load_file(path)
        except Exception as error:  # the library raises its own, and torch's of shapes and types
            problem = (str(error).splitlines() or [type(error).__name__])[0][:200]
    raise UserError(f"{what} cannot be read: {problem}.")


def _problem(path: Path) -> str:
    """What is wrong with a file's header; "" if nothing is."""
    try:
        length = path.stat().st_size
        if not path.is_file():
            return "it is no file"
        with path.open("rb") as file:
            header = int.from_bytes(file.read(8), "little")
            if length < 8 or header > min(length - 8, MAX_HEADER):
                return f"its header claims {header} bytes, and the file has {length}"
            content = json.loads(file.read(header), object_pairs_hook=once)
        check_extent(content, "it")
        check_names(content if isinstance(content, dict) else (), "it")
        return _layout(content, length - 8 - header)
    except OSError as error:
        return error.strerror or str(error)
    except RecursionError:
        return "its header is nested too deeply"
    except UserError as error:
        return str(error).removesuffix(".")
    except ValueError:  # JSON or text that is none
        return "its header is damaged"


def _layout(header: Any, length: int) -> str:
    if not isinstance(header, dict):
        return "its header is no table of tensors"
    place = 0
    tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
    try:
        for name, entry in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
            start, stop = entry["data_offsets"]
            numbers = math.prod(entry["shape"])
            if any(type(n) is not int or n < 0 for n in (start, stop, *entry["shape"])):
                return f"the shape or place of {name[:60]!r} is no number of things"
            if start != place or stop < start or stop > length or numbers > (stop - start) * 2:
                return f"{name[:60]!r} claims bytes {start} to {stop} for {numbers} numbers; {length} bytes are there"
            place = stop
    except (TypeError, KeyError, ValueError, IndexError):
        return "its header is no table of tensors"
    return "" if place == length else f"{length - place} of its bytes belong to no tensor"
