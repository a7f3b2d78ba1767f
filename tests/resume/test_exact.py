"""A run that is killed and resumed, again and again, is the run that never was: bit for bit, hook for hook."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback

from xscale_lightning.callbacks.trace import differences, read_rows, read_trace

pytestmark = pytest.mark.usefixtures("seed")


def check(train: Callable, folder: Path, kills: list[int], **options) -> None:
    """Kill before each of these batches; all lines, also of batches run twice, are those of a straight run."""
    log = train(folder, "straight", **options)
    straight, seen = read_trace(folder / "straight.txt"), []
    last = folder / "killed" / "checkpoints" / "last.ckpt"
    for kill in [*kills, None]:
        part = train(folder, "killed", kill, ckpt_path=last if last.is_file() else None, **options)
        seen += part
    killed = read_trace(folder / "killed.txt")
    assert not differences(straight, killed), differences(straight, killed)[:3]
    assert set(read_rows(folder / "killed.txt")) == set(straight.values())
    assert set(log) == set(seen), set(log) ^ set(seen)
    one, two = (
        torch.load(folder / name / "checkpoints/last.ckpt", weights_only=True) for name in ("straight", "killed")
    )
    assert one["loops"]["fit_loop"] == two["loops"]["fit_loop"] and one["global_step"] == two["global_step"]


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 18}], ids=["epochs", "steps"])
@pytest.mark.parametrize(
    "validation", [{}, {"limit_val_batches": 0}, {"val_check_interval": 3}], ids=["end", "no", "3"]
)
def test_inside_an_epoch_at_its_ends_and_around_validations(train, tmp_path, length, validation):
    check(train, tmp_path, [2, 3, 6, 7, 8, 13, 14, 17], **length, **validation)


@pytest.mark.parametrize("length", [{"max_epochs": 3}, {"max_steps": 8}], ids=["epochs", "steps"])
@pytest.mark.parametrize("validation", [{}, {"val_check_interval": 4}], ids=["end", "4"])
def test_accumulated_gradients(train, tmp_path, length, validation):
    """Windows of 3, 3 and 1 batches in epochs of 7: kills between the batches of a step, and at their ends."""
    check(train, tmp_path, [2, 4, 5, 6, 7, 8, 11, 14], accumulate_grad_batches=3, **length, **validation)


@pytest.mark.parametrize("kind", ["synthetic", "scene"])
def test_worker_processes(train, tmp_path, kind):
    check(train, tmp_path, [3, 9], kind=kind, workers=2, max_epochs=2)


def test_a_method_with_a_target_network(train, tmp_path):
    check(train, tmp_path, [3, 7, 10], method="ijepa", kind="scene", max_epochs=2)


def test_checkpoints_at_steps_that_fall_on_validations_and_ends_of_epochs(train, tmp_path):
    """`every_n_train_steps` as configured, and no file of a moment from which a run would go on differently."""
    saving = {"minutes": None, "every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}
    options = {"val_check_interval": 3, "saving": saving}
    log = train(tmp_path, "straight", **options)
    straight = read_trace(tmp_path / "straight.txt")
    files = sorted((tmp_path / "straight/checkpoints").glob("step=*.ckpt"))
    assert [int(file.stem.split("=")[1]) for file in files] == [12, 15, 18, 21, 3, 6, 9]
    for number, file in enumerate(files):
        part = train(tmp_path, f"again_{number}", ckpt_path=file, **options)
        again = read_trace(tmp_path / f"again_{number}.txt") if (tmp_path / f"again_{number}.txt").is_file() else {}
        first = int(file.stem.split("=")[1])
        assert list(again) == list(range(first, 21)) and not differences({n: straight[n] for n in again}, again)
        assert part == log[len(log) - len(part) :], file


def test_no_checkpoint_between_the_batches_of_a_step(train, tmp_path):
    train(tmp_path, "straight", kill=4, accumulate_grad_batches=3)
    state = torch.load(tmp_path / "straight/checkpoints/last.ckpt", weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]["ready"] == 3


class StopAfter(Callback):
    """Asks for the end of the run, as `max_time` does, when so many batches are done."""

    def __init__(self, batches: int) -> None:
        self.batches = batches

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = trainer.should_stop or trainer.fit_loop.total_batch_idx + 1 == self.batches


def test_a_run_that_stops_by_itself_inside_an_epoch(train, tmp_path):
    options = {"accumulate_grad_batches": 3, "max_epochs": 2}
    train(tmp_path, "straight", **options)
    for batches, done in ((3, 3), (4, 6), (7, 7)):  # the end of a step, inside one, the end of the epoch
        name = f"stop_{batches}"
        train(tmp_path, name, callbacks=[StopAfter(batches)], saving={}, **options)
        assert list(read_trace(tmp_path / f"{name}.txt")) == list(range(done))
        train(tmp_path, name, ckpt_path=tmp_path / name / "checkpoints" / "last.ckpt", **options)
        assert not differences(read_trace(tmp_path / "straight.txt"), read_trace(tmp_path / f"{name}.txt")), batches
