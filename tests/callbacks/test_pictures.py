"""The ratio figure of `ReconstructionPictures`, and that methods with other scales are scored alike."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from xscale_lightning.callbacks import Measurement, ReconstructionPictures
from xscale_lightning.data.bands import Bands
from xscale_lightning.data.synthetic import SyntheticData
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.spectral import spectral_angle
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.output import Reconstruction, StepOutput
from xscale_lightning.models.registry import BackboneConfig


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen: list[Measurement] = []

    def record_probe(self, trainer: Any, measurement: Measurement) -> None:
        self.seen.append(measurement)

    def metrics(self) -> dict[str, float]:
        return {name: value for measurement in self.seen for name, value in measurement.metrics.items()}

    def base_lines(self) -> dict[str, Any]:
        return {name: value for measurement in self.seen for name, value in measurement.baselines.items()}


class Scaled(MAE):
    """MAE that is shown its images brighter and with another contrast, and puts them back on that scale."""

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        return self.mean - 3 * self.std, 2 * self.std

    def evaluate(self, batch: dict[str, Any], seed: int) -> Any:
        output = MAE.evaluate(Plain.of(self), batch, seed)
        before = output.reconstruction

        def reconstruction() -> Any:
            result = before()
            result.target, result.prediction = ((x + 3) / 2 for x in (result.target, result.prediction))
            return result

        output.reconstruction = reconstruction
        return output


class Plain(MAE):
    """The same weights with the record's scale."""

    @staticmethod
    def of(method: MAE) -> MAE:
        plain = MAE(**OPTIONS, bands=method.bands)
        plain.load_state_dict(method.state_dict())
        plain.mask_ratio = method.mask_ratio
        return plain


OPTIONS: dict[str, Any] = {
    "backbone": BackboneConfig("vit_tiny_patch8", depth=1),
    "decoder_dim": 16,
    "decoder_depth": 1,
    "decoder_heads": 2,
}


def validate(make_trainer, cls: type = MAE, size: int = 32, options: dict[str, Any] | None = None, **arguments: Any):
    data = SyntheticData(length=8, batch_size=4, image_height=size, image_width=size)
    torch.manual_seed(0)
    method = cls(bands=data.bands, **OPTIONS, **(options or {}))
    recorder = Recorder()
    callback = ReconstructionPictures(num_score_images=4, **arguments)
    trainer = make_trainer(callback, recorder)
    trainer.validate(method, datamodule=data, verbose=False)
    assert method.mask_ratio == (options or {}).get("mask_ratio", 0.75)
    return recorder, callback


def test_figure_and_numbers_of_every_ratio(make_trainer, tmp_path: Path) -> None:
    recorder, callback = validate(make_trainer, ratios=[0.5, 0.75])
    folder = tmp_path / "runs" / "a" / "pictures"
    assert sorted(os.listdir(folder)) == ["ratios_step_0000000.png", "step_0000000.png"]
    assert np.asarray(Image.open(folder / "ratios_step_0000000.png")).shape[1] > 500
    metrics, base_lines = recorder.metrics(), recorder.base_lines()
    assert {name for name in metrics if "_at_" in name} == {"reconstruction/psnr_at_50", "reconstruction/psnr_at_75"}
    assert set(base_lines["reconstruction/psnr_at_50"]) == {"mean fill", "bilinear inpainting"}
    # The same four images, the same seed and ratio: the number is that of the training's own ratio.
    assert metrics["reconstruction/psnr_at_75"] == pytest.approx(metrics["reconstruction/psnr"], abs=1e-6)
    assert base_lines["reconstruction/psnr_at_75"] == pytest.approx(base_lines["reconstruction/psnr"], abs=1e-6)
    assert 0 < metrics["reconstruction/spectral_angle"] < 180
    events = EventAccumulator(str(tmp_path / "runs" / "a"), size_guidance={"images": 0})
    events.Reload()
    assert len(events.Images("reconstruction/mask_ratios")) == 1
    for name in ("psnr_at_50", "psnr_at_50_bilinear", "spectral_angle", "spectral_angle_mean_fill"):
        assert np.isfinite(events.Scalars(f"reconstruction/{name}")[0].value)
    assert callback.state_dict() == {"image_size": [32, 32]}


def test_methods_that_scale_differently_are_scored_alike(make_trainer) -> None:
    plain, other = (validate(make_trainer, cls)[0] for cls in (MAE, Scaled))
    assert other.metrics() == pytest.approx(plain.metrics(), abs=1e-3)
    for name, values in plain.base_lines().items():
        assert other.base_lines()[name] == pytest.approx(values, abs=0.01)


class Shifted(MAE):
    """Sees nothing of bright images and puts back the last band too high by two deviations."""

    seen: list[Tensor]

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        Shifted.seen.append(raw)
        return super().scaling(raw)

    def evaluate(self, batch: dict[str, Any], seed: int) -> StepOutput:
        images = (batch["image"] - self.mean) / self.std
        wrong = torch.cat([images[:, :-1], images[:, -1:] + 2], dim=1)
        result = Reconstruction(images, wrong, torch.zeros_like(images, dtype=torch.bool))
        return StepOutput(torch.zeros(()), {}, lambda: result)


def test_the_angle_is_that_of_raw_spectra(make_trainer, monkeypatch) -> None:
    count, large = len(SyntheticData().bands), [9000.0, 300.0, 4000.0, 1500.0]
    statistics = [large[band % 4] for band in range(count)], [30.0] * count
    monkeypatch.setattr(Bands, "means", property(lambda self: statistics[0]))
    monkeypatch.setattr(Bands, "stds", property(lambda self: statistics[1]))
    Shifted.seen = []
    recorder, _ = validate(make_trainer, Shifted, ratios=[])
    (raw,) = (images.double() for images in Shifted.seen)
    assert raw.mean() > 1000
    guess = raw.clone()
    guess[:, -1] += 60
    wanted = float(spectral_angle(raw, guess).mean())
    assert recorder.metrics()["reconstruction/spectral_angle"] == pytest.approx(wanted, rel=1e-4) and wanted < 2


def test_a_ratio_without_visible_tokens_is_skipped_with_a_note(make_trainer, caplog) -> None:
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        recorder, _ = validate(make_trainer, size=16)
    names = {name for name in recorder.metrics() if "_at_" in name}
    assert names == {"reconstruction/psnr_at_50", "reconstruction/psnr_at_75"}
    notes = [r.message for r in caplog.records if "left out" in r.message]
    assert len(notes) == 2 and "0.95" in notes[1] and "4 tokens" in notes[1]
    assert validate(make_trainer, size=16, ratios=[0.95])[0].metrics().keys() == {
        "reconstruction/psnr",
        "reconstruction/spectral_angle",
    }


def test_an_empty_list_leaves_the_figure_out(make_trainer, tmp_path) -> None:
    recorder, _ = validate(make_trainer, ratios=[])
    assert not [name for name in recorder.metrics() if "_at_" in name]
    assert os.listdir(tmp_path / "runs" / "a" / "pictures") == ["step_0000000.png"]


def test_borrowed_statistics_have_a_figure_and_no_numbers(make_trainer, tmp_path) -> None:
    recorder, _ = validate(make_trainer, options={"norm_pix_loss": True})
    assert recorder.metrics() == {}
    assert "ratios_step_0000000.png" in os.listdir(tmp_path / "runs" / "a" / "pictures")


@pytest.mark.parametrize("arguments", [{"ratios": [1.0]}, {"ratios": [0.0, 0.5]}, {"num_ratio_images": 0}])
def test_impossible_arguments_are_refused(arguments) -> None:
    with pytest.raises(UserError, match=r"ReconstructionPictures\.(ratios|num_ratio_images)"):
        ReconstructionPictures(**arguments)
