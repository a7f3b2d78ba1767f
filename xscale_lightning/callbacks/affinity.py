"""Spatial affinity seen: pictures of it, and its figures on whole held-out pairs."""

from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from xscale_lightning.callbacks.probe import (
    Measurement,
    ProbeCallback,
    evaluation_split,
    publish_picture,
    run_folder,
    to_device,
)
from xscale_lightning.callbacks.sampling import sample_batches
from xscale_lightning.callbacks.sources import held_out_loader
from xscale_lightning.callbacks.steps import current_step
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.affinity_figure import AffinityRow, affinity_figure, similarity_maps
from xscale_lightning.evaluation.geometry import effective_rank
from xscale_lightning.evaluation.pictures import composite
from xscale_lightning.losses import affinity_gram, off_diagonal_affinity
from xscale_lightning.methods.affinity_pairs import pair_fits
from xscale_lightning.methods.spatial_affinity import SpatialAffinity

MAX_TOKENS = 4096  # that the rank is computed of


class AffinityPictures(ProbeCallback):
    """Shows how alike patches are to the student on MR and to the teacher on HR; for `spatial_affinity` alone.

    Writes `<run>/pictures/affinity_step_0000123.png`: for some held-out pairs the cosine of one patch with all others.
    Logs over held-out pairs of which nothing is hidden `affinity/gram` (error of the Gram matrices),
    `affinity/student` and `affinity/teacher` (mean cosine of different patches of an image; near 1 where all are
    equal), `affinity/rank_student` and `affinity/rank_teacher` (effective rank of the tokens of all images; they
    collapse where it nears 1). All of them are of real HR where the data have it, whatever the source of training; runs
    without an affinity loss have them where the host has an EMA. Other methods are passed over.

    Args:
        num_pairs: rows of the picture.
        num_score_pairs: pairs that the figures are computed over.
        seed: draws the pairs and their patches.
        every_n_epochs: epochs between evaluations; 0 leaves only those at step 0 and at the end.

    Raises:
        UserError: if a number is below 1.
    """

    def __init__(self, num_pairs: int = 4, num_score_pairs: int = 32, seed: int = 0, every_n_epochs: int = 10) -> None:
        super().__init__(every_n_epochs)
        for name, value in (("num_pairs", num_pairs), ("num_score_pairs", num_score_pairs)):
            if value < 1:
                raise UserError(f"AffinityPictures.{name}: {value} is not possible; give at least 1.")
        self.num_pairs, self.num_score_pairs, self.seed = num_pairs, num_score_pairs, seed

    def probe(self, trainer: Trainer, pl_module: LightningModule) -> Measurement | None:
        """Encode, score and draw, batch by batch."""
        loader = held_out_loader(trainer)
        if loader is None or not isinstance(pl_module, SpatialAffinity):
            return None
        rows: list[AffinityRow] = []
        found: dict[str, list[Tensor]] = {}
        tokens: dict[str, list[Tensor]] = {"student": [], "teacher": []}
        gsd: list[float] = []
        patches = torch.Generator().manual_seed(self.seed)
        for raw in sample_batches(loader, max(self.num_pairs, self.num_score_pairs), self.seed):
            batch = to_device(trainer, pl_module, raw)
            if {"gsd", "gsd_hr"} <= batch.keys():
                gsd = gsd or [float(batch[name][0]) for name in ("gsd", "gsd_hr")]
            with trainer.precision_plugin.forward_context():
                encoded = pl_module.affinity_maps(batch)
            if encoded is None:
                return None
            student, teacher = encoded  # [B, D, h, w], [B, D', r * h, r * w]
            pooled = F.avg_pool2d(teacher, pl_module.ratio)
            sides = {"student": student.flatten(2).mT, "teacher": pooled.flatten(2).mT}  # [B, N, D]
            gram = torch.stack([affinity_gram(s[None], t[None]) for s, t in zip(*sides.values(), strict=True)])
            found.setdefault("affinity/gram", []).append(gram)
            for name, side in sides.items():
                alike = torch.stack([off_diagonal_affinity(image[None]) for image in side])
                found.setdefault(f"affinity/{name}", []).append(alike)
                tokens[name].append(side.flatten(0, 1).cpu())
            for i in range(min(len(student), self.num_pairs - len(rows))):
                row, column = (int(torch.randint(n, (), generator=patches)) for n in student.shape[-2:])
                maps = similarity_maps(student[i].cpu(), teacher[i].cpu(), (row, column))
                rows.append(AffinityRow(_pictures(pl_module, batch, i), maps, (row, column), float(gram[i])))
        if not rows:
            return None
        if trainer.is_global_zero and run_folder(trainer) is not None:
            title = f"{pl_module.method_name}, source {pl_module.source}, step {current_step(trainer)}"
            publish_picture(trainer, affinity_figure(rows, title, gsd), "affinity", prefix="affinity_")
        metrics = {name: float(torch.cat(values).mean()) for name, values in found.items()}
        for name, values in tokens.items():
            side = torch.cat(values)
            metrics[f"affinity/rank_{name}"] = effective_rank(side[:: -(-len(side) // MAX_TOKENS)])
        return Measurement(metrics, evaluation_split(trainer))


def _pictures(method: SpatialAffinity, batch: dict[str, Any], i: int) -> tuple[Tensor, Tensor]:
    """MR and HR of pair `i` in natural colours, each in its own stretch: their sensors may differ."""
    image = batch["image"][i : i + 1].float().cpu()
    if pair_fits(batch, method.ratio):
        finer, bands = batch["image_hr"][i : i + 1].float().cpu(), method.bands_hr
    else:
        finer, bands = F.interpolate(image, scale_factor=method.ratio, mode="bilinear"), method.bands
    return composite(image, method.bands.rgb)[0], composite(finer, bands.rgb)[0]
