"""The package as a whole: what importing it costs, and what its tracked files may say."""

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import xscale_lightning

ROOT = Path(__file__).resolve().parents[1]
LOCK_LINE = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*==[0-9][A-Za-z0-9.]*")
# Assembled here so that this file does not contain what it forbids.
FORBIDDEN = [
    re.compile("".join(parts))
    for parts in (
        (r"(?<![\w.\-])/", r"(work|root|tmp|home)/\w"),  # a path on somebody's machine
        (r"\.\./", r"shared\b"),
        ("python", "hosted|", "pypi", r"\.org/simple|", "download", r"\.pytorch|", "registry", r"\.npmjs"),
        ("--(extra-)?index", "-url|--find", "-links"),
    )
]


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def lock() -> dict[str, str]:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line and line[0] != "#"]
    return dict(line.split("==") for line in lines)


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout


def test_import_is_light() -> None:
    code = "import sys, xscale_lightning; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    loaded = set(run_python(code).split())
    assert "xscale_lightning" in loaded
    assert not loaded & {"torch", "lightning", "numpy", "timm", "torchgeo", "jsonargparse", "rich"}


@pytest.mark.parametrize("name", [name for name in xscale_lightning.__all__ if name != "__version__"])
def test_public_names_resolve(name: str) -> None:
    value = getattr(xscale_lightning, name)
    assert value.__name__ == name
    assert name in dir(xscale_lightning)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = xscale_lightning.Nonsense


def test_lock_is_sorted_pins_and_nothing_else() -> None:
    lines = [line for line in (ROOT / "requirements.lock").read_text().splitlines() if line[:1] != "#"]
    assert lines and all(LOCK_LINE.fullmatch(line) for line in lines)
    names = [line.split("==")[0] for line in lines]
    assert names == sorted(set(names))


def test_lock_meets_every_bound() -> None:
    pins = lock()
    meta = project()
    wanted = meta["dependencies"] + [entry for extra in meta["optional-dependencies"].values() for entry in extra]
    for requirement in map(Requirement, wanted):
        assert requirement.name in pins, f"{requirement.name} is missing in requirements.lock"
        assert pins[requirement.name] in requirement.specifier, f"{requirement} excludes {pins[requirement.name]}"


def test_versions_are_in_sync() -> None:
    heading = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert heading is not None and heading[1] == xscale_lightning.__version__
    assert project()["dynamic"] == ["version"]
    try:
        installed = metadata.version("xscale-lightning")
    except metadata.PackageNotFoundError:
        pytest.skip("run from the source tree without an installation")
    assert installed == xscale_lightning.__version__


def test_tracked_files_name_no_machine_and_no_index() -> None:
    listing = subprocess.run(["git", "ls-files", "-z"], capture_output=True, text=True, cwd=ROOT)
    if listing.returncode != 0:
        pytest.skip("not a git checkout")
    found = []
    for name in filter(None, listing.stdout.split("\0")):
        try:
            text = (ROOT / name).read_text()
        except (UnicodeDecodeError, FileNotFoundError):  # imagery; or deleted but not yet committed
            continue
        found += [f"{name}: {match[0]}" for pattern in FORBIDDEN for match in pattern.finditer(text)]
    assert not found, "\n".join(found)
