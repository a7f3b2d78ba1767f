"""Online kNN: how well do nearest neighbours in feature space share labels?"""

import math
import re
from functools import partial
from statistics import fmean
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from xscale_lightning.callbacks.probe import Measurement, ProbeCallback, evaluation_split, publish_picture
from xscale_lightning.callbacks.sampling import extract_variants
from xscale_lightning.callbacks.sources import open_probe_data, patch_size
from xscale_lightning.callbacks.steps import checkpoint_record, current_step, is_base_line
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.curves import Curve, plot_curves
from xscale_lightning.evaluation.knn import knn_evaluate
from xscale_lightning.evaluation.scales import check_shares, scale_batch, scaled_sizes, score_names


class OnlineKNN(ProbeCallback):
    """k-nearest-neighbour accuracy of the features, on any labelled data.

    Logs `knn/<data>/top1`, for multi-label data `knn/<data>/map_micro` and `knn/<data>/map_macro`. Neighbours come from
    the training split; they are asked about the validation split in `fit` and `validate`, the test split in `test`.

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
        UserError: if a number is out of range; when the run starts, if the data has no labels, too few samples, other
            bands than the model, or a scale leaves less than one patch.
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
        self.scales = check_shares(scales)
        self.scaled = scaled
        self._step_0: Curve | None = None
        self._probe_data: XScaleDataModule | None = None
        self._explained = False

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
        """Open the data and compare its bands with the model's, before the first step."""
        self._probe_data = self._choose(trainer)
        if self._probe_data is None:
            return
        data = self._probe_data
        open_probe_data(trainer, pl_module, data, stage, "OnlineKNN")
        if data.num_classes is None:
            raise UserError(f"OnlineKNN.data: {data.name} has no labels; give labelled data or leave the callback out.")
        self._sizes(pl_module)

    def _sizes(self, pl_module: LightningModule) -> dict[float, tuple[int, int]]:
        """Image sizes by scale; none where the data does not know its own before it is read."""
        size = self._probe_data.image_size if self._probe_data is not None else None
        return scaled_sizes(size, self.scales, patch_size(pl_module)) if size and all(size) else {}

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
        patch = patch_size(pl_module)
        variants = [partial(scale_batch, share=share, patch=patch) for share in self.scales]  # the native size first
        bank_variants = variants if self.scaled == "both" else variants[:1]
        banks, bank_labels = extract_variants(
            trainer, pl_module, data.probe_dataloader("train"), self.max_train, bank_variants
        )
        asked, labels = extract_variants(trainer, pl_module, data.probe_dataloader(split), self.max_test, variants)
        if bank_labels is None or labels is None:
            raise UserError(f"OnlineKNN.data: {data.name} gives batches without label; give labelled data.")
        found = {
            share: knn_evaluate(banks[i % len(banks)], bank_labels, features, labels, self.k, self.temperature)
            for i, (share, features) in enumerate(zip(self.scales, asked, strict=True))
        }
        if len(self.scales) > 1 and trainer.is_global_zero:
            self._draw(trainer, pl_module, found, split, len(labels))
        return self._measurement(found, split, len(labels))

    def _measurement(self, found: dict[float, dict[str, float]], split: str, count: int) -> Measurement:
        """Scores of all scales by log name, those of the native size first."""
        prefix = f"knn/{self._probe_data.name}"  # type: ignore[union-attr]
        metrics = {f"{prefix}/{score_names(s, n)}": v for s, scores in found.items() for n, v in scores.items()}
        errors = {n: _error(v, count) for n, v in metrics.items() if n.endswith("/top1")}
        if len(found) > 1:
            for name in found[1.0]:
                metrics[f"{prefix}/mean_over_scales/{name}"] = fmean(scores[name] for scores in found.values())
            if errors:
                # The same images at every scale: errors do not average out, so this is the bound of Minkowski.
                errors[f"{prefix}/mean_over_scales/top1"] = fmean(errors.values())
        return Measurement(metrics, split, errors=errors)

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
        publish_picture(trainer, picture, f"knn_scales/{data}", f"knn_scales_{stem}_")


def _error(share: float, count: int) -> float:
    """Binomial standard error of a share of correct answers; mAP has no such closed form."""
    return math.sqrt(share * (1 - share) / count)
