"""`init_from`: a new run that starts from weights. Only the encoder comes over; it never resumes anything."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from xscale_lightning.data.band_names import band_key, listed
from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.errors import UserError
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.resizing import fit_tables
from xscale_lightning.models.timm_vit import TimmViT
from xscale_lightning.models.vit import Encoder, ViT
from xscale_lightning.pretrained import scaling_of
from xscale_lightning.readers.common import Report
from xscale_lightning.sources import Source, open_source

if TYPE_CHECKING:
    from xscale_lightning.methods.base import SSLModule

LEAST = 0.9  # of the encoder's numbers must come from the source
SAME_WAVELENGTH = 0.03  # micrometres; the 560 nm bands of Sentinel-2 and Landsat 8 are one band by this
FILTERS = ("patch_embed.proj.weight", "model.patch_embed.proj.weight")


def load_encoder(
    source: str | Path,
    bands: Bands | None = None,
    backbone: BackboneConfig | None = None,
    reader: str | None = None,
    adapt_bands: bool = False,
) -> tuple[Encoder, Bands, Report]:
    """An encoder with the weights of `source`, in evaluation mode.

    Args:
        source: checkpoint (`.ckpt`) or folder of a run, export folder, published checkpoint, state dict with timm's
            names (`.pth`, `.safetensors`), or the name of a model of timm's (`timm:vit_small_patch16_224`).
        bands: the bands it will see; None for those of the source.
        backbone: options to build it with; None for the source's own.
        reader: whose names a state dict has: `timm`, `cross_scale_mae`, `spectralgpt`, `latent_mim` or `ijepa`; None
            finds out.
        adapt_bands: where the bands differ, keep the filters of the bands that both have (by name), and give the others
            the mean of the source's filters.

    Returns:
        The encoder; the record of its bands, with the statistics it was trained with where the source says them; and
        what became of every tensor.

    Raises:
        UserError: no such source, other bands (which ones, and the remedy), or weights that do not fit.
    """
    found = open_source(source, len(bands) if bands else None, reader)
    target = fitting_bands(found, bands, adapt_bands)
    config = replace(backbone or found.config, pretrained=False)
    if backbone is None and config.wavelengths is not None and target != found.bands:
        config = replace(config, wavelengths=None)
    encoder = config.build(len(target), target.wavelengths)
    return encoder.eval(), target, transfer(found, encoder, target)


def start_from(module: "SSLModule", source: str, adapt_bands: bool = False, frozen: bool = False) -> Report:
    """Give the encoder of a method, and the target networks that follow it, the weights of `source`.

    With `frozen` nothing is trained after this: images are then normalised by the mean and deviation the source was
    trained with, as far as it says them.

    Raises:
        UserError: as `load_encoder`; with `frozen` also if the source scaled its images in another way.
    """
    found = open_source(source, len(module.bands), None)
    theirs = fitting_bands(found, module.bands, adapt_bands)
    if frozen and found.scaling is not None and found.scaling != (ours := scaling_of(module)):
        raise UserError(
            f"{found.what} scales its images by {found.scaling!r}, and {module.method_name} by {ours!r}: evaluate it "
            "with the method it was trained with."
        )
    for part in (module, getattr(module, "host", module)) if frozen else ():
        part.bands = theirs
        part.mean.copy_(torch.tensor(theirs.means).view_as(part.mean))
        part.std.copy_(torch.tensor(theirs.stds).view_as(part.std))
    report = transfer(found, module.backbone, module.bands)
    for student, target in module._targets:
        target.module.load_state_dict(student.state_dict())
    return report


def fitting_bands(found: Source, bands: Bands | None, adapt_bands: bool) -> Bands:
    """The record of the bands that an encoder from this source will have.

    Args:
        found: the source.
        bands: those of the data; None takes the source's.
        adapt_bands: allow others than the source's.

    Returns:
        `bands`, where source and data share one with the statistics that the source was trained with.

    Raises:
        UserError: they differ from the source's, and are not to be adapted.
    """
    there = found.bands
    chans = found.encoder.in_chans
    if bands is None:
        return there or generic(chans)
    if there is None:
        if chans != len(bands) and not adapt_bands and not _any_count(found.encoder):
            raise UserError(
                f"{found.what} was made for {chans} bands, and the data has {len(bands)} ({listed(bands.names)}).\n"
                f"Choose {chans} with data.bands.names, or set adapt_bands to true: every filter becomes their mean."
            )
        return bands
    difference = "" if same_bands(there, bands) else there.difference(bands) or "wavelengths or unit"
    if difference and not adapt_bands:
        known = [name for name in there.names if name in bands.names]
        choice = "choose its bands with data.bands.names" if len(known) == len(there) else "take data that has them"
        raise UserError(
            f"{found.what} was trained on other bands than the data's: {difference}.\nEither {choice}, or set "
            "adapt_bands to true: shared bands keep their filters, the others begin with the mean of all."
        )
    shared = _shared(there, bands)
    statistics = {i: there.bands[j] for i, j in shared.items()} if there.unit == bands.unit else {}
    mean = [statistics[i].mean if i in statistics else band.mean for i, band in enumerate(bands.bands)]
    std = [statistics[i].std if i in statistics else band.std for i, band in enumerate(bands.bands)]
    return bands.with_statistics(mean, std)


def same_bands(there: Bands, here: Bands) -> bool:
    """Whether an encoder of one record takes images of the other: names, order, wavelengths and unit are the same.

    Another name of the sensor alone is no difference: presets share bands.
    """
    return there.names == here.names and there.unit == here.unit and _shared(there, here) == _same(here)


def _same(bands: Bands) -> dict[int, int]:
    return {i: i for i in range(len(bands))}


def _any_count(encoder: Encoder) -> bool:
    """Whether its filters do not depend on the number of bands: spectral cubes."""
    return not any(name in encoder.state_dict() and encoder.state_dict()[name].ndim == 4 for name in FILTERS)


def _shared(there: Bands, here: Bands) -> dict[int, int]:
    """Channel here -> channel there of the bands with the same name; at another wavelength it is another band."""
    places = {band_key(band.name): i for i, band in enumerate(there.bands)}
    shared = {}
    for i, band in enumerate(here.bands):
        j = places.get(band_key(band.name))
        if j is None:
            continue
        ours, theirs = band.wavelength, there.bands[j].wavelength
        if ours is None or theirs is None or abs(ours - theirs) <= SAME_WAVELENGTH:
            shared[i] = j
    return shared


def transfer(found: Source, encoder: Encoder, bands: Bands) -> Report:
    """Load what fits of a source into an encoder; its learned position tables are resized.

    Raises:
        UserError: tensors of another shape, or too few that fit; nothing has been loaded then.
    """
    state, unused = _named_for(found, encoder)
    notes = list(found.resized)
    ours = encoder.state_dict()
    for name in FILTERS:
        if name in state and name in ours and state[name].ndim == 4:
            state[name], note = _filters(state[name], found.bands, bands)
            notes += [f"{name} ({note})"] if note else []
    state, tables = fit_tables(encoder, state)
    wrong = [name for name, value in state.items() if name in ours and value.shape != ours[name].shape]
    if wrong:
        name = wrong[0]
        raise UserError(
            f"{found.what} is of another architecture: {len(wrong)} tensors differ, first {name}, "
            f"{list(state[name].shape)} there and {list(ours[name].shape)} here. Give model.backbone the "
            "source's options."
        )
    changed = {note.split(" (")[0] for note in notes} | set(tables)
    matched = [name for name in state if name in ours and name not in changed]
    missing = [name for name in ours if name not in state]
    unexpected = [*unused, *(name for name in state if name not in ours)]
    numbers = sum(value.numel() for value in ours.values())
    share = 1 - sum(ours[name].numel() for name in missing) / max(numbers, 1)
    if share < LEAST:
        raise UserError(
            f"{found.what} gives only {share:.0%} of the encoder: {len(missing)} of {len(ours)} tensors are missing, "
            f"first {missing[0]}. Give model.backbone the source's options."
        )
    encoder.load_state_dict({name: value for name, value in state.items() if name in ours}, strict=False)
    return Report(matched, [*notes, *(name for name in tables if name not in notes)], missing, unexpected)


def _named_for(found: Source, encoder: Encoder) -> tuple[dict[str, Tensor], list[str]]:
    """Weights of a source under the names of `encoder`, and the names that are left over."""
    state = dict(found.encoder.state_dict())
    if isinstance(found.encoder, TimmViT) == isinstance(encoder, TimmViT):
        return state, list(found.unused)
    if isinstance(encoder, ViT):  # timm's weights in ours: a copy takes them, because positions differ in form
        taker = copy.deepcopy(encoder)
        unused = taker.load_timm_state_dict({name.removeprefix("model."): value for name, value in state.items()})
        return dict(taker.state_dict()), [*found.unused, *unused]
    raise UserError(f"{found.what} is no model of timm's, and the backbone is one: leave the backbone's name out.")


def _filters(weight: Tensor, there: Bands | None, here: Bands) -> tuple[Tensor, str]:
    """Filters `[D, C, p, p]` for the bands here, and what had to be done; "" if nothing."""
    if there is None:
        if weight.shape[1] == len(here):
            return weight, ""
        mean = weight.mean(1, keepdim=True)
        scale = weight.shape[1] / len(here)  # the sum over the bands keeps its size
        return mean.expand(-1, len(here), -1, -1) * scale, f"the mean of {weight.shape[1]} filters for every band"
    shared = _shared(there, here)
    if shared == _same(here) and len(there) == len(here):
        return weight, ""
    mean = weight.mean(1)
    rows = [weight[:, shared[i]] if i in shared else mean for i in range(len(here))]
    new = [name for i, name in enumerate(here.names) if i not in shared]
    note = f"filters of {len(shared)} shared bands by name" + (f"; the mean of all for {listed(new)}" if new else "")
    return torch.stack(rows, 1), note
