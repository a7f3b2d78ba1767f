"""The reconstruction figure of masked autoencoders: one image, hidden to several degrees, and what was put back.

Columns: the original, then for each ratio the masked image and its reconstruction. Rows for each image: natural colour,
false colour where the bands for it exist, and where the error is. Below: the error of every band.
"""

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor

from xscale_lightning.evaluation.pictures import composite, stretch_limits
from xscale_lightning.evaluation.ratios import BILINEAR, MEAN, RatioScores, Restored
from xscale_lightning.evaluation.reconstruction import percentile_range
from xscale_lightning.evaluation.sheet import DPI, Sheet, cell_size, fit, to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from xscale_lightning.data.bands import Bands

MARGIN, GAP, GROUP_GAP = 12, 4, 18
LABEL_WIDTH = 104
HEADER = 84
CHART = 210
BARS = 20  # bands; more are drawn as lines
CHARACTER = 6.6  # pixels, mean width at 8 points
ERROR_MAP, SHARE_MAP, COLOURS = colormaps["magma"], colormaps["Greys"], colormaps["viridis"]


@dataclass(frozen=True)
class FigureText:
    """What is written around the pictures."""

    title: str = ""
    """First line."""
    notes: Sequence[str] = ()
    """Added to the caption."""


def ratio_figure(
    found: Mapping[float, Restored],
    scores: Mapping[float, RatioScores],
    bands: "Bands",
    text: FigureText = FigureText(),
    paste_visible: bool = False,
    false_colour: bool = True,
) -> np.ndarray:
    """Draw the figure.

    Args:
        found: what was put back, by ratio; every image `[B, C, H, W]` becomes a block of rows.
        scores: numbers by ratio.
        bands: record of the bands.
        text: title and notes.
        paste_visible: show the reconstruction with the visible values of the original in it.
        false_colour: add rows in near infrared, red, green where these bands exist.

    Returns:
        `[height, width, 3]` uint8.
    """
    parts = {ratio: _on_cpu(part) for ratio, part in sorted(found.items())}
    target = next(iter(parts.values())).target
    count, _, *size = target.shape
    height, width = cell_size(*size)
    rows = _colour_rows(bands, false_colour)
    block = 2 * width + GAP
    right = MARGIN + LABEL_WIDTH + width + len(parts) * (block + GROUP_GAP) + MARGIN
    sheet_width = max(right, 900)
    caption = _caption(parts, bands, text, paste_visible, sheet_width)
    top = MARGIN + (32 if text.title else 0)
    below = top + HEADER + count * (len(rows) + 1) * (height + GAP) + (count - 1) * GROUP_GAP
    chart = CHART if any(s.method for s in scores.values()) else 0
    sheet = Sheet(sheet_width, below + (chart + 74 if chart else 0) + 16 + 17 * len(caption) + MARGIN)
    if text.title:
        sheet.text(MARGIN, MARGIN, text.title, size=10, weight="bold")
    lefts = [MARGIN + LABEL_WIDTH + width + GROUP_GAP + i * (block + GROUP_GAP) for i in range(len(parts))]
    for left, ratio in zip(lefts, parts, strict=True):
        _header(sheet, left, top, width, ratio, scores[ratio])
    sheet.text(MARGIN + LABEL_WIDTH + width / 2, top + HEADER - 18, "original", ha="center")
    limits = stretch_limits(target)
    errors = {ratio: _error_map(part, percentile_range(target)) for ratio, part in parts.items()}
    largest = _largest(errors.values())
    y = top + HEADER
    for image in range(count):
        for name, channels in rows:
            label = name if count == 1 else f"image {image + 1}\n{name}"
            sheet.text(MARGIN, y + height / 2, label, va="center")
            columns = [(MARGIN + LABEL_WIDTH, composite(target, channels, limits)[image])]
            for left, part in zip(lefts, parts.values(), strict=True):
                shown = part.pasted() if paste_visible else part.prediction
                columns.append((left, composite(target, channels, limits, part.visible)[image]))
                columns.append((left + width + GAP, composite(shown, channels, limits)[image]))
            for left, picture in columns:
                sheet.picture(left, y, to_uint8(fit(picture, (height, width))))
            y += height + GAP
        sheet.text(MARGIN, y + height / 2, "bands hidden,\nerror\n(white: none)", va="center")
        for left, (ratio, part) in zip(lefts, parts.items(), strict=True):
            hidden = (~part.visible[image]).double().mean(0)  # [H, W]
            sheet.picture(left, y, to_uint8(fit(_coloured(SHARE_MAP, hidden * 0.85), (height, width))))
            error = errors[ratio][image]
            coloured = _coloured(ERROR_MAP, error / largest).masked_fill(error.isnan(), 1.0)
            sheet.picture(left + width + GAP, y, to_uint8(fit(coloured, (height, width))))
        if image == 0:
            _legend(sheet, MARGIN + LABEL_WIDTH, y, width, height, largest)
        y += height + GAP + GROUP_GAP
    y -= GROUP_GAP
    if chart:
        across = sheet_width - 2 * MARGIN - LABEL_WIDTH
        across = across if len(bands) > 8 else min(across, max(560, 32 * len(bands) * len(scores)))
        _band_chart(sheet.axes(MARGIN + LABEL_WIDTH, y + 34, across, chart), scores, bands)
        y += chart + 74
    for line in caption:
        y += 17
        sheet.text(MARGIN, y - 9, line)
    return sheet.pixels()


def _on_cpu(part: Restored) -> Restored:
    return Restored(part.target.cpu(), part.prediction.cpu(), part.visible.cpu(), part.borrows)


def _colour_rows(bands: "Bands", false_colour: bool) -> list[tuple[str, tuple[int, int, int]]]:
    """Label and channels of the rows in colour."""
    natural = bands.rgb
    known = all(bands.wavelengths[c] is not None for c in natural) and len(set(natural)) == 3
    rows = [("natural colour" if known else "bands", natural)]
    if false_colour and bands.false_colour is not None:
        rows.append(("false colour", bands.false_colour))
    return [(f"{name}\n{' '.join(dict.fromkeys(bands.names[c] for c in chosen))}", chosen) for name, chosen in rows]


def _header(sheet: Sheet, left: int, top: int, width: int, ratio: float, scores: RatioScores) -> None:
    """Ratio, numbers and column titles above a pair of columns."""
    middle = left + width + GAP / 2
    sheet.text(middle, top, f"{100 * ratio:g} % hidden", size=9, weight="bold", ha="center")
    if scores.method is not None:
        angle = "" if math.isnan(scores.method.angle) else f", angle {scores.method.angle:.1f}°"
        sheet.text(middle, top + 21, f"PSNR {scores.method.psnr:.1f} dB{angle}", ha="center")
        short = {BILINEAR: "bilinear", MEAN: "mean spectrum"}
        rivals = [f"{short.get(name, name)} {s.psnr:.1f} dB" for name, s in reversed(scores.base_lines.items())]
        sheet.text(middle, top + 39, ", ".join(rivals), size=7, color="dimgrey", ha="center")
    sheet.text(left + width / 2, top + HEADER - 18, "masked", ha="center")
    sheet.text(left + width + GAP + width / 2, top + HEADER - 18, "reconstruction", ha="center")


def _error_map(part: Restored, limits: Tensor) -> Tensor:
    """Root mean square over the hidden bands of error / range, `[B, H, W]`; NaN where no band is hidden."""
    used = limits > 0
    hidden = ~part.visible[:, used]
    relative = (part.prediction - part.target)[:, used] / limits[used].view(1, -1, 1, 1)
    squared = relative.double().square().masked_fill(~hidden, 0.0).sum(1)
    return (squared / hidden.sum(1)).sqrt()


def _largest(maps: "Sequence[Tensor] | object") -> float:
    """End of the colour scale: the 98th percentile of all maps."""
    values = torch.cat([m[m.isfinite()].float() for m in maps])  # type: ignore[attr-defined]
    values = values[:: max(1, math.ceil(len(values) / 10**6))]
    return max(float(torch.quantile(values, 0.98)), 1e-6) if len(values) else 1.0


def _coloured(colours, values: Tensor) -> Tensor:
    """`[H, W]` in 0..1 in colours, `[3, H, W]`."""
    return torch.from_numpy(np.asarray(colours(values.nan_to_num(0.0).clamp(0, 1).numpy()))[..., :3]).permute(2, 0, 1)


def _legend(sheet: Sheet, left: int, top: int, width: int, height: int, largest: float) -> None:
    """Two colour scales in the empty cell below the original."""
    ramp = torch.linspace(0, 1, 64)[None]  # [1, 64]
    scales = (
        (SHARE_MAP, 0.85, "share of bands hidden", "100 %"),
        (ERROR_MAP, 1.0, "error / range", f"{100 * largest:.0f} %"),
    )
    for i, (colours, end, name, last) in enumerate(scales):
        y = top + round(height * (0.12 + 0.48 * i))
        sheet.text(left + 6, y, name, size=7)
        sheet.picture(left + 6, y + 16, to_uint8(fit(_coloured(colours, ramp * end), (10, width - 12))))
        sheet.text(left + 6, y + 29, "0", size=6.5)
        sheet.text(left + width - 6, y + 29, last, size=6.5, ha="right")


def _band_chart(axes: "Axes", scores: Mapping[float, RatioScores], bands: "Bands") -> None:
    """Error of every band at every ratio as bars, as lines for many bands, with bilinear inpainting beside it."""
    drawn = {ratio: s for ratio, s in scores.items() if s.method is not None}
    shades = [COLOURS(0.88 - 0.8 * i / max(1, len(drawn) - 1)) for i in range(len(drawn))]
    many = len(bands) > BARS
    known = [w for w in bands.wavelengths if w is not None]
    by_wavelength = many and len(known) == len(bands)
    places = np.array(known) * 1000 if by_wavelength else np.arange(1, len(bands) + 1, dtype=float)
    order = np.argsort(places, kind="stable")  # the spectrometers of one sensor overlap
    bar = 0.8 / len(drawn)
    for i, ((ratio, part), shade) in enumerate(zip(drawn.items(), shades, strict=True)):
        assert part.method is not None
        own, rival = 100 * np.array(part.method.share), part.base_lines.get(BILINEAR)
        label, rival_label = f"{100 * ratio:g} % hidden", BILINEAR if i == 0 else ""
        if many:
            axes.plot(places[order], own[order], color=shade, lw=1.4, label=label)
            if rival is not None:
                shares = 100 * np.array(rival.share)
                axes.plot(places[order], shares[order], color=shade, lw=0.8, ls=":", label=rival_label)
            continue
        centres = places + (i - (len(drawn) - 1) / 2) * bar
        axes.bar(centres, own, bar * 0.9, color=shade, label=label)
        if rival is not None:
            low, high = centres - bar * 0.45, centres + bar * 0.45
            axes.hlines(100 * np.array(rival.share), low, high, color="black", lw=1.2, label=rival_label)
    top = _upper_end([100 * np.array(s.method.share) for s in drawn.values() if s.method is not None])
    axes.set_ylim(0, top)
    cut = "" if top is None else f", cut off at {top:.0f} %"
    axes.set_title(f"error per band, % of its range{cut}", fontsize=8, loc="left", x=0, pad=8)
    axes.margins(x=0.01)
    axes.tick_params(labelsize=7)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    if not many:
        names = [
            n if w is None else f"{n}\n{1000 * w:.0f} nm" for n, w in zip(bands.names, bands.wavelengths, strict=True)
        ]
        axes.set_xticks(places, names, parse_math=False)
    else:
        axes.set_xlabel("wavelength, nm" if by_wavelength else "number of the band", fontsize=7, labelpad=1)
    axes.legend(fontsize=7, ncols=len(drawn) + 1, loc="lower right", bbox_to_anchor=(1, 1), frameon=False, borderpad=0)


def _upper_end(errors: Sequence[np.ndarray]) -> float | None:
    """Where to cut the axis when a band without much signal, such as cirrus, would dwarf all others; None: nowhere."""
    values = np.concatenate(errors)
    values = values[np.isfinite(values)]
    middle = float(np.median(values)) if len(values) else 0.0
    return 4 * middle if len(values) and 0 < 6 * middle < values.max() else None


def _caption(
    parts: Mapping[float, Restored], bands: "Bands", text: FigureText, paste_visible: bool, width: int
) -> list[str]:
    """Lines below the figure."""
    first = next(iter(parts.values()))
    sentences = [
        "Masks are nested: what a lower ratio hides, a higher one hides too.",
        "All columns share one stretch per image and band, the 2nd to 98th percentile of the original.",
    ]
    if bool((first.visible != first.visible[:, :1]).any()):
        sentences.append(
            "Bands are masked one group at a time and a hidden band is grey in that band alone: where only some of the "
            "three shown bands are hidden, a patch takes a colour."
        )
    sentences.append(
        "Visible values are pasted in." if paste_visible else "The reconstruction is what the method puts out."
    )
    if first.borrows:
        sentences.append(
            "The target is normalised per patch, so the reconstruction borrows mean and deviation from the original, "
            "hidden patches included: no numbers."
        )
    else:
        sentences.append(
            "PSNR, angle and error are of hidden values; the error of a band is divided by its range (2nd to 98th "
            "percentile), the angle is between original and reconstructed spectrum in raw units."
        )
    return textwrap.wrap(" ".join([*sentences, *text.notes]), int((width - 2 * MARGIN) / CHARACTER * DPI / 120))
