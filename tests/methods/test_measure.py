"""Floating-point operations are counted whatever the modules return."""

import torch

from xscale_lightning.data.bands import generic
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.measure import count_flops
from xscale_lightning.models.registry import BackboneConfig


def test_learned_tables_do_not_stop_the_counter():
    """A learned table of the right size is returned as the parameter that it is."""
    counts, sample = {}, {"image": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))}
    for position in ("sincos", "learned"):
        backbone = BackboneConfig("vit_tiny_patch8", depth=1, dim=16, num_heads=2, position=position, image_size=32)
        method = MAE(bands=generic(3), backbone=backbone, decoder_dim=16, decoder_depth=1, decoder_heads=2)
        before = {name: value.clone() for name, value in method.state_dict().items()}
        counts[position] = count_flops(method, sample)
        assert all(p.grad is None for p in method.parameters())
        assert all(torch.equal(value, before[name]) for name, value in method.state_dict().items())
    assert counts["learned"] == counts["sincos"] > 0
