"""Softmax attention for CPUs in blocks of heads that stay in the cache.

PyTorch's fused kernel spends most of its time in a backward pass that was made for long sequences, and explicit
attention writes `[B, H, N, M]` logits to memory four times. Here a few heads at a time go through all of it while their
logits are in the second-level cache, in the same arithmetic as explicit attention.
"""

import math
from typing import Any

import torch
from torch import Tensor

BLOCK = 2**19  # logits per thread at a time: 1 MiB in bfloat16
# Longer sequences compute their probabilities again in the backward pass: memory then grows with N, not with N * M.
KEEP_BELOW = 256


def blocked_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`softmax(q k' / sqrt(d)) v` over `[B, N, H, d]` -> `[B, N, H, d]`; keys and values may have another length M.

    Gradients of gradients (`create_graph`), torch.func and forward-mode derivatives go through explicit attention.
    """
    batch, _, heads, _ = q.shape
    # As every matrix product under autocast; the operators below, which write into given tensors, would not.
    cast = torch.is_autocast_enabled("cpu") and v.dtype is not torch.float64
    dtype = torch.get_autocast_dtype("cpu") if cast else v.dtype
    rows = [t.transpose(1, 2).flatten(0, 1).to(dtype).contiguous() for t in (q, k, v)]  # [B * H, N, d]
    out = _explicit(*rows) if _transformed() else _Blocked.apply(*rows)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, heads)).transpose(1, 2)


class _Blocked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty(*q.shape[:2], v.shape[2])
        length = k.shape[1]
        kept = q.new_empty(len(q), q.shape[1], length) if length < KEEP_BELOW and any(ctx.needs_input_grad) else None
        for part in _blocks(q, k):
            weights = _weights(q[part], k[part])
            if kept is not None:
                kept[part] = weights
            torch.bmm(weights, v[part], out=out[part])
        ctx.save_for_backward(q, k, v, kept)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, kept = ctx.saved_tensors
        grad = grads[0].to(v.dtype).contiguous()
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # the gradient is to be differentiated itself
            return _explicit_gradients(q, k, v, grad)
        grad_q, grad_k, grad_v = (torch.empty_like(t) for t in (q, k, v))
        scale = 1 / math.sqrt(q.shape[-1])
        for part in _blocks(q, k):
            weights = _weights(q[part], k[part]) if kept is None else kept[part]
            torch.bmm(weights.mT, grad[part], out=grad_v[part])
            grad_logits = torch.bmm(grad[part], v[part].mT)
            grad_logits = torch._softmax_backward_data(grad_logits, weights, -1, weights.dtype)
            torch.baddbmm(grad_q[part], grad_logits, k[part], beta=0, alpha=scale, out=grad_q[part])
            torch.baddbmm(grad_k[part], grad_logits.mT, q[part], beta=0, alpha=scale, out=grad_k[part])
        return grad_q, grad_k, grad_v


def _transformed() -> bool:
    """Whether this is traced by torch.func or for forward-mode derivatives, which take no function of our own."""
    if torch.compiler.is_compiling():
        return False
    functional = getattr(torch._C, "_are_functorch_transforms_active", None)
    return torch.autograd.forward_ad._current_level >= 0 or (functional is not None and functional())


def _explicit(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same `[b, N, d]` by operators that can be differentiated in any way."""
    return (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1) @ v


def _explicit_gradients(q: Tensor, k: Tensor, v: Tensor, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `_explicit` by operators that can be differentiated again; no weights are kept for it."""
    scale = 1 / math.sqrt(q.shape[-1])
    weights = (q @ k.mT * scale).softmax(-1)
    grad_weights = grad @ v.mT
    grad_logits = weights * (grad_weights - (grad_weights * weights).sum(-1, keepdim=True)) * scale
    return grad_logits @ k, grad_logits.mT @ q, weights.mT @ grad


def _weights(q: Tensor, k: Tensor) -> Tensor:
    """Attention weights `[b, N, M]` of a block of heads."""
    logits = torch.baddbmm(q.new_empty(1), q, k.mT, beta=0, alpha=1 / math.sqrt(q.shape[-1]))
    return logits.softmax(-1)


def _blocks(q: Tensor, k: Tensor) -> list[slice]:
    threads = torch.get_num_threads()
    step = max(threads, threads * BLOCK // max(1, q.shape[1] * k.shape[1]))
    return [slice(start, start + step) for start in range(0, len(q), step)]
