"""The Transformer block of all networks here: timm's, with our attention."""

from functools import partial
from typing import Literal

import torch
from timm.layers import LayerNorm
from timm.models.vision_transformer import Block as TimmBlock
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from xscale_lightning.models.attention import Attention
from xscale_lightning.models.tokenizers import PatchTokenizer

BlockNorm = Literal["pre", "post"]
MAX_DEPTH = 1000  # blocks: ten times the deepest published encoders


class Block(TimmBlock):
    """timm's block with `attend`; parameter names are timm's.

    Args:
        dim: width.
        num_heads: attention heads.
        drop_path: stochastic depth.
        mlp_ratio: width of the MLP over that of the block.
        block_norm: `pre`, x + f(norm(x)), or `post`, norm(x + f(x)) (Vaswani et al. 2017).
        norm_eps: of both LayerNorms.
    """

    checkpointing = False  # compute the block again in the backward pass instead of keeping what is inside it

    def __init__(
        self,
        dim: int,
        num_heads: int,
        drop_path: float = 0.0,
        mlp_ratio: float = 4.0,
        block_norm: BlockNorm = "pre",
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__(
            dim,
            num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=True,
            drop_path=drop_path,
            norm_layer=partial(LayerNorm, eps=norm_eps),  # type: ignore[arg-type]
            attn_layer=Attention,
        )
        self.post_norm = block_norm == "post"

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        seqlens: tuple[int, ...] | None = None,
    ) -> Tensor:
        """One block over `x [B, N, D]`; `seqlens` as in `attend`."""
        if self.checkpointing and torch.is_grad_enabled():
            # Random numbers matter only where stochastic depth draws some.
            draws = self.training and not isinstance(self.drop_path1, nn.Identity)
            rest = (attn_mask, is_causal, seqlens)
            out = checkpoint(self._run, x, *rest, use_reentrant=False, preserve_rng_state=draws)
            assert isinstance(out, Tensor)
            return out
        return self._run(x, attn_mask, is_causal, seqlens)

    def _run(self, x: Tensor, attn_mask: Tensor | None, is_causal: bool, seqlens: tuple[int, ...] | None) -> Tensor:
        if self.post_norm:
            x = self.norm1(x + self.drop_path1(self.ls1(self.attn(x, attn_mask, is_causal, seqlens))))
            return self.norm2(x + self.drop_path2(self.ls2(self.mlp(x))))
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), attn_mask, is_causal, seqlens)))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


def set_checkpointing(module: nn.Module, on: bool) -> None:
    """Make every block inside `module` keep its input only and compute the rest again in the backward pass."""
    for block in module.modules():
        if isinstance(block, Block):
            block.checkpointing = on


def set_compiled(module: nn.Module, on: bool) -> None:
    """Let torch.compile fuse what lies between the matrix products of every block inside `module`, or no longer.

    Attention keeps its kernels (`attend` is not compiled). Compiled on the first call; shapes that change are compiled
    once more, for any size.
    """
    for block in module.modules():
        if isinstance(block, Block) and on != (block._compiled_call_impl is not None):
            block.compile() if on else setattr(block, "_compiled_call_impl", None)


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform matrices, zero biases, LayerNorm 1 and 0."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, PatchTokenizer) and hasattr(module, "proj"):  # one made of others has none of its own
        nn.init.xavier_uniform_(module.proj.weight.flatten(1))  # like the linear layer that it is
        assert module.proj.bias is not None
        nn.init.zeros_(module.proj.bias)
