"""Position tables of another size: learned tables are the only weights whose shape follows the imagery."""

from collections.abc import Callable, Iterator, Mapping
from typing import Literal

from torch import Tensor, nn

from xscale_lightning.models.pos_embed import LearnedPositions
from xscale_lightning.models.spectral_positions import LearnedSpectral

Tables = Literal["resize", "reinit"]


def fit_tables(
    module: nn.Module, state: Mapping[str, Tensor], tables: Tables = "resize"
) -> tuple[dict[str, Tensor], list[str]]:
    """A state dict whose learned position tables have the sizes that `module` needs, and the names that were changed.

    Args:
        module: what the state dict is for; it is not changed.
        state: weights by name; tables of another size are found by their name.
        tables: `resize` interpolates them; `reinit` puts the values that `module` has now in their place, which is what
            the published code does on a change of image size.

    Raises:
        UserError: a table cannot be resized.
    """
    fitted, changed = dict(state), []
    for name, table, adapt in _tables(module):
        if name in fitted and fitted[name].shape != table.shape and fitted[name].shape[-1] == table.shape[-1]:
            fitted[name] = adapt(fitted[name]) if tables == "resize" else table.detach().clone()
            changed.append(name)
    return fitted, changed


def _tables(module: nn.Module) -> Iterator[tuple[str, Tensor, Callable[[Tensor], Tensor]]]:
    for prefix, part in module.named_modules():
        if isinstance(part, (LearnedPositions, LearnedSpectral)):
            yield f"{prefix}.table".removeprefix("."), part.table, part.adapt
