"""Feature geometry: does the encoder use its dimensions, or has it collapsed? Needs no labels."""

from lightning.pytorch import LightningModule, Trainer

from xscale_lightning.callbacks.probe import Measurement, ProbeCallback, evaluation_split
from xscale_lightning.callbacks.sampling import extract_features
from xscale_lightning.callbacks.sources import held_out_loader
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.geometry import effective_rank, mean_cosine, uniformity


class FeatureGeometry(ProbeCallback):
    """Effective rank (RankMe), uniformity and mean pairwise cosine of the features of held-out images.

    Logs `geometry/rank`, `geometry/uniformity` and `geometry/cosine`.

    Args:
        max_samples: at most so many images (a fixed random part). The rank cannot exceed it.
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.

    Raises:
        UserError: if `max_samples` is below 2.
    """

    def __init__(self, max_samples: int = 1024, every_n_epochs: int = 1) -> None:
        super().__init__(every_n_epochs)
        if max_samples < 2:
            raise UserError(f"FeatureGeometry.max_samples: {max_samples} is not possible; give at least 2.")
        self.max_samples = max_samples

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Three figures of up to `max_samples` features."""
        loader = held_out_loader(trainer)
        if loader is None:
            return None
        features, _ = extract_features(trainer, pl_module, loader, self.max_samples)
        if len(features) < 2:
            return None
        metrics = {
            "geometry/rank": effective_rank(features),
            "geometry/uniformity": uniformity(features),
            "geometry/cosine": mean_cosine(features),
        }
        return Measurement(metrics, evaluation_split(trainer))
