"""Loss terms as pure functions; each is tested alone against a closed form."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError


def normalize_patches(patches: Tensor, eps: float = 1e-6) -> Tensor:
    """Standardise the values of every patch `[..., V]` by its own mean and unbiased variance.

    Source: He et al. 2022, section 3, "reconstruction target"; eps 1e-6 as published.
    """
    mean = patches.mean(-1, keepdim=True)
    var = patches.var(-1, keepdim=True)
    return (patches - mean) / (var + eps).sqrt()


def patch_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error over values, patches and images of `[B, M, V]`, computed in float32 or better.

    Source: He et al. 2022, section 3: the loss is taken on the hidden patches only, so only those are passed in.
    """
    return (at_least_float32(prediction) - at_least_float32(target)).square().mean()


def nt_xent(
    a: Tensor,
    b: Tensor,
    temperature: float = 0.5,
    positive_in_denominator: bool = False,
    keys: Tensor | None = None,
    first: int = 0,
) -> Tensor:
    """Contrastive loss between two views `a, b [B, D]` of the same B images, in float32 or better.

    With z the 2B normalised rows of `[a; b]`, s_ik = <z_i, z_k> / temperature and p(i) the other view of row i:

        L = 1 / 2B  sum_i  log(sum_{k not i, p(i)} exp s_ik + 1e-8) - s_i,p(i)

    Args:
        a: features of the first view.
        b: features of the second view.
        temperature: divides the cosine.
        positive_in_denominator: let k run over p(i), too, which is NT-Xent (Chen et al. 2020, SimCLR, equation 1);
            without it the positive does not push itself away (Yeh et al. 2022, decoupled contrastive learning).
        keys: rows `[K, D]` that serve as negatives, `[a; b]` of this process among them; None takes `[a; b]` alone.
        first: row of `keys` at which `[a; b]` of this process begins.

    Source: Tang et al. 2023 (Cross-Scale MAE), published code: decoupled, temperature 0.5, and the 1e-8.

    Raises:
        UserError: fewer than two images, so there are no negatives; a temperature that is not positive.
    """
    count = len(a)
    if count < 2 and (keys is None or len(keys) < 4):
        raise UserError(f"the contrastive loss needs at least 2 images per process, got {count}: raise the batch size.")
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}.")
    with torch.autocast(a.device.type, enabled=False):
        rows = F.normalize(at_least_float32(torch.cat([a, b])), dim=-1)  # [2B, D]
        columns = rows if keys is None else F.normalize(at_least_float32(keys), dim=-1)
        similarity = rows @ columns.T / temperature  # [2B, K]
        own = torch.arange(2 * count, device=a.device)
        positive = similarity.gather(1, first + own.roll(count)[:, None])  # [2B, 1]
        left_out = first + (own if positive_in_denominator else torch.stack([own, own.roll(count)]))
        similarity = similarity.scatter(1, left_out.reshape(-1, 2 * count).T, -torch.inf)
        floor = similarity.new_full((), math.log(1e-8))
        return (torch.logaddexp(similarity.logsumexp(1), floor) - positive.squeeze(1)).mean()


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype.itemsize > 4 else x.float()
