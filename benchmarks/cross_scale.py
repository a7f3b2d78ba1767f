"""Time the Cross-Scale MAE training step against a plain eager float32 reference, interleaved in one run.

    python benchmarks/cross_scale.py                        both sizes, some minutes on two CPU cores
    python benchmarks/cross_scale.py --size vit_base --batch 64 --seconds 60

The reference is the published arithmetic on the blocks of preset `paper` (pre-norm, encoder norm applied, mean of the
two reconstructions): one pass per view, explicit softmax attention, every patch embedded and predicted, and a
contrastive loss that writes out the product of all pairs of features. Ours runs once per attention
backend that this device has (math, sdpa, xformers), in encoder and decoder alike. A row of MAE says what the second
view costs. Ratios are medians over pairs of neighbouring steps. One image counts once, although it gives two views.
"""

import argparse
import dataclasses

import common
import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.transforms import RandomResizedCrop

from xscale_lightning.data.bands import generic
from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.cross_scale_recipe import Recipe
from xscale_lightning.models.attention import available_backends
from xscale_lightning.models.registry import BackboneConfig

PREDICTOR_DIM = 2048
SIZES = {
    "quickstart": dataclasses.replace(common.SIZES["quickstart"], batch=64),
    "vit_base": dataclasses.replace(common.SIZES["vit_base"], image=128, batch=16),  # the published size
    "smallest": common.SIZES["smallest"],
}


class ReferenceCrossScale(common.ReferenceMAE):
    """The published arithmetic with the norms and the mean of preset `paper`; its parameters have the names of ours."""

    def __init__(self, size: common.Size) -> None:
        super().__init__(size)
        width = size.decoder_dim
        self.predictor = nn.ModuleDict(
            {
                "fc1": nn.Linear(width, PREDICTOR_DIM),
                "norm": nn.BatchNorm1d(size.tokens),
                "fc2": nn.Linear(PREDICTOR_DIM, width),
            }
        )

    def forward(self, images: Tensor, noise: Tensor, second: Tensor, second_noise: Tensor) -> Tensor:
        """Sum of the three losses for two views `[B, C, H, W]` and their mask noise `[B, L]`."""
        z_a, y_a, loss_a = self.view(images, noise)
        z_b, y_b, loss_b = self.view(second, second_noise)
        hidden = self.predictor["norm"](self.predictor["fc1"](y_b[:, 1:])).relu()
        prediction = (self.predictor["fc2"](hidden) - y_a[:, 1:]).square().mean()
        features = torch.cat([z_a[:, 1:].mean(1), z_b[:, 1:].mean(1)])  # [2n, D]
        similarity = functional.cosine_similarity(features[:, None], features[None], dim=-1) / 0.5  # [2n, 2n, D] inside
        count = len(images)
        own = torch.eye(2 * count, dtype=torch.bool, device=images.device)
        positive = own.roll(count, 1)
        negatives = (similarity.exp() * ~(own | positive)).sum(1)
        contrastive = ((negatives + 1e-8).log() - similarity[positive]).mean()
        return (loss_a + loss_b) / 2 + prediction + contrastive


class Reference(common.Reference):
    """Its training step: the crop per batch, two passes, an ordinary AdamW."""

    def __init__(self, size: common.Size, device: torch.device) -> None:
        super().__init__(size, device)
        torch.manual_seed(0)
        self.model = ReferenceCrossScale(size).to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), 1.5e-4, (0.9, 0.95), weight_decay=0.05)

    def forward(self) -> Tensor:
        """Loss of one batch."""
        images = self.images
        top, left, height, width = RandomResizedCrop.get_params(images, [0.25, 0.75], [0.75, 1.3333])
        cut = images[:, :, top : top + height, left : left + width]
        second = functional.interpolate(cut, images.shape[-2:], mode="bilinear", align_corners=False, antialias=True)
        noise = torch.rand(2, len(images), self.model.size.tokens, device=images.device)
        return self.model(images, noise[0], second, noise[1])


def build(size: common.Size, recipe: Recipe) -> CrossScaleMAE:
    """Our Cross-Scale MAE of the given size."""
    return CrossScaleMAE(
        recipe=recipe,
        bands=generic(size.bands),
        backbone=BackboneConfig(size.backbone, depth=size.depth, image_size=size.image),
        views=common.NO_VIEWS,
        mask_ratio=size.mask_ratio,
        decoder_dim=size.decoder_dim,
        decoder_depth=size.decoder_depth,
        decoder_heads=size.decoder_heads,
        predictor_dim=PREDICTOR_DIM,
    )


def measure(size: common.Size, device: torch.device, seconds: float) -> dict[str, dict]:
    """Images per second, ratio to the reference and memory of every variant; all of them interleaved."""
    bf16 = torch.bfloat16
    variants: dict[str, common.Ours | common.Reference] = {"reference float32": Reference(size, device)}
    for preset in ("recommended", "paper"):
        for backend in available_backends(device):
            module = build(size, Recipe(preset=preset))
            variants[f"{preset} {backend}"] = common.Ours(size, device, bf16, backend, module=module)
    variants["mae auto"] = common.Ours(size, device, bf16)
    return common.compare(variants, "reference float32", size.batch, device, seconds)


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=[*SIZES, "default"], default="default", help="quickstart and vit_base")
    parser.add_argument("--batch", type=int, help="images per step; the size's own unless given")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60.0, help="time to spend on each size")
    parser.add_argument("--output", help="folder for cross_scale.json; benchmarks/results unless given")
    args = parser.parse_args(argv)
    device = torch.device(args.device)
    rows, results = [], {}
    for name in ["quickstart", "vit_base"] if args.size == "default" else [args.size]:
        size = dataclasses.replace(SIZES[name], batch=args.batch) if args.batch else SIZES[name]
        print(f"{name}: {size.backbone}, {size.image} px, {size.bands} bands, batch {size.batch} ...", flush=True)
        found = measure(size, device, args.seconds)
        rows += common.compare_rows(name, found)
        results[name] = {"size": dataclasses.asdict(size), "variants": found}
    print(common.table(["training step", "images/s", "ratio", "step MB"], rows))
    print("written:", common.write_result("cross_scale", device, {"sizes": results}, args.output))


if __name__ == "__main__":
    main()
