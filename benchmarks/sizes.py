"""Sizes at which the benchmarks run every method: one `Size` per method, by the name of the set."""

import dataclasses
from dataclasses import dataclass

METHODS = ("mae", "cross_scale_mae", "s2mae", "ijepa", "latent_mim", "sa_ijepa", "sa_latent_mim")


@dataclass(frozen=True)
class Size:
    """One model size with its images and batch.

    `image` is the side in pixels of the image that the method gets; the affinity's HR image has twice of it. The
    decoder is the predictor in I-JEPA. `gap` pixels lie between two patches of LatentMIM.
    """

    method: str
    dim: int
    depth: int
    heads: int
    patch: int
    image: int
    bands: int
    decoder_dim: int
    decoder_depth: int
    decoder_heads: int
    batch: int
    mask_ratio: float = 0.75
    gap: int = 0
    hidden: int = 0
    """Width of Cross-Scale MAE's predictor or of LatentMIM's projection head."""

    @property
    def host(self) -> str:
        """The method, without an affinity around it."""
        return self.method.removeprefix("sa_")

    @property
    def paired(self) -> bool:
        """Whether it learns from pairs of resolutions."""
        return self.method.startswith("sa_")

    @property
    def side(self) -> int:
        """Patches along one side of an image."""
        return self.image // (self.patch + self.gap)

    @property
    def tokens(self) -> int:
        """Places of one image: patches, or cubes of three bands in S2MAE."""
        return self.side**2 * (-(-self.bands // CUBE) if self.method == "s2mae" else 1)


CUBE = 3
RATIO = 2  # HR pixels per MR pixel and axis

_BASE = (768, 12, 12)
_PAPER = {
    "mae": Size("mae", *_BASE, 16, 224, 3, 512, 8, 16, batch=8),
    "cross_scale_mae": Size("cross_scale_mae", *_BASE, 16, 128, 3, 512, 8, 16, batch=16, hidden=2048),
    "s2mae": Size("s2mae", *_BASE, 8, 96, 12, 512, 4, 16, batch=4, mask_ratio=0.9),
    "ijepa": Size("ijepa", *_BASE, 16, 224, 3, 384, 6, 12, batch=4),
    "latent_mim": Size("latent_mim", *_BASE, 16, 280, 3, 512, 3, 16, batch=8, mask_ratio=0.897, gap=4, hidden=4096),
}
_PAPER["sa_ijepa"] = dataclasses.replace(_PAPER["ijepa"], method="sa_ijepa", bands=4)
_PAPER["sa_latent_mim"] = dataclasses.replace(_PAPER["latent_mim"], method="sa_latent_mim", bands=4, batch=4)


def _all(**changes: int) -> dict[str, Size]:
    return {name: dataclasses.replace(size, **changes) for name, size in _PAPER.items()}


def _wide(width: tuple[int, int, int], batch: int) -> dict[str, Size]:
    dim, depth, heads = width
    return _all(dim=dim, depth=depth, heads=heads, batch=batch)


def _narrow(image: int, batch: int, depth: int, decoder: tuple[int, int, int]) -> dict[str, Size]:
    dim, blocks, heads = decoder
    shape = {"dim": 192, "depth": depth, "heads": 3, "patch": 8, "image": image, "bands": 12, "batch": batch}
    decoder_shape = {"decoder_dim": dim, "decoder_depth": blocks, "decoder_heads": heads}
    found = _all(**shape, **decoder_shape)
    for name, size in found.items():
        gapped = {"gap": 2, "image": image // 8 * 10} if size.gap else {}
        found[name] = dataclasses.replace(size, hidden=min(size.hidden, 384), **gapped)
    return found


SIZES: dict[str, dict[str, Size]] = {
    # The published ViT-B recipes: image, decoder, mask; batches that a CPU takes.
    "vit_base": _PAPER,
    # The same width and images, 4 of 12 blocks and half of the decoder: what `make bench` has time for.
    "base4": {
        name: dataclasses.replace(size, depth=4, decoder_depth=(size.decoder_depth + 1) // 2, batch=4)
        for name, size in _PAPER.items()
    },
    "vit_large": _wide((1024, 24, 16), batch=64),
    "quickstart": _narrow(64, 32, 4, (128, 3, 4)),  # configs/quickstart.yaml
    "smallest": _narrow(48, 2, 1, (48, 1, 3)),  # for the benchmarks' own test
}
