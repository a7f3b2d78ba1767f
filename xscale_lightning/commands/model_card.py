"""The model card of an export: what it is, how it loads, what it wants to see, how well it did."""

from collections.abc import Mapping
from typing import Any

from xscale_lightning.data.bands import Bands

SCALING = {
    "standardize": "`(image - mean) / std` per band, with the numbers below",
    "minmax": "every band of every image to [0, 1] by its own minimum and maximum",
    "none": "none: the encoder sees raw values",
}
MAX_NUMBERS = 40


def model_card(config: Mapping[str, Any], bands: Bands, facts: Mapping[str, Any]) -> str:
    """Text of `README.md`.

    Args:
        config: what stands in `config.json`.
        bands: the band record.
        facts: of the run, see `commands.export.run_facts`.
    """
    own = config["xscale"]
    lines = [
        "---",
        "library_name: timm" if own["timm"] else "library_name: xscale_lightning",
        "tags: [remote-sensing, self-supervised, image-feature-extraction]",
        "---",
        "",
        f"# Encoder pretrained with {own['method']}",
        "",
        f"- **Method**: `{facts.get('class_path', own['method'])}`. {facts.get('paper', '')}".rstrip(),
        f"- **Encoder**: {facts.get('encoder', own['backbone']['name'])}, {config['num_features']} features, pooled by "
        f"`{own['pool']}`",
        f"- **Bands**: {len(bands)} of sensor `{bands.sensor}`, unit: {bands.unit}",
        f"- **Scaling**: {SCALING[own['scaling']]}",
    ]
    if facts.get("data"):
        lines.append(f"- **Data**: {facts['data']}")
    if own["image_size"]:
        lines.append(f"- **Image size**: {own['image_size']} pixels")
    if own["gsd"]:
        lines.append(f"- **Ground sample distance**: {own['gsd']:g} m per pixel (finest band)")
    if facts.get("steps") is not None:
        lines.append(f"- **Training**: {facts['steps']} steps")
    lines += [
        f"- **Checkpoint**: SHA-256 `{facts.get('sha256', '')}`",
        f"- **Written by**: xscale_lightning {own['version']}",
    ]
    lines += ["", "## Load it", "", *_loading(own, len(bands))]
    lines += ["", "## Bands", "", "In this order, in raw values of the files.", ""]
    lines += ["| band | wavelength (µm) | GSD (m) | mean | std |", "| --- | --- | --- | --- | --- |"]
    for band in bands.bands:
        cells = ("" if v is None else f"{v:g}" for v in (band.wavelength, band.gsd, band.mean, band.std))
        lines.append(f"| {band.name} | {' | '.join(cells)} |")
    numbers = dict(facts.get("numbers") or {})
    if numbers:
        lines += ["", "## Numbers of the run", "", "| what | value |", "| --- | --- |"]
        lines += [f"| {name} | {value:.6g} |" for name, value in list(numbers.items())[:MAX_NUMBERS]]
        if len(numbers) > MAX_NUMBERS:
            lines.append(f"| ... | {len(numbers) - MAX_NUMBERS} more in the run's `results.json` |")
    return "\n".join(lines) + "\n"


def _loading(own: Mapping[str, Any], count: int) -> list[str]:
    lines = [
        "```python",
        "from xscale_lightning import load_backbone",
        "",
        'backbone = load_backbone("PATH_TO_THIS_FOLDER")',
        f"vectors = backbone.features(images, gsd)  # images [B, {count}, H, W] in raw values, gsd in metres per pixel",
        "maps = backbone.patch_features(images, gsd)  # one vector per patch",
        "```",
        "",
    ]
    if not own["timm"]:
        return [*lines, f"timm cannot load it: {own['why_not_timm']}."]
    text = "Without xscale_lightning, through timm, at the image size in `config.json`; normalise the images yourself:"
    return [
        *lines,
        text,
        "",
        "```python",
        "import timm",
        "",
        'model = timm.create_model("local-dir:PATH_TO_THIS_FOLDER", pretrained=True)',
        "```",
        "",
        "Without `pretrained=True` timm builds the model and leaves the weights out. For another `img_size` timm "
        "interpolates the position table; `load_backbone` computes it anew, which is better.",
    ]
