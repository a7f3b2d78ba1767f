"""`model.optional_args`: for the methods that have them, left out for the others, and typing errors refused."""

import json
from pathlib import Path

import pytest
import yaml

from xscale_lightning.commands.optional_args import settle_optional_args
from xscale_lightning.commands.parser import import_methods
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import SSLModule

CONFIGS = Path(__file__).resolve().parents[2] / "configs"


class Bare(SSLModule):
    """A method without a decoder."""


@pytest.fixture(autouse=True)
def methods():
    import_methods()


def settled(*words: str) -> list[dict]:
    """Contents of the inline configurations that come out."""
    out = settle_optional_args(["fit", *words])
    return [json.loads(word) for word in out if word.startswith("{")]


def overlay(**optional: object) -> str:
    return json.dumps({"model": {"optional_args": optional, "init_args": {"attention": "math"}}})


def test_a_method_takes_what_it_has_from_itself_and_its_bases():
    words = ["--model", "xscale_lightning.methods.mae.MAE", "--config", overlay(mask_ratio=0.5, views={"size": 32})]
    (content,) = settled(*words)
    assert content == {"model": {"init_args": {"mask_ratio": 0.5, "views": {"size": 32}, "attention": "math"}}}


@pytest.mark.parametrize("name", [f"{Bare.__module__}.Bare", "Bare", "no.such.Method"])
def test_the_others_leave_it_out(name):
    (content,) = settled("--config", json.dumps({"model": {"class_path": name}}), "--config", overlay(mask_ratio=0.5))[
        1:
    ]
    assert content == {"model": {"init_args": {"attention": "math"}}}


def test_the_place_among_the_other_words_stays():
    words = ["fit", "--model", "mae", "--config", overlay(mask_ratio=0.5), "--model.mask_ratio", "0.6", "--debug"]
    out = settle_optional_args(words)
    assert out[:3] == words[:3] and out[3] == "--config" and out[5:] == words[5:]
    assert settle_optional_args(words[:3]) == words[:3]


def test_wrong_names_are_refused():
    with pytest.raises(UserError, match=r"no method has an argument 'mask_ration': did you mean 'mask_ratio'\?"):
        settled("--model", "mae", "--config", overlay(mask_ration=0.5))
    with pytest.raises(UserError, match=r"optional_args\.attention is under model\.init_args, too"):
        settled("--model", "mae", "--config", overlay(attention="math"))


def test_the_quickstart_makes_the_predictor_small():
    words = ["--config", str(CONFIGS / "ijepa.yaml"), "--config", str(CONFIGS / "quickstart.yaml")]
    given = settled(*words)[-1]["model"]["init_args"]
    assert given["predictor"] == {"dim": 96, "depth": 3, "num_heads": 3} and "decoder_dim" not in given


@pytest.mark.parametrize("method", ["mae", "cross_scale_mae", "s2mae"])
def test_the_quickstart_makes_decoders_small(method):
    optional = yaml.safe_load((CONFIGS / "quickstart.yaml").read_text())["model"]["optional_args"]
    words = ["--config", str(CONFIGS / f"{method}.yaml"), "--config", str(CONFIGS / "quickstart.yaml")]
    given = settled(*words)[-1]["model"]["init_args"]
    assert {name: given[name] for name in optional if name in given} == {
        "norm_pix_loss": False,
        "decoder_dim": 128,
        "decoder_depth": 3,
        "decoder_heads": 4,
    }


def test_the_quickstart_makes_what_a_host_has_small():
    words = ["--config", str(CONFIGS / "sa_ijepa.yaml"), "--config", str(CONFIGS / "quickstart.yaml")]
    given = settled(*words)[-1]["model"]["init_args"]
    small = {"dim": 96, "depth": 3, "num_heads": 3}
    assert given["host_args"]["predictor"] | small == given["host_args"]["predictor"]
    assert given["host_args"]["masks"]["min_keep"] == 10 and not {"predictor", "decoder_dim"} & set(given)
    words[1] = str(CONFIGS / "sa_latent_mim.yaml")
    given = settled(*words)[-1]["model"]["init_args"]["host_args"]
    assert (given["decoder_dim"], given["head_dim"], given["gap"]) == (128, 384, 0.25) and "predictor" not in given


def test_host_args_are_laid_over_those_before_while_the_host_stays():
    def content(**init_args: object) -> str:
        return json.dumps({"model": {"class_path": "spatial_affinity", "init_args": init_args}})

    first = content(host="mae", host_args={"mask_ratio": 0.5, "decoder_dim": 64})
    (merged,) = settled("--config", first, "--config", content(host_args={"decoder_dim": 32}))[1:]
    assert merged["model"]["init_args"]["host_args"] == {"mask_ratio": 0.5, "decoder_dim": 32}
    other = content(host="ijepa", host_args={"features_from": "student"})
    assert settled("--config", first, "--config", other)[-1] == json.loads(other)
    with pytest.raises(UserError, match=r"optional_args\.mask_ratio is under model\.init_args, too"):
        settled(
            "--config",
            first,
            "--config",
            json.dumps(
                {"model": {"optional_args": {"mask_ratio": 0.5}, "init_args": {"host_args": {"mask_ratio": 0.6}}}}
            ),
        )
