"""What probes on labelled data share: where the data comes from, and that its labels are classes."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from xscale_lightning.callbacks.features import SplitFeatures, forget_features, split_features
from xscale_lightning.callbacks.probe import Measurement, ProbeCallback
from xscale_lightning.callbacks.sources import open_probe_data
from xscale_lightning.data.datamodule import Split, XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import Estimate
from xscale_lightning.evaluation.scores import absent_labels, check_labels

BASE_LINE = "band statistics"  # mean and deviation of every band, in the place of features


class LabelledProbe(ProbeCallback):
    """A probe that compares features with labels.

    Args:
        data: labelled data to probe with; null takes the data of the run if it has labels.
        max_train: at most so many training samples (a fixed random part); null takes all.
        max_test: at most so many samples to ask about; null takes all.
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.
    """

    def __init__(
        self, data: XScaleDataModule | None, max_train: int | None, max_test: int | None, every_n_epochs: int
    ) -> None:
        super().__init__(every_n_epochs)
        if max_test is not None and max_test < 1:
            raise UserError(f"{self.owner}.max_test: {max_test} is not possible; give at least 1, or null.")
        self.data = data
        self.max_train, self.max_test = max_train, max_test
        self._probe_data: XScaleDataModule | None = None
        self._said: set[str] = set()

    @property
    def owner(self) -> str:
        """Name for messages."""
        return type(self).__name__

    def choose(self, trainer: Trainer, pl_module: LightningModule) -> XScaleDataModule | None:
        """The data to probe with in this command; None leaves the probe out."""
        return self.data or labelled_data(trainer)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the data and compare its bands with the model's, before the first step."""
        self._probe_data = data = self.choose(trainer, pl_module)
        if data is None:
            return
        open_probe_data(trainer, pl_module, data, stage, self.owner)
        if data.num_classes is None:
            raise UserError(
                f"{self.owner}.data: {data.name} has no labels; give labelled data or leave the callback out."
            )

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Free the features."""
        forget_features(trainer)

    def split(
        self, trainer: Trainer, pl_module: LightningModule, split: Split, shares: Sequence[float] = (1.0,)
    ) -> SplitFeatures:
        """Features and checked labels of a split of the data.

        Raises:
            UserError: no labels, or labels that are no class.
        """
        data = self._probe_data
        assert data is not None and data.num_classes is not None
        limit = self.max_train if split == "train" else self.max_test
        found = split_features(trainer, pl_module, data, split, limit, shares)
        check_labels(found.labels, data.num_classes, data.multilabel, f"the {split} split of {data.name}")
        name = "max_train" if split == "train" else "max_test"
        if trainer.state.fn != TrainerFn.FITTING and found.total is not None and len(found.labels) < found.total:
            count = f"{len(found.labels)} of {found.total} samples"
            self.say(f"{count} of the {split} split of {data.name}; {name} null takes all.")
        if split == "train":
            absent = absent_labels(found.labels, data.num_classes)
            names = label_names(data)
            listed = ", ".join(f"'{names[number]}'" for number in absent)
            if absent and listed not in self._said:
                self._said.add(listed)
                rank_zero_warn(
                    f"{self.owner}: none of the {len(found.labels)} training samples of {data.name} is of class "
                    f"{listed}; it cannot be learned."
                )
        return found

    def say(self, text: str) -> None:
        """Print a line once."""
        if text not in self._said:
            self._said.add(text)
            rank_zero_info(f"{self.owner}: {text}")


def labelled_data(trainer: Trainer) -> XScaleDataModule | None:
    """The data of the run, if it has labels."""
    data: XScaleDataModule | None = getattr(trainer, "datamodule", None)
    return data if getattr(data, "num_classes", None) is not None else None


def label_names(data: XScaleDataModule) -> list[str]:
    """Names of the classes as far as the data set says them (`classes`, as TorchGeo's do), else their numbers."""
    source: Any = data.dataset("train")
    while source is not None:
        for names in (getattr(source, "classes", None), getattr(source, "names", None)):
            if isinstance(names, (list, tuple)) and len(names) == data.num_classes:
                return [str(name) for name in names]
        source = getattr(source, "dataset", None) or getattr(source, "source", None)
    return [str(number) for number in range(data.num_classes or 0)]


def measured(
    found: Mapping[str, Estimate],
    split: str,
    base_lines: Mapping[str, Mapping[str, float]],
    protocols: Mapping[str, Mapping[str, Any]],
) -> Measurement:
    """Scores by log name as a measurement."""
    return Measurement(
        {name: estimate.value for name, estimate in found.items()},
        split,
        base_lines,
        {name: estimate.error for name, estimate in found.items()},
        {name: estimate.interval for name, estimate in found.items() if estimate.interval is not None},
        protocols,
    )
