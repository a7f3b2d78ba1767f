import os
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer

from xscale_lightning.checkpoints import check_resume, load_method, metadata, plain
from xscale_lightning.data.bands import Bands, generic
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import PAPER, S2MAE
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.optim import OptimizerConfig
from xscale_lightning.pretrained import load_backbone

BANDS = generic(3).with_statistics([5.0, 6.0, 7.0], [2.0, 3.0, 4.0])
BATCH = {
    "image": 6 + 3 * torch.randn(2, 3, 16, 24, generator=torch.Generator().manual_seed(0)),
    "gsd": torch.ones(2) * 10,
}


class OtherMethod(MAE):
    """The same tensors under another name."""


def make(cls: type[MAE] = MAE, bands: Bands = BANDS, depth: int = 1, **options) -> MAE:
    backbone = BackboneConfig("vit_tiny_patch8", depth=depth, position="gsd", reference_gsd=20.0)
    sizes = {"backbone": backbone, "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    views = Views(scale=(0.5, 1.0), rot90=False)
    return cls(bands=bands, views=views, optimizer=OptimizerConfig(lr=0.5), **{**sizes, **options})


def save(module: SSLModule, path: Path) -> Path:
    """A checkpoint as Lightning writes it, without training."""
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False)
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return path


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> tuple[MAE, Path]:
    torch.manual_seed(0)
    module = make(mask_ratio=0.5)
    return module, save(module, tmp_path_factory.mktemp("checkpoint") / "mae.ckpt")


def test_a_method_comes_back_whole(saved):
    module, path = saved
    again = load_method(path)
    assert type(again) is MAE and not again.training
    assert again.mask_ratio == 0.5 and again.bands == BANDS and again.views == module.views
    assert again.optimizer_config == module.optimizer_config
    for (name, ours), theirs in zip(again.state_dict().items(), module.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs), name
    assert torch.equal(again.features(BATCH), module.features(BATCH))


def test_the_backbone_comes_back_with_its_bands(saved):
    module, path = saved
    encoder, bands = load_backbone(path)
    assert bands == BANDS and not encoder.training
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (bands.means, bands.stds))
    with torch.no_grad():
        features = encoder.pool(encoder((BATCH["image"] - mean) / std, gsd=BATCH["gsd"]))
    assert torch.equal(features, module.features(BATCH))


def test_values_become_plain():
    value = {"a": (1, 2.5), "b": Views(), "c": None, 4: Path("x")}
    out = plain(value)
    assert out["a"] == [1, 2.5] and out["c"] is None and out["4"] == "x" and out["b"]["scale"] == list(Views().scale)
    assert Bands.from_dict(plain(BANDS)) == BANDS


class Malice:
    """Would create a folder when unpickled."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("load", [load_method, load_backbone, lambda path: check_resume(path, make())])
def test_a_file_that_would_run_code_is_refused(tmp_path, load):
    path, trace = tmp_path / "evil.ckpt", tmp_path / "trace"
    torch.save({"state_dict": {}, "xscale": Malice(str(trace))}, path)
    with pytest.raises(UserError, match=r"evil\.ckpt' holds more than weights"):
        load(path)
    assert not trace.exists()


def test_damaged_files_are_named(saved, tmp_path):
    whole = saved[1].read_bytes()
    for name, content in {"half": whole[: len(whole) // 2], "empty": b"", "text": b"not a checkpoint at all"}.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(UserError, match=rf"checkpoint '.*{name}\.ckpt'") as error:
            load_method(path)
        assert len(str(error.value).splitlines()) <= 2
    with pytest.raises(UserError, match=r"absent\.ckpt' does not exist"):
        load_method(tmp_path / "absent.ckpt")
    with pytest.raises(UserError, match="does not exist: give the path"):
        load_method(tmp_path)
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as file:
        file.writestr("a.txt", "a")
    with pytest.raises(UserError, match=r"zip\.ckpt' is damaged or no checkpoint"):
        load_method(tmp_path / "zip.ckpt")


def test_checkpoints_of_other_programs_are_named(tmp_path):
    path = tmp_path / "other.ckpt"
    for content in ({"model": {}}, [1, 2], torch.zeros(3)):
        torch.save(content, path)
        with pytest.raises(UserError, match=r"other\.ckpt' is no training checkpoint"):
            load_method(path)
    torch.save({"state_dict": {"w": torch.zeros(2)}}, path)
    with pytest.raises(UserError, match=r"other\.ckpt' was not written by xscale"):
        load_backbone(path)


@pytest.mark.parametrize(
    ("class_path", "message"),
    [
        ("no_such_package.method.Mine", "names 'no_such_package.method.Mine', of no announced plug-in"),
        ("xscale_lightning.methods.mae.Gone", "needs .xscale_lightning.methods.mae.Gone.: install"),
        ("torch.nn.Linear", "names .torch.nn.Linear., which is no method"),
    ],
)
def test_a_class_that_is_not_there_or_no_method_is_named(saved, tmp_path, class_path, message):
    content = torch.load(saved[1], weights_only=True)
    content["xscale"]["class_path"] = class_path
    torch.save(content, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match=message):
        load_method(tmp_path / "x.ckpt")


def test_the_same_run_may_be_resumed(saved):
    check_resume(saved[1], make(mask_ratio=0.5))
    check_resume(saved[1], make(mask_ratio=0.75))  # a setting, not the architecture


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            lambda: make(OtherMethod),
            r"holds xscale_lightning\.methods\.mae\.MAE and the configuration asks for .*OtherMethod",
        ),
        (lambda: make(depth=2), r"of another architecture: backbone\.depth is 1 there and 2 here"),
        (lambda: make(decoder_heads=4), r"of another architecture: decoder_heads is 2 there and 4 here"),
        (lambda: make(bands=BANDS.with_statistics([9.0] * len(BANDS), [2.0] * len(BANDS))), "was trained with mean"),
        (lambda: make(decoder_dim=32), r"of another architecture: decoder_dim is 16 there and 32 here"),
        (lambda: make(bands=generic(4)), "was trained on other bands"),
    ],
)
def test_resuming_another_run_is_refused(saved, other, message):
    with pytest.raises(UserError, match=message) as error:
        check_resume(saved[1], other())
    assert "--ckpt_path" in str(error.value) and len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize("name", ["norm_eps", "reference_gsd"])
def test_floats_of_the_architecture_may_not_change(saved, name):
    backbone = {"depth": 1, "position": "gsd", "reference_gsd": 20.0, name: 0.5}
    with pytest.raises(UserError, match=rf"of another architecture: backbone\.{name} is .* there and 0\.5 here"):
        check_resume(saved[1], make(mask_ratio=0.5, backbone=BackboneConfig("vit_tiny_patch8", **backbone)))


@pytest.mark.parametrize("spectral", ["wavelength", "learned"])
def test_wavelengths_may_not_change_where_positions_come_from_them(tmp_path, spectral):
    bands = generic(6).with_wavelengths([0.44, 0.49, 0.56, 0.66, 0.84, 1.6])
    other = bands.with_wavelengths([0.44, 0.49, 0.57, 0.66, 0.84, 1.61])

    def cubes(record: Bands, **options) -> S2MAE:
        backbone = replace(PAPER, name="spectral_vit_tiny_cube3_patch8", depth=1, dim=24, num_heads=2, **options)
        return S2MAE(bands=record, backbone=backbone, decoder_dim=24, decoder_depth=1, decoder_heads=2)

    path = save(cubes(bands, spectral=spectral), tmp_path / "x.ckpt")
    check_resume(path, cubes(bands, spectral=spectral))
    if spectral == "learned":
        return check_resume(path, cubes(other, spectral=spectral))
    with pytest.raises(UserError, match=r"trained with 0\.56 um for band band3, and .* has 0\.57, .*data\.bands\.wave"):
        check_resume(path, cubes(other, spectral=spectral))
    own = save(cubes(bands, spectral=spectral, wavelengths=other.wavelengths), tmp_path / "own.ckpt")
    check_resume(own, cubes(other, spectral=spectral, wavelengths=other.wavelengths))  # the bands' do not count


def test_metadata_of_a_plug_in_names_its_class():
    assert metadata(make(OtherMethod))["class_path"].endswith(".OtherMethod")
