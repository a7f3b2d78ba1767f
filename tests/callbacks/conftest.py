"""A tiny method and tiny data that fulfil the contracts the callbacks rely on."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, nn
from torch.utils.data import Dataset

from xscale_lightning.data.bands import Bands, BandSelection
from xscale_lightning.data.datamodule import XScaleDataModule
from xscale_lightning.methods.output import Reconstruction, StepOutput


class TinyMethod(LightningModule):
    """Predicts the lower half of an image from the upper half; with dropout, so that random numbers matter."""

    method_name = "tiny"

    def __init__(self, bands: Bands, pixels: bool = True) -> None:
        super().__init__()
        self.bands = bands
        self.pixels = pixels
        self.encoder = nn.Sequential(nn.Linear(len(bands) * 32, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3))
        self.decoder = nn.Linear(16, len(bands) * 32)
        self.frozen = nn.Dropout(0.5).eval()  # stays in eval mode while the rest trains
        self.losses: list[float] = []
        self.flops_per_batch = 1000

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (self.bands.means, self.bands.stds))
        return mean, std

    def _normalise(self, image: Tensor) -> Tensor:
        mean, std = self.scaling(image)
        return (image - mean) / std

    @torch.no_grad()
    def features(self, batch: dict[str, Any]) -> Tensor:
        modes = [(m, m.training) for m in self.modules()]
        self.eval()
        result = self.encoder(self._normalise(batch["image"])[:, :, :4].flatten(1)).float()
        for module, mode in modes:
            module.training = mode
        return result

    def step(self, batch: dict[str, Any]) -> StepOutput:
        image = self._normalise(batch["image"])
        prediction = self.decoder(self.encoder(image[:, :, :4].flatten(1))).view_as(image[:, :, 4:])
        loss = (prediction - image[:, :, 4:]).square().mean()

        def reconstruction() -> Reconstruction:
            visible = torch.zeros_like(image, dtype=torch.bool)
            visible[:, :, :4] = True
            return Reconstruction(image, torch.cat([image[:, :, :4], prediction.detach()], dim=2), visible)

        return StepOutput(loss, {}, reconstruction if self.pixels else None)

    @torch.no_grad()
    def evaluate(self, batch: dict[str, Any], seed: int) -> StepOutput:
        self.eval()  # careless on purpose: the callbacks must put modes and random numbers back
        torch.manual_seed(seed)
        return self.step(batch)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.step(batch).loss
        self.losses.append(loss.item())
        self.log("train/loss", loss.detach())
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("val/loss", self.evaluate(batch, batch_idx).loss)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        self.log("test/loss", self.evaluate(batch, batch_idx).loss)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2)


class TinyImages(Dataset[dict[str, Any]]):
    """Raw images `[C, 8, 8]` whose brightness says the class; sorted by class, as data on disk often is."""

    def __init__(self, bands: Bands, size: int, classes: int | None, multilabel: bool, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.arange(size) * (classes or 4) // size
        mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in (bands.means, bands.stds))
        noise = 0.3 * torch.randn(size, len(bands), 8, 8, generator=generator)
        self.images = (noise + numbers.view(-1, 1, 1, 1) - 1.5) * std + mean
        self.labels = None
        if classes is not None:
            one_hot = nn.functional.one_hot(numbers, classes)
            self.labels = torch.maximum(one_hot, one_hot.roll(1, 1)) if multilabel else numbers

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        label = {} if self.labels is None else {"label": self.labels[index]}
        return {"image": self.images[index], **label}


class TinyData(XScaleDataModule):
    def __init__(
        self,
        bands: str = "sentinel2_rgb",
        classes: int | None = 4,
        multilabel: bool = False,
        name: str = "tiny",
        batch_size: int = 16,
    ) -> None:
        super().__init__(BandSelection(bands), batch_size=batch_size, num_workers=0)
        self.name, self.num_classes, self.multilabel, self.image_size = name, classes, multilabel, (8, 8)
        self.gsd = 10.0

    def build_dataset(self, split: str) -> TinyImages:
        size, seed = {"train": (64, 0), "val": (40, 1), "test": (32, 2)}[split]
        return TinyImages(self.bands, size, self.num_classes, self.multilabel, seed)


@pytest.fixture
def make_data() -> type[TinyData]:
    return TinyData


@pytest.fixture
def make_method() -> Callable[..., TinyMethod]:
    def make(data: XScaleDataModule, pixels: bool = True) -> TinyMethod:
        torch.manual_seed(7)
        return TinyMethod(data.bands, pixels)

    return make


@pytest.fixture
def make_trainer(tmp_path: Path) -> Callable[..., Trainer]:
    def make(*callbacks: Callback, logger: bool = True, **options: Any) -> Trainer:
        torch.manual_seed(11)
        options = {"max_steps": 4, "log_every_n_steps": 1, "enable_checkpointing": False, **options}
        own_bar = any("ProgressBar" in type(callback).__name__ for callback in callbacks)
        return Trainer(
            accelerator="cpu",
            devices=1,
            default_root_dir=tmp_path,
            logger=TensorBoardLogger(tmp_path, name="runs", version="a") if logger else False,
            callbacks=list(callbacks),
            enable_progress_bar=own_bar,
            enable_model_summary=False,
            **options,
        )

    return make
