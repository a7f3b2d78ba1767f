"""`xscale export`: the same features before and after, here and in timm, whole folders or none."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from lightning.pytorch import Trainer

from xscale_lightning import cli, exports, load_backbone
from xscale_lightning.data.bands import SENSORS, generic
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import PAPER, S2MAE
from xscale_lightning.models.registry import BackboneConfig

BANDS = SENSORS["sentinel2_10"]
SMALL = BackboneConfig("vit_tiny_patch8", dim=24, depth=2, num_heads=3, image_size=32)
SIZES = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def save(module: SSLModule, path: Path) -> Path:
    for parameter in module.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


def images(count: int = 10, side: int = 32) -> torch.Tensor:
    return 3000 * torch.rand(3, count, side, side, generator=torch.Generator().manual_seed(1))


GSD = torch.tensor([10.0, 20.0, 5.0])
PLAIN = {
    "sincos": SMALL,
    "learned": replace(SMALL, position="learned", pool="cls"),
    "stretched": replace(SMALL, position="stretched", class_token=False),
    "timm": BackboneConfig("timm:test_vit"),
}
OTHERS = {
    "gsd": (replace(SMALL, position="gsd"), "follow the metres per pixel"),
    "post": (replace(SMALL, block_norm="post"), "block_norm post"),
    "bare": (replace(SMALL, final_norm=False), "final_norm false"),
    "epsilon": (replace(SMALL, norm_eps=1e-5), "epsilon of its LayerNorms"),
}


@pytest.mark.parametrize("kind", PLAIN)
def test_a_plain_encoder_has_the_same_features_here_and_in_timm(kind, tmp_path, capsys):
    torch.manual_seed(0)
    module = MAE(bands=BANDS, backbone=PLAIN[kind], **SIZES)
    path, out = save(module, tmp_path / "mae.ckpt"), tmp_path / "out"
    assert cli.main(["export", str(path), str(out), "--image-size", "32"]) == 0
    assert "local-dir:" in capsys.readouterr().out
    again = load_backbone(out)
    batch = {"image": images(), "gsd": GSD}
    assert torch.equal(again.features(images(), GSD), module.features(batch))
    assert torch.equal(again.patch_features(images(), GSD), module.patch_features(batch))
    assert again.bands == BANDS and again.origin.method == "mae"
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        theirs = model(again.normalise(images()))
        exact = model.double()(again.normalise(images()).double())
        ours = again.encoder.double().pool(again.encoder(again.normalise(images()).double(), gsd=GSD))
    assert (theirs - again.float().features(images(), GSD)).abs().max() < 1e-5
    assert (exact - ours).abs().max() < 1e-12


@pytest.mark.parametrize("kind", OTHERS)
def test_what_timm_cannot_be_is_said(kind, tmp_path, capsys):
    backbone, reason = OTHERS[kind]
    module = MAE(bands=BANDS, backbone=backbone, **SIZES)
    path, out = save(module, tmp_path / "mae.ckpt"), tmp_path / "out"
    assert cli.main(["export", str(path), str(out)]) == 0
    assert reason in capsys.readouterr().out
    assert (
        reason in (out / "README.md").read_text()
        and reason in json.loads((out / "config.json").read_text())["xscale"]["why_not_timm"]
    )
    assert torch.equal(load_backbone(out).features(images(), GSD), module.features({"image": images(), "gsd": GSD}))


def test_the_scaling_and_the_encoder_of_the_method_go_with_it(tmp_path):
    torch.manual_seed(0)
    cubes = replace(PAPER, dim=24, num_heads=3, depth=1, image_size=16)
    small = {"backbone": replace(SMALL, class_token=False, depth=1)}
    for module in (
        S2MAE(bands=SENSORS["sentinel2_l2a"], backbone=cubes, **SIZES),  # every image by itself
        IJEPA(bands=SENSORS["sentinel2_l2a"], **small),  # features of the target encoder
    ):
        path, out = save(module, tmp_path / "m.ckpt"), tmp_path / module.method_name
        assert cli.main(["export", str(path), str(out)]) == 0
        raw = images(12, 16)
        assert torch.equal(load_backbone(out).features(raw, 10.0), module.features({"image": raw, "gsd": GSD * 0 + 10}))
        assert torch.equal(load_backbone(path).features(raw, 10.0), load_backbone(out).features(raw, 10.0))


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return save(MAE(bands=generic(2), backbone=SMALL, **SIZES), tmp_path / "mae.ckpt")


def refused(capsys, *words: object) -> str:
    assert cli.main([str(word) for word in words]) == 2
    message = capsys.readouterr().err
    assert message.startswith("xscale: error: ") and len(message.strip().splitlines()) <= 2
    return message


def test_nothing_is_overwritten_unasked(checkpoint, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["export", str(checkpoint), str(out)]) == 0
    before = (out / "model.safetensors").read_bytes()
    assert "--overwrite" in refused(capsys, "export", checkpoint, out)
    other = save(MAE(bands=generic(2), backbone=SMALL, **SIZES), tmp_path / "other.ckpt")
    assert cli.main(["export", str(other), str(out), "--overwrite"]) == 0
    assert (out / "model.safetensors").read_bytes() != before
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "thesis.txt").write_text("years")
    assert "is no export" in refused(capsys, "export", checkpoint, tmp_path / "work", "--overwrite")
    assert "is a file" in refused(capsys, "export", checkpoint, checkpoint, "--overwrite")
    assert "is an export already" in refused(capsys, "export", out, tmp_path / "new")
    assert "no multiple of the patch" in refused(capsys, "export", checkpoint, tmp_path / "new", "--image-size", 30)
    assert "does not exist" in refused(capsys, "export", tmp_path / "absent.ckpt", tmp_path / "new")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mae.ckpt", "other.ckpt", "out", "work"]


def test_an_export_that_breaks_off_leaves_nothing(checkpoint, tmp_path, monkeypatch, capsys):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exports, "save_tensors", full)
    assert "No space left" in refused(capsys, "export", checkpoint, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["mae.ckpt"]


def test_damaged_and_foreign_exports_are_named(checkpoint, tmp_path):
    out = tmp_path / "out"
    assert cli.main(["export", str(checkpoint), str(out)]) == 0
    config = (out / "config.json").read_text()
    unsigned = json.loads(config)
    del unsigned["xscale"]["sha256"]  # as an earlier version has written it
    early = json.dumps(unsigned)
    for name, content, message in (
        ("config.json", "{", "cannot be read"),
        ("config.json", "{}", "was not written by xscale"),
        ("config.json", config.replace('"format": 1', '"format": 9'), "has format 9"),
        ("config.json", config.replace('"mlp_ratio": 4.0', '"mlp_ratio": 2.0'), "in its config.json is not as"),
        ("bands.json", "{}", "its bands.json is not as it was written"),
        ("model.safetensors", "x", "its model.safetensors is not as it was written"),
        ("config.json", early.replace('"mlp_ratio": 4.0', '"mlp_ratio": 2.0'), "is not of its config.json"),
    ):
        whole = (out / name).read_bytes()
        (out / name).write_text(content)
        with pytest.raises(exports.UserError, match=message):
            load_backbone(out)
        (out / name).write_bytes(whole)
    assert len(load_backbone(out).bands) == 2


def test_a_run_folder_means_its_last_checkpoint_and_the_card_has_its_numbers(tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)
    save(MAE(bands=BANDS, backbone=SMALL, **SIZES), run / "checkpoints" / "last.ckpt")
    (run / "results.json").write_text(json.dumps({"knn": {"top1": 0.875}, "note": "x"}))
    (run / "config.yaml").write_text("data:\n  class_path: a.SceneFolder\n  init_args: {root: secret/folder}\n")
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| knn/top1 | 0.875 |" in card and "SceneFolder" in card and "secret" not in card
    assert "He et al." in card and f"| B8A | {BANDS.bands[7].wavelength:g} | 20 |" in card and "load_backbone" in card
    with pytest.raises(exports.UserError, match="neither a checkpoint"):
        load_backbone(tmp_path)


def test_images_of_another_number_of_bands_are_refused(checkpoint):
    with pytest.raises(exports.UserError, match=r"takes \[B, 2, H, W\], the bands band1, band2"):
        load_backbone(checkpoint).features(images())
