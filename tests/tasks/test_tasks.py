"""Tasks: they learn, start from weights, freeze, come back from checkpoints and refuse nonsense."""

import json

import pytest
import torch
from lightning.pytorch import seed_everything

from xscale_lightning import checkpoints, cli, load_backbone
from xscale_lightning.data.bands import BandSelection
from xscale_lightning.data.sample import SampleScene
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.tasks.change import ChangeDetection
from xscale_lightning.tasks.classification import Classification, MultiLabelClassification
from xscale_lightning.tasks.segmentation import Segmentation

SMALL = BackboneConfig("vit_tiny_patch8", dim=24, depth=2, num_heads=2)
BANDS = BandSelection(sensor="generic", names=["a", "b"]).resolve()
LEARN = ["--trainer.max_epochs=12", "--model.optimizer.lr=0.003", "--model.optimizer.scale_lr=false"]
WHOLE = ["--model.views.scale=[1.0, 1.0]"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind", "options", "score"),
    [
        ("Classification", "class", ["--model.smoothing=0.1", "--model.head_norm=layer"], "top1"),
        ("MultiLabelClassification", "labels", ["--model.head_norm=layer"], "map_micro"),
        ("Segmentation", "mask", ["--model.decoder=linear", "--model.class_weights=balanced"], "miou"),
        ("ChangeDetection", "change", ["--model.decoder=upernet", "--model.decoder_dim=32"], "f1"),
    ],
)
def test_tasks_learn(fit, task, kind, options, score):
    folder, results = fit(
        task, kind, *options, *LEARN, *WHOLE, f"--checkpoint.monitor=val/{score}", "--checkpoint.mode=max"
    )
    record = results["metrics"][f"test/{score}"]
    assert record["last"] > 0.9 and record["interval"][0] <= record["last"] <= record["interval"][1]
    assert results["metrics"][f"val/{score}"]["last"] > 0.9 and results["verdict"].startswith("It learned")
    assert results["command"] == "fit" and {"train/loss", "val/loss", "test/loss"} <= set(results["losses"])
    assert results["tested_checkpoint"].endswith(".ckpt") and "last" not in results["tested_checkpoint"]
    module = checkpoints.load_method(folder / "checkpoints" / "last.ckpt")
    assert module.num_classes == 2
    encoder, bands = load_backbone(folder / "checkpoints" / "last.ckpt")
    assert bands.names == ("a", "b")
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, module.backbone.state_dict()[name])


@pytest.fixture
def pretrained(tmp_path):
    """A run's checkpoint of another task, whose encoder is known."""
    seed_everything(5)
    module = Classification(num_classes=3, bands=BANDS, backbone=SMALL, normalize="minmax")
    path = tmp_path / "pretrained.ckpt"
    torch.save({"state_dict": module.state_dict(), "xscale": checkpoints.metadata(module)}, path)
    return module, path


def test_it_starts_from_weights_and_scaling(pretrained):
    before, path = pretrained
    module = Segmentation(init_from=str(path), bands=BANDS, num_classes=4, drop_path=0.3, pool="cls")
    for name, value in before.backbone.state_dict().items():
        assert torch.equal(value, module.backbone.state_dict()[name])
    assert module.normalize == "minmax" and module.backbone.pool_mode == "cls"
    assert module.backbone.blocks[-1].drop_path1.drop_prob == 0.3
    raw = torch.rand(2, 2, 16, 16) * 50
    assert module.prepare({"image": raw})["image"].amax().item() == pytest.approx(1.0)
    images = module.prepare({"image": raw})["image"]
    module.eval(), before.eval()
    torch.testing.assert_close(module.backbone(images).x, before.backbone(images).x)


def test_a_checkpoint_is_rebuilt_without_the_file_it_started_from(pretrained, tmp_path):
    _, path = pretrained
    module = Classification(init_from=str(path), bands=BANDS, num_classes=4, tune="frozen", mixing={"mixup": 0.5})
    saved = tmp_path / "tuned.ckpt"
    checkpoint = {"state_dict": module.state_dict()}
    module.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, saved)
    path.unlink()
    again = checkpoints.load_method(saved)
    assert again.tune == "frozen" and again.num_classes == 4 and again.normalize == "minmax"
    assert checkpoints.read_metadata(saved)[1]["init_from"] == str(path)


def test_bands_of_a_checkpoint_that_are_not_the_datas_are_named(pretrained):
    _, path = pretrained
    other = BandSelection(sensor="generic", names=["a", "c"]).resolve()
    with pytest.raises(UserError, match="trained on other bands than the data's: missing b; additional c"):
        Classification(init_from=str(path), bands=other, num_classes=2)
    adapted = Classification(init_from=str(path), bands=other, num_classes=2, adapt_bands=True)
    assert adapted.bands.names == ("a", "c")


def test_statistics_of_the_checkpoint(pretrained):
    _, path = pretrained
    ours = BANDS.with_statistics([3.0, 4.0], [5.0, 6.0])
    assert Classification(init_from=str(path), bands=ours).bands.means == [0.0, 0.0]
    assert Classification(init_from=str(path), bands=ours, statistics="data").bands.means == [3.0, 4.0]
    assert Classification(bands=ours).bands.means == [3.0, 4.0]


def test_a_frozen_encoder_gets_no_gradient_and_keeps_still():
    module = Segmentation(bands=BANDS, backbone=SMALL, num_classes=2, tune="frozen", drop_path=0.5).train()
    batch = {"image": torch.randn(2, 2, 16, 16), "mask": torch.randint(2, (2, 16, 16))}
    module.step(module.prepare(batch)).loss.backward()
    assert all(p.grad is None for p in module.backbone.parameters())
    assert all(p.grad is not None for p in module.head.parameters())
    assert not module.backbone.training


def test_classes_that_the_data_does_not_name_have_their_numbers():
    data = SampleScene(image_size=16)  # its patches may be "mixed", its pixels not
    module = Classification(bands=data.bands, backbone=SMALL, num_classes=data.num_classes)
    module.check_data(data, fitting=True)
    assert len(module.class_names) == data.num_classes == len(data.class_names) + 1
    assert module.class_names[-1] == str(data.num_classes - 1)


def test_the_loss_is_torchs():
    module = Classification(bands=BANDS, backbone=SMALL, num_classes=3, class_weights=[1.0, 2.0, 3.0], smoothing=0.1)
    logits, labels = torch.randn(5, 3), torch.tensor([0, 1, 2, 2, 1])
    plain = Classification(bands=BANDS, backbone=SMALL, num_classes=3, class_weights=[1.0, 2.0, 3.0])
    expected = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]))(logits, labels)
    torch.testing.assert_close(plain.loss(logits, {"label": labels}), expected)
    smooth = Classification(bands=BANDS, backbone=SMALL, num_classes=3, smoothing=0.1)
    torch.testing.assert_close(
        smooth.loss(logits, {"label": labels}), torch.nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels)
    )
    assert module.loss(logits, {"label": labels}).isfinite()
    many = MultiLabelClassification(bands=BANDS, backbone=SMALL, num_classes=3)
    target = torch.randint(2, (5, 3))
    torch.testing.assert_close(
        many.loss(logits, {"label": target}), torch.nn.MultiLabelSoftMarginLoss()(logits, target.float())
    )


def test_the_loss_of_pixels_is_torchs_and_zero_where_nothing_counts():
    module = Segmentation(bands=BANDS, backbone=SMALL, num_classes=3, class_weights=[1.0, 2.0, 3.0], ignore_index=255)
    logits, mask = torch.randn(2, 3, 4, 4), torch.randint(3, (2, 4, 4))
    mask[0, 0], mask[1, 1] = 255, -1
    expected = torch.nn.CrossEntropyLoss(torch.tensor([1.0, 2.0, 3.0]), ignore_index=-1)(
        logits, mask.where(mask < 9, -1)
    )
    torch.testing.assert_close(module.loss(logits, {"mask": mask}), expected)
    assert module.loss(logits, {"mask": torch.full_like(mask, 255)}) == 0


def test_dates_and_mask_are_turned_alike():
    module = ChangeDetection(bands=BANDS, backbone=SMALL, num_classes=2, views=Views(scale=(1.0, 1.0)))
    torch.manual_seed(3)
    image = torch.rand(16, 2, 16, 16)
    batch = {"image": image, "image2": image + 1, "mask": (image[:, 0] > 0.5).long(), "gsd": torch.ones(16)}
    prepared = module.prepare(batch, augment=True)
    torch.testing.assert_close(prepared["image2"], prepared["image"] + 1)
    assert torch.equal(prepared["mask"], (prepared["image"][:, 0] > 0.5).long())
    assert not torch.equal(prepared["image"], image)


def test_dates_are_compared_by_one_encoder():
    image, other = torch.rand(2, 2, 16, 16), torch.rand(2, 2, 16, 16)
    module = ChangeDetection(bands=BANDS, backbone=SMALL, num_classes=2).eval()
    forward, back = ({"image": image, "image2": other}, {"image": other, "image2": image})
    torch.testing.assert_close(module.logits(forward), module.logits(back))  # |a - b|
    for fusion in ("difference", "concat"):
        module = ChangeDetection(fusion=fusion, bands=BANDS, backbone=SMALL, num_classes=2).eval()
        assert not torch.allclose(module.logits(forward), module.logits(back))


LONG = ["--trainer.max_epochs=1"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "kind", "options", "message"),
    [
        ("Classification", "class", ["--data.wrong=range"], "from 9 to 10 do not fit 2 classes, 0 to 1"),
        ("Classification", "labels", [], "set model.class_path to MultiLabelClassification"),
        ("Classification", "mask", [], "needs labelled data"),
        ("Classification", "class", ["--model.num_classes=5"], "num_classes is 5, and shapes has 2"),
        ("Classification", "class", ["--model.class_weights=[1, 2, 3]"], "3 values for 2 classes"),
        ("Classification", "class", ["--model.init_from=nowhere.ckpt"], "'nowhere.ckpt' does not exist"),
        ("Segmentation", "mask", ["--data.wrong=range"], "a mask has the value 9, and there are 2 classes"),
        ("Segmentation", "mask", ["--data.wrong=size"], r"masks of shape \(8, 8, 16\) do not fit images of 16 x 16"),
        ("Segmentation", "mask", ["--model.decoder=fpn", "--model.decoder_dim=33"], "must be a multiple of 32, got 33"),
        ("ChangeDetection", "mask", [], r"needs batch\['image2'\]"),
        ("ChangeDetection", "change", ["--data.classes=3"], "knows two classes"),
    ],
)
def test_wrong_input_is_named(fit, tmp_path, task, kind, options, message):
    with pytest.raises(Exception, match=message):
        fit(task, kind, *LONG, *options)
    assert not list(tmp_path.rglob("results.json"))


@pytest.mark.slow
def test_a_split_of_ignored_pixels_is_told(fit, tmp_path):
    with pytest.raises(Exception, match="every pixel of this split is ignored"):
        fit("Segmentation", "mask", *LONG, "--data.wrong=ignored")
    assert json.loads(next(tmp_path.rglob("results.json")).read_text())["status"] == "failed"
    with pytest.raises(Exception, match="every label of the training split is ignored"):
        fit("Segmentation", "mask", *LONG, "--data.wrong=ignored", "--trainer.limit_val_batches=0", output="more")


@pytest.mark.slow
def test_a_class_that_training_lacks_is_told(fit):
    with pytest.warns(UserWarning, match="no sample of class class2: it cannot be learned"):
        fit("Classification", "class", *LONG, "--data.classes=3", "--data.wrong=missing", "--model.test=false")


@pytest.mark.slow
def test_test_and_predict_take_the_checkpoint(fit, tmp_path):
    folder, results = fit("Classification", "class", *LONG, "--model.test=false")
    assert "test/top1" not in results["metrics"]
    config, path = str(folder / "config.yaml"), str(folder / "checkpoints" / "last.ckpt")
    for verb in ("test", "predict"):
        assert (
            cli.main([verb, "--config", config, "--ckpt_path", path, "--output", str(tmp_path / verb), "--debug"]) == 0
        )
    from safetensors.torch import load_file

    written = load_file(next((tmp_path / "predict").rglob("embeddings.safetensors")))
    assert {name: list(value.shape) for name, value in written.items()} == {
        "embedding": [32, 24],
        "label": [32],
        "score": [32, 2],
    }
    assert next((tmp_path / "test").rglob("results.json")).exists()


def test_a_fine_tuned_checkpoint_is_tested_when_its_start_is_gone(fit, pretrained, tmp_path, capsys):
    _, path = pretrained
    folder, results = fit("Classification", "class", *LONG, "--model.drop_path=0.1", f"--model.init_from={path}")
    path.unlink()
    config, saved = folder / "config.yaml", folder / "checkpoints" / "last.ckpt"
    words = ["--config", str(config), "--ckpt_path", str(saved), "--output", str(tmp_path / "again"), "--debug"]
    assert cli.main(["test", *words]) == 0
    again = json.loads(next((tmp_path / "again").rglob("results.json")).read_text())
    assert again["metrics"]["test/top1"]["last"] == results["metrics"]["test/top1"]["last"]
    assert str(path) in next((tmp_path / "again").rglob("config.yaml")).read_text()
    assert cli.main(["fit", *words, "--trainer.max_epochs=2", "--model.test=false"]) == 0
    last = max((tmp_path / "again").rglob("last.ckpt"), key=lambda file: file.stat().st_mtime)
    assert checkpoints.read_metadata(last)[1]["init_from"] == str(path)
    assert cli.main(["test", "--config", str(config), "--output", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
