"""`xscale sweep`: variants are checked first, one that fails does not stop the others, a table compares them."""

import json
import os
import sys
from pathlib import Path

import pytest
import yaml

from xscale_lightning import cli
from xscale_lightning.checkpoints import _flat
from xscale_lightning.commands import sweep
from xscale_lightning.commands.optional_args import settle_optional_args
from xscale_lightning.commands.parser import import_methods
from xscale_lightning.commands.stage_options import insert_configs, take_apart
from xscale_lightning.commands.stages import check
from xscale_lightning.commands.train import CLI, build
from xscale_lightning.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
ABLATIONS = ROOT / "configs" / "ablations" / "s2mae.yaml"
NARROW = [
    *("--model.backbone.depth", "1", "--model.backbone.dim", "16", "--model.backbone.num_heads", "2"),
    *("--model.decoder_dim", "16", "--model.decoder_heads", "2", "--trainer.accelerator", "cpu"),
    *("--trainer.devices", "1", "--data.batch_size", "4", "--data.num_workers", "0"),
]
BASE = {
    "seed_everything": 0,
    "model": {
        "class_path": "mae",
        "init_args": {"decoder_depth": 1, "backbone": {"name": "vit_tiny_patch8"}},
    },
    "data": {"class_path": "SyntheticData", "init_args": {"length": 8, "image_height": 16, "image_width": 16}},
    "trainer": {"max_steps": 1, "enable_progress_bar": False},
    "knn": {"max_train": 8, "max_test": 2},
    "geometry": {"max_samples": 2},
    "pictures": {"num_images": 1, "num_score_images": 1},
}


@pytest.fixture(autouse=True)
def process(monkeypatch, tmp_path):
    """The command line sets these for its process; the next test gets them back."""
    monkeypatch.setattr(sys, "argv", ["xscale"])
    monkeypatch.chdir(tmp_path)
    for name, value in (("PL_GLOBAL_SEED", "0"), ("PL_SEED_WORKERS", "0"), ("MPLBACKEND", "Agg")):
        monkeypatch.setenv(name, value)


def files(folder: Path, **variants: object) -> list[str]:
    """Arguments of a sweep over `variants`; its output is `folder/out`."""
    (folder / "base.yaml").write_text(yaml.safe_dump(BASE))
    (folder / "variants.yaml").write_text(yaml.safe_dump(variants))
    output = ["--output", str(folder / "out")]
    return [str(folder / "variants.yaml"), "--config", str(folder / "base.yaml"), *NARROW, *output]


def mask(ratio: float) -> dict:
    return {"model": {"init_args": {"mask_ratio": ratio}}}


def test_variants_run_and_are_compared(tmp_path, capsys):
    args = files(tmp_path, half=mask(0.5), most={**mask(0.7), "trainer": {"max_steps": 2}})
    assert sweep.main(["sweep", *args, "--knn.k", "3"], launch=cli.main) == 0
    (folder,) = (tmp_path / "out").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["half", "most", "sweep.json", "sweep.md"]
    records = json.loads((folder / "sweep.json").read_text())["variants"]
    assert [record["status"] for record in records.values()] == ["finished", "finished"]
    assert [record["steps"] for record in records.values()] == [1, 2]
    for name, ratio in (("half", 0.5), ("most", 0.7)):
        run = folder / records[name]["run"]
        results = json.loads((run / "results.json").read_text())
        assert yaml.safe_load((run / "config.yaml").read_text())["model"]["init_args"]["mask_ratio"] == ratio
        figures = records[name]["metrics"]["reconstruction/psnr"]
        assert figures == {key: results["metrics"]["reconstruction/psnr"][key] for key in ("step_0", "last")}
        assert records[name]["metrics"]["train/loss"]["last"] == results["losses"]["train/loss"]["last"]
    table = (folder / "sweep.md").read_text()
    assert "| half | finished |" in table and "reconstruction/psnr" in table.splitlines()[4]
    assert "most" in capsys.readouterr().out


def launches(codes: list[int]):
    """Takes note of the arguments and returns one code after the other; a negative one is Ctrl-C."""
    seen: list[list[str]] = []

    def launch(arguments: list[str]) -> int:
        seen.append(arguments)
        if codes[len(seen) - 1] < 0:
            raise KeyboardInterrupt
        return codes[len(seen) - 1]

    return launch, seen


def test_a_variant_that_fails_does_not_stop_the_others(tmp_path, capsys):
    launch, seen = launches([0, 1, 0])
    args = files(tmp_path, a={}, b=mask(0.5), c=None)
    assert sweep.main(["sweep", *args, "--knn.k", "3"], launch=launch) == 1
    (folder,) = (tmp_path / "out").iterdir()
    records = json.loads((folder / "sweep.json").read_text())["variants"]
    assert [record["status"] for record in records.values()] == ["finished", "failed", "finished"]
    assert "1 of 3 variants failed: b" in capsys.readouterr().err
    assert all(words[-2:] == ["--output", str(folder / name)] for words, name in zip(seen, "abc", strict=True))
    assert seen[1][1:5] == [*args[1:3], "--config", str(folder / "b" / "variant.yaml")]


def test_what_was_finished_stays_on_interruption(tmp_path):
    launch, _ = launches([0, -1])
    with pytest.raises(KeyboardInterrupt):
        sweep.main(["sweep", *files(tmp_path, a={}, b={}, c={}), "--knn.k", "3"], launch=launch)
    (record,) = (tmp_path / "out").glob("*/sweep.json")
    records = json.loads(record.read_text())["variants"]
    assert [records[name]["status"] for name in "abc"] == ["finished", "interrupted", "not run"]


def test_only_and_check(tmp_path, capsys):
    launch, seen = launches([0])
    args = [*files(tmp_path, a={}, b={}, c={}), "--knn.k", "3"]
    assert sweep.main(["sweep", *args, "--only", "c,a", "--check"], launch=launch) == 0
    assert "2 variants can run: a, c" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert sweep.main(["sweep", *args, "--only=b"], launch=launch) == 0
    assert len(seen) == 1


@pytest.mark.parametrize(
    ("variants", "args", "words"),
    [
        ({"a": {}, "b": {"model": {"init_args": {"mask_rtio": 1}}}}, [], ["variant 'b'", "mask_rtio", "mask_ratio"]),
        ({"a": {}, "b": {"data": {"init_args": {"image_width": 30}}}}, [], ["variant 'b'", "30"]),
        ({"a": {}}, ["--only", "z"], ["--only z", "known are a"]),
        ({"a": {"output": "x"}}, [], ["a has 'output'", "--output"]),
        ({"a/b": {}}, [], ["'a/b'", "letters"]),
        ({"a": 3}, [], ["a is '3'"]),
        ({}, [], ["no variants"]),
    ],
)
def test_wrong_variants_are_refused_before_the_first_runs(tmp_path, capsys, variants, args, words):
    assert cli.main(["sweep", *files(tmp_path, **variants), "--knn.k", "3", *args]) == 2
    err = capsys.readouterr().err
    message = err[err.index("xscale: error: ") :].strip()
    assert len(message.splitlines()) <= 2 and all(word in message for word in words), message
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("args", [["nowhere.yaml"], [], ["--config", "x.yaml"]])
def test_a_missing_file_of_variants(args, capsys):
    assert cli.main(["sweep", *args]) == 2
    assert ("nowhere.yaml" if args == ["nowhere.yaml"] else "Give it first") in capsys.readouterr().err


def test_results_of_a_run_in_stages_are_those_of_its_last_stage(tmp_path):
    for number in (2, 1):
        folder = tmp_path / "v" / "mae" / "now" / f"stage_{number}_x"
        folder.mkdir(parents=True)
        metrics = {"knn/x/top1": {"step_0": 0.1, "last": float(number), "last_step": 3}}
        content = {"metrics": metrics, "losses": {}, "steps": 3, "seconds": 1.0, "finished_at": f"{3 - number}"}
        (folder / "results.json").write_text(json.dumps({**content, "stage": {"number": number, "of": 2, "name": "x"}}))
    record = sweep.read_results(tmp_path / "v")
    assert record["metrics"]["knn/x/top1"] == {"step_0": 0.1, "last": 2.0} and record["stage"]["number"] == 2
    assert record["run"] == "v/mae/now/stage_2_x"


@pytest.mark.parametrize("name", list(yaml.safe_load(ABLATIONS.read_text())))
def test_every_ablation_can_run(name):
    overlay = json.dumps(yaml.safe_load(ABLATIONS.read_text())[name])
    options = ["--config", str(ROOT / "configs" / "s2mae.yaml"), *NARROW]
    command = take_apart(["fit", *insert_configs(options, ["--config", overlay])])
    check(command)
    with pytest.raises(UserError):
        check(take_apart([*["fit", *options], "--model.no_such_option", "1"]))


AFFINITY = yaml.safe_load(ABLATIONS.with_name("spatial_affinity.yaml").read_text())


@pytest.mark.parametrize("name", list(AFFINITY))
def test_every_comparison_of_spatial_affinity_can_run_and_says_all_that_the_others_change(name):
    configs = [str(ROOT / "configs" / file) for file in ("sa_latent_mim.yaml", "latent_mim_quick.yaml")]
    options = ["--config", configs[0], "--config", configs[1]]
    check(take_apart(["fit", *insert_configs(options, ["--config", json.dumps(AFFINITY[name])])]))
    arguments, default = (AFFINITY[n]["model"]["init_args"] for n in (name, "pair"))
    assert set(arguments) == set(default)
    assert sum(value != default[key] for key, value in arguments.items()) == (name != "pair")


OWN = {  # by variant, what it has in the place of `default`'s
    "positions_joint_sincos": {"backbone.position": "sincos", "backbone.spectral": "joint"},
    "positions_sincos": {"backbone.position": "sincos", "backbone.spectral": "sincos"},
    "positions_wavelength": {"backbone.spectral": "wavelength"},
    "decoder_2": {"decoder_depth": 2},
    "decoder_8": {"decoder_depth": 8},
    "target_none": {"normalize": "none"},
    "target_standardize": {"normalize": "standardize"},
    "patch_16": {"backbone.patch_size": 16},
    "mask_25": {"mask_ratio": 0.25},
    "mask_50": {"mask_ratio": 0.5},
    "mask_75": {"mask_ratio": 0.75},
}


@pytest.mark.parametrize("beneath", ["s2mae_quick.yaml", "quickstart.yaml"])
def test_every_ablation_differs_from_the_papers_choice_in_its_own_factor_alone(beneath):
    variants = sweep.read_variants(str(ABLATIONS))
    configs = [word for name in ("s2mae.yaml", beneath) for word in ("--config", str(ROOT / "configs" / name))]
    import_methods()
    parser = build(CLI, arguments=["fit", *configs, *NARROW], check_only=True).parser

    def resolved(overlay: dict) -> dict:
        arguments = ["fit", *insert_configs([*configs, *NARROW], ["--config", json.dumps(overlay)])]
        return dict(_flat(parser.parse_args(settle_optional_args(arguments)).fit.model.init_args.as_dict()))

    default = resolved(variants.pop("default"))
    paper = {"decoder_depth": 4, "mask_ratio": 0.9, "normalize": "minmax", "backbone.patch_size": 8}
    paper |= {"backbone.position": "learned", "backbone.spectral": "learned"}
    assert {name: default[name] for name in paper} == paper
    found = {name: resolved(overlay) for name, overlay in variants.items()}
    assert {name: {k: v for k, v in values.items() if v != default[k]} for name, values in found.items()} == OWN


@pytest.mark.slow
def test_an_ablation_trains_in_a_process_of_its_own(tmp_path, monkeypatch):
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    for name, value in (("PYTHONPATH", path), ("OMP_NUM_THREADS", "1")):
        monkeypatch.setenv(name, value)
    configs = ["--config", str(ROOT / "configs/s2mae.yaml"), "--config", str(ROOT / "configs/quickstart.yaml")]
    quick = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--knn.max_train", "8", "--knn.max_test"]
    quick += ["4", "--geometry.max_samples", "4", "--pictures.num_images", "1", "--pictures.num_score_images", "1"]
    options = [*NARROW, *quick, "--data.samples_per_epoch", "16", "--output", str(tmp_path)]
    assert cli.main(["sweep", str(ABLATIONS), "--only", "patch_16", *configs, *options]) == 0
    (record,) = tmp_path.glob("sweep_*/sweep.json")
    records = json.loads(record.read_text())["variants"]
    assert {name: content["steps"] for name, content in records.items()} == {"patch_16": 2}
