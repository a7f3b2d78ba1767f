"""Which files of a folder make a scene, and which band of which file is which.

Two layouts, also mixed: several bands per file (names from the files' band descriptions, or given), and one file per
band with the band's name in the file name (`scene_B02.tif`, `B02_10m.jp2`). Files of one folder whose names agree apart
from the band and the resolution are one scene; folders named after a resolution (`R10m`) count as their parent.
"""

import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence

from xscale_lightning.data.bands import band_key
from xscale_lightning.data.geotiff import SUFFIXES, Raster, Source, UnreadableFile, inspect
from xscale_lightning.errors import UserError

_RESOLUTION = re.compile(r"R?\d+m", re.IGNORECASE)

SceneBands = dict[str, Source]
"""Band key (`band_key`) -> where to read it."""


def list_rasters(root: str) -> list[str]:
    """Paths of all raster files below a folder, sorted; hidden folders are left out.

    Raises:
        UserError: if the folder is missing or holds no raster.
    """
    remedy = f"data.root must be a folder of rasters ({', '.join(SUFFIXES)})."
    if not os.path.isdir(root):
        raise UserError(f"data.root: folder '{root}' does not exist; {remedy}")
    found = []
    for folder, folders, files in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(folder, name) for name in sorted(files) if name.lower().endswith(SUFFIXES)]
    if not found:
        raise UserError(f"data.root: folder '{root}' holds no raster; {remedy}")
    return found


def split_band(stem: str, keys: Collection[str]) -> tuple[str, str | None]:
    """Split a file name without suffix into the scene's part and the band's key (None if it names no band).

    A band's name must stand between separators; the last one counts: `T18SVG_B02_10m` is band B02 of `T18SVG`.
    """
    tokens = re.split(r"[_\-. ]+", stem)
    tokens = [token for token in tokens if not _RESOLUTION.fullmatch(token)]
    for i in reversed(range(len(tokens))):
        if (key := band_key(tokens[i])) in keys:
            rest = tokens[:i] + tokens[i + 1 :]
            return "_".join(rest), key
    return "_".join(tokens), None


def names_of(raster: Raster, named: str | None, file_bands: Sequence[str] | None) -> list[str | None]:
    """Band keys of a raster: what it says itself, else the name in its file name, else `file_bands` in order."""
    if any(raster.descriptions) and not (len(raster.descriptions) == 1 and named):
        return [band_key(text) if text else None for text in raster.descriptions]
    if len(raster.descriptions) == 1 and named:
        return [named]
    if file_bands is not None and len(file_bands) == len(raster.descriptions):
        return [band_key(name) for name in file_bands]
    return [None] * len(raster.descriptions)


def find_scenes(
    root: str, wanted: Sequence[str], known: Sequence[str] = (), file_bands: Sequence[str] | None = None
) -> tuple[dict[str, SceneBands], dict[str, str]]:
    """Group the rasters below `root` into scenes that have all `wanted` bands.

    Args:
        root: folder, searched with its sub-folders.
        wanted: names of the bands that a scene must have.
        known: names of other bands that file names may mention.
        file_bands: names of the bands of files that say none, in the files' order.

    Returns:
        scenes by name, in order, each with at least the wanted bands; and why files or scenes were left out, by path.

    Raises:
        UserError: if the folder is missing, holds no raster, or no scene has the bands.
    """
    keys = [band_key(name) for name in wanted]
    mentioned = {*keys, *(band_key(name) for name in known)}
    scenes: dict[str, SceneBands] = defaultdict(dict)
    left_out: dict[str, str] = {}
    found: set[str] = set()
    unnamed: set[int] = set()
    for path in list_rasters(root):
        try:
            raster = inspect(path)
        except UnreadableFile as error:
            left_out[path] = error.reason
            continue
        folder, file = os.path.split(path)
        while _RESOLUTION.fullmatch(os.path.basename(folder)):
            folder = os.path.dirname(folder)
        rest, named = split_band(os.path.splitext(file)[0], mentioned)
        scene = scenes[os.path.normpath(os.path.join(os.path.relpath(folder, root), rest))]
        names = names_of(raster, named, file_bands)
        if not any(names):
            unnamed.add(len(names))
        for index, key in enumerate(names, start=1):
            if key is not None:
                found.add(key)
                if key not in scene or raster.dx < scene[key].raster.dx:  # the same band twice: the finer one
                    scene[key] = Source(raster, index)
    complete = {name: bands for name, bands in scenes.items() if all(key in bands for key in keys)}
    incomplete = {
        name: bands for name, bands in scenes.items() if name not in complete and any(k in bands for k in keys)
    }
    if not complete:
        problem = _no_scene(root, wanted, keys, found, unnamed)
        raise UserError(_name_damaged(root, left_out, problem) if left_out else problem)
    for name, bands in incomplete.items():
        missing = [band for band, key in zip(wanted, keys, strict=True) if key not in bands]
        left_out[os.path.join(root, name)] = f"the scene lacks {', '.join(missing)}"
    return complete, left_out


def _no_scene(root: str, wanted: Sequence[str], keys: Sequence[str], found: set[str], unnamed: set[int]) -> str:
    """Say why not a single scene can be used; empty where no file could be read."""
    missing = [name for name, key in zip(wanted, keys, strict=True) if key not in found]
    if not found and not unnamed:
        return ""
    if not found:
        counts = ", ".join(str(count) for count in sorted(unnamed))
        return (
            f"data.root: the files in '{root}' ({counts} bands each) do not say which bands they hold; "
            "name them in order with data.file_bands."
        )
    if missing:
        return f"data.bands: the files in '{root}' have no {', '.join(missing)}; they have {', '.join(sorted(found))}."
    return (
        f"data.bands: no scene in '{root}' has all of {', '.join(wanted)}; the bands of a scene must lie in one "
        "folder, in files whose names differ in the band only."
    )


def _name_damaged(root: str, left_out: dict[str, str], problem: str) -> str:
    """Name an unreadable file first: what the readable ones lack is most often in that one."""
    path, reason = next(iter(left_out.items()))
    if not problem:
        return f"data.root: none of the {len(left_out)} rasters in '{root}' can be read; {path}: {reason}."
    others = f" (and {len(left_out) - 1} more cannot be read)" if len(left_out) > 1 else ""
    return f"data.root: {path}: {reason}{others}; mend or remove it.\nWithout it: {problem}"
