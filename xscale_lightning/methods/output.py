"""What one step of a method hands to the base module and, through it, to the callbacks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from xscale_lightning.models.tokens import Tokens


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
        student: what the student made of the patches it saw (`Tokens.kept`), one entry per mask; for add-ons that look
            at the tokens of a method, so that nothing is encoded twice.
        encoded: the batch as the method encoded it (`image`, `gsd`, `image_hr`, `gsd_hr`), if it cut the images up.
    """

    loss: Tensor
    logs: dict[str, Tensor] = field(default_factory=dict)
    reconstruction: Callable[[], Reconstruction] | None = None
    student: Sequence[Tokens] = ()
    encoded: dict[str, Any] | None = None
