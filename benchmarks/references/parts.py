"""What the references share: blocks with explicit softmax attention, a plain encoder, per-sample augmentation."""

import copy
from typing import Any

import torch
from sizes import Size
from torch import Tensor, nn
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms import functional as transforms

from xscale_lightning.models.pos_embed import sincos_2d

Batch = dict[str, Tensor]
Interpolation = transforms.InterpolationMode


def softmax_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of `[B, H, N, d]` written out; returns `[B, N, H * d]`."""
    weights = ((q @ k.transpose(-2, -1)) * q.shape[-1] ** -0.5).softmax(-1)
    return (weights @ v).transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Self-attention with one matrix for queries, keys and values."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # [B, H, N, d]
        return self.proj(softmax_attention(q, k, v))


class Mlp(nn.Module):
    """Two linear layers, four times as wide between them."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block, everything written out."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


def blocks(dim: int, depth: int, heads: int) -> nn.ModuleList:
    """A stack of them."""
    return nn.ModuleList(Block(dim, heads) for _ in range(depth))


def take(x: Tensor, index: Tensor) -> Tensor:
    """Tokens `[B, N, D]` at `index [B, K]` -> `[B, K, D]`."""
    return x.gather(1, index.unsqueeze(-1).expand(-1, -1, x.shape[-1]))


def table(dim: int, side: int, stretch: bool = False) -> Tensor:
    """Fixed sin-cos positions `[1, side * side, dim]`; stretched ones lie n / (n - 1) apart, as LatentMIM has them."""
    at = torch.arange(side, dtype=torch.float64) * (side / (side - 1) if stretch else 1.0)
    return sincos_2d(dim, at, at).float().unsqueeze(0)


class Encoder(nn.Module):
    """Every patch embedded, the visible ones kept, blocks, norm."""

    def __init__(self, size: Size, class_token: bool, positions: Tensor) -> None:
        super().__init__()
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(size.bands, size.dim, size.patch, size.patch)})
        self.cls_token = nn.Parameter(torch.randn(1, 1, size.dim) * 0.02) if class_token else None
        self.blocks = blocks(size.dim, size.depth, size.heads)
        self.norm = nn.LayerNorm(size.dim, eps=1e-6)
        self.register_buffer("positions", positions, persistent=False)

    def forward(self, images: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens `[B, P + N, D]` of `images [B, C, H, W]`, or of the patches at `keep [B, K]` alone."""
        x = self.patch_embed["proj"](images).flatten(2).transpose(1, 2) + self.positions  # [B, N, D]
        x = x if keep is None else take(x, keep)
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], dim=1)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def holder(module: nn.Module) -> nn.Module:
    """A copy of `module` without gradients, as `.module` of an empty one: the name of our targets."""
    outer = nn.Module()
    outer.module = copy.deepcopy(module).requires_grad_(False)
    return outer


@torch.no_grad()
def follow(target: nn.Module, student: nn.Module, momentum: float) -> None:
    """EMA, parameter by parameter, as published."""
    for theirs, ours in zip(student.parameters(), target.parameters(), strict=True):
        ours.mul_(momentum).add_((1.0 - momentum) * theirs.detach())


def crop_and_flip(
    images: list[Tensor], side: int, scale: tuple[float, float], kernel: Interpolation, flips: tuple[bool, bool]
) -> list[Tensor]:
    """One random resized crop and flips for images `[C, r * H, r * W]` of one place, as a loader does it."""
    first = images[0]
    box = RandomResizedCrop.get_params(first, list(scale), [3 / 4, 4 / 3])
    mirror = [bool(flip and torch.rand(()) < 0.5) for flip in flips]
    found = []
    for image in images:
        ratio = image.shape[-1] // first.shape[-1]
        size = [side * ratio, side * ratio]
        view = transforms.resized_crop(image, *(ratio * n for n in box), size, kernel, antialias=True)
        view = transforms.hflip(view) if mirror[0] else view
        found.append(transforms.vflip(view) if mirror[1] else view)
    return found


class Reference(nn.Module):
    """Base of the references.

    `scale`, `kernel` and `flips` (left-right, top-bottom) are those of the published loader.
    """

    scale = (0.2, 1.0)
    kernel = Interpolation.BICUBIC
    flips = (True, False)

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.size = size

    def scaled(self, image: Tensor) -> Tensor:
        """One image `[C, H, W]` in the scale that the encoder sees: standardised, with mean 0 and deviation 1."""
        mean, std = torch.zeros(image.shape[0], 1, 1), torch.ones(image.shape[0], 1, 1)
        return (image - mean) / std

    def load(self, raw: Batch, augment: bool = True) -> Batch:
        """What a loader does with every sample `[C, H, W]` by itself, on the host; then the batch is stacked."""
        names = [name for name in ("image", "image_hr") if name in raw]
        samples = []
        for index in range(len(raw["image"])):
            images = [self.scaled(raw[name][index]) for name in names]
            if augment:
                images = crop_and_flip(images, self.size.image, self.scale, self.kernel, self.flips)
            samples.append(images)
        return {name: torch.stack([images[i] for images in samples]) for i, name in enumerate(names)}

    def draw(self, batch: Batch) -> tuple[Any, ...]:
        """Random numbers of one step: masks."""
        return (torch.rand(len(batch["image"]), self.size.tokens, device=batch["image"].device),)

    def loss(self, batch: Batch, *draws: Any) -> Tensor:
        """Loss of a loaded batch with given masks."""
        raise TypeError(f"{type(self).__name__} has no loss.")

    def forward(self, batch: Batch) -> Tensor:
        return self.loss(batch, *self.draw(batch))

    def move(self, momentum: float = 0.996) -> None:
        """Move the target networks, where there are any."""


class ReferenceStep:
    """The full training step of a reference: eager, an ordinary AdamW, and autocast only where it is asked for."""

    def __init__(
        self,
        model: Reference,
        raw: Batch,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        augment: bool = True,
    ) -> None:
        self.model = model.to(device).train()
        self.raw = {name: images.cpu() for name, images in raw.items() if name in ("image", "image_hr")}
        self.device, self.dtype, self.augment = device, dtype, augment
        self.ready = {name: images.to(device) for name, images in model.load(self.raw, augment=False).items()}
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, 1.5e-4, (0.9, 0.95), weight_decay=0.05)

    def forward(self) -> Tensor:
        """Loss of one batch that is loaded already."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not torch.float32):
            return self.model(self.ready)

    def step(self) -> Tensor:
        """Loader's part (with `augment`), forward, backward, optimizer, targets; returns the loss."""
        if self.augment:
            self.ready = {name: images.to(self.device) for name, images in self.model.load(self.raw).items()}
        loss = self.forward()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.model.move()
        return loss.detach()
