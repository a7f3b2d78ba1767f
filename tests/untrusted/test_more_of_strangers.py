"""Hostile files of further kinds: refused in a line or two, in bounded time and memory, and nothing is run."""

import contextlib
import resource
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from xscale_lightning import checkpoints
from xscale_lightning.callbacks.run_checkpoint import RunCheckpoint
from xscale_lightning.callbacks.saving import CheckpointFiles
from xscale_lightning.errors import UserError
from xscale_lightning.init_from import load_encoder
from xscale_lightning.pretrained import load_backbone
from xscale_lightning.readers.common import open_published

sys.path.insert(0, str(Path(__file__).parent))
import strange_exports
import strangers

SECONDS, KILOBYTES = 60, 1_000_000
LONGEST = 700  # characters of a refusal, a path of pytest's among them


@contextlib.contextmanager
def bounded() -> Iterator[None]:
    """Time and memory, and no way out of the process."""
    calls, active = [], [True]

    def too_long(*args: object) -> None:
        raise TimeoutError(f"more than {SECONDS} s")

    def hook(event: str, arguments: tuple) -> None:
        if active[0] and event in ("os.system", "subprocess.Popen", "os.exec", "socket.connect"):
            calls.append(event)

    sys.addaudithook(hook)
    taken, before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, signal.signal(signal.SIGALRM, too_long)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        active[0] = False
    assert not calls
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - taken < KILOBYTES


def refused(read) -> str:
    with bounded(), pytest.raises(UserError) as caught:
        read()
    text = str(caught.value)
    assert len(text.splitlines()) <= 2 and len(text) < LONGEST
    assert f"more than {SECONDS} s" not in text
    assert text.replace("\n", "").isprintable() and not Path(strangers.TRACE).exists()
    return text


@pytest.mark.parametrize("kind", strangers.CHECKPOINTS)
def test_checkpoints(good, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = strangers.CHECKPOINTS[kind](good, tmp_path)
    refused(lambda: checkpoints.load_method(path))
    if kind in strangers.LONG:
        return
    refused(lambda: load_backbone(path))
    if kind not in strangers.RECORDED:
        refused(lambda: open_published(path))
        refused(lambda: load_encoder(path))
        refused(lambda: CheckpointFiles().load_checkpoint(path, weights_only=True))


@pytest.mark.parametrize("kind", strange_exports.EXPORTS)
def test_exports(good, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    path = strange_exports.EXPORTS[kind](good.parent / "export", tmp_path)
    refused(lambda: load_backbone(path))
    refused(lambda: load_encoder(path))


def test_the_good_ones_are_read(good):
    assert len(load_backbone(good).bands) == len(load_backbone(good.parent / "export").bands) == 2
    assert load_encoder(good)[0].depth == 1


@pytest.mark.parametrize(
    "path",
    ["{elsewhere}", "local://{elsewhere}", "file://{elsewhere}", "{run}/../elsewhere", "x::{elsewhere}", 7, None],
)
def test_no_file_outside_of_the_run_is_removed(tmp_path, path):
    """Lightning removes the files that a checkpoint lists as its older ones, and folders with all that is in them."""
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    given = path.format(run=run, elsewhere=elsewhere) if isinstance(path, str) else path
    for state in (
        {
            "last_model_path": given,
            "kth_best_model_path": given,
            "best_k_models": {given: 0.5},
            "best_model_path": given,
        },
        {"last_model_path": given, "best_k_models": [given], "dirpath": str(run)},
    ):
        checkpoint = RunCheckpoint(dirpath=run, save_top_k=1, monitor="x")
        checkpoint.load_state_dict(state)
        assert (checkpoint.last_model_path, checkpoint.kth_best_model_path, checkpoint.best_k_models) == ("", "", {})
    kept = {"dirpath": str(run), "last_model_path": str(run / "last.ckpt"), "best_k_models": {str(run / "a.ckpt"): 0.5}}
    checkpoint.load_state_dict(kept)
    assert (checkpoint.last_model_path, checkpoint.best_k_models) == (kept["last_model_path"], kept["best_k_models"])
