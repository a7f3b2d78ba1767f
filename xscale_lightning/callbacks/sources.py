"""Where probes take their images from."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.utils.data import DataLoader

from xscale_lightning.callbacks.probe import evaluation_split
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.errors import UserError


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


def open_probe_data(
    trainer: Trainer, pl_module: LightningModule, data: XScaleDataModule, stage: str, owner: str
) -> None:
    """Make a probe's own data ready, once on every process; the training data is the Trainer's to open.

    Args:
        trainer: of the run.
        pl_module: the model.
        data: what the probe evaluates on.
        stage: that of the callback's `setup`.
        owner: class name of the probe, for messages.

    Raises:
        UserError: if its bands are not the model's.
    """
    if data is not getattr(trainer, "datamodule", None):
        if trainer.local_rank == 0:
            data.prepare_data()
        trainer.strategy.barrier(owner)
        data.setup("fit")
        if stage == "test":
            data.setup("test")
    difference = pl_module.bands.difference(data.bands)  # type: ignore[operator, union-attr]
    if difference:
        raise UserError(
            f"{owner}.data: the bands of {data.name} are not the model's ({difference}); "
            f"choose the same ones with {owner}.data.bands."
        )


def patch_size(pl_module: LightningModule) -> int:
    """Pixels per side of a patch; 1 for models that know none."""
    return getattr(getattr(pl_module, "backbone", None), "patch_size", 1)


def asks_unasked(trainer: Trainer, pl_module: LightningModule) -> bool:
    """Whether the labels and masks of the run's own data are probed by default: in `validate` and `test` of a method.

    What a task has fine-tuned is judged by the task's own head.
    """
    fitting = trainer.state.fn == TrainerFn.FITTING
    return not fitting and "knn" not in getattr(pl_module, "without_callbacks", ())
