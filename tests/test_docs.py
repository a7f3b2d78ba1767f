"""The pages build strictly, their links lead somewhere, and their Python runs."""

import ast
import importlib
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```python([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def python_blocks(page: Path) -> list[tuple[str, str]]:
    """`(title, code)` of every Python block."""
    found = BLOCK.findall(page.read_text(encoding="utf-8"))
    return [(title[1] if (title := re.search(r'title="(.+?)"', head)) else "", code) for head, code in found]


@pytest.mark.slow
@pytest.mark.skipif(find_spec("mkdocs") is None or find_spec("mkdocstrings") is None, reason="needs the docs extra")
def test_the_site_builds_strictly(tmp_path):
    # No proxy, no network: whatever the theme wants to fetch would fail.
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "https_proxy": "http://127.0.0.1:9"}
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "check_method" in (tmp_path / "reference" / "index.html").read_text()
    pages = "".join(page.read_text() for page in tmp_path.rglob("*.html"))
    assert "fonts.googleapis" not in pages


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_internal_links(page):
    for target in re.findall(r"\]\((?!https?:)([^)#\s]*)(?:#[^)]*)?\)", page.read_text(encoding="utf-8")):
        found = page.parent / target  # the pages of tutorials are made of their scripts
        assert found.exists() or found.with_suffix(".py").exists(), f"{page.name} links to {target}"


def test_every_page_is_in_the_navigation():
    text = (ROOT / "mkdocs.yml").read_text()
    pages = re.findall(r": (\S+\.md)$", text, re.MULTILINE)
    docs = ROOT / "docs"
    sources = [*docs.rglob("*.md"), *(script.with_suffix(".md") for script in docs.glob("tutorials/*.py"))]
    assert sorted(pages) == sorted(str(p.relative_to(docs)) for p in sources)
    assert yaml.safe_load(text.split("plugins:")[0])["theme"]["font"] is False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page, tmp_path, monkeypatch):
    """Blocks of a page run one after the other; titled ones are files, and those with PATH_TO_ are compiled only."""
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "page"}
    for title, code in python_blocks(page):
        if title or "PATH_TO_" in code:
            ast.parse(code)
        else:
            exec(compile(code, str(page), "exec"), names)


@pytest.mark.slow
def test_the_method_on_the_page_keeps_the_contract(tmp_path, monkeypatch):
    """The code of docs/add-a-method.md, as it stands there: under 100 lines, and its own test passes."""
    files = {title: code for title, code in python_blocks(ROOT / "docs" / "add-a-method.md") if title}
    assert sum(len(code.splitlines()) for code in files.values()) < 100
    for name, code in files.items():
        (tmp_path / name).write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    importlib.import_module("test_masked_features").test_the_contract()
    for name in files:
        sys.modules.pop(name.removesuffix(".py"), None)


def test_the_configuration_on_the_page_builds_the_method(tmp_path, monkeypatch, capsys):
    from xscale_lightning.cli import main

    page = ROOT / "docs" / "add-a-method.md"
    (tmp_path / "masked_features.py").write_text(dict(python_blocks(page))["masked_features.py"])
    block = re.search(r'^```yaml title="masked_features.yaml"\n(.*?)^```$', page.read_text(), re.MULTILINE | re.DOTALL)
    assert block
    (tmp_path / "masked_features.yaml").write_text(block[1])
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["xscale"])
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", "masked_features.yaml", "--print_config"])
    sys.modules.pop("masked_features", None)
    assert not stop.value.code
    assert "class_path: masked_features.MaskedFeatures" in capsys.readouterr().out
