"""LatentMIM's decoder and what it is made of."""

import pytest
import torch
from torch import nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.attention import CrossAttention, set_backend
from xscale_lightning.models.cross_decoder import CrossDecoder
from xscale_lightning.models.pos_embed import StretchedPositions, sincos_2d
from xscale_lightning.models.tokens import Tokens


def test_cross_attention_is_torchs():
    torch.manual_seed(0)
    ours, theirs = CrossAttention(12, 3).double(), nn.MultiheadAttention(12, 3, batch_first=True).double()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q_proj.weight, ours.kv_proj.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q_proj.bias, ours.kv_proj.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, context = torch.randn(2, 5, 12, dtype=torch.float64), torch.randn(2, 7, 12, dtype=torch.float64)
    expected = theirs(x, context, context, need_weights=False)[0]
    for backend in ("math", "sdpa"):
        set_backend(ours, backend)
        assert ours.backend == backend
        torch.testing.assert_close(ours(x, context), expected, rtol=1e-12, atol=1e-12)


def test_stretched_positions_reach_from_0_to_n():
    like = torch.zeros(1, dtype=torch.float64)
    got = StretchedPositions(8)((1, 3, 5), like)
    rows, columns = (torch.linspace(0, n, n, dtype=torch.float64) for n in (3, 5))
    torch.testing.assert_close(got[0], sincos_2d(8, rows, columns), rtol=0, atol=1e-7)
    assert torch.equal(StretchedPositions(8)((1, 1), like)[0, 0, :2], like.new_zeros(2))  # one token is at 0


def decoder(**options):
    torch.manual_seed(0)
    made = CrossDecoder(10, 6, 8, 1, 2, **options).double()
    for p in made.parameters():
        nn.init.normal_(p, std=0.3)
    return made


def tokens(prefix=1, grid=(1, 3, 4)):
    generator = torch.Generator().manual_seed(1)
    order = torch.rand(2, 12, generator=generator).argsort(1)
    x = torch.randn(2, prefix + 4, 10, generator=generator, dtype=torch.float64)
    return Tokens(x, grid, order[:, :4], prefix), order[:, 4:]


def test_predictions_follow_their_places():
    module, (seen, hidden) = decoder(), tokens()
    out = module(seen, hidden)
    assert out.shape == (2, 8, 6) and module.decode(seen, hidden).shape == (2, 9, 6)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(
        module(seen, hidden[:, order]), out[:, order]
    )  # queries know their places, not their order
    turn = torch.tensor([2, 0, 3, 1])
    turned = Tokens(torch.cat([seen.x[:, :1], seen.x[:, 1:][:, turn]], 1), seen.grid, seen.kept[:, turn], 1)
    torch.testing.assert_close(module(turned, hidden), out)
    assert not torch.allclose(module(Tokens(seen.x, (1, 4, 3), seen.kept, 1), hidden), out)  # another grid


def test_a_query_is_the_mean_of_the_visible_tokens_weighted_by_position():
    module, (seen, hidden) = decoder(), tokens()
    queries = []
    module.blocks[0].register_forward_pre_hook(lambda _, args: queries.append(args[0]))
    module(seen, hidden)
    table = module.positions(seen.grid, like=seen.x)[0]
    e = module.embed(seen.x)[:, 1:]
    for b in range(2):
        for m, place in enumerate(hidden[b]):
            scores = torch.tensor([float(table[place] @ table[v]) / 8**0.5 for v in seen.kept[b]]).double().exp()
            expected = module.mask_token[0, 0] + (scores / scores.sum()) @ e[b] + table[place]
            torch.testing.assert_close(queries[0][b, 1 + m], expected)


def test_without_class_token_and_what_is_refused():
    module, (seen, hidden) = decoder(class_token=False), tokens(prefix=0)
    assert module(seen, hidden).shape == (2, 8, 6) and module.cls_token is None
    with pytest.raises(UserError, match="decoder width 8 is not divisible by its 3 heads"):
        CrossDecoder(10, 6, 8, 1, 3)
    with pytest.raises(UserError, match="must be at least 1, got 8, 0 and 2"):
        CrossDecoder(10, 6, 8, 0, 2)
    assert CrossDecoder(10, 6, 8, 1, 2).mask_token.abs().sum() == 0  # as published
