"""Online kNN: how well do nearest neighbours in feature space share labels?"""

import math

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from xscale_lightning.callbacks.probe import Measurement, ProbeCallback, evaluation_split
from xscale_lightning.callbacks.sampling import extract_features
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.knn import knn_evaluate


class OnlineKNN(ProbeCallback):
    """k-nearest-neighbour accuracy of the features, on any labelled data.

    Logs `knn/<data>/top1`, for multi-label data `knn/<data>/map_micro` and `knn/<data>/map_macro`. Neighbours come from
    the training split; they are asked about the validation split in `fit` and `validate`, the test split in `test`.

    Args:
        data: labelled data to probe with; null takes the training data if it has labels.
        k: number of neighbours.
        temperature: null counts every neighbour once; 0.07 is the weighted vote of DINO.
        max_train: at most so many samples to find neighbours among (a fixed random part); null takes all.
        max_test: at most so many samples to classify; null takes all.
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.

    Raises:
        UserError: if a number is out of range; when the run starts, if the data has no labels, too few samples, or
            other bands than the model.
    """

    def __init__(
        self,
        data: XScaleDataModule | None = None,
        k: int = 5,
        temperature: float | None = None,
        max_train: int | None = 5000,
        max_test: int | None = 2000,
        every_n_epochs: int = 10,
    ) -> None:
        super().__init__(every_n_epochs)
        if k < 1:
            raise UserError(f"OnlineKNN.k: {k} neighbours are not possible; give at least 1.")
        if temperature is not None and temperature <= 0:
            raise UserError(f"OnlineKNN.temperature: {temperature} is not possible; give a number above 0, or null.")
        if max_train is not None and max_train < k:
            raise UserError(f"OnlineKNN.max_train: {max_train} samples are too few for k={k}; give at least {k}.")
        if max_test is not None and max_test < 1:
            raise UserError(f"OnlineKNN.max_test: {max_test} is not possible; give at least 1, or null.")
        self.data = data
        self.k = k
        self.temperature = temperature
        self.max_train = max_train
        self.max_test = max_test
        self._probe_data: XScaleDataModule | None = None
        self._explained = False

    @property
    def state_key(self) -> str:
        """One key per probed data set, so that several kNN probes can stand side by side."""
        return f"{type(self).__name__}-{self.data.name if self.data is not None else 'training data'}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the data and compare its bands with the model's, before the first step."""
        self._probe_data = self._choose(trainer)
        if self._probe_data is None:
            return
        data = self._probe_data
        if data is self.data:
            if trainer.local_rank == 0:
                data.prepare_data()
            trainer.strategy.barrier("OnlineKNN")
            data.setup("fit")
            if stage == "test":
                data.setup("test")
        if data.num_classes is None:
            raise UserError(f"OnlineKNN.data: {data.name} has no labels; give labelled data or leave the callback out.")
        difference = pl_module.bands.difference(data.bands)  # type: ignore[operator, union-attr]
        if difference:
            raise UserError(
                f"OnlineKNN.data: the bands of {data.name} are not the model's ({difference}); "
                "choose the same ones with OnlineKNN.data.bands."
            )

    def _choose(self, trainer: Trainer) -> XScaleDataModule | None:
        if self.data is not None:
            return self.data
        training: XScaleDataModule | None = getattr(trainer, "datamodule", None)
        if training is not None and getattr(training, "num_classes", None) is not None:
            return training
        if not self._explained:
            rank_zero_info("OnlineKNN: the training data has no labels, skipped; set OnlineKNN.data to labelled data.")
            self._explained = True
        return None

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Features of both splits, and the score of the held-out one."""
        data = self._probe_data
        if data is None:
            return None
        split = evaluation_split(trainer)
        train, train_labels = extract_features(trainer, pl_module, data.probe_dataloader("train"), self.max_train)
        features, labels = extract_features(trainer, pl_module, data.probe_dataloader(split), self.max_test)
        if train_labels is None or labels is None:
            raise UserError(f"OnlineKNN.data: {data.name} gives batches without label; give labelled data.")
        scores = knn_evaluate(train, train_labels, features, labels, self.k, self.temperature)
        metrics = {f"knn/{data.name}/{name}": value for name, value in scores.items()}
        # The binomial error of a share of correct answers; mAP has no such closed form.
        errors = {n: math.sqrt(v * (1 - v) / len(features)) for n, v in metrics.items() if n.endswith("/top1")}
        return Measurement(metrics, split, errors=errors)
