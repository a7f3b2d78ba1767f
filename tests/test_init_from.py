"""`init_from`: encoders of any source, every tensor accounted for, other bands only when asked for."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from safetensors.torch import save_file

from xscale_lightning import cli, init_from, load_encoder
from xscale_lightning.data.bands import SENSORS, generic
from xscale_lightning.errors import UserError
from xscale_lightning.methods.ijepa import IJEPA
from xscale_lightning.methods.latent_mim import LatentMIM
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import PAPER, S2MAE
from xscale_lightning.models.registry import BackboneConfig, create_backbone
from xscale_lightning.readers import ijepa, latent_mim, spectralgpt

ALL = SENSORS["sentinel2_l1c"]
RGB = ALL.select(["B04", "B03", "B02"])
SMALL = BackboneConfig("vit_tiny_patch8", dim=64, depth=2, num_heads=1, image_size=32)
SIZES = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def save(module, path: Path) -> Path:
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[MAE, Path]:
    torch.manual_seed(0)
    module = MAE(bands=RGB, backbone=SMALL, **SIZES)
    return module, save(module, tmp_path_factory.mktemp("run") / "mae.ckpt")


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    return all(torch.equal(value, b.state_dict()[name]) for name, value in a.state_dict().items())


def test_a_checkpoint_and_an_export_give_the_same_encoder(run, tmp_path):
    module, path = run
    assert cli.main(["export", str(path), str(tmp_path / "out")]) == 0
    for source in (path, str(path), tmp_path / "out"):
        encoder, bands, report = load_encoder(source)
        assert same(encoder, module.backbone) and bands == RGB and not encoder.training
        assert len(report.matched) == len(encoder.state_dict())
        assert not (report.missing or report.unexpected or report.resized)


def test_other_bands_are_named_and_adapted_by_name_when_asked_for(run):
    module, path = run
    wanted = ALL.select(["B02", "B08", "B04"])
    with pytest.raises(UserError, match=r"other bands than the data's: missing B03; additional B08\.\n.*adapt_bands"):
        load_encoder(path, wanted)
    with pytest.raises(UserError, match="order B04, B03, B02 against B02, B03, B04"):
        load_encoder(path, ALL.select(["B02", "B03", "B04"]))
    encoder, bands, report = load_encoder(path, wanted, adapt_bands=True)
    old, new = module.backbone.patch_embed.proj.weight, encoder.patch_embed.proj.weight
    assert torch.equal(new[:, 0], old[:, 2]) and torch.equal(new[:, 2], old[:, 0])
    assert torch.allclose(new[:, 1], old.mean(1))
    assert bands.names == wanted.names and "2 shared bands by name; the mean of all for B08" in report.resized[0]


def test_the_name_of_the_sensor_alone_is_no_difference_and_statistics_are_the_trained_ones(run):
    data = SENSORS["sentinel2_rgb"].with_statistics([1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    _, bands, _ = load_encoder(run[1], data)
    assert bands.sensor == "sentinel2_rgb" and bands.means == RGB.means and bands.stds == RGB.stds
    landsat = SENSORS["landsat8"].select(["B4", "B3", "B2"])  # the same names to a reader, other bands
    with pytest.raises(UserError, match="trained on other bands"):
        load_encoder(run[1], landsat)


def test_another_architecture_is_refused_whole(run):
    path = run[1]
    with pytest.raises(UserError, match=r"of another architecture: \d+ tensors differ, first cls_token"):
        load_encoder(path, backbone=replace(SMALL, dim=32))
    with pytest.raises(UserError, match=r"gives only \d+% of the encoder: .* missing, first blocks.2"):
        load_encoder(path, backbone=replace(SMALL, depth=6))
    encoder, _, report = load_encoder(path, backbone=replace(SMALL, depth=1))
    assert encoder.depth == 1 and all(name.startswith("blocks.1.") for name in report.unexpected)


def test_learned_positions_are_resized(tmp_path):
    learned = replace(SMALL, position="learned")
    path = save(MAE(bands=RGB, backbone=learned, **SIZES), tmp_path / "m.ckpt")
    encoder, _, report = load_encoder(path, backbone=replace(learned, image_size=64))
    assert report.resized == ["positions.table"] and encoder.positions.table.shape[1] == 64


def test_state_dicts_with_timm_names(tmp_path):
    torch.manual_seed(0)
    ours = create_backbone("vit_tiny_patch8", 3, dim=64, depth=2, num_heads=1, position="learned", image_size=32)
    state = {name: value for name, value in ours.state_dict().items() if name != "positions.table"}
    table = torch.cat([torch.zeros(1, 1, 64), ours.positions.table.detach()], 1)
    head = {"head.weight": torch.zeros(5, 64)}
    save_file({**state, **head, "pos_embed": table}, tmp_path / "vit.safetensors")
    torch.save({"model": {f"module.{n}": v for n, v in {**state, "pos_embed": table}.items()}}, tmp_path / "vit.pth")
    x = torch.rand(2, 3, 32, 32)
    for name in ("vit.safetensors", "vit.pth"):
        encoder, bands, report = load_encoder(tmp_path / name)
        assert torch.equal(encoder(x).x, ours(x).x) and len(bands) == 3
        assert report.unexpected == (["head.weight"] if "safe" in name else [])
    with pytest.raises(UserError, match=r"made for 3 bands, and the data has 13"):
        load_encoder(tmp_path / "vit.pth", ALL)
    encoder, _, report = load_encoder(tmp_path / "vit.pth", ALL, adapt_bands=True)
    assert encoder.in_chans == 13 and "the mean of 3 filters" in report.resized[0]


def test_maes_fixed_table_is_recognised(tmp_path):
    ours = create_backbone("vit_tiny_patch8", 3, dim=64, depth=1, num_heads=1)
    table = torch.cat([torch.zeros(1, 1, 64), ours.positions((4, 4), like=ours.cls_token)], 1)
    decoder = {"decoder_embed.weight": torch.zeros(3, 64), "mask_token": torch.zeros(1)}
    torch.save({"model": {**ours.state_dict(), "pos_embed": table, **decoder}}, tmp_path / "mae.pth")
    encoder, _, report = load_encoder(tmp_path / "mae.pth")
    x = torch.rand(1, 3, 48, 48)
    assert torch.equal(encoder(x).x, ours(x).x) and "decoder_embed.weight" in report.unexpected


def test_published_checkpoints_through_the_readers(tmp_path):
    torch.manual_seed(0)
    cubes = S2MAE(bands=generic(12), backbone=replace(PAPER, dim=384, num_heads=6, depth=1, image_size=16), **SIZES)
    jepa = IJEPA(bands=generic(3), backbone=replace(SMALL, class_token=False))
    latent = LatentMIM(bands=generic(3), backbone=replace(SMALL, position="stretched"), head_dim=8, decoder_dim=64)
    cases = {
        "spectralgpt": (cubes, spectralgpt.to_published(cubes)),
        "ijepa": (jepa, ijepa.to_published(jepa, 4)),
        "latent_mim": (latent, latent_mim.to_published(latent, 4)),
    }
    for name, (module, state) in cases.items():
        torch.save(state, tmp_path / f"{name}.pth")
        encoder, _, report = load_encoder(tmp_path / f"{name}.pth")
        assert same(encoder, module.feature_encoder), name
        assert "beside its encoder" in report.unexpected[0]
    with pytest.raises(UserError, match="reader 'mae' is unknown; choose from ijepa"):
        load_encoder(tmp_path / "ijepa.pth", reader="mae")


def test_models_of_timm_by_name(monkeypatch):
    build = BackboneConfig.build

    def offline(config, *args):
        if config.pretrained:
            raise ConnectionError("no network")
        return build(config, *args)

    monkeypatch.setattr(BackboneConfig, "build", offline)
    for name in ("timm:test_vit", "test_vit"):
        with pytest.raises(UserError, match=r"'timm:test_vit': its weights cannot be fetched \(ConnectionError\)"):
            load_encoder(name)
    monkeypatch.setattr(BackboneConfig, "build", lambda config, *args: build(replace(config, pretrained=False), *args))
    torch.manual_seed(0)
    encoder, bands, report = load_encoder("timm:test_vit", ALL)
    assert encoder.in_chans == 13 and bands == ALL and "RGB filters" in report.resized[0]
    size = BackboneConfig("vit_tiny_patch16", dim=64, depth=6, num_heads=2, mlp_ratio=3.0)
    ours, _, report = load_encoder("timm:test_vit", RGB, backbone=size)
    assert not report.missing and torch.isfinite(ours(torch.rand(1, 3, 32, 32)).x).all()


def test_wrong_sources_are_named(tmp_path):
    with pytest.raises(UserError, match=r"'absent\.ckpt' does not exist: give a checkpoint"):
        load_encoder("absent.ckpt")
    with pytest.raises(UserError, match="neither a checkpoint"):
        load_encoder(tmp_path)
    torch.save({"conv1.weight": torch.zeros(2)}, tmp_path / "resnet.pth")
    with pytest.raises(UserError, match=r"holds no encoder that is known: .* conv1.weight"):
        load_encoder(tmp_path / "resnet.pth")
    (tmp_path / "x.safetensors").write_text("x")
    with pytest.raises(UserError, match="cannot be read"):
        load_encoder(tmp_path / "x.safetensors")


def test_a_method_and_its_targets_start_from_weights_once(run, tmp_path):
    jepa = IJEPA(bands=RGB, backbone=replace(SMALL, class_token=False), init_from=str(run[1]))
    donor = MAE(bands=RGB, backbone=replace(SMALL, class_token=False), **SIZES)
    jepa._start = (str(save(donor, tmp_path / "d.ckpt")), False)
    jepa.initialise()
    assert same(jepa.backbone, donor.backbone) and same(jepa.target.module, donor.backbone)
    assert jepa._start == (None, False)
    with torch.no_grad():
        jepa.backbone.norm.bias += 1
    jepa.initialise()
    assert not same(jepa.backbone, donor.backbone)


def test_fit_starts_from_weights_and_a_resumed_run_does_not(run, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(init_from, "start_from", lambda module, *a: started.append(a) or "report")
    words = ["fit", "--model", "mae", "--data", "SyntheticData", "--data.length", "8", "--data.batch_size", "4"]
    words += ["--data.image_height", "16", "--data.image_width", "16", "--data.bands.sensor", "sentinel2_rgb"]
    words += ["--model.backbone.name", "vit_tiny_patch8", "--model.backbone.depth", "1", "--model.decoder_depth", "1"]
    words += ["--trainer.accelerator", "cpu", "--trainer.enable_progress_bar", "false", "--knn.every_n_epochs", "0"]
    words += ["--geometry.every_n_epochs", "0", "--pictures.every_n_epochs", "0", "--output", str(tmp_path)]
    words += ["--trainer.limit_val_batches", "0", "--model.init_from", "weights.pth"]
    assert cli.main([*words, "--trainer.max_epochs", "1", "--debug"]) == 0
    assert [words[:2] for words in started] == [("weights.pth", False)]
    (last,) = tmp_path.glob("mae/*/checkpoints/last.ckpt")
    assert cli.main([*words, "--trainer.max_epochs", "2", "--ckpt_path", str(last), "--debug"]) == 0
    assert len(started) == 1
    monkeypatch.undo()
    capsys.readouterr()
    assert cli.main([*words, "--trainer.max_epochs", "1"]) == 2
    assert "'weights.pth' does not exist" in capsys.readouterr().err
    assert len(list(tmp_path.glob("mae/*"))) == 2
