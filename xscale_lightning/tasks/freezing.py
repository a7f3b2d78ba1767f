"""Which part of an encoder is trained."""

from typing import Literal

from xscale_lightning.errors import UserError
from xscale_lightning.models.vit import Encoder

Tune = Literal["full", "last_k", "frozen"]


def freeze(encoder: Encoder, tune: Tune, last_k: int) -> None:
    """Leave parameters without gradients: none of them (`full`), all (`frozen`), or all before the last blocks.

    Raises:
        UserError: more blocks than there are, or none.
    """
    if last_k < 1 or (tune == "last_k" and last_k > encoder.depth):
        raise UserError(f"model.last_k must be in [1, {encoder.depth}] for this encoder, got {last_k}.")
    first = {"full": 0, "last_k": encoder.depth + 1 - last_k, "frozen": encoder.depth + 2}[tune]
    for name, parameter in encoder.named_parameters():
        if encoder.layer_index(name) < first:
            parameter.requires_grad_(False)


def quieten(encoder: Encoder, tune: Tune) -> None:
    """Put the frozen parts into evaluation mode, so that they have no stochastic depth."""
    if tune == "frozen":
        encoder.eval()
    elif tune == "last_k":
        for part in encoder.modules():
            parameters = list(part.parameters())
            if parameters and not any(parameter.requires_grad for parameter in parameters):
                part.eval()
