"""`xscale bench`: everything is checked first, nothing is computed twice, what fails or stops leaves the rest alone."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from xscale_lightning import cli
from xscale_lightning.commands import bench
from xscale_lightning.commands.bench_cells import Cell, plan
from xscale_lightning.commands.bench_file import read_bench
from xscale_lightning.commands.bench_plot import draw
from xscale_lightning.commands.bench_results import Score, mark_best, matches, spent, t_quantile
from xscale_lightning.data.bands import generic
from xscale_lightning.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
BASE = {
    "model": {
        "class_path": "mae",
        "init_args": {
            **{"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2},
            "backbone": {"name": "vit_tiny_patch8", "depth": 2, "dim": 16, "num_heads": 2},
        },
    },
    "data": {
        "class_path": "SyntheticData",
        "init_args": {
            **{"length": 16, "batch_size": 4, "num_workers": 0, "image_height": 16, "image_width": 16},
            "bands": {"names": ["B02", "B03"]},
        },
    },
    "trainer": {"max_steps": 2, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    "knn": {"k": 3, "max_train": 8, "max_test": 4},
    "geometry": {"max_samples": 4},
    "pictures": {"num_images": 1, "num_score_images": 1},
}
TASK = {
    "model": {"class_path": "xscale_lightning.tasks.classification.Classification", "init_args": {}},
    "data": BASE["data"],
    "trainer": {"max_steps": 1, "accelerator": "cpu", "devices": 1, "enable_progress_bar": False},
    "checkpoint": {"monitor": "val/top1", "mode": "max"},
}

TUNED = {"finetune": "task.yaml", "metrics": ["test/top1"]}
# The least that passes for a checkpoint of ours.
RECORD = {"class_path": "xscale_lightning.methods.mae.MAE", "init_args": {}, "bands": generic(2).to_dict()}
CHECKPOINT = {"state_dict": {}, "xscale": RECORD}


@pytest.fixture(autouse=True)
def process(monkeypatch, tmp_path):
    """The command line sets these for its process; the next test gets them back."""
    monkeypatch.setattr(sys, "argv", ["xscale"])
    monkeypatch.chdir(tmp_path)
    for name, value in (("PL_GLOBAL_SEED", "0"), ("PL_SEED_WORKERS", "0"), ("MPLBACKEND", "Agg")):
        monkeypatch.setenv(name, value)


def write(folder: Path, **changes: object) -> str:
    """A bench of a model and the same untrained, asked with one seed; `changes` replace its keys."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "task.yaml").write_text(yaml.safe_dump(TASK))
    content = {
        "seeds": [0],
        "models": {"mae": {"fit": ["base.yaml"]}, "random": {"fit": "base.yaml", "steps": 0}},
        "evaluations": {"frozen": {"test": [], "metrics": ["knn/*/top1"]}},
    }
    path = folder / "small.yaml"
    path.write_text(yaml.safe_dump({**content, **changes}))
    return str(path)


def really(arguments: list[str]) -> tuple[int, str]:
    return cli.main(arguments), ""


class Pretend:
    """Writes what a run would write. `answers` gives the exit code, or -1 for Ctrl-C, by the folder's name."""

    def __init__(self, **answers: int) -> None:
        self.answers, self.seen = answers, list[list[str]]()

    def __call__(self, arguments: list[str]) -> tuple[int, str]:
        self.seen.append(arguments)
        place = Path(arguments[arguments.index("--output") + 1])
        name = place.parts[-3] + "_" + place.name.rsplit("-", 1)[0]
        run = place / "mae" / f"run_{len(list(place.glob('mae/*')))}"
        (run / "checkpoints").mkdir(parents=True)
        torch.save(CHECKPOINT, run / "checkpoints" / "last.ckpt")
        if code := self.answers.get(name, 0):
            if code < 0:
                raise KeyboardInterrupt
            return code, "it burnt"
        value = {"last": 0.5, "interval": [0.4, 0.6], "error": 0.05}
        metrics = {"knn/synthetic/top1": value} if arguments[0] == "test" else {"test/top1": value}
        content = {"metrics": metrics, "losses": {}, "images_seen": 8, "flops_per_image": 1e6, "seconds": 36.0}
        device = {"device": {"name": "abacus", "processes": 2}, "finished_at": "2026"}
        (run / "results.json").write_text(json.dumps({**content, **device}))
        return 0, ""


@pytest.fixture
def unchecked(monkeypatch):
    """Cells without the seconds that it takes to check them; the file's text is their key."""

    def plan(read, options):
        cells = []
        for name in read.models:
            key = f"{abs(hash((name, str(read.models[name])))):08x}"
            cells.append(Cell(name, "pretraining", 0, key, ("fit",)))
            cells += [Cell(name, other, 0, key, ("test",), cells[-1]) for other in read.evaluations]
        return cells

    monkeypatch.setattr(bench, "plan", plan)


def results(folder: Path) -> dict:
    return json.loads((folder / "results.json").read_text())


def test_models_meet_evaluations(tmp_path, capsys):
    evaluations = {
        "frozen": {"test": [], "metrics": ["knn/*/top1", "test/loss"]},
        "tuned": TUNED,
    }
    path = write(tmp_path, evaluations=evaluations)
    assert bench.main(["bench", path, "--output", "out"], launch=really) == 0, capsys.readouterr().err
    content = results(tmp_path / "out")
    assert {cell["status"] for cell in content["cells"]} == {"finished"} and content["problems"] == []
    assert [(cell["model"], cell["evaluation"]) for cell in content["cells"]] == [
        (model, name) for model in ("mae", "random") for name in ("pretraining", "frozen", "tuned")
    ]
    images = [cell["budget"]["images_seen"] for cell in content["cells"]]
    assert images == [8, 0, 4, 0, 0, 4]  # batches of four: two steps, none in a test, one step of fine-tuning
    assert content["cells"][0]["budget"]["flops"] > 0 and content["cells"][3]["budget"]["flops"] == 0
    for cell in content["cells"]:
        if cell["evaluation"] == "tuned":
            here = next((tmp_path / "out/runs" / cell["model"] / "seed_0").glob("tuned-*"))
            found = json.loads((here / cell["run"] / "results.json").read_text())
            (score,) = (s for s in content["scores"] if s["model"] == cell["model"] and s["evaluation"] == "tuned")
            assert score["values"] == [found["metrics"]["test/top1"]["last"]]
            assert score["interval"] == found["metrics"]["test/top1"]["interval"]
    # the untrained model is the one that a run of its seed would begin with
    checkpoints = [next((tmp_path / f"out/runs/{name}").rglob("last.ckpt")) for name in ("mae", "random")]
    trained, untrained = (torch.load(file, weights_only=True)["state_dict"] for file in checkpoints)
    assert not torch.equal(trained["backbone.blocks.0.mlp.fc1.weight"], untrained["backbone.blocks.0.mlp.fc1.weight"])
    table = (tmp_path / "out/table.md").read_text()
    assert "| mae | pretraining | 1 | 8 |" in table and "## tuned" in table and "Not finished" not in table
    assert np.asarray(Image.open(tmp_path / "out/bench.png")).std() > 0
    assert not list((tmp_path / "out").rglob("*.part"))

    def never(arguments):
        raise AssertionError("it was computed already")

    assert bench.main(["bench", path, "--output", "out"], launch=never) == 0
    assert capsys.readouterr().out.count("computed already") == 6


def test_a_changed_configuration_is_computed_anew(tmp_path, capsys):
    path = write(tmp_path)
    assert bench.main(["bench", path, "--output", "out"], launch=Pretend()) == 0
    capsys.readouterr()
    assert bench.main(["bench", path, "--output", "out", "--check", "--data.num_workers", "1"]) == 0
    assert "to run" not in capsys.readouterr().out  # the number of workers changes nothing
    write(tmp_path, evaluations={"frozen": {"test": [], "options": "--knn.k 2", "metrics": ["knn/*/top1"]}})
    assert bench.main(["bench", path, "--output", "out", "--check"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in lines if "pretraining" in line] == ["computed already"] * 2
    assert all(line.startswith("to run") for line in lines if "frozen" in line)
    launch = Pretend()
    models = {"mae": {"fit": "base.yaml", "steps": 3}, "random": {"fit": "base.yaml", "steps": 0}}
    assert bench.main(["bench", write(tmp_path, models=models), "--output", "out"], launch=launch) == 0
    assert ["/mae/" in " ".join(words) for words in launch.seen] == [True, True]  # training and what follows from it
    assert len(list((tmp_path / "out/runs/mae/seed_0").iterdir())) == 4  # the old ones are still there


def test_a_cell_that_fails_leaves_the_others_alone(unchecked, tmp_path, capsys):
    launch = Pretend(mae_pretraining=1)
    assert bench.main(["bench", write(tmp_path), "--output", "out"], launch=launch) == 1
    assert "mae, seed 0, pretraining failed: it burnt" in capsys.readouterr().err
    table = (tmp_path / "out/table.md").read_text()
    assert "pretraining failed: it burnt" in table and "mae, seed 0, frozen: not run" in table
    assert "| random | 0.500 [0.400, 0.600] | 1 |" in table and "| mae | - | 0 |" in table
    again = Pretend()
    assert bench.main(["bench", "small.yaml", "--output", "out"], launch=again) == 0
    assert len(again.seen) == 2 and not any("--ckpt_path" in words for words in again.seen[:1])


def test_an_interrupted_bench_goes_on(unchecked, tmp_path):
    path = write(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        bench.main(["bench", path, "--output", "out"], launch=Pretend(random_pretraining=-1))
    cells = {(cell["model"], cell["evaluation"]): cell["status"] for cell in results(tmp_path / "out")["cells"]}
    assert cells == {
        **{("mae", "pretraining"): "finished", ("mae", "frozen"): "finished"},
        **{("random", "pretraining"): "interrupted", ("random", "frozen"): "not run"},
    }
    launch = Pretend()
    assert bench.main(["bench", path, "--output", "out"], launch=launch) == 0
    first, second = launch.seen
    place = Path(first[first.index("--output") + 1])
    assert Path(first[first.index("--ckpt_path") + 1]) == place / "mae/run_0/checkpoints/last.ckpt"
    assert second[0] == "test" and str(place) in second[second.index("--ckpt_path") + 1]


def test_an_exit_code_of_ctrl_c_stops_the_bench(unchecked, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        bench.main(["bench", write(tmp_path), "--output", "out"], launch=Pretend(mae_pretraining=130))
    assert [cell["status"] for cell in results(tmp_path / "out")["cells"]] == ["interrupted", *["not run"] * 3]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for name in ("a", "b", "c"):
        path = tmp_path / name / "checkpoints/last.ckpt"
        path.parent.mkdir(parents=True)
        torch.save(CHECKPOINT if name == "a" else {"state_dict": {}, "xscale": {}}, path)
    path.write_bytes(path.read_bytes()[:-100])
    assert bench.newest(tmp_path) == tmp_path / "a/checkpoints/last.ckpt"
    (tmp_path / "a/checkpoints/last.ckpt").unlink()
    assert bench.newest(tmp_path) is None


def test_only_runs_what_is_named(unchecked, tmp_path, capsys):
    path = write(tmp_path)
    launch = Pretend()
    assert bench.main(["bench", path, "--output", "out", "--only", "random"], launch=launch) == 0
    assert len(launch.seen) == 2 and all("/random/" in " ".join(words) for words in launch.seen)
    assert cli.main(["bench", path, "--only", "randm"]) == 2
    assert "known are mae, random, frozen" in capsys.readouterr().err


def test_a_metric_that_nothing_has_is_told(unchecked, tmp_path, capsys):
    evaluations = {"frozen": {"test": [], "metrics": ["knn/*/top1", "knn/*/top5"]}}
    assert bench.main(["bench", write(tmp_path, evaluations=evaluations), "--output", "out"], launch=Pretend()) == 1
    assert "nothing is called knn/*/top5; there are knn/synthetic/top1" in capsys.readouterr().err


def test_a_checkpoint_is_a_model(tmp_path):
    assert cli.main(["fit", "--config", write(tmp_path).replace("small", "base"), "--output", "own"]) == 0
    (run,) = (tmp_path / "own/mae").iterdir()
    evaluations = {
        "frozen": {"test": [], "metrics": ["knn/*/top1"]},
        "tuned": TUNED,
    }
    models = {"own": {"init_from": str(run)}}
    read = read_bench(write(tmp_path, seeds=[0, 1], models=models, evaluations=evaluations))
    cells = plan(read, [])
    assert [(cell.evaluation, cell.seed) for cell in cells] == [("frozen", 0), ("tuned", 0), ("tuned", 1)]
    assert [cell.option for cell in cells] == ["--ckpt_path", *["--model.init_from"] * 2]
    keys = [cell.key for cell in cells]
    assert len(set(keys)) == 3
    checkpoint = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    checkpoint["state_dict"]["backbone.norm.weight"] += 1
    torch.save(checkpoint, run / "checkpoints/last.ckpt")
    assert not set(keys) & {cell.key for cell in plan(read, [])}  # other weights under the same path
    assert bench.main(["bench", "small.yaml", "--output", "out"], launch=Pretend()) == 0
    assert "| own | pretraining | 1 | 8 |" in (tmp_path / "out/table.md").read_text()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"modles": {}}, ["unknown key 'modles'", "did you mean 'models'"]),
        ({"models": {}}, ["no models"]),
        ({"seeds": [0, 0]}, ["seeds", "once"]),
        ({"seeds": ["a"]}, ["seeds is ['a']", "integers"]),
        ({"models": {"a": {"steps": 0}}}, ["models.a", "neither fit"]),
        ({"models": {"a": {"fit": ["nowhere.yaml"]}}}, ["models.a: fit", "'nowhere.yaml' does not exist"]),
        ({"models": {"a": {"fit": ["base.yaml"], "step": 0}}}, ["unknown key 'step'", "'steps'"]),
        ({"models": {"a": {"fit": ["base.yaml"], "steps": -1}}}, ["steps is -1"]),
        ({"models": {"a": {"init_from": "nowhere"}}}, ["model 'a'", "'nowhere' does not exist"]),
        ({"models": {"a": {"init_from": "x", "steps": 0}}}, ["steps without fit"]),
        ({"models": {"a": {"fit": ["base.yaml"], "options": "--output x"}}}, ["options has --output"]),
        ({"models": {"a": {"fit": ["base.yaml"], "options": "--model.mask_rtio 1"}}}, ["model 'a'", "mask_ratio"]),
        ({"models": {"a/b": {"fit": ["base.yaml"]}}}, ["'a/b'", "letters"]),
        ({"models": {"frozen": {"fit": ["base.yaml"]}}}, ["'frozen' is a model and an evaluation"]),
        ({"evaluations": {"e": {"metrics": ["test/top1"]}}}, ["evaluations.e", "neither test nor finetune"]),
        ({"evaluations": {"e": {"test": []}}}, ["metrics is None"]),
        ({"evaluations": {"e": {"test": [], "metrics": ["knnn/*/top1"]}}}, ["did you mean knn/*/top1"]),
        ({"evaluations": {"e": {"test": [], "metrics": ["top1"]}}}, ["'top1' is no metric"]),
        ({"evaluations": {"e": {"finetune": ["task.yaml"], "metrics": ["knn/*/top1"]}}}, ["begin with test/"]),
        ({"evaluations": {"e": {"finetune": ["base.yaml"], "metrics": ["test/top1"]}}}, ["no fine-tuning task"]),
        (
            {
                "evaluations": {
                    "e": {"finetune": "task.yaml", "options": "--data.bands.names [B02]", "metrics": ["test/f1"]}
                }
            },
            ["evaluation 'e' of model 'mae'", "missing B03", "adapt_bands"],
        ),
    ],
)
def test_wrong_files_are_refused_before_anything_runs(tmp_path, capsys, changes, words):
    assert cli.main(["bench", write(tmp_path, **changes), "--output", "out"]) == 2
    err = capsys.readouterr().err
    message = err[err.index("xscale: error: ") :].strip()
    assert len(message.splitlines()) <= 2 and all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("name", "word"), [("nowhere.yaml", "nowhere.yaml"), ("--only", "Give it first")])
def test_a_missing_file(name, word, capsys):
    assert cli.main(["bench", name]) == 2
    assert word in capsys.readouterr().err


def score(model: str, mean: float, half: float | None, metric: str = "test/top1") -> Score:
    interval = None if half is None else [mean - half, mean + half]
    return Score("e", metric, model, [mean], mean, interval, "seeds")


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([score("a", 0.5, 0.1), score("b", 0.8, 0.1)], ["b"]),
        ([score("a", 0.5, 0.1), score("b", 0.6, 0.1)], []),
        ([score("a", 0.5, 0.1), score("b", 0.8, None)], []),
        ([score("a", 0.5, 0.1)], []),
        ([score("a", 0.5, 0.1, "test/loss"), score("b", 0.8, 0.1, "test/loss")], ["a"]),
        ([score("a", 5, 0.1, "geometry/rank"), score("b", 8, 0.1, "geometry/rank")], []),
    ],
)
def test_the_best_is_marked_where_it_is_beyond_doubt(scores, best):
    assert [s.model for s in mark_best(scores) if s.best] == best


def test_the_interval_over_seeds_is_students():
    # tables of the t distribution; mean and deviation of 1, 2, 3 by hand
    known = {1: 12.706, 2: 4.303, 9: 2.262, 10: 2.228, 14: 2.145, 30: 2.042, 100: 1.984}
    assert {n: round(t_quantile(n), 3) for n in known} == known
    from xscale_lightning.commands.bench_results import _score

    found = _score("e", "test/top1", "m", [{"last": 1.0}, {"last": 2.0}, {"last": 3.0}])
    assert found.mean == 2 and found.interval_of == "seeds"
    assert np.allclose(found.interval or [], [2 - 4.3027 / math.sqrt(3), 2 + 4.3027 / math.sqrt(3)])
    alone = _score("e", "test/top1", "m", [{"last": 0.5, "error": 0.1, "interval": None}])
    assert np.allclose(alone.interval or [], [0.304, 0.696]) and alone.interval_of == "samples"


def test_names_match_part_by_part():
    assert matches("knn/*/top1", "knn/eurosat/top1") and not matches("knn/*/top1", "knn/eurosat/scale_50/top1")


def test_stages_cost_what_they_cost_together():
    stage = {"images_seen": 10, "flops_per_image": 2.0, "seconds": 1800.0, "device": {"name": "x", "processes": 1}}
    budget = spent([stage, {**stage, "images_seen": 5, "flops_per_image": 4.0}], training=True)
    assert (budget.images_seen, budget.flops, budget.hours, budget.device) == (15, 40.0, 1.0, "x")
    assert spent([{**stage, "flops_per_image": None}], training=True).flops is None


def test_panels_show_what_there_is():
    models = ["a", "b"]
    one = draw([score("a", 0.5, 0.1), score("b", 0.8, None)], models)
    four = draw([score("a", 0.5, 12.0, f"test/{i}") for i in range(4)], models)
    assert one[:4] == four[:4] == b"\x89PNG" and one != four


def test_the_shipped_bench_can_run(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    read = read_bench("configs/bench/quickstart.yaml")
    cells = plan(read, ["--data.num_workers", "0", "--trainer.accelerator", "cpu"])
    assert len(cells) == len(read.seeds) * len(read.models) * (1 + len(read.evaluations))
    assert len({cell.key for cell in cells}) == len(cells)
    with pytest.raises(UserError):
        plan(read, ["--model.no_such_option", "1"])


@pytest.mark.slow
def test_the_shipped_bench_runs(tmp_path, monkeypatch):
    """One seed of one model, two steps of a thinner encoder, and every evaluation of it."""
    monkeypatch.chdir(ROOT)
    content = yaml.safe_load(Path("configs/bench/quickstart.yaml").read_text())
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump({**content, "seeds": [0], "models": {"mae": content["models"]["mae"]}}))
    short = ["--trainer.max_steps", "2", "--data.samples_per_epoch", "16", "--data.batch_size", "4", "--knn.max_train"]
    short += ["16", "--knn.max_test", "8", "--geometry.max_samples", "4", "--pictures.num_score_images", "2"]
    short += ["--data.num_workers", "0", "--trainer.accelerator", "cpu", "--dense.epochs", "12"]
    short += ["--model.backbone.depth", "1", "--model.decoder_depth", "1"]
    assert bench.main(["bench", str(path), "--output", str(tmp_path / "out"), *short], launch=really) == 0
    content = results(tmp_path / "out")
    assert {s["model"] for s in content["scores"]} == {"mae"} and content["problems"] == []
    names = {"knn/sample/top1", "linear/sample/top1", "dense/sample/miou"}
    assert {s["metric"] for s in content["scores"]} == names


def test_cells_run_in_a_process_of_their_own_and_its_error_is_told(monkeypatch, capfd):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert bench.in_new_process(["--version"]) == (0, "")
    code, error = bench.in_new_process(["trian"])
    assert code == 2 and "trian" in error and not error.startswith("xscale")
    assert error in capfd.readouterr().err
