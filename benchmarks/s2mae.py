"""Time the S2MAE training step against a plain eager float32 reference, interleaved in one run.

    python benchmarks/s2mae.py                          both sizes, some minutes on two CPU cores
    python benchmarks/s2mae.py --size vit_base --batch 8 --seconds 120

The reference has the arithmetic of the authors' SpectralGPT code with its first loss: a 3-D convolution over all cubes,
explicit softmax attention, every cube decoded and predicted, and the mask applied to the error. Ours runs once per
attention backend that this device has, and once with a quarter of the hidden cubes predicted, which the reference
cannot. Ratios are medians over pairs of neighbouring steps.
"""

import argparse
import dataclasses

import common
import torch
from torch import Tensor, nn

from xscale_lightning.data.bands import generic
from xscale_lightning.methods.s2mae import PAPER, S2MAE
from xscale_lightning.models.attention import available_backends

CUBE = 3
SIZES = {
    # configs/s2mae.yaml with configs/quickstart.yaml, and the published ViT-B at the size of the first stage
    "quickstart": common.Size("", 192, 4, 3, 8, 64, 12, 128, 3, 4, batch=64, mask_ratio=0.9),
    "vit_base": common.Size("", 768, 12, 12, 8, 96, 12, 512, 4, 16, batch=4, mask_ratio=0.9),
    "smallest": common.Size("", 48, 1, 3, 8, 16, 12, 32, 1, 2, batch=2, mask_ratio=0.5),
}


class _Tables(nn.ModuleDict):
    def __init__(self, places: int, groups: int, dim: int) -> None:
        super().__init__({"spatial": nn.Module(), "spectral": nn.Module()})
        self["spatial"].table = nn.Parameter(torch.randn(1, places, dim) * 0.02)
        self["spectral"].table = nn.Parameter(torch.randn(1, groups, dim) * 0.02)

    def forward(self) -> Tensor:
        """Both tables for all cubes `[1, G * h * w, D]`."""
        spatial, spectral = self["spatial"].table, self["spectral"].table
        places, groups = spatial.shape[1], spectral.shape[1]
        return spatial.repeat(1, groups, 1) + spectral.repeat_interleave(places, dim=1)


class ReferenceS2MAE(nn.Module):
    """The authors' arithmetic; its parameters have the names of ours."""

    def __init__(self, size: common.Size) -> None:
        super().__init__()
        self.size, self.groups = size, size.bands // CUBE
        self.length = self.groups * size.tokens
        kernel = (CUBE, size.patch, size.patch)
        self.backbone, self.decoder = encoder, decoder = nn.Module(), nn.Module()
        encoder.patch_embed = nn.ModuleDict({"proj": nn.Conv3d(1, size.dim, kernel, kernel)})
        encoder.positions = _Tables(size.tokens, self.groups, size.dim)
        encoder.blocks = nn.ModuleList(common.Block(size.dim, size.heads) for _ in range(size.depth))
        encoder.norm = nn.LayerNorm(size.dim, eps=1e-6)
        decoder.embed = nn.Linear(size.dim, size.decoder_dim)
        decoder.mask_token = nn.Parameter(torch.randn(1, 1, size.decoder_dim) * 0.02)
        decoder.positions = _Tables(size.tokens, self.groups, size.decoder_dim)
        decoder.blocks = nn.ModuleList(
            common.Block(size.decoder_dim, size.decoder_heads) for _ in range(size.decoder_depth)
        )
        decoder.norm = nn.LayerNorm(size.decoder_dim, eps=1e-6)
        decoder.pred = nn.Linear(size.decoder_dim, CUBE * size.patch**2)

    def forward(self, images: Tensor, noise: Tensor) -> Tensor:
        """Loss of `images [B, C, H, W]`; the cubes with the lowest `noise [B, L]` stay visible."""
        encoder, decoder, size = self.backbone, self.decoder, self.size
        keep = int(self.length * (1 - size.mask_ratio))
        order = noise.argsort(dim=1)
        back = order.argsort(dim=1)
        kept = order[:, :keep, None]
        x = encoder.patch_embed["proj"](images.unsqueeze(1)).flatten(2).transpose(1, 2)  # [B, L, D]
        x = x.gather(1, kept.expand(-1, -1, size.dim))
        x = x + encoder.positions().expand(len(x), -1, -1).gather(1, kept.expand(-1, -1, size.dim))
        for block in encoder.blocks:
            x = block(x)
        x = decoder.embed(encoder.norm(x))
        x = torch.cat([x, decoder.mask_token.expand(len(x), self.length - keep, -1)], dim=1)
        x = x.gather(1, back.unsqueeze(-1).expand_as(x)) + decoder.positions()
        for block in decoder.blocks:
            x = block(x)
        prediction = decoder.pred(decoder.norm(x))  # [B, L, V]
        side, p = size.image // size.patch, size.patch
        target = images.reshape(len(images), self.groups, CUBE, side, p, side, p).permute(0, 1, 3, 5, 2, 4, 6)
        mask = (back >= keep).float()
        return ((prediction - target.reshape(prediction.shape)).square().mean(-1) * mask).sum() / mask.sum()


class Reference(common.Reference):
    """Its training step, with min-max scaling per image and band as the authors' reader does it."""

    def __init__(self, size: common.Size, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = ReferenceS2MAE(size).to(device).train()
        self.images = common.synthetic_images(size, device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1.5e-4, (0.9, 0.95), weight_decay=0.05)

    def forward(self) -> Tensor:
        """Loss of one batch."""
        low, high = self.images.amin((2, 3), keepdim=True), self.images.amax((2, 3), keepdim=True)
        noise = torch.rand(len(self.images), self.model.length, device=self.images.device)
        return self.model((self.images - low) / (high - low + 1e-10), noise)


def build(size: common.Size, predict_ratio: float = 1.0) -> S2MAE:
    """Our S2MAE of the given size."""
    sizes = {"dim": size.dim, "depth": size.depth, "num_heads": size.heads, "patch_size": size.patch}
    return S2MAE(
        bands=generic(size.bands),
        backbone=dataclasses.replace(PAPER, **sizes, image_size=size.image),
        views=common.NO_VIEWS,
        mask_ratio=size.mask_ratio,
        predict_ratio=predict_ratio,
        decoder_dim=size.decoder_dim,
        decoder_depth=size.decoder_depth,
        decoder_heads=size.decoder_heads,
    )


def measure(size: common.Size, device: torch.device, seconds: float) -> dict[str, dict]:
    """Images per second, ratio to the reference and memory of every variant; all of them interleaved."""
    bf16 = torch.bfloat16
    variants: dict[str, common.Ours | common.Reference] = {"reference float32": Reference(size, device)}
    variants["ours float32"] = common.Ours(size, device, torch.float32, module=build(size))
    for backend in (*available_backends(device), "auto"):
        variants[f"ours bfloat16 {backend}"] = common.Ours(size, device, bf16, backend, module=build(size))
    variants["ours bfloat16 auto, a quarter predicted"] = common.Ours(size, device, bf16, module=build(size, 0.25))
    return common.compare(variants, "reference float32", size.batch, device, seconds)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "default"], default="default", help="quickstart and vit_base")
    parser.add_argument("--batch", type=int, help="images per step; the size's own unless given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on each size")
    parser.add_argument("--output", help="folder for s2mae.json; benchmarks/results unless given")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows, results = [], {}
    for name in ["quickstart", "vit_base"] if args.size == "default" else [args.size]:
        size = dataclasses.replace(SIZES[name], batch=args.batch) if args.batch else SIZES[name]
        print(f"{name}: width {size.dim}, {size.image} px, {size.bands} bands, batch {size.batch} ...", flush=True)
        found = measure(size, device, args.seconds)
        rows += common.compare_rows(name, found)
        results[name] = {"size": dataclasses.asdict(size), "variants": found}
    print(common.table(["training step", "images/s", "ratio", "step MB"], rows))
    print("written:", common.write_result("s2mae", device, {"sizes": results}, args.output))


if __name__ == "__main__":
    main()
