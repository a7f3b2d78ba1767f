"""Linear probe: how well does one linear layer on frozen features tell the classes apart?"""

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from xscale_lightning.callbacks.features import SplitFeatures
from xscale_lightning.callbacks.labelled import BASE_LINE, LabelledProbe, labelled_data, measured
from xscale_lightning.callbacks.probe import Measurement, evaluation_split
from xscale_lightning.callbacks.sources import asks_unasked
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import Statistic, estimates, values
from xscale_lightning.evaluation.linear import LinearFit, LinearRecipe, Solver, fit_linear
from xscale_lightning.evaluation.scores import class_scores, label_scores


class LinearProbe(LabelledProbe):
    """Logistic regression on frozen features, on any labelled data, in `validate` and `test`.

    Features are computed once (and shared with `OnlineKNN`), standardised, and kept in memory. The layer is trained on
    the training split; what is swept is chosen on the validation split and asked about the test split. In `validate`
    a fifth of the training samples is held out for the choice. Logs `linear/<data>/top1` and `linear/<data>/macro_f1`,
    for multi-label data `linear/<data>/map_micro` and `linear/<data>/map_macro`, with bootstrap intervals, beside what
    the same layer reaches on mean and deviation of every band.

    Args:
        data: labelled data to probe with; null takes the data of the run if it has labels, in `validate` and `test` of
            a method.
        while_training: probe in `fit` too: before the first step, every n epochs and at the end.
        solver: `lbfgs` minimises scikit-learn's `LogisticRegression` in float64 and sweeps `c`; `sgd` trains in float32
            with momentum 0.9 and a cosine, and sweeps `lr`.
        c: inverse strengths of the L2 penalty.
        max_iter: steps of L-BFGS for every c, at most.
        lr: learning rates of SGD, per 256 samples.
        epochs: passes of SGD over the training features.
        batch_size: samples per step of SGD.
        max_train: at most so many training samples (a fixed random part); null takes all.
        max_test: at most so many samples to ask about, and to choose on; null takes all.
        seed: of the order of SGD and of the samples held out.
        every_n_epochs: epochs between evaluations while training; 0 leaves only those at step 0 and at the end.

    Raises:
        UserError: if a number is out of range; when the command starts, if the data has no labels or other bands than
            the model; when it is evaluated, if a label is no class.
    """

    def __init__(
        self,
        data: XScaleDataModule | None = None,
        while_training: bool = False,
        solver: Solver = "lbfgs",
        c: Sequence[float] = LinearRecipe.c,
        max_iter: int = 1000,
        lr: Sequence[float] = LinearRecipe.lr,
        epochs: int = 100,
        batch_size: int = 256,
        max_train: int | None = 5000,
        max_test: int | None = 2000,
        seed: int = 0,
        every_n_epochs: int = 10,
    ) -> None:
        super().__init__(data, max_train, max_test, every_n_epochs)
        if max_train is not None and max_train < 2:
            raise UserError(f"LinearProbe.max_train: {max_train} is not possible; give at least 2, or null.")
        self.while_training = while_training
        self.recipe = LinearRecipe(solver, tuple(c), max_iter, tuple(lr), epochs, batch_size, seed)

    def choose(self, trainer: Trainer, pl_module: LightningModule) -> XScaleDataModule | None:
        """The data given, else that of the run; nothing in `fit` unless asked for."""
        if trainer.state.fn == TrainerFn.FITTING:
            return (self.data or labelled_data(trainer)) if self.while_training else None
        return self.data or (labelled_data(trainer) if asks_unasked(trainer, pl_module) else None)

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Features of the splits, the layer, and its scores on the held-out split."""
        data = self._probe_data
        if data is None:
            return None
        split = evaluation_split(trainer)
        train = self.split(trainer, pl_module, "train")
        asked = self.split(trainer, pl_module, split)
        chosen_on: SplitFeatures | None = None
        if split == "test" and data.dataset("val") is not None:
            chosen_on = self.split(trainer, pl_module, "val")
        classes = data.num_classes or 0

        def fit(of: str) -> tuple[LinearFit, Statistic]:
            x, y, held = (None if s is None else _inputs(s, of) for s in (train, asked, chosen_on))
            assert x is not None and y is not None
            selection = None if held is None or chosen_on is None else (held, chosen_on.labels)
            fitted = fit_linear(x, train.labels, classes, self.recipe, selection)
            logits = fitted.head.logits(y)
            multilabel = fitted.head.multilabel
            scores = (
                label_scores(logits, asked.labels)
                if multilabel
                else class_scores(logits.argmax(1), asked.labels, classes)
            )
            return fitted, scores

        fitted, statistic = fit("features")
        fitting = trainer.state.fn == TrainerFn.FITTING
        prefix = f"linear/{data.name}"
        found = {f"{prefix}/{name}": score for name, score in estimates(statistic).items()}
        simple = {} if fitting else values(fit("statistics")[1])
        protocol: dict[str, Any] = {
            "data": data.name,
            "samples": len(asked.labels),
            "train_samples": len(train.labels),
            "scale": 1.0,
            "solver": self.recipe.solver,
            "c" if self.recipe.solver == "lbfgs" else "lr": fitted.chosen,
            "chosen_on": "val" if chosen_on is not None else "train",
            "seed": self.recipe.seed,
        }
        return measured(
            found,
            split,
            {f"{prefix}/{name}": {BASE_LINE: value} for name, value in simple.items()},
            dict.fromkeys(found, protocol),
        )


def _inputs(split: SplitFeatures, of: str) -> Any:
    return split.features[1.0] if of == "features" else split.statistics
