"""LatentMIM as published: patches with gaps, a projection head, a target that sees the hidden patches."""

import math

import torch
from sizes import Size
from torch import Tensor, nn
from torch.nn import functional

from references.parts import Attention, Batch, Encoder, Mlp, Reference, follow, holder, softmax_attention, table, take

TAU = 0.2


class Head(nn.Module):
    """Three linear layers without bias, each with a LayerNorm."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.linear0, self.norm0 = nn.Linear(dim, hidden, bias=False), nn.LayerNorm(hidden)
        self.linear1, self.norm1 = nn.Linear(hidden, hidden, bias=False), nn.LayerNorm(hidden)
        self.linear2, self.norm2 = nn.Linear(hidden, dim, bias=False), nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.norm0(self.linear0(x)))
        x = functional.gelu(self.norm1(self.linear1(x)))
        return self.norm2(self.linear2(x))


class Projected(nn.Module):
    """Encoder and head."""

    def __init__(self, backbone: Encoder, head: Head) -> None:
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, images: Tensor, keep: Tensor) -> Tensor:
        return self.head(self.backbone(images, keep))


class CrossAttention(nn.Module):
    """Attention of queries to a context."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.kv_proj, self.proj = nn.Linear(dim, dim), nn.Linear(dim, 2 * dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q = self.q_proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_proj(context).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(softmax_attention(q, k, v))


class CrossBlock(nn.Module):
    """Self-attention of the queries, cross-attention to the visible tokens, MLP."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        for name in ("norm1", "norm2q", "norm2kv", "norm3"):
            self.add_module(name, nn.LayerNorm(dim, eps=1e-6))
        self.self_attn, self.cross_attn, self.mlp = Attention(dim, heads), CrossAttention(dim, heads), Mlp(dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.self_attn(self.norm1(x))
        x = x + self.cross_attn(self.norm2q(x), self.norm2kv(context))
        return x + self.mlp(self.norm3(x))


class ReferenceLatentMIM(Reference):
    """Wei et al. 2024."""

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        self.backbone = Encoder(size, True, table(size.dim, size.side, stretch=True))
        self.head = Head(size.dim, size.hidden)
        self.target = holder(self.student)
        self.decoder = decoder = nn.Module()
        width = size.decoder_dim
        decoder.embed = nn.Linear(size.dim, width)
        decoder.cls_token = nn.Parameter(torch.randn(1, 1, width) * 0.02)
        decoder.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        decoder.blocks = nn.ModuleList(CrossBlock(width, size.decoder_heads) for _ in range(size.decoder_depth))
        decoder.norm, decoder.head = nn.LayerNorm(width, eps=1e-6), nn.Linear(width, size.dim)
        self.register_buffer("decoder_positions", table(width, size.side, stretch=True), persistent=False)

    @property
    def student(self) -> Projected:
        """Encoder and head that are trained."""
        return Projected(self.backbone, self.head)

    def draw(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Where in its cell each patch begins `[B, 2, L]`, and the visible `[B, K]` and hidden `[B, M]` places."""
        size, count, device = self.size, len(batch["image"]), batch["image"].device
        offsets = torch.randint(0, max(size.gap, 1), (count, 2, size.tokens), device=device)
        order = torch.rand(count, size.tokens, device=device).argsort(1)
        keep = int(size.tokens * (1 - size.mask_ratio))
        return offsets, order[:, :keep], order[:, keep:]

    def patches(self, images: Tensor, offsets: Tensor, ratio: int = 1) -> Tensor:
        """The patch of every cell, pushed together `[B, C, r * h * p, r * w * p]`, for images `r` times finer."""
        side, patch, cell = self.size.side, self.size.patch * ratio, (self.size.patch + self.size.gap) * ratio
        inside = torch.arange(patch, device=images.device)
        x = images.unflatten(3, (side, cell)).unflatten(2, (side, cell))  # [B, C, h, c, w, c]
        at = (offsets * ratio).unflatten(2, (side, side))  # [B, 2, h, w]
        rows = (at[:, 0, :, :, None] + inside).permute(0, 1, 3, 2)[:, None, :, :, :, None]  # [B, 1, h, p, w, 1]
        x = x.gather(3, rows.expand(-1, x.shape[1], -1, -1, -1, cell))
        columns = (at[:, 1, :, :, None] + inside)[:, None, :, None]  # [B, 1, h, 1, w, p]
        x = x.gather(5, columns.expand(-1, x.shape[1], -1, patch, -1, -1))
        return x.flatten(4, 5).flatten(2, 3)

    def loss(self, batch: Batch, offsets: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Patch discrimination among the hidden patches of each image."""
        return self.encode_and_predict(self.patches(batch["image"], offsets), visible, hidden)[1]

    def encode_and_predict(self, images: Tensor, visible: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """Projected visible tokens `[B, K, D]`, and the loss; `images` are patches pushed together."""
        with torch.no_grad():
            wanted = self.target.module(images, hidden)[:, 1:]  # [B, M, D]
        seen = self.student(images, visible)  # [B, 1 + K, D]
        prediction = self.decode(seen, visible, hidden)
        prediction = (prediction - prediction.mean(1, keepdim=True)) / (prediction.std(1, keepdim=True) + 1e-4)
        u, v = functional.normalize(prediction, dim=-1), functional.normalize(wanted, dim=-1)
        logits = (u @ v.transpose(1, 2) / TAU).flatten(0, 1)  # [B * M, M]
        own = torch.arange(hidden.shape[1], device=hidden.device).repeat(len(hidden))
        return seen[:, 1:], functional.cross_entropy(logits, own) * 2 * TAU

    def decode(self, seen: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """Predictions `[B, M, D]` by queries that average the visible tokens by the nearness of their positions."""
        decoder = self.decoder
        positions = self.decoder_positions.expand(len(seen), -1, -1)
        at_visible, at_hidden = take(positions, visible), take(positions, hidden)
        x = decoder.embed(seen)
        near = (at_hidden @ at_visible.transpose(1, 2) / math.sqrt(at_hidden.shape[-1])).softmax(-1)  # [B, M, K]
        queries = decoder.mask_token + near @ x[:, 1:] + at_hidden
        context = torch.cat([x[:, :1], x[:, 1:] + at_visible], dim=1)
        queries = torch.cat([decoder.cls_token.expand(len(x), -1, -1), queries], dim=1)
        for block in decoder.blocks:
            queries = block(queries, context)
        return decoder.head(decoder.norm(queries))[:, 1:]

    def move(self, momentum: float = 0.99) -> None:
        """The target follows encoder and head."""
        follow(self.target.module, self.student, momentum)
