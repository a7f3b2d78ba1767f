"""VICReg (Bardes, Ponce and LeCun, ICLR 2022) for images of any bands.

Two views of an image, z and z' their projections [B, D]:

    L = 25 mean |z - z'|^2 + 25 (v(z) + v(z')) + c(z) + c(z')
    v(z) = mean_d max(0, 1 - sqrt(Var(z_d) + 1e-4))        no coordinate may become constant
    c(z) = 1/D sum_{d != e} Cov(z)_de^2                     no two coordinates may say the same

Deviations: views move no colours, which are physics here, but haze may be put over them; the statistics are those of
each process's own batch.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xscale_lightning import SSLModule, StepOutput
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_vicreg.haze import Haze

CROPS = Views(scale=(0.3, 1.0), intensity=0.1)


def variance(z: Tensor) -> Tensor:
    """Hinge that keeps the deviation of every coordinate of `z [B, D]` at 1 or more."""
    return F.relu(1 - (z.var(dim=0) + 1e-4).sqrt()).mean()


def covariance(z: Tensor) -> Tensor:
    """Sum of the squared covariances of different coordinates of `z [B, D]`, over D."""
    centred = z - z.mean(dim=0)
    squares = (centred.mT @ centred / (len(z) - 1)).square()
    return (squares.sum() - squares.diagonal().sum()) / z.shape[1]


class VICReg(SSLModule):
    """Two views of an image shall have the same projection, whose coordinates vary and differ.

    Args:
        crops: the views that are compared; the base's own `views` come before them, and do nothing by default.
        haze: the atmosphere over each view.
        dim: width D of the projection.
        invariance_weight: of the distance between the two projections.
        variance_weight: of the variance hinge.
        views: augmentation before the two views are drawn.
        **kwargs: bands, backbone, optimizer, attention: see `SSLModule`.
    """

    sample_wise = False  # the loss compares the samples of a batch

    def __init__(
        self,
        crops: Views = CROPS,
        haze: Haze = Haze(),  # noqa: B008 (never changed)
        dim: int = 512,
        invariance_weight: float = 25.0,
        variance_weight: float = 25.0,
        views: Views = Views(scale=(1.0, 1.0), ratio=(1.0, 1.0)),  # noqa: B008
        **kwargs,
    ) -> None:
        super().__init__(views=views, **kwargs)
        if dim < 2:
            raise UserError(f"model.dim: {dim} is not possible; give at least 2.")
        self.crops, self.haze = crops, haze
        self.invariance_weight, self.variance_weight = invariance_weight, variance_weight
        width = self.backbone.num_features
        layers = [nn.Linear(width, dim), nn.BatchNorm1d(dim), nn.ReLU()]
        self.projector = nn.Sequential(*layers, nn.Linear(dim, dim, bias=False))

    def project(self, images: Tensor, gsd: Tensor | None) -> Tensor:
        """Projection `[B, D]` in float32 of a new view of `images [B, C, H, W]`."""
        known = images.new_ones(len(images)) if gsd is None else gsd
        view, zoomed = self.crops(images, known)
        view = self.haze(view, self.bands.wavelengths)
        tokens = self.backbone(view, gsd=None if gsd is None else zoomed)
        return self.projector(self.backbone.pool(tokens)).to(torch.promote_types(images.dtype, torch.float32))

    def step(self, batch) -> StepOutput:
        """`batch["image"]` is `[B, C, H, W]`, normalised; `batch["gsd"]` is `[B]` in metres per pixel."""
        one, other = (self.project(batch["image"], batch.get("gsd")) for _ in range(2))
        with torch.autocast(one.device.type, enabled=False):
            distance = F.mse_loss(one, other)
            spread = variance(one) + variance(other)
            redundancy = covariance(one) + covariance(other)
            loss = self.invariance_weight * distance + self.variance_weight * spread + redundancy
        return StepOutput(loss, {"invariance": distance, "variance": spread, "covariance": redundancy})
