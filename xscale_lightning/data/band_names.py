"""Names and wavelengths of bands as people write them: spelling forgiven, long lists shown short, units checked."""

import math
import re
from collections.abc import Sequence

from xscale_lightning.errors import UserError

_SHOWN = 16  # names a message gives in full; of more it gives the first and the last ones
_NUMBERED = re.compile(r"band[ _-]?\d+\b.*", re.IGNORECASE)
_SHORTEST, _LONGEST = 0.1, 20.0  # micrometres; ultraviolet to thermal infrared


def band_key(name: str) -> str:
    """Spelling-independent key of a band name: B1, b01 and SR_B1 are the same band."""
    match = re.fullmatch(r"(?:SR_)?B0*(\d+)(A?)", name.strip().upper())
    return f"B{int(match[1]):02d}{match[2]}".replace("B08A", "B8A") if match else name.strip().lower()


def listed(names: Sequence[str]) -> str:
    """Names for a message: all of them, or of a hyperspectral sensor's the first, the last and their number."""
    if len(names) <= _SHOWN:
        return ", ".join(names)
    return f"{', '.join(names[:3])}, ..., {names[-1]} ({len(names)} in all)"


def match_names(names: Sequence[str], available: Sequence[str], owner: str, argument: str = "bands") -> list[int]:
    """Index in `available` of every name; spelling as in `band_key` is forgiven.

    Raises:
        UserError: naming the bands that `owner` lacks and those it has.
    """
    exact = {name: i for i, name in reversed(list(enumerate(available)))}
    loose = {band_key(name): i for i, name in reversed(list(enumerate(available)))}
    found = [exact.get(name, loose.get(band_key(name))) for name in names]
    missing = [name for name, i in zip(names, found, strict=True) if i is None]
    if missing:
        raise UserError(f"{argument}.names: {owner} has no {listed(missing)}; it has {listed(available)}.")
    return [i for i in found if i is not None]


def says_its_bands(descriptions: Sequence[str], known: Sequence[str]) -> bool:
    """Whether a file's band descriptions tell its bands; "", "Band 1" or "band 8 (424 Nanometers)" only number them."""
    keys = {band_key(name) for name in known}
    return any(text and (band_key(text) in keys or not _NUMBERED.fullmatch(text.strip())) for text in descriptions)


def check_wavelengths(wavelengths: Sequence[float], names: Sequence[str]) -> None:
    """Refuse a list of wavelengths (micrometres) that does not fit the bands or is in another unit.

    Raises:
        UserError: naming the number of values, or the first value that is no wavelength in micrometres.
    """
    if len(wavelengths) != len(names):
        raise UserError(
            f"bands.wavelengths: {len(wavelengths)} values for {len(names)} bands ({listed(names)}); "
            "give one value per band, in micrometres."
        )
    for name, value in zip(names, wavelengths, strict=True):
        if math.isfinite(value) and _SHORTEST <= value <= _LONGEST:
            continue
        hint = ""
        for unit, factor in (("nanometres", 1e-3), ("metres", 1e6)):
            if math.isfinite(value) and _SHORTEST <= value * factor <= _LONGEST:
                hint = f": {value:g} looks like {unit}, write {value * factor:g}"
        raise UserError(
            f"bands.wavelengths: {value:g} of band {name} is not possible; "
            f"give micrometres, from {_SHORTEST:g} to {_LONGEST:g}{hint}."
        )
