"""Scripts of the benchmarks folder as modules, which they are only when they are run from there."""

import importlib
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
MODULES = {path.stem for path in FOLDER.glob("*.py")} | {"references"}


@pytest.fixture
def load(monkeypatch):
    """Import a module of the benchmarks folder by name; afterwards they are gone again."""
    before = list(sys.path)
    monkeypatch.syspath_prepend(str(FOLDER))
    yield importlib.import_module
    for name in [name for name in sys.modules if name.split(".")[0] in MODULES]:
        del sys.modules[name]
    sys.path[:] = before
