"""Online kNN: how well do nearest neighbours in feature space share labels?"""

import math
import re
from collections.abc import Mapping
from statistics import fmean
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from xscale_lightning.callbacks.labelled import BASE_LINE, LabelledProbe, labelled_data, measured
from xscale_lightning.callbacks.probe import Measurement, evaluation_split, publish_picture
from xscale_lightning.callbacks.sources import patch_size
from xscale_lightning.callbacks.steps import checkpoint_record, current_step, is_base_line
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.bootstrap import Estimate, Statistic, bootstrap_draws, estimate, values
from xscale_lightning.evaluation.curves import Curve, plot_curves
from xscale_lightning.evaluation.knn import knn_evaluate, knn_scores
from xscale_lightning.evaluation.scales import check_shares, scaled_sizes, score_names

ONLINE = ("top1", "map_micro", "map_macro")  # scores in `fit`; `validate` and `test` give all, with intervals


class OnlineKNN(LabelledProbe):
    """k-nearest-neighbour accuracy of the features, on any labelled data.

    Logs `knn/<data>/top1`, for multi-label data `knn/<data>/map_micro` and `knn/<data>/map_macro`. Neighbours come from
    the training split; they are asked about the validation split in `fit` and `validate`, the test split in `test`.
    `validate` and `test` add `knn/<data>/macro_f1`, bootstrap intervals, and what the same neighbours say by mean and
    deviation of every band.

    With several scales the images are also averaged down to shares of their size (the protocol of Scale-MAE and
    Cross-Scale MAE) and their `gsd` grows accordingly: `knn/<data>/scale_12.5/top1` and so on, the mean of all as
    `knn/<data>/mean_over_scales/top1`, and the curve over the scales beside that of step 0 in TensorBoard and in
    `<run>/pictures/knn_scales_<data>_step_0000123.png`.

    Args:
        data: labelled data to probe with; null takes the training data if it has labels.
        k: number of neighbours.
        temperature: null counts every neighbour once; 0.07 is the weighted vote of DINO.
        max_train: at most so many samples to find neighbours among (a fixed random part); null takes all.
        max_test: at most so many samples to classify; null takes all.
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.
        scales: shares of the native image size, such as [0.125, 0.25, 0.5, 1.0]; sizes in pixels are rounded to whole
            patches. The native size (1.0) is always among them.
        scaled: which splits are scaled: `evaluation` keeps the neighbours at the native size, `both` scales them too.

    Raises:
        UserError: if a number is out of range; when the run starts, if the data has no labels, other bands than the
            model or fewer training samples than k, or a scale leaves less than one patch; when it is evaluated, if a
            label is no class.
    """

    def __init__(
        self,
        data: XScaleDataModule | None = None,
        k: int = 5,
        temperature: float | None = None,
        max_train: int | None = 5000,
        max_test: int | None = 2000,
        every_n_epochs: int = 10,
        scales: list[float] = [1.0],  # noqa: B006 (never changed; shown as default in --help)
        scaled: Literal["evaluation", "both"] = "evaluation",
    ) -> None:
        super().__init__(data, max_train, max_test, every_n_epochs)
        if k < 1:
            raise UserError(f"OnlineKNN.k: {k} neighbours are not possible; give at least 1.")
        if temperature is not None and temperature <= 0:
            raise UserError(f"OnlineKNN.temperature: {temperature} is not possible; give a number above 0, or null.")
        if max_train is not None and max_train < k:
            raise UserError(f"OnlineKNN.max_train: {max_train} samples are too few for k={k}; give at least {k}.")
        self.k = k
        self.temperature = temperature
        self.scales = check_shares(scales)
        self.scaled = scaled
        self._step_0: Curve | None = None

    @property
    def state_key(self) -> str:
        """One key per data set and protocol: probes can stand side by side, and only like is compared with like."""
        name = self.data.name if self.data is not None else "training data"
        return f"{type(self).__name__}-{name}-k{self.k}-{self.temperature}-{self.scaled}"

    def state_dict(self) -> dict[str, Any]:
        """Curve of step 0, in plain types; nothing with one scale alone."""
        zero = self._step_0
        return {} if zero is None else {"step_0": [zero.label, dict(zero.scores), dict(zero.errors)]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`."""
        found = state_dict.get("step_0")
        self._step_0 = None if found is None else Curve(*found, base_line=True)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """As the base; also compare k and the scales with the data."""
        super().setup(trainer, pl_module, stage)
        data = self._probe_data
        if data is None:
            return
        training = data.dataset("train")
        count = len(training) if hasattr(training, "__len__") else None  # type: ignore[arg-type]
        if count is not None and count < self.k:
            raise UserError(
                f"OnlineKNN.k: {self.k} neighbours asked for, and {data.name} has {count} training samples "
                "(samples_per_epoch, or the files); give at most that many."
            )
        self._sizes(pl_module)

    def _sizes(self, pl_module: LightningModule) -> dict[float, tuple[int, int]]:
        """Image sizes by scale; none where the data does not know its own before it is read."""
        size = self._probe_data.image_size if self._probe_data is not None else None
        return scaled_sizes(size, self.scales, patch_size(pl_module)) if size and all(size) else {}

    def choose(self, trainer: Trainer, pl_module: LightningModule) -> XScaleDataModule | None:
        """The data given, else that of the run if it has labels; says so if there is neither."""
        data = self.data or labelled_data(trainer)
        if data is None:
            self.say("the training data has no labels, skipped; set OnlineKNN.data to labelled data.")
        return data

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Features of both splits, and the score of the held-out one."""
        data = self._probe_data
        if data is None:
            return None
        split = evaluation_split(trainer)
        bank = self.split(trainer, pl_module, "train", self.scales if self.scaled == "both" else [1.0])
        asked = self.split(trainer, pl_module, split, self.scales)
        statistics = {
            share: knn_scores(
                bank.features[share if self.scaled == "both" else 1.0],
                bank.labels,
                asked.features[share],
                asked.labels,
                self.k,
                self.temperature,
            )
            for share in self.scales  # the native size first
        }
        found = {share: values(statistic) for share, statistic in statistics.items()}
        fitting = trainer.state.fn == TrainerFn.FITTING
        if len(self.scales) > 1 and trainer.is_global_zero:
            self._draw(trainer, pl_module, found, split, len(asked.labels))
        scores = self._scores(found, {} if fitting else statistics, len(asked.labels))
        prefix, base_lines = f"knn/{data.name}", {}
        if fitting:
            scores = {name: value for name, value in scores.items() if name.endswith(ONLINE)}
        else:
            simple = knn_evaluate(
                bank.statistics, bank.labels, asked.statistics, asked.labels, self.k, self.temperature
            )
            base_lines = {f"{prefix}/{name}": {BASE_LINE: value} for name, value in simple.items()}
        counts = {"data": data.name, "samples": len(asked.labels), "train_samples": len(bank.labels)}
        protocol = {**counts, "k": self.k, "temperature": self.temperature}
        return measured(
            {f"{prefix}/{name}": value for name, value in scores.items()},
            split,
            base_lines,
            {f"{prefix}/{name}": {**protocol, "scale": self._scale_of(name)} for name in scores},
        )

    def _scale_of(self, name: str) -> float | list[float]:
        """Share of the native size that a score is of; all of them for their mean."""
        return next((s for s in self.scales if score_names(s, name.rsplit("/", 1)[-1]) == name), self.scales)

    def _scores(
        self, found: dict[float, dict[str, float]], statistics: Mapping[float, Statistic], count: int
    ) -> dict[str, Estimate]:
        """Scores of all scales by log name, those of the native size first, with intervals where there is a statistic.

        The same images are drawn at every scale, so the mean over the scales has an interval of its own.
        """
        drawn = {share: bootstrap_draws(statistic) for share, statistic in statistics.items() if count > 1}

        def with_error(name: str, value: float, draws: list[torch.Tensor], bound: float) -> Estimate:
            known = estimate(value, torch.stack(draws).mean(0)) if draws else Estimate(value)
            return Estimate(value, bound if name == "top1" else known.error, known.interval)

        scores = {
            score_names(share, name): with_error(
                name, value, [drawn[share][name]] if drawn else [], _error(value, count)
            )
            for share, single in found.items()
            for name, value in single.items()
        }
        if len(found) > 1:
            for name in found[1.0]:
                single = [scores[name] for scores in found.values()]
                draws = [part[name] for part in drawn.values()]
                # Errors do not average out over the scales of the same images, so this is the bound of Minkowski.
                bound = fmean(_error(value, count) for value in single)
                scores[f"mean_over_scales/{name}"] = with_error(name, fmean(single), draws, bound)
        return scores

    def _draw(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        found: dict[float, dict[str, float]],
        split: str,
        count: int,
    ) -> None:
        """Plot the curve over the scales beside that of step 0."""
        score = "top1" if "top1" in found[1.0] else "map_micro"
        values = {share: scores[score] for share, scores in found.items()}
        errors = {share: _error(value, count) for share, value in values.items()} if score == "top1" else {}
        curves = [Curve(f"step {current_step(trainer)} ({split})", values, errors)]
        if is_base_line(trainer):
            self._step_0 = Curve(f"step 0 ({split})", values, errors, base_line=True)
            curves = []
        elif trainer.state.fn != TrainerFn.FITTING:  # Lightning restores callbacks in `fit` alone
            self.load_state_dict(checkpoint_record(trainer)[1].get(self.state_key) or self.state_dict())
        if self._step_0 is not None:
            curves.insert(0, self._step_0)
        data = self._probe_data.name  # type: ignore[union-attr]
        picture = plot_curves(
            curves,
            f"{data}: kNN over scales, k = {self.k}",
            "top-1 accuracy" if score == "top1" else "mAP (micro)",
            self._sizes(pl_module),
        )
        stem = re.sub(r"[^\w.-]+", "_", data)  # a name need not be fit for files
        publish_picture(trainer, picture, f"knn/{data}/scales", f"knn_scales_{stem}_")


def _error(share: float, count: int) -> float:
    """Binomial standard error of a share of correct answers; other scores have no such closed form."""
    return math.sqrt(max(share * (1 - share), 0.0) / count)
