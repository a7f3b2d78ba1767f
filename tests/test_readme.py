"""Every command in the README and on the pages exists, parses and, where it is cheap, runs."""

import re
import shlex
import sys
from pathlib import Path

import pytest
import yaml

from xscale_lightning.cli import COMMANDS, main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TRAINER_VERBS = {"fit", "validate", "test", "predict"}
PLACEHOLDER = re.compile(r"PATH_TO_[A-Z]+")


def blocks(page: Path, language: str) -> list[str]:
    """Contents of the fenced blocks of one language."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(pages: list[Path]) -> list[str]:
    """Lines of the bash blocks, each once."""
    seen = {line for page in pages for block in blocks(page, "bash") for line in block.splitlines() if line.strip()}
    return sorted(seen)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run `xscale` in this process from the repository's root; returns (exit code, output)."""
    monkeypatch.chdir(ROOT)

    def run(*args: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["xscale", *args])
        try:
            code = main(args)
        except SystemExit as stop:  # --help and --print_config
            code = int(stop.code or 0)
        out = capsys.readouterr()
        return code, out.out + out.err

    return run


def fill_placeholders(command: str, folder: Path, config: str) -> str:
    """Temporary paths in place of the user's; a run's configuration is a shipped one."""
    command = command.replace("PATH_TO_RUN/config.yaml", config)
    return PLACEHOLDER.sub(lambda match: str(folder), command)


def test_the_first_two_commands_are_demo_and_test():
    assert [block.strip() for block in blocks(ROOT / "README.md", "bash")[:2]] == ["make demo", "make test"]


def test_the_environment_is_activated_before_the_first_xscale_command():
    lines = [line for block in blocks(ROOT / "README.md", "bash") for line in block.splitlines()]
    first = next(i for i, line in enumerate(lines) if line.startswith("xscale"))
    assert any(line.startswith("source ") for line in lines[:first])


def test_the_figures_are_of_the_shipped_quickstart():
    settings = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    data, epochs = settings["data"]["init_args"], settings["trainer"]["max_epochs"]
    steps = epochs * (data["samples_per_epoch"] // data["batch_size"])
    assert f"{epochs} epochs = {steps} steps" in (ROOT / "README.md").read_text(encoding="utf-8")
    lr, batch = float(settings["model"]["init_args"]["optimizer"]["lr"]), data["batch_size"]
    line = f"learning rate {lr:g} x {batch} / 256 = {lr * batch / 256:.4g} ({batch} samples per step), {steps} steps"
    for page in ("quickstart.md", "configuration.md"):
        assert line in (ROOT / "docs" / page).read_text(encoding="utf-8")


def test_the_readme_is_short_and_starts_with_a_picture():
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) < 150
    picture = re.match(r"!\[.+\]\((.+)\)", lines[0])
    assert picture and (ROOT / picture[1]).stat().st_size < 300_000


def test_the_tables_list_the_methods_and_verbs_that_there_are():
    from xscale_lightning.methods.discovery import BUILT_IN

    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`xscale ([a-z-]+)`", text)) == set(COMMANDS)
    assert set(re.findall(r"^\| `([a-z0-9_]+)` \|", text, re.MULTILINE)) == set(BUILT_IN)


@pytest.mark.parametrize("command", commands(PAGES))
def test_command(command, run, tmp_path):
    words = shlex.split(fill_placeholders(command, tmp_path, "configs/quickstart.yaml"))
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif words[0] == "xscale":
        check_xscale(words[1:], run, tmp_path)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()
    elif words[0] == "source":
        venv = re.search(r"^VENV +:= (\S+)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert venv and words[1] == f"{venv[1]}/bin/activate"
    else:
        assert words[0] in ("pip", "tensorboard")


def check_xscale(words: list[str], run, tmp_path: Path) -> None:
    """Parse commands that train, run the others."""
    if words[0] in TRAINER_VERBS:
        if "--config" in words and words[words.index("--config") + 1] == "configs/quickstart.yaml":
            words[words.index("--config") : words.index("--config")] = ["--config", "configs/mae.yaml"]
        if not any(word in ("--help", "--print_config") or word.endswith(".help") for word in words):
            words = [*words, "--print_config"]
    elif words[0] == "new-method":
        words = [*words, "--into", str(tmp_path)]
    elif words[0] in ("doctor", "schema", "sweep", "bench", "reconstruct", "export", "embed", "stats", "completion"):
        words = [*words, "--help"]  # they take seconds or a checkpoint, and have tests of their own
    code, out = run(*words)
    assert code == 0, out
    if "--print_config" in words:
        text = out[out.index("seed_everything") if "seed_everything" in out else 0 :]
        assert "class_path: xscale_lightning.methods" in text


def test_version(run):
    assert run("--version")[0] == 0


@pytest.mark.slow
def test_the_demo_trains(run, tmp_path):
    """The demo's command with two steps and little to evaluate."""
    demo = re.search(r"^\t@\$\(BIN\)/xscale (fit .*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert demo
    limits = ["--trainer.max_epochs", "-1", "--trainer.max_steps", "2", "--trainer.limit_val_batches", "1"]
    small = ["--data.batch_size", "4", "--data.samples_per_epoch", "8", "--knn.max_train", "16", "--knn.max_test", "8"]
    pictures = ["--pictures.num_score_images", "4", "--geometry.max_samples", "8", "--output", str(tmp_path)]
    words = demo[1].replace("$(METHOD)", "mae").replace("$(QUICK)", "configs/quickstart.yaml")
    code, out = run(*shlex.split(words), *limits, *small, *pictures)
    assert code == 0, out
    assert len(list(tmp_path.glob("mae/*/results.json"))) == 1
    assert list(tmp_path.glob("mae/*/pictures/*.png"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_yaml_blocks_are_yaml(page):
    for block in blocks(page, "yaml"):
        assert isinstance(yaml.safe_load(block), dict)


def test_the_citation_file_is_valid_yaml_of_this_version():
    import xscale_lightning

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == xscale_lightning.__version__ and citation["license"] == "Apache-2.0"
