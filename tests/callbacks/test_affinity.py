"""Affinity pictures: what is measured and drawn, and silence for other methods."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from matplotlib import colormaps
from PIL import Image

from xscale_lightning.callbacks.affinity import AffinityPictures
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.errors import UserError
from xscale_lightning.evaluation.affinity_figure import AffinityRow, affinity_figure, mark, similarity_maps
from xscale_lightning.methods.spatial_affinity import SpatialAffinity
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.testing import NO_VIEWS

BACKBONE = BackboneConfig("vit_tiny_patch8", depth=1, dim=48, num_heads=3, class_token=False)


def run(folder: Path, **options) -> tuple[Trainer, AffinityPictures]:
    torch.manual_seed(0)
    data = SampleScene(image_size=32, pair_ratio=2, batch_size=4, samples_per_epoch=8)
    module = SpatialAffinity(
        host_args={"predictor": {"dim": 48, "depth": 1}}, bands=data.bands, backbone=BACKBONE, views=NO_VIEWS, **options
    )
    callback = AffinityPictures(num_pairs=2, num_score_pairs=3, every_n_epochs=0)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=2,
        limit_val_batches=1,
        logger=TensorBoardLogger(folder, name="runs", version="a"),
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data)
    return trainer, callback


@pytest.mark.parametrize("source", ["pair", "interpolated"])
def test_figures_and_pictures_at_the_start_and_the_end(tmp_path, source):
    trainer, _ = run(tmp_path, source=source)
    sides = ("student", "teacher")
    names = {"affinity/gram", *(f"affinity/{kind}{side}" for side in sides for kind in ("", "rank_"))}
    found = {name: float(trainer.callback_metrics[name]) for name in names}
    assert found["affinity/gram"] > 0 and all(found[f"affinity/rank_{side}"] > 1 for side in sides)
    assert all(-1 <= found[f"affinity/{side}"] < 1 for side in sides)
    assert {"val/host", "val/affinity_gram", "val/affinity_student"} <= set(trainer.callback_metrics)
    pictures = sorted(p.name for p in (tmp_path / "runs" / "a" / "pictures").iterdir())
    assert pictures == ["affinity_step_0000000.png", "affinity_step_0000002.png"]
    first, last = (np.asarray(Image.open(tmp_path / "runs" / "a" / "pictures" / name)) for name in pictures)
    assert first.shape == last.shape and not np.array_equal(first, last)


def test_the_host_alone_is_measured_on_real_pairs_too(tmp_path):
    trainer, _ = run(tmp_path, source="mr")
    assert float(trainer.callback_metrics["affinity/gram"]) > 0 and "val/affinity_gram" not in trainer.callback_metrics


def test_silent_where_there_is_no_teacher_or_no_hr(tmp_path):
    trainer, _ = run(tmp_path, source="mr", ratio=3)  # the pairs have another
    assert not any(name.startswith("affinity/") for name in trainer.callback_metrics)
    assert not (tmp_path / "runs" / "a" / "pictures").exists()


def test_maps_in_closed_form():
    student = torch.randn(5, 2, 3)
    teacher = torch.randn(4, 4, 6)
    ours, pooled, fine = similarity_maps(student, teacher, (1, 2))
    torch.testing.assert_close(ours[0, 1], F.cosine_similarity(student[:, 0, 1], student[:, 1, 2], dim=0))
    means = teacher.unflatten(2, (3, 2)).unflatten(1, (2, 2)).mean((2, 4))
    torch.testing.assert_close(pooled[0, 0], F.cosine_similarity(means[:, 0, 0], means[:, 1, 2], dim=0))
    torch.testing.assert_close(fine[3, 0], F.cosine_similarity(teacher[:, 3, 0], means[:, 1, 2], dim=0))
    assert ours[1, 2] == pytest.approx(1) and pooled[1, 2] == pytest.approx(1) and fine[2:, 4:].max() < 1


def test_the_frame_is_around_the_patch():
    pixels = np.zeros((40, 60, 3), np.uint8)
    mark(pixels, (1, 2), (4, 6))  # rows 10 to 20, columns 20 to 30
    red = (pixels == (230, 0, 0)).all(-1)
    rows, columns = np.nonzero(red)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (9, 20, 19, 30)
    assert not pixels[11:19, 21:29].any() and not pixels[:8].any()
    corner = np.zeros((8, 8, 3), np.uint8)
    mark(corner, (0, 0), (1, 1))  # nothing lies around it
    assert corner.any()


def test_one_colour_scale_for_all_maps():
    alike, different = torch.full((2, 2), 0.99), torch.tensor([[1.0, -0.5], [0.0, 0.5]])
    pictures = (torch.rand(3, 16, 16), torch.rand(3, 32, 32))
    fine = torch.full((4, 4), 0.99)

    def area(student: torch.Tensor, low: float) -> int:
        """Pixels in the colour that 0.99 has on a scale from `low` to 1."""
        drawn = affinity_figure([AffinityRow(pictures, (student, alike, fine), (0, 0), 0.1)])
        wanted = (np.array(colormaps["viridis"]((0.99 - low) / (1 - low))[:3]) * 255).round()
        return int((np.abs(drawn - wanted).max(-1) <= 1).sum())

    cell = 160 * 160
    assert area(different, -0.55) > 1.5 * cell  # both maps of the teacher, but for the frames
    assert area(alike, 0.95) > 2.2 * cell and area(alike, -0.55) < cell


def test_wrong_numbers():
    with pytest.raises(UserError, match=r"AffinityPictures\.num_pairs: 0 is not possible"):
        AffinityPictures(num_pairs=0)
