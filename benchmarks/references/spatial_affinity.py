"""Spatial affinity as published: a second teacher for HR beside the host's target, children found index by index."""

from typing import Any

import torch
from sizes import RATIO, Size
from torch import Tensor
from torch.nn import functional

from references.ijepa import ReferenceIJEPA
from references.latent_mim import ReferenceLatentMIM
from references.parts import Batch, Interpolation, Reference, follow, holder, table


class ReferenceAffinity(Reference):
    """Waithaka et al. 2026, around I-JEPA or LatentMIM."""

    kernel = Interpolation.BILINEAR
    flips = (False, False)

    def __init__(self, size: Size) -> None:
        super().__init__(size)
        latent = size.host == "latent_mim"
        self.host = ReferenceLatentMIM(size) if latent else ReferenceIJEPA(size)
        self.scale = self.host.scale
        self.teacher = holder(self.student)
        encoder = self.teacher.module.backbone if latent else self.teacher.module
        encoder.positions = table(size.dim, RATIO * size.side, stretch=latent)

    @property
    def student(self) -> torch.nn.Module:
        """What both teachers are copies of."""
        return self.host.student if isinstance(self.host, ReferenceLatentMIM) else self.host.backbone

    def draw(self, batch: Batch) -> tuple[Any, ...]:
        """As the host."""
        return self.host.draw(batch)

    def loss(self, batch: Batch, *draws: Any) -> Tensor:
        """The host's loss and the squared difference of the affinities."""
        images, finer = batch["image"], batch["image_hr"]
        if isinstance(self.host, ReferenceLatentMIM):
            offsets, visible, hidden = draws
            images, finer = self.host.patches(images, offsets), self.host.patches(finer, offsets, RATIO)
            seen, loss = self.host.encode_and_predict(images, visible, hidden)
        else:
            visible, targets = draws
            seen, loss = self.host.encode_and_predict(images, visible, targets)
        with torch.no_grad():
            places = children(visible, self.size.side)
            tokens = self.teacher.module(finer, places)[:, -places.shape[1] :]
            pooled = tokens.unflatten(1, (-1, RATIO**2)).mean(2)  # [B, K, D]
        s, t = functional.normalize(seen, dim=-1), functional.normalize(pooled, dim=-1)
        return loss + functional.mse_loss(s @ s.transpose(1, 2), t @ t.transpose(1, 2))

    def move(self, momentum: float = 0.996) -> None:
        """Both teachers follow the student."""
        self.host.move(momentum)
        follow(self.teacher.module, self.student, momentum)


def children(parents: Tensor, side: int) -> Tensor:
    """Places on the finer grid under `parents [B, N]`, one index after the other as in the published code."""
    found = []
    for row in parents.tolist():
        places = []
        for parent in row:
            top, left = RATIO * (parent // side), RATIO * (parent % side)
            places += [(top + a) * RATIO * side + left + b for a in range(RATIO) for b in range(RATIO)]
        found.append(places)
    return torch.tensor(found, device=parents.device)
