"""What one step of a method hands to the base module and, through it, to the callbacks."""

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Reconstruction:
    """Pixels a method has put back, in normalised units.

    Attributes:
        target: images `[B, C, H, W]`.
        prediction: images `[B, C, H, W]`; only hidden pixels need to be meaningful.
        visible: booleans `[B, C, H, W]`, true where the encoder saw the pixel.
        borrows: the prediction uses statistics of the hidden pixels (a target normalised per patch), so it makes a
            picture but no fair figure.
    """

    target: Tensor
    prediction: Tensor
    visible: Tensor
    borrows: bool = False


@dataclass
class StepOutput:
    """Result of `SSLModule.step`.

    Attributes:
        loss: scalar to minimise.
        logs: loss terms and other scalars `{name: tensor}`, logged as `train/<name>`.
        reconstruction: makes the pictures when a callback asks for them; None for methods without pixels.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    reconstruction: Callable[[], Reconstruction] | None = None
