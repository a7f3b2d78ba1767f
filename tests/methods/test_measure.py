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


def test_counting_leaves_the_parameters_of_a_module_registered_twice() -> None:
    method = MAE(bands=generic(4), backbone=BackboneConfig("vit_tiny_patch8", depth=1))
    method.twice = torch.nn.ModuleDict({"again": method.backbone})
    before = dict(method.named_parameters(remove_duplicate=False))
    count_flops(method, {"image": torch.zeros(2, 4, 32, 32), "gsd": torch.ones(2)})
    after = dict(method.named_parameters(remove_duplicate=False))
    assert all(after[name] is p for name, p in before.items())
