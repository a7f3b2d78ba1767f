"""Loss terms as pure functions; each is tested alone against a closed form."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from xscale_lightning.errors import UserError


def normalize_patches(patches: Tensor, eps: float = 1e-6, real: Tensor | None = None) -> Tensor:
    """Standardise the values of every patch `[..., V]` by its own mean and unbiased variance.

    Args:
        patches: values.
        eps: added to the variance; 1e-6 as published.
        real: booleans `[..., V]`, false where a value is padding and takes no part; None: all are real.

    Source: He et al. 2022, section 3, "reconstruction target".
    """
    mean, deviation = patch_statistics(patches, eps, real)
    return (patches - mean) / deviation


def patch_statistics(patches: Tensor, eps: float = 1e-6, real: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean and `sqrt(variance + eps)` of every patch, each `[..., 1]`; see `normalize_patches`."""
    if real is None:
        return patches.mean(-1, keepdim=True), (patches.var(-1, keepdim=True) + eps).sqrt()
    count = real.sum(-1, keepdim=True)
    mean = (patches * real).sum(-1, keepdim=True) / count
    var = ((patches - mean).square() * real).sum(-1, keepdim=True) / (count - 1)
    return mean, (var + eps).sqrt()


def patch_mse(prediction: Tensor, target: Tensor, real: Tensor | None = None) -> Tensor:
    """Mean squared error over values, patches and images of `[B, M, V]`, computed in float32 or better.

    Args:
        prediction: of the hidden patches only: the loss is taken on them alone.
        target: what they are.
        real: booleans `[B, M, V]`, false where a value is padding; the mean of a patch is then over its real values.

    Source: He et al. 2022, section 3.
    """
    squared = (at_least_float32(prediction) - at_least_float32(target)).square()
    return squared.mean() if real is None else ((squared * real).sum(-1) / real.sum(-1)).mean()


def spectral_sum(prediction: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of the sum over the spectral groups of `[B, G, N, V]`, in float32 or better.

    Bands at the same place inside their cubes are added over the groups; visible tokens count, too.

    Source: Hong et al. 2024 (SpectralGPT), published code: its second loss.
    """
    return (at_least_float32(prediction) - at_least_float32(target)).sum(1).square().mean()


def spectral_means(prediction: Tensor, target: Tensor) -> Tensor:
    """Half the squared error of the mean over groups, half that of the mean over places, of `[B, G, N, V]`.

    Source: SpectralGPT as its code stood on 2023-09-14, known from byte-code only.
    """
    difference = at_least_float32(prediction) - at_least_float32(target)
    return 0.5 * difference.mean(1).square().mean() + 0.5 * difference.mean(2).square().mean()


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


def patch_discrimination(
    prediction: Tensor,
    target: Tensor,
    temperature: float = 0.2,
    standardize: bool = True,
    negatives: Literal["image", "batch"] = "image",
) -> Tensor:
    """Which target belongs to which prediction? Contrastive loss among the tokens of an image, in float32 or better.

    With u the normalised predictions and v the normalised targets, `[B, M, D]`, and i, j tokens of one image:

        L = 2 tau mean_i ( -log  exp(<u_i, v_i> / tau) / sum_j exp(<u_i, v_j> / tau) )

    Args:
        prediction: of the hidden tokens.
        target: what they are; gets no gradient here only if it has none.
        temperature: tau.
        standardize: first bring every feature of the predictions to mean 0 and deviation 1 over the tokens of the image
            (unbiased, 1e-4 added to the deviation), as published; Galileo and OlmoEarth do without.
        negatives: j runs over the tokens of the same `image`, or over those of the whole `batch` (Galileo's AllDisc).

    Source: Wei et al. 2024 (LatentMIM), "patch discrimination", published code: factor 2 tau, 1e-4, temperature 0.2.

    Raises:
        UserError: fewer than two tokens per image, so there are no negatives; a temperature that is not positive.
    """
    if prediction.shape[1] < 2:
        raise UserError(
            f"patch discrimination needs at least 2 hidden tokens per image, got {prediction.shape[1]}: "
            "hide more of them, or take larger images."
        )
    if not temperature > 0:
        raise UserError(f"temperature must be above 0, got {temperature}.")
    with torch.autocast(prediction.device.type, enabled=False):
        u, v = at_least_float32(prediction), at_least_float32(target)
        if standardize:
            u = (u - u.mean(1, keepdim=True)) / (u.std(1, keepdim=True) + 1e-4)
        if negatives == "batch":
            u, v = u.flatten(0, 1).unsqueeze(0), v.flatten(0, 1).unsqueeze(0)  # [1, B * M, D]
        logits = F.normalize(u, dim=-1) @ F.normalize(v, dim=-1).transpose(1, 2) / temperature  # [B, M, M]
        right = logits.diagonal(dim1=1, dim2=2)  # [B, M]
        return 2 * temperature * (logits.logsumexp(2) - right).mean()


def mean_similarity(tokens: Tensor) -> Tensor:
    """Mean cosine over all pairs of tokens of one image, a token with itself too, of `[B, N, D]`; a scalar.

    The mean over pairs is the squared length of the mean direction, so no `[N, N]` matrix is made.

    Source: Wei et al. 2024 (LatentMIM), whose similarity constraint holds it near a value that falls.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        return F.normalize(at_least_float32(tokens), dim=-1).mean(1).square().sum(-1).mean()


def affinity_gram(student: Tensor, teacher: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Mean squared difference of the cosines between all pairs of tokens of an image, of `[B, N, D]` each.

    With s and t the normalised tokens: mean over b, i, j of (<s_i, s_j> - <t_i, t_j>)^2, the diagonal included, in
    float32 or better. The teacher's width may be another. With `lengths`, image b has so many tokens and zeros after
    them, and the mean is over images of the mean over its pairs.

    Source: Waithaka et al. 2026 (spatial affinity); Simeoni et al. 2025 (DINOv3), Gram anchoring.
    """
    with torch.autocast(student.device.type, enabled=False):
        s, t = (affinity(x) for x in (student, teacher))
        return _mean_of_real((s - t).square(), lengths, 2)


def affinity(tokens: Tensor) -> Tensor:
    """Cosines between all pairs of tokens of an image `[B, N, D]` -> `[B, N, N]`, in float32 or better."""
    with torch.autocast(tokens.device.type, enabled=False):
        unit = F.normalize(at_least_float32(tokens), dim=-1)
        return unit @ unit.transpose(1, 2)


def affinity_features(student: Tensor, teacher: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Mean squared difference of the normalised tokens `[B, N, D]`: the ablation of `affinity_gram`."""
    with torch.autocast(student.device.type, enabled=False):
        s, t = (F.normalize(at_least_float32(x), dim=-1) for x in (student, teacher))
        return _mean_of_real((s - t).square().mean(-1), lengths, 1)


def off_diagonal_affinity(tokens: Tensor, lengths: Sequence[int] | None = None) -> Tensor:
    """Mean cosine between different tokens of an image `[B, N, D]`; 1 where all of them are equal (collapse).

    Arguments as in `affinity_gram`. From the length of the sum of the unit tokens, so no `[N, N]` matrix is made.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        total = F.normalize(at_least_float32(tokens), dim=-1).sum(1).square().sum(-1)  # [B]: all pairs
        count = total.new_tensor([tokens.shape[1]] if lengths is None else lengths)
        return ((total - count) / (count * (count - 1)).clamp(min=1)).mean()


def _mean_of_real(values: Tensor, lengths: Sequence[int] | None, power: int) -> Tensor:
    """Mean over images of the mean of `values [B, ...]`, of which `length ** power` are real and the others 0."""
    if lengths is None:
        return values.mean()
    return (values.flatten(1).sum(1) / values.new_tensor(lengths).pow(power)).mean()


def at_least_float32(x: Tensor) -> Tensor:
    """`x` in float32, or as it is in float64."""
    return x if x.dtype.itemsize > 4 else x.float()
