"""Loss terms as pure functions; each is tested alone against a closed form."""

from torch import Tensor


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
    dtype = target.dtype if target.dtype.itemsize > 4 else None
    difference = prediction.to(dtype or target.float().dtype) - target.to(dtype or target.float().dtype)
    return difference.square().mean()
