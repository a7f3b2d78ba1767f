"""The golden cases agree, through the command, and a wrong number is noticed."""

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
import run_case  # noqa: E402 (a script, so its folder is put on the path first)

CASES = sorted((HERE / "cases").glob("*.json"))


@pytest.mark.slow
def test_golden_cases_agree(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run_case.py", *map(str, CASES)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(HERE / "run_case.py"), run_name="__main__")
    out = capsys.readouterr().out
    assert not stop.value.code, out[-3000:]
    assert "all numbers agree" in out and out.count("grad ") >= 12


@pytest.mark.slow
@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_a_wrong_number_is_noticed(path, tmp_path, capsys):
    case = json.loads(path.read_text())
    run_name = next(iter(case["runs"]))
    case["runs"] = {run_name: case["runs"][run_name]}
    golden, exact = (case["runs"][run_name].get(key, {}) for key in ("golden", "golden_formula_tables"))
    name = next(iter(golden))
    golden[name] += 1e-8
    if name in exact:  # compared in its place, to 1e-8
        exact[name] += 2e-8
    (tmp_path / "wrong.json").write_text(json.dumps(case))
    assert run_case.main([str(tmp_path / "wrong.json")]) == 1
    out = capsys.readouterr().out
    assert (
        f"  {name} " in next(line for line in out.splitlines() if line.endswith("OFF")) and "1 numbers are off" in out
    )


def test_numbers_with_exact_tables_replace_the_plain_ones(monkeypatch):
    def numbers(case, run):
        golden = case["runs"][run]["golden"]
        ours = {"loss": 1 + 5e-9, "check": 2 + 5e-7, "first": [1.0, 2.0 + 5e-6]}
        yield from run_case.compare_all(ours, {**golden, "check": 2.0, "first": [1.0, 2.0], "strange": 3.0, "no": None})

    monkeypatch.setitem(sys.modules, "parity_fake", SimpleNamespace(numbers=numbers))
    entry = {"golden": {"loss": 1 + 9e-8}}
    names = ["loss", "check", "first[0]", "first[1]", "strange", "no"]
    for exact, good in (
        ({"golden_formula_tables": {"loss": 1.0}}, ["loss", "check", "first[0]", "no"]),
        ({}, ["first[0]", "no"]),
    ):
        found = list(run_case.numbers({"method": "fake", "runs": {"one": {**entry, **exact}}}, "one"))
        assert [number.name for number in found] == names
        assert [number.name for number in found if number.good] == good


def test_broken_cases_and_unknown_names_do_not_end_the_others(tmp_path, capsys):
    case = json.loads((HERE / "cases" / "cross_scale_mae_odd.json").read_text())
    run = case["runs"]["pre_norm"]
    case["runs"] = {"pre_norm": run}
    case["config"]["flavour"] = "mint"
    run["golden"]["strange"] = 1.0
    run["fill_check"]["sum"] = 1.0
    run["checks"] = {"decoder_a": {"shape": [3, 5, 20], "median": 1.0}}
    (tmp_path / "odd.json").write_text(json.dumps(case))
    (tmp_path / "empty.json").write_text("{}")
    assert run_case.main([str(tmp_path / name) for name in ("none.json", "empty.json", "odd.json")]) == 1
    out = capsys.readouterr().out
    off = [line for line in out.splitlines() if line.endswith("OFF")]
    assert [name for line, name in zip(off, ("none.json", "empty.json", "odd.json", "strange"), strict=False)
            if name not in line] == []  # fmt: skip
    assert len(off) == 6 and "shape [3, 25, 20], not [3, 5, 20]" in off[4] and "decoder_a.median" in off[5]
    assert "not read: flavour" in out and "grad predictor.3.bias" in out and "6 numbers are off" in out


def test_what_a_case_leaves_out_has_the_published_value(tmp_path):
    case = json.loads((HERE / "cases" / "cross_scale_mae.json").read_text())
    for name in ("decoder_norm_eps", "bn_eps", "bn_momentum", "mlp_ratio", "tau", "mask_ratio", "tokens", "batch"):
        del case["config"][name]
    case["runs"] = {"pre_norm": case["runs"]["pre_norm"]}
    case["config"] |= {"w_cc": 1.0, "loss_weight_re": 1.0, "lambda_cp": 1.0}
    (tmp_path / "short.json").write_text(json.dumps(case))
    assert run_case.main([str(tmp_path / "short.json")]) == 0
    case["config"]["contrastive_weight"] = case["config"].pop("w_cc") / 2
    (tmp_path / "weight.json").write_text(json.dumps(case))
    assert run_case.main([str(tmp_path / "weight.json")]) == 1


@pytest.mark.parametrize("method", ["ijepa", "latent_mim"])
def test_sizes_are_told_by_the_tensors(method, tmp_path):
    case = json.loads((HERE / "cases" / f"{method}_odd.json").read_text())
    told = {"heads", "predictor_heads", "decoder_heads", "norm_eps", "head_norm_eps", "target_norm_eps"}
    told |= {"patch_gap", "tau"}
    case["config"] = {name: value for name, value in case["config"].items() if name in told}
    case["tensors"].reverse()
    for run in case["runs"].values():
        for name in ("loss", "sa_mode") if run["config"].get("loss") != "norm_l2" else ():
            run["config"].pop(name, None)
        run["indices"] = {name: value for name, value in run.get("indices", {}).items() if name != "hr_children"}
    (tmp_path / "bare.json").write_text(json.dumps(case))
    assert run_case.main([str(tmp_path / "bare.json")]) == 0
