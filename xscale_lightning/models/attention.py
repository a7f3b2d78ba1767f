"""`attend`: the one place that knows about attention kernels.

Backends: `xformers` (memory-efficient attention on CUDA), `sdpa` (PyTorch's fused kernels), `blocked` (explicit
softmax, some heads at a time, for CPUs) and `math` (explicit softmax). They agree in forward and gradient within
rounding (tests/models/test_attention.py holds the tolerances).
"""

import functools
import importlib
import itertools
import math
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import torch
import torch.nn.functional as F
from timm.layers import Attention as TimmAttention
from torch import Tensor, nn

from xscale_lightning.models.blocked_attention import blocked_attention

P = ParamSpec("P")
R = TypeVar("R")
Backend = Literal["auto", "xformers", "sdpa", "blocked", "math"]


@functools.cache
def xformers_status() -> tuple[bool, str]:
    """Whether xFormers' memory-efficient attention can run here, and why (not)."""
    if not torch.cuda.is_available():
        return False, "no CUDA device (xFormers has no CPU operator)"
    try:
        ops = importlib.import_module("xformers.ops")
    except Exception as error:  # a broken CUDA library raises OSError and others at import
        return False, f"xformers does not import: {type(error).__name__}: {error}"
    q = torch.zeros(1, 16, 1, 64, dtype=torch.bfloat16, device="cuda")
    try:
        ops.memory_efficient_attention(q, q, q)
    except Exception as error:  # built for another torch: its C++ operators are missing
        return False, f"xformers has no working operator here: {str(error).splitlines()[0]}"
    return True, "xFormers memory-efficient attention works on this GPU"


def choose_backend(device: torch.device, dtype: torch.dtype) -> tuple[str, str]:
    """The backend, and the reason in words.

    On a server CPU with bfloat16 units (benchmarks/attention.py) attention in blocks takes half to a seventh of SDPA's
    time in bfloat16, forward and backward, at every length tried (17 to 1024 tokens); in float32 SDPA wins or ties.
    """
    if device.type == "cuda":
        works, why = xformers_status()
        return ("xformers", why) if works else ("sdpa", why)
    if device.type == "cpu" and dtype is torch.bfloat16:
        return "blocked", "attention in blocks is faster than SDPA on a CPU in bfloat16"
    return "sdpa", f"PyTorch's fused attention on {device.type}"


def available_backends(device: torch.device) -> list[str]:
    """Backends that can run on `device`."""
    if device.type == "cuda":
        return ["xformers", "sdpa", "math"] if xformers_status()[0] else ["sdpa", "math"]
    return ["blocked", "sdpa", "math"] if device.type == "cpu" else ["sdpa", "math"]


def _not_compiled(function: Callable[P, R]) -> Callable[P, R]:
    """Kernels are fused as they are, and torch.compile would begin anew for every list of lengths."""
    return torch.compiler.disable(function)  # pyright: ignore[reportReturnType] (not typed)


@_not_compiled
def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    seqlens: tuple[int, ...] | None = None,
    kv_seqlens: tuple[int, ...] | None = None,
    backend: Backend = "auto",
) -> Tensor:
    """Softmax attention `softmax(q k' / sqrt(d)) v` over `[B, N, H, d]` -> `[B, N, H, d]`.

    Args:
        q: queries `[B, N, H, d]`.
        k: keys `[B, M, H, d]`.
        v: values `[B, M, H, d]`.
        seqlens: lengths of sequences packed one after the other into one row (then B is 1 and they sum to N);
            a token attends only inside its own sequence.
        kv_seqlens: lengths of the packed key sequences when they differ from the queries' (cross-attention).
        backend: kernel to use; `auto` chooses by device and type.

    Raises:
        ValueError: packed input whose row count is not 1 or whose lengths do not sum to N.
        ImportError, NotImplementedError: a backend was asked for that cannot run on this device.
    """
    if seqlens is None:
        name = choose_backend(q.device, q.dtype)[0] if backend == "auto" else backend
        return _KERNELS[name](q, k, v)
    kv_seqlens = kv_seqlens or seqlens
    if q.shape[0] != 1 or sum(seqlens) != q.shape[1] or sum(kv_seqlens) != k.shape[1]:
        raise ValueError(
            f"packed attention wants one row and lengths that sum to it, got q {tuple(q.shape)}, k {tuple(k.shape)}, "
            f"seqlens summing to {sum(seqlens)} and {sum(kv_seqlens)}."
        )
    name = choose_backend(q.device, q.dtype)[0] if backend == "auto" else backend
    if name == "xformers":
        return _xformers(q, k, v, _block_diagonal(seqlens, kv_seqlens))
    return _by_runs(q, k, v, seqlens, kv_seqlens, name)


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, N, d]
    logits = (q * (1 / math.sqrt(q.shape[-1]))) @ k.transpose(-2, -1)
    return (logits.softmax(-1).to(v.dtype) @ v).transpose(1, 2)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, N, d]
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def _xformers(q: Tensor, k: Tensor, v: Tensor, bias: object | None = None) -> Tensor:
    ops = importlib.import_module("xformers.ops")
    return ops.memory_efficient_attention(q, k, v, attn_bias=bias)


_KERNELS = {"math": _math, "sdpa": _sdpa, "blocked": blocked_attention, "xformers": _xformers}


@functools.lru_cache(maxsize=64)
def _block_diagonal(seqlens: tuple[int, ...], kv_seqlens: tuple[int, ...]) -> object:
    bias = importlib.import_module("xformers.ops.fmha.attn_bias")
    return bias.BlockDiagonalMask.from_seqlens(list(seqlens), list(kv_seqlens))


def _by_runs(
    q: Tensor, k: Tensor, v: Tensor, seqlens: tuple[int, ...], kv_seqlens: tuple[int, ...], name: str
) -> Tensor:
    """Packed attention for kernels without a block-diagonal mode: one call per run of equal lengths, nothing padded."""
    groups = itertools.groupby(zip(seqlens, kv_seqlens, strict=True))
    runs = [(len(list(same)), n, m) for (n, m), same in groups]  # sequences, queries and keys of each
    queries = [count * n for count, n, _ in runs]
    keys = [count * m for count, _, m in runs]
    parts = [
        _KERNELS[name](*(t.unflatten(0, (count, size)) for t, size in ((a, n), (b, m), (c, m)))).flatten(0, 1)
        for (count, n, m), a, b, c in zip(runs, q[0].split(queries), k[0].split(keys), v[0].split(keys), strict=True)
    ]
    return torch.cat(parts).unsqueeze(0)


class Attention(TimmAttention):
    """timm's multi-head self-attention (same parameters, same names) computed by `attend`."""

    backend: Backend = "auto"

    @classmethod
    def adopt(cls, other: TimmAttention) -> "Attention":
        """The same layer (shared parameters, same names) computed by `attend`."""
        layer = cls(other.qkv.in_features, other.num_heads, other.head_dim, qkv_bias=other.qkv.bias is not None)
        for name, child in other.named_children():
            setattr(layer, name, child)
        return layer

    def forward(
        self,
        x: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        seqlens: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Self-attention over `x [B, N, D]` -> `[B, N, D]`; `seqlens` as in `attend`.

        Raises:
            ValueError: a mask or causality is asked for (timm's signature has both; no method here uses them).
        """
        if attn_mask is not None or is_causal:
            raise ValueError("this attention has no masks: drop tokens, or pack sequences with seqlens.")
        batch, length, _ = x.shape
        qkv = self.qkv(x).reshape(batch, length, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.unbind(2)  # [B, N, H, d]
        out = attend(self.q_norm(q), self.k_norm(k), v, seqlens, backend=self.backend)
        return self.proj_drop(self.proj(self.norm(out.reshape(batch, length, self.attn_dim))))


class CrossAttention(nn.Module):
    """Multi-head attention of one sequence to another, computed by `attend`.

    Args:
        dim: width of both.
        num_heads: attention heads.
    """

    backend: Backend = "auto"

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(dim, dim)
        self.kv_proj = nn.Linear(dim, 2 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Queries `x [B, M, D]` to the keys and values of `context [B, N, D]` -> `[B, M, D]`."""
        q = self.q_proj(x).unflatten(-1, (self.num_heads, -1))  # [B, M, H, d]
        k, v = self.kv_proj(context).unflatten(-1, (2, self.num_heads, -1)).unbind(2)  # [B, N, H, d]
        return self.proj(attend(q, k, v, backend=self.backend).flatten(2))


def set_backend(module: torch.nn.Module, backend: Backend) -> None:
    """Make every attention layer inside `module` use `backend`."""
    for layer in module.modules():
        if isinstance(layer, Attention | CrossAttention):
            layer.backend = backend
