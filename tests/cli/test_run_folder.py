"""What a run leaves in its folder: configuration, command line, environment."""

import json
import shlex
import subprocess

import pytest
import yaml

from xscale_lightning import __version__, cli
from xscale_lightning.callbacks.start_record import git_state

pytestmark = pytest.mark.usefixtures("process")


def test_the_folder_says_how_the_run_was_started(staged, tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hidden")
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    plain = tmp_path / "with space.yaml"
    content = {key: value for key, value in staged.config.items() if key != "stages"}
    plain.write_text(yaml.safe_dump({**content, "trainer": {**content["trainer"], "max_epochs": 1}}))
    words = ["fit", "-c", str(plain), "--output", str(tmp_path / "runs"), "--data.batch_size", "2"]
    assert cli.main([*words, "--debug"]) == 0
    (folder,) = (tmp_path / "runs" / "mae").iterdir()
    for name in ("config.yaml", "command.txt", "environment.json", "results.json"):
        assert (folder / name).is_file(), name
    assert shlex.split((folder / "command.txt").read_text()) == ["xscale", *words]
    text = (folder / "environment.json").read_text()
    found = json.loads(text)
    assert found["versions"]["xscale_lightning"] == __version__ and "torch" in found["versions"]
    assert found["device"]["type"] == "cpu" and found["variables"]["SLURM_JOB_ID"] == "17"
    assert "hidden" not in text
    assert yaml.safe_load((folder / "config.yaml").read_text())["data"]["init_args"]["batch_size"] == 2


def test_the_state_of_the_code_is_that_of_git(tmp_path):
    assert git_state(tmp_path) is None
    own = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c", "-C", str(tmp_path)]
    subprocess.run([*own, "init", "-q"], check=True)
    (tmp_path / "a").write_text("1")
    subprocess.run([*own, "add", "a"], check=True)
    subprocess.run([*own, "commit", "-q", "-m", "a"], check=True)
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["modified"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {**state, "modified": True}
