"""All attention backends that can run agree, packed and not, in forward and gradient."""

import pytest
import torch
from timm.layers import Attention as TimmAttention

from xscale_lightning.models import blocked_attention
from xscale_lightning.models.attention import Attention, attend, available_backends, choose_backend, set_backend
from xscale_lightning.models.blocks import Block

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BACKENDS = [(d, b) for d in DEVICES for b in available_backends(torch.device(d))]
# Largest difference to the float64 result, per type of the inputs.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 5e-2}


def reference(q, k, v, seqlens=None, kv_seqlens=None):
    """Softmax attention written out, one sequence at a time."""
    seqlens, kv_seqlens = seqlens or (q.shape[1],), kv_seqlens or seqlens or (k.shape[1],)
    rows = []
    for qs, ks, vs in zip(q.split(seqlens, 1), k.split(kv_seqlens, 1), v.split(kv_seqlens, 1), strict=True):
        weights = torch.einsum("bnhd,bmhd->bhnm", qs, ks).div(q.shape[-1] ** 0.5).softmax(-1)
        rows.append(torch.einsum("bhnm,bmhd->bnhd", weights, vs))
    return torch.cat(rows, 1)


def run(function, inputs):
    """Output and the gradients of a non-uniform sum."""
    inputs = [t.clone().requires_grad_() for t in inputs]
    out = function(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).reshape(out.shape)
    (out * weights.to(out.dtype)).sum().backward()
    return [out.detach().double(), *(t.grad.double() for t in inputs)]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("seqlens", [None, (5, 5, 5), (1, 7, 4, 3)])
def test_backends_agree_with_the_formula(device, backend, dtype, seqlens):
    if backend == "xformers" and dtype is torch.float64:
        pytest.skip("xFormers has no float64 kernel")
    torch.manual_seed(0)
    batch = 2 if seqlens is None else 1
    inputs = [torch.randn(batch, 15, 3, 16, dtype=torch.float64, device=device).to(dtype) for _ in range(3)]
    ours = run(lambda q, k, v: attend(q, k, v, seqlens, backend=backend), inputs)
    expected = run(lambda q, k, v: reference(q, k, v, seqlens), [t.double() for t in inputs])
    for got, want in zip(ours, expected, strict=True):
        assert (got - want).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize(("device", "backend"), BACKENDS)
def test_cross_attention_between_packed_sequences(device, backend):
    torch.manual_seed(0)
    dtype = torch.float32
    q = torch.randn(1, 6, 2, 16, dtype=dtype, device=device)
    k, v = torch.randn(2, 1, 9, 2, 16, dtype=dtype, device=device)
    ours = run(lambda q, k, v: attend(q, k, v, (2, 4), (6, 3), backend), [q, k, v])
    expected = run(lambda q, k, v: reference(q, k, v, (2, 4), (6, 3)), [t.double() for t in (q, k, v)])
    for got, want in zip(ours, expected, strict=True):
        assert (got - want).abs().max() < TOLERANCE[dtype]


@pytest.mark.parametrize("backend", available_backends(torch.device("cpu")))
def test_float32_tensors_under_autocast(backend):
    torch.manual_seed(0)
    inputs = [torch.randn(2, 15, 3, 16) for _ in range(3)]
    with torch.autocast("cpu", torch.bfloat16):
        assert attend(*inputs, backend=backend).dtype is torch.bfloat16
        ours = run(lambda q, k, v: attend(q, k, v, backend=backend), inputs)
    expected = run(reference, [t.double() for t in inputs])
    for got, want in zip(ours, expected, strict=True):
        assert (got - want).abs().max() < TOLERANCE[torch.bfloat16]


def test_packed_lengths_must_fit():
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match="lengths that sum"):
        attend(q, q, q, (3, 2))


def test_choice_follows_device_type_and_length():
    cpu = torch.device("cpu")
    assert choose_backend(cpu, torch.bfloat16)[0] == "blocked"
    assert choose_backend(cpu, torch.float32)[0] == choose_backend(cpu, torch.float64)[0] == "sdpa"


@pytest.mark.parametrize("keep_below", [0, 100])
@pytest.mark.parametrize("block", [1, 40, 10_000])
def test_blocks_of_any_size_give_the_same(monkeypatch, keep_below, block):
    monkeypatch.setattr(blocked_attention, "BLOCK", block)
    monkeypatch.setattr(blocked_attention, "KEEP_BELOW", keep_below)
    torch.manual_seed(0)
    q = torch.randn(3, 5, 4, 8, dtype=torch.float64)
    k, v = torch.randn(2, 3, 9, 4, 8, dtype=torch.float64)
    ours = run(blocked_attention.blocked_attention, [q, k, v])
    for got, want in zip(ours, run(reference, [q, k, v]), strict=True):
        assert (got - want).abs().max() < 1e-13


def test_blocked_keeps_nothing_of_the_size_of_the_logits_for_long_sequences():
    length = blocked_attention.KEEP_BELOW
    inputs = [torch.randn(1, length, 2, 8, requires_grad=True) for _ in range(3)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        attend(*inputs, backend="blocked")
    assert max(saved) == length * 2 * 8


@pytest.mark.parametrize("backend", ["math", "sdpa", "blocked"])
def test_layer_equals_timms(backend):
    torch.manual_seed(0)
    timms = TimmAttention(24, 3, qkv_bias=True).double()
    ours = Attention.adopt(timms)
    assert list(ours.state_dict()) == list(timms.state_dict())
    set_backend(ours, backend)
    x = torch.randn(2, 5, 24, dtype=torch.float64)
    assert (ours(x) - timms(x)).abs().max() < 1e-12


def test_packed_block_equals_separate_blocks():
    torch.manual_seed(0)
    block = Block(24, 3).double()
    a, b = torch.randn(1, 4, 24).double(), torch.randn(1, 7, 24).double()
    packed = block(torch.cat([a, b], 1), seqlens=(4, 7))
    assert (packed - torch.cat([block(a), block(b)], 1)).abs().max() < 1e-12


def _penalty(backend: str):
    """Gradient of a gradient's size, as penalties and Hessians have it."""
    torch.manual_seed(0)
    inputs = [torch.randn(2, length, 3, 4, dtype=torch.float64, requires_grad=True) for length in (5, 7, 7)]
    out = attend(*inputs, backend=backend).sin().sum()
    first = torch.autograd.grad(out, inputs, create_graph=True)
    return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), inputs)]


def test_gradients_of_gradients_go_through_the_blocks():
    for ours, theirs in zip(_penalty("blocked"), _penalty("math"), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_torch_func_and_forward_mode_go_through_the_blocks():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 5, 3, 4, dtype=torch.float64) for _ in range(3))

    def loss(backend: str):
        return lambda q: attend(q, k, v, backend=backend).sin().sum()

    for make in (torch.func.grad, torch.func.hessian):
        torch.testing.assert_close(make(loss("blocked"))(q), make(loss("math"))(q))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(q, torch.ones_like(q))
        found = torch.autograd.forward_ad.unpack_dual(loss("blocked")(dual)).tangent
    torch.testing.assert_close(found, torch.func.grad(loss("math"))(q).sum())
