"""The golden cases agree, through the command, and a wrong number is noticed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
CASES = sorted((HERE / "cases").glob("*.json"))


def run(*paths: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, HERE / "run_case.py", *paths]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=HERE.parents[1])


@pytest.mark.slow
def test_golden_cases_agree():
    done = run(*CASES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "all numbers agree" in done.stdout and done.stdout.count("grad ") >= 12


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_wrong_number_is_noticed(path, tmp_path):
    case = json.loads(path.read_text())
    run_name = next(iter(case["runs"]))
    case["runs"] = {run_name: case["runs"][run_name]}
    golden = case["runs"][run_name]["golden"]
    name = next(iter(golden))
    golden[name] += 1e-8
    (tmp_path / "wrong.json").write_text(json.dumps(case))
    done = run(tmp_path / "wrong.json")
    assert done.returncode == 1 and f"  {name} " in next(x for x in done.stdout.splitlines() if x.endswith("OFF"))
