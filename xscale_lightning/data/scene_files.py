"""Which files of a folder make a scene, and which band of which file is which.

Two layouts, also mixed: several bands per file (names from the files' band descriptions, given, or those of the sensor
whose number of bands the file has), and one file per band with the band's name in the file name (`scene_B02.tif`,
`B02_10m.jp2`). Files of one folder whose names agree apart from the band and the resolution are one scene; folders
named after a resolution (`R10m`) count as their parent.
"""

import logging
import os
import re
from collections import defaultdict
from collections.abc import Collection, Sequence

from xscale_lightning.data.band_names import band_key, listed, says_its_bands
from xscale_lightning.data.geotiff import SUFFIXES, Raster, Source, UnreadableFile, inspect
from xscale_lightning.errors import UserError

logger = logging.getLogger(__name__)
_RESOLUTION = re.compile(r"R?\d+m", re.IGNORECASE)

SceneBands = dict[str, Source]
"""Band key (`band_key`) -> where to read it."""


def list_rasters(
    root: str,
    files: str | None = None,
    argument: str = "root",
    suffixes: tuple[str, ...] = SUFFIXES,
) -> list[str]:
    """Paths of all raster files below a folder, sorted; hidden folders are left out.

    Args:
        root: the folder.
        files: regular expression; only files whose path below `root` it is found in; None takes all.
        argument: of the data module that names the folder, for messages.
        suffixes: endings of the files to list, in small letters.

    Raises:
        UserError: if the folder is missing or holds no raster.
    """
    remedy = f"data.{argument} must be a folder of rasters ({', '.join(suffixes)})."
    if not os.path.isdir(root):
        raise UserError(f"data.{argument}: folder '{root}' does not exist; {remedy}")
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [os.path.join(folder, name) for name in sorted(names) if name.lower().endswith(suffixes)]
    if not found:
        raise UserError(f"data.{argument}: folder '{root}' holds no raster; {remedy}")
    if files is None:
        return found
    try:
        pattern = re.compile(files)
    except re.error as error:
        name = argument.replace("root", "files")
        raise UserError(f"data.{name}: '{files}' is no regular expression ({error}); mend it.") from None
    chosen = [path for path in found if pattern.search(os.path.relpath(path, root).replace(os.sep, "/"))]
    if not chosen:
        shown = os.path.relpath(found[0], root)
        raise UserError(
            f"data.{argument}: none of the {len(found)} rasters in '{root}' fits '{files}' (such as {shown})."
        )
    return chosen


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


def names_of(
    raster: Raster,
    named: str | None,
    file_bands: Sequence[str] | None,
    known: Sequence[str] = (),
    orders: Sequence[Sequence[str]] = (),
) -> tuple[list[str | None], Sequence[str] | None]:
    """Band keys of a raster: what it says itself, else its file name, else `file_bands`, else the order that fits.

    Args:
        raster: header of the file.
        named: key of the band in the file name, if there is one.
        file_bands: names of the bands of files that say none, in the files' order.
        known: names of bands that descriptions may mention.
        orders: band orders that a file without names may be taken to have, if it has as many bands.

    Returns:
        one key per band, None where nothing says it; and the order out of `orders` that was assumed, if one was.
    """
    count = len(raster.descriptions)
    if count == 1 and named:
        return [named], None
    if says_its_bands(raster.descriptions, known):
        return [band_key(text) if text else None for text in raster.descriptions], None
    if file_bands is not None:
        return ([band_key(name) for name in file_bands] if len(file_bands) == count else [None] * count), None
    assumed = next((order for order in orders if len(order) == count), None)
    return ([None] * count if assumed is None else [band_key(name) for name in assumed]), assumed


def find_scenes(
    root: str,
    wanted: Sequence[str],
    known: Sequence[str] = (),
    file_bands: Sequence[str] | None = None,
    orders: Sequence[Sequence[str]] = (),
    files: str | None = None,
    argument: str = "root",
    suffixes: tuple[str, ...] = SUFFIXES,
) -> tuple[dict[str, SceneBands], dict[str, str]]:
    """Group the rasters below `root` into scenes that have all `wanted` bands.

    Args:
        root: folder, searched with its sub-folders.
        wanted: names of the bands that a scene must have.
        known: names of other bands that file names may mention.
        file_bands: names of the bands of files that say none, in the files' order.
        orders: without `file_bands`, band orders that such a file is taken to have if the number of bands agrees.
        files: regular expression for the files' paths below `root`; see `list_rasters`.
        argument: of the data module that names the folder, for messages.
        suffixes: endings of the files to look at.

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
    assumed: dict[Sequence[str], int] = defaultdict(int)
    for path in list_rasters(root, files, argument, suffixes):
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
        names, order = names_of(raster, named, file_bands, [*wanted, *known], orders)
        if order is not None:
            assumed[order] += 1
        if not any(names):
            unnamed.add(len(names))
            if len(names) > 1:  # one band without a name may be a mask, or anything else
                left_out[path] = f"it has {len(names)} bands, and nothing says which"
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
        problem = _no_scene(root, wanted, found, unnamed, file_bands, orders, argument)
        raise UserError(_name_damaged(root, left_out, problem) if left_out else problem)
    for order, count in assumed.items():
        text = (
            "%d files of '%s' do not say which bands they hold; taken in order as %s (data.file_bands says otherwise)."
        )
        logger.warning(text, count, root, listed(order))
    for name, bands in incomplete.items():
        missing = [band for band, key in zip(wanted, keys, strict=True) if key not in bands]
        left_out[os.path.join(root, name)] = f"the scene lacks {listed(missing)}"
    return complete, left_out


def _no_scene(
    root: str,
    wanted: Sequence[str],
    found: set[str],
    unnamed: set[int],
    file_bands: Sequence[str] | None,
    orders: Sequence[Sequence[str]],
    argument: str,
) -> str:
    """Say why not a single scene can be used; empty where no file could be read."""
    missing = [name for name in wanted if band_key(name) not in found]
    if not found and not unnamed:
        return ""
    if not found:
        counts = ", ".join(str(count) for count in sorted(unnamed))
        if file_bands is not None:
            name = argument.replace("root", "file_bands")
            return (
                f"data.{name}: {len(file_bands)} names, but the files in '{root}' have {counts} bands each; "
                "name every band of a file, in the files' order."
            )
        expected = " or ".join(dict.fromkeys(str(len(order)) for order in orders))
        fits = f", and the {expected} of data.bands do not fit" if expected else ""
        return (
            f"data.root: the files in '{root}' ({counts} bands each) do not say which bands they hold{fits}; "
            "name them in order with data.file_bands."
        )
    if missing:
        have = listed(sorted(found))
        return f"data.bands: the files in '{root}' have no {listed(missing)}; they have {have}."
    return (
        f"data.bands: no scene in '{root}' has all of {listed(wanted)}; the bands of a scene must lie in one "
        "folder, in files whose names differ in the band only."
    )


def _name_damaged(root: str, left_out: dict[str, str], problem: str) -> str:
    """Name an unreadable file first: what the readable ones lack is most often in that one."""
    path, reason = next(iter(left_out.items()))
    if not problem:
        return f"data.root: none of the {len(left_out)} rasters in '{root}' can be read; {path}: {reason}."
    others = f" (and {len(left_out) - 1} more cannot be read)" if len(left_out) > 1 else ""
    return f"data.root: {path}: {reason}{others}; mend or remove it.\nWithout it: {problem}"
