import json
import os
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from xscale_lightning.callbacks import (
    FeatureGeometry,
    OnlineKNN,
    ProgressBar,
    ReconstructionPictures,
    RunSummary,
    Throughput,
)
from xscale_lightning.callbacks.summary import write_json
from xscale_lightning.callbacks.verdict import Record, verdict
from xscale_lightning.errors import UserError


def results(tmp_path: Path) -> dict:
    return json.loads((tmp_path / "runs" / "a" / "results.json").read_text())


def test_results_hold_every_figure_with_its_step_0_value(
    make_data, make_method, make_trainer, tmp_path, capsys
) -> None:
    data = make_data()
    callbacks = [OnlineKNN(), FeatureGeometry(), ReconstructionPictures(), Throughput(), RunSummary()]
    trainer = make_trainer(*callbacks, max_steps=8)
    trainer.fit(make_method(data), datamodule=data)
    found = results(tmp_path)
    names = {"knn/tiny/top1", "geometry/rank", "geometry/uniformity", "geometry/cosine"}
    assert set(found["metrics"]) == names | {"reconstruction/psnr", "reconstruction/spectral_angle"}
    for record in found["metrics"].values():
        assert record["step_0"] is not None and record["last_step"] == 8
    assert set(found["metrics"]["reconstruction/psnr"]["baselines"]) == {"mean fill", "bilinear inpainting"}
    assert (found["steps"], found["images_seen"], found["status"]) == (8, 128, "finished")
    assert found["losses"]["train/loss"]["first"] > 0 and "last" in found["losses"]["val/loss"]
    assert found["speed"]["images_per_s"] > 0 and 0 <= found["speed"]["data_wait"] <= 1
    assert found["versions"]["torch"] and found["device"]["type"] == "cpu" and found["method"] == "tiny"
    printed = capsys.readouterr().out
    assert "step 0" in printed and "masked PSNR" in printed
    assert found["verdict"].replace(" ", "") in printed.replace("\n", "").replace(" ", "")
    assert [name for name in os.listdir(tmp_path / "runs" / "a") if name.endswith(".part")] == []


def test_step_0_survives_a_resume_and_reaches_test(make_data, make_method, make_trainer, tmp_path) -> None:
    data = make_data()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1)
    trainer = make_trainer(FeatureGeometry(), OnlineKNN(), RunSummary(), checkpoint, enable_checkpointing=True)
    trainer.fit(make_method(data), datamodule=data)
    first = results(tmp_path)["metrics"]
    (path,) = (tmp_path / "ckpt").glob("*.ckpt")
    torch.load(path, weights_only=True)["callbacks"]["RunSummary"]

    data = make_data()
    trainer = make_trainer(FeatureGeometry(), OnlineKNN(), RunSummary(), max_steps=6)
    trainer.fit(make_method(data), datamodule=data, ckpt_path=path)
    found = results(tmp_path)
    assert found["steps"] == 6 and found["images_seen"] == 96
    for name, record in found["metrics"].items():
        assert record["step_0"] == first[name]["step_0"] and record["last_step"] == 6

    data = make_data()
    trainer = make_trainer(FeatureGeometry(), OnlineKNN(), RunSummary())
    trainer.test(make_method(data), datamodule=data, ckpt_path=path, verbose=False)
    found = results(tmp_path)
    assert (found["command"], found["steps"]) == ("test", 4)
    record = found["metrics"]["knn/tiny/top1"]
    assert (record["step_0"], record["step_0_split"], record["split"]) == (
        first["knn/tiny/top1"]["step_0"],
        "val",
        "test",
    )
    assert "is below band statistics" in found["verdict"]  # step 0 was measured on another split


def test_without_a_checkpoint_the_step_0_value_is_said_to_be_missing(
    make_data, make_method, make_trainer, tmp_path, capsys
) -> None:
    data = make_data()
    make_trainer(OnlineKNN(), RunSummary()).validate(make_method(data), datamodule=data, verbose=False)
    assert results(tmp_path)["metrics"]["knn/tiny/top1"]["step_0"] is None
    assert "not measured" in capsys.readouterr().out


class Stop(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            raise RuntimeError("disk full")


def test_a_failed_run_says_so(make_data, make_method, make_trainer, tmp_path) -> None:
    data = make_data()
    with pytest.raises(RuntimeError, match="disk full"):
        make_trainer(OnlineKNN(), RunSummary(), Stop()).fit(make_method(data), datamodule=data)
    found = results(tmp_path)
    assert (found["status"], found["steps"]) == ("failed", 2)
    assert found["metrics"]["knn/tiny/top1"]["step_0"] is not None


def test_verdict_says_plainly_what_happened() -> None:
    rivals = {"mean fill": 17.0, "bilinear inpainting": 23.0}
    good = Record(step_0=12.1, step_0_split="val", last=24.1, last_step=9, baselines=rivals)
    expected = "It learned: masked PSNR 24.1 dB beats bilinear inpainting 23.0 dB (step 0: 12.1)."
    assert verdict({"reconstruction/psnr": good}) == expected
    bad = Record(step_0=12.1, step_0_split="val", last=21.0, last_step=9, baselines=rivals)
    text = verdict({"reconstruction/psnr": bad})
    assert text.startswith("It has not learned") and "does not beat bilinear inpainting 23.0 dB" in text
    knn = Record(step_0=0.67, step_0_split="val", last=0.6, last_step=9)
    text = verdict({"reconstruction/psnr": good, "knn/eurosat/top1": knn})
    assert text.startswith("Mixed") and "kNN top-1 on eurosat 0.600 is not above its step-0 value 0.670" in text
    assert "OnlineKNN.data" in verdict({"geometry/rank": Record(step_0=3.0, last=5.0)})
    nan = Record(step_0=12.1, step_0_split="val", last=float("nan"), baselines=rivals)
    assert verdict({"reconstruction/psnr": nan}).startswith("It has not learned")


def test_json_is_strict_and_whole(tmp_path: Path) -> None:
    path = write_json({"a": {"b": float("nan"), "c": 1.5}}, tmp_path / "new" / "x.json")
    assert json.loads(path.read_text()) == {"a": {"b": None, "c": 1.5}}
    with pytest.raises(TypeError):
        write_json({"a": object()}, path)
    assert json.loads(path.read_text()) == {"a": {"b": None, "c": 1.5}}
    assert os.listdir(path.parent) == ["x.json"]


def test_a_knn_difference_inside_its_noise_decides_nothing() -> None:
    def record(last: float, error: float) -> dict[str, Record]:
        return {"knn/sample/top1": Record(step_0=0.70, step_0_split="val", last=last, error=error)}

    noisy = verdict(record(0.712, 0.05))
    assert noisy.startswith("These figures do not show whether it learned") and "within the noise (± 0.100)" in noisy
    assert verdict(record(0.712, 0.001)).startswith("It learned")
    assert verdict(record(0.60, 0.001)).startswith("It has not learned")


def test_a_run_stopped_before_its_next_measurement_gets_no_verdict() -> None:
    start = Record(step_0=0.70, step_0_split="val", last=0.70, error=0.05)
    psnr = Record(step_0=10.0, step_0_split="val", last=10.0)
    assert verdict({"knn/x/top1": start, "reconstruction/psnr": psnr}).startswith("Nothing was measured after step 0")
    psnr.last_step = 5
    assert "masked PSNR" in verdict({"knn/x/top1": start, "reconstruction/psnr": psnr})


def test_a_psnr_of_another_split_than_step_0_says_so() -> None:
    rivals = {"mean fill": 17.0}
    record = Record(step_0=10.9, step_0_split="val", last=20.0, last_step=5, split="test", baselines=rivals)
    assert "(step 0: 10.9 on val)" in verdict({"reconstruction/psnr": record})
    record.baselines = {}
    assert "on test cannot be compared with step 0 (10.9 on val)" in verdict({"reconstruction/psnr": record})


def test_damage_is_counted_and_told_at_the_end(make_data, make_method, make_trainer, tmp_path, capsys) -> None:
    data = make_data()
    data.on_after_batch_transfer({"skipped": 3}, 0)
    data._recalled = {"val": [1, 4]}
    data.damage.first_time("a.tif")
    data.left_out = {"b.tif": "the file is empty (0 bytes)"}
    make_trainer(RunSummary()).fit(make_method(data), datamodule=data)
    found = results(tmp_path)
    assert found["skipped_samples"] == 3
    assert found["left_out_samples"] == {"val": 2}
    assert found["left_out"] == {"count": 1, "reasons": {"b.tif": "the file is empty (0 bytes)"}}
    printed = capsys.readouterr().out
    assert printed.count("3 damaged samples were replaced (1 file named above).") == 1
    assert printed.count("2 damaged samples are left out of the val split: no score counts them.") == 1
    assert printed.count("1 file or scene was left out (named above).") == 1
    data = make_data()
    make_trainer(RunSummary()).fit(make_method(data), datamodule=data)
    assert results(tmp_path)["skipped_samples"] == 0 and not {"left_out", "left_out_samples"} & set(results(tmp_path))
    assert "damaged" not in capsys.readouterr().out


class Refuse(Callback):
    """Refuses the first batch; `error` may be our kind or another."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        raise self.error


@pytest.fixture
def saved(make_data, make_method, make_trainer, tmp_path) -> Path:
    """Checkpoint of step 4 of a run with all its figures."""
    data = make_data()
    checkpoint = ModelCheckpoint(dirpath=tmp_path / "ckpt", every_n_train_steps=4, save_top_k=-1)
    callbacks = [OnlineKNN(), ReconstructionPictures(), RunSummary(), checkpoint]
    make_trainer(*callbacks, enable_checkpointing=True).fit(make_method(data), datamodule=data)
    (path,) = (tmp_path / "ckpt").glob("*.ckpt")
    return path


def test_a_resumed_run_refused_at_once_reports_nothing(
    saved, make_data, make_method, make_trainer, tmp_path, capsys
) -> None:
    (tmp_path / "runs" / "a" / "results.json").unlink()
    capsys.readouterr()
    data = make_data()
    trainer = make_trainer(OnlineKNN(), RunSummary(), Refuse(UserError("no")), max_steps=8)
    with pytest.raises(UserError, match="no"):
        trainer.fit(make_method(data), datamodule=data, ckpt_path=saved)
    assert "step 0" not in capsys.readouterr().out
    folder = tmp_path / "runs" / "a"
    assert not (folder / "results.json").exists()
    assert (folder / "pictures" / "step_0000004.png").exists(), "the earlier run's folder must stay"


def test_only_an_untouched_run_folder_of_our_own_errors_goes(make_data, make_method, make_trainer, tmp_path) -> None:
    folder = tmp_path / "runs" / "a"

    def fit(error: Exception) -> None:
        data = make_data()
        trainer = make_trainer(ReconstructionPictures(), RunSummary(), Refuse(error))
        with pytest.raises(type(error)):
            trainer.fit(make_method(data), datamodule=data)

    fit(UserError("no"))
    assert not folder.exists()
    fit(RuntimeError("a fault of the program"))
    assert (folder / "pictures" / "step_0000000.png").exists()
    notes = folder / "notes.txt"
    notes.write_text("mine")
    fit(UserError("no"))
    assert notes.exists() and list(folder.glob("events.out.*"))
    notes.unlink()
    for path in folder.glob("events.out.*"):
        os.utime(path, (1e9, 1e9))  # an earlier run's
    fit(UserError("no"))
    assert list(folder.glob("events.out.*"))


@pytest.mark.parametrize("verb", ["validate", "test"])
def test_the_checkpoint_says_the_step(saved, make_data, make_method, make_trainer, tmp_path, capsys, verb) -> None:
    for path in (tmp_path / "runs" / "a" / "pictures").iterdir():
        path.unlink()
    capsys.readouterr()
    data = make_data()
    callbacks = [OnlineKNN(), ReconstructionPictures(), RunSummary(), ProgressBar()]
    getattr(make_trainer(*callbacks), verb)(make_method(data), datamodule=data, ckpt_path=saved, verbose=False)
    assert os.listdir(tmp_path / "runs" / "a" / "pictures") == ["step_0000004.png"]
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    assert len(lines) == 2 and all(line.startswith("step 4: ") for line in lines)
    assert all((" on val)" in line) == (verb == "test") for line in lines)


def test_step_0_is_announced_once(make_data, make_method, make_trainer, caplog) -> None:
    data = make_data()
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        make_trainer(OnlineKNN(), FeatureGeometry(), ReconstructionPictures()).fit(make_method(data), datamodule=data)
    assert caplog.text.count("measuring step 0 ...") == 1
