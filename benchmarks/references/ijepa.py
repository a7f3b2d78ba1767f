"""I-JEPA as published: blocks drawn image by image, targets through the full target encoder, one pass per target."""

import math

import torch
from sizes import Size
from torch import Tensor, nn
from torch.nn import functional

from references.parts import Batch, Encoder, Interpolation, Reference, blocks, follow, holder, table, take

TARGETS = 4
LEAST = 11  # tokens of a context


class ReferenceIJEPA(Reference):
    """Assran et al. 2023."""

    scale = (0.3, 1.0)
    kernel = Interpolation.BILINEAR
    flips = (False, False)

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.backbone = Encoder(size, False, table(size.dim, size.side))
        self.predictor = predictor = nn.Module()
        predictor.embed = nn.Linear(size.dim, size.decoder_dim)
        predictor.mask_token = nn.Parameter(torch.randn(1, 1, size.decoder_dim) * 0.02)
        predictor.blocks = blocks(size.decoder_dim, size.decoder_depth, size.decoder_heads)
        predictor.norm = nn.LayerNorm(size.decoder_dim, eps=1e-6)
        predictor.proj = nn.Linear(size.decoder_dim, size.dim)
        self.target = holder(self.backbone)
        self.register_buffer("predictor_positions", table(size.decoder_dim, size.side), persistent=False)

    def draw(self, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        """Visible places `[B, K]` and places of the targets, `TARGETS` times `[B, M]`; the collator's work."""
        side, count, device = self.size.side, len(batch["image"]), batch["image"].device
        share = float(torch.rand(()))  # one number drives the area and the shape of a target
        target = _size(side, 0.15 + 0.05 * share, 0.75 + 0.75 * share)
        context = _size(side, 0.85 + 0.15 * float(torch.rand(())), 1.0)
        seen, wanted = [], []
        for _ in range(count):
            hidden = [_rectangle(side, target) for _ in range(TARGETS)]
            tries = 0
            while True:  # after 20 failures one target less is kept free of the context
                left_out = set().union(*hidden[: TARGETS - tries // 20]) if tries < 20 * TARGETS else set()
                visible = [place for place in _rectangle(side, context) if place not in left_out]
                if len(visible) >= min(LEAST, side * side // 8):
                    break
                tries += 1
            seen.append(visible)
            wanted.append(hidden)
        least = min(len(visible) for visible in seen)  # the first tokens of every context
        visible = torch.tensor([places[:least] for places in seen], device=device)
        return visible, [torch.tensor([hidden[i] for hidden in wanted], device=device) for i in range(TARGETS)]

    def loss(self, batch: Batch, visible: Tensor, targets: list[Tensor]) -> Tensor:
        """Smooth L1 between the predicted and the target encoder's tokens."""
        return self.encode_and_predict(batch["image"], visible, targets)[1]

    def encode_and_predict(self, images: Tensor, visible: Tensor, targets: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Encoded context tokens `[B, K, D]`, and the loss."""
        with torch.no_grad():
            tokens = self.target.module(images)  # the whole image
            tokens = functional.layer_norm(tokens, tokens.shape[-1:], eps=1e-5)
            wanted = torch.cat([take(tokens, places) for places in targets])  # [T * B, M, D]
        seen, predictor = self.backbone(images, visible), self.predictor
        positions = self.predictor_positions.expand(len(images), -1, -1)
        x = (predictor.embed(seen) + take(positions, visible)).repeat(len(targets), 1, 1)
        masks = predictor.mask_token + torch.cat([take(positions, places) for places in targets])
        x = torch.cat([x, masks], dim=1)
        for block in predictor.blocks:
            x = block(x)
        prediction = predictor.proj(predictor.norm(x)[:, visible.shape[1] :])
        return seen, functional.smooth_l1_loss(prediction, wanted)

    def move(self, momentum: float = 0.996) -> None:
        """The target follows the encoder."""
        follow(self.target.module, self.backbone, momentum)


def _size(side: int, scale: float, ratio: float) -> tuple[int, int]:
    area = int(side * side * scale)
    rows, columns = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
    return min(rows, side - 1), min(columns, side - 1)


def _rectangle(side: int, size: tuple[int, int]) -> list[int]:
    """Places of a block; the last row and column are never reached, as published."""
    top, left = (int(torch.randint(0, side - n, ())) for n in size)
    return [row * side + column for row in range(top, top + size[0]) for column in range(left, left + size[1])]
