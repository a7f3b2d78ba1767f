"""What `gpu.py` checks: attention backends against float64, and that every method trains. Runs on a CPU, too."""

import dataclasses
from collections.abc import Callable
from functools import partial

import torch
from ours import Ours
from sizes import METHODS, SIZES
from torch import Tensor

from xscale_lightning.models.attention import attend, available_backends

# Largest allowed distance to float64, relative to the largest value, per type of the inputs.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
CASES = {"plain": None, "packed equal": (64, 64, 64), "packed unequal": (7, 64, 1, 120)}
Rows = list[list[str]]


def attention_reference(q: Tensor, k: Tensor, v: Tensor, seqlens: tuple[int, ...] | None = None) -> Tensor:
    """Softmax attention written out in the inputs' type, one sequence at a time."""
    lengths = seqlens or (q.shape[1],)
    rows = []
    for a, b, c in zip(q.split(lengths, 1), k.split(lengths, 1), v.split(lengths, 1), strict=True):
        weights = torch.einsum("bnhd,bmhd->bhnm", a, b).div(q.shape[-1] ** 0.5).softmax(-1)
        rows.append(torch.einsum("bhnm,bmhd->bnhd", weights, c))
    return torch.cat(rows, 1)


def flash_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA with nothing but its flash kernel; raises where it has none for these inputs."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = torch.nn.functional.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)))
    return out.transpose(1, 2)


def padded_attention(q: Tensor, k: Tensor, v: Tensor, seqlens: tuple[int, ...]) -> Tensor:
    """What packing replaces: every sequence padded to the longest, SDPA with a mask."""
    lengths = torch.tensor(seqlens, device=q.device)[:, None]  # [S, 1]
    place = torch.arange(max(seqlens), device=q.device)
    real = place < lengths  # [S, L]
    index = (lengths.cumsum(0) - lengths + place).clamp(max=q.shape[1] - 1)
    wide = [t[0][index].transpose(1, 2) for t in (q, k, v)]  # [S, H, L, d]; what is not real takes no part
    out = torch.nn.functional.scaled_dot_product_attention(*wide, attn_mask=real[:, None, None])
    return out.transpose(1, 2)[real].unsqueeze(0)


def forward_and_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Output and gradients of a weighted sum, in float64."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device=out.device).reshape(out.shape).to(out.dtype)
    gradients = torch.autograd.grad((out * weights).sum(), inputs)
    return [t.detach().double() for t in (out, *gradients)]


def attention_kinds(device: torch.device, dtype: torch.dtype, packed: bool) -> dict[str, Callable[..., Tensor]]:
    """Everything that computes attention here, by name; functions of `(q, k, v)` and, where packed, of `seqlens`."""
    kinds: dict[str, Callable[..., Tensor]] = {
        backend: partial(attend, backend=backend) for backend in available_backends(device)
    }
    if packed:
        kinds["sdpa padded"] = padded_attention
    elif device.type == "cuda" and dtype is torch.bfloat16:
        kinds["sdpa flash"] = flash_attention
    return kinds


def check_attention(device: torch.device) -> Rows:
    """Rows (what, distance, verdict); every backend, type and packing."""
    rows = []
    for dtype, tolerance in TOLERANCE.items():
        for case, seqlens in CASES.items():
            generator = torch.Generator().manual_seed(0)
            shape = (2, 96, 6, 64) if seqlens is None else (1, sum(seqlens), 6, 64)
            inputs = [torch.randn(shape, generator=generator).to(device, dtype) for _ in range(3)]
            doubles = [t.double() for t in inputs]
            exact = forward_and_gradients(partial(attention_reference, seqlens=seqlens), doubles)
            for name, kind in attention_kinds(device, dtype, seqlens is not None).items():
                title = f"{name} {str(dtype)[6:]} {case}"
                try:
                    ours = forward_and_gradients(kind if seqlens is None else partial(kind, seqlens=seqlens), inputs)
                except RuntimeError as error:  # a kernel that this machine does not have is a finding, not a crash
                    rows.append([title, "", f"FAILED ({str(error).splitlines()[0][:80]})"])
                    continue
                worst = max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(ours, exact, strict=True))
                rows.append([title, f"{worst:.1e}", "ok" if worst < tolerance else f"FAILED (limit {tolerance:g})"])
    return rows


def check_methods(device: torch.device, steps: int) -> Rows:
    """Rows (method, first and last loss, verdict) of a short bfloat16 training on one batch and mask."""
    rows = []
    for name in METHODS:
        size = dataclasses.replace(SIZES["quickstart"][name], depth=2, decoder_depth=1, batch=8)
        step = Ours(size, device, torch.bfloat16, augment=False)
        found = []
        for _ in range(steps):
            torch.manual_seed(0)  # the same masks in every step: the loss has to fall
            found.append(step.step())
        losses = torch.stack(found)
        first, last = losses[0].item(), losses[-1].item()
        good = bool(losses.isfinite().all()) and last < first
        rows.append([f"{name} bfloat16", f"{first:.3f} -> {last:.3f}", "ok" if good else "FAILED"])
    return rows
