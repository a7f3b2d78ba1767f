"""Where unlabelled probes take their images from."""

from typing import Any

from lightning.pytorch import Trainer
from torch.utils.data import DataLoader

from xscale_lightning.callbacks.probe import evaluation_split


def held_out_loader(trainer: Trainer) -> DataLoader[Any] | None:
    """Fresh loader of the held-out split (validation, in `test` the test split), None if there is none.

    It comes from the data module, or from the loaders given to the Trainer; with several the first one counts. The
    Trainer's own, distributed loader is not used: the first process shall see the whole split.
    """
    name = f"{evaluation_split(trainer)}_dataloader"
    data = getattr(trainer, "datamodule", None)
    loaders: Any = getattr(data, name)() if data is not None else getattr(trainer, f"{name}s", None)
    while isinstance(loaders, (list, tuple)):
        loaders = loaders[0] if loaders else None
    return loaders if isinstance(loaders, DataLoader) else None
