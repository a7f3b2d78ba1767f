"""Spatial affinity: what the teacher sees, what it is, where gradients go, and what is refused."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from xscale_lightning import checkpoints
from xscale_lightning.data.bands import generic
from xscale_lightning.data.datamodule import Collate
from xscale_lightning.data.synthetic import SyntheticDataset
from xscale_lightning.data.views import Views
from xscale_lightning.errors import UserError
from xscale_lightning.losses import affinity_gram, off_diagonal_affinity
from xscale_lightning.masking import children
from xscale_lightning.methods.affinity_parts import encode_at, pooled_children
from xscale_lightning.methods.mae import MAE
from xscale_lightning.methods.s2mae import PAPER
from xscale_lightning.methods.spatial_affinity import SpatialAffinity
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.optim import parameter_groups
from xscale_lightning.pretrained import load_backbone
from xscale_lightning.schedules import Rise
from xscale_lightning.testing import NO_VIEWS

PLAIN = BackboneConfig("vit_tiny_patch8", depth=2, dim=48, num_heads=3, class_token=False)
SPECTRAL = replace(PAPER, name="spectral_vit_tiny_cube3_patch8", depth=2, dim=48, num_heads=3)
DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}
PREDICTOR = {"predictor": {"dim": 48, "depth": 1}}
HOSTS = {
    "ijepa": ("ijepa", PREDICTOR, PLAIN, "host"),
    "ijepa_balanced": ("ijepa", {**PREDICTOR, "masks": {"sampler": "balanced", "contexts": 2}}, PLAIN, "host"),
    "latent_mim": ("latent_mim", {**DECODER, "head_dim": 32}, replace(PLAIN, position="stretched"), "host"),
    "mae": ("mae", DECODER, replace(PLAIN, class_token=True), "own"),
    "cross_scale_mae": ("cross_scale_mae", {**DECODER, "predictor_dim": 16}, replace(PLAIN, class_token=True), "own"),
    "s2mae": ("s2mae", {**DECODER, "mask_ratio": 0.7}, SPECTRAL, "own"),
}


def make(name: str = "ijepa", **options) -> SpatialAffinity:
    host, host_args, backbone, teacher = HOSTS[name]
    torch.manual_seed(0)
    given = {"backbone": backbone, "teacher": teacher, "views": NO_VIEWS, "bands": generic(3), **options}
    return SpatialAffinity(host, {**host_args, **given.pop("host_args", {})}, **given).train()


def pair(size: tuple[int, int] = (48, 64), ratio: int = 2, count: int = 2) -> dict:
    bands = generic(3)
    fine = tuple(ratio * side for side in size)
    data = SyntheticDataset(torch.tensor(bands.means), torch.tensor(bands.stds), fine, count, classes=4, seed=0)
    batch = Collate(5.0)([data[i] for i in range(count)])
    hr = batch["image"]
    return {"image": F.avg_pool2d(hr, ratio), "gsd": torch.full((count,), 5.0 * ratio), "image_hr": hr} | {
        "gsd_hr": torch.full((count,), 5.0)
    }


@pytest.mark.parametrize("name", HOSTS)
def test_every_host_learns_affinity_and_its_own_task(name):
    module = make(name)
    torch.manual_seed(1)
    output = module.step(module.prepare(pair()))
    torch.manual_seed(1)
    alone = module.host.step(module.host.prepare(pair()))
    assert torch.equal(output.logs["host"], alone.loss)
    torch.testing.assert_close(output.loss, alone.loss + output.logs["affinity_gram"])
    assert output.logs["affinity_gram"] > 0
    output.loss.backward()
    assert all(p.grad is not None for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", HOSTS)
@pytest.mark.parametrize("tokens", ["host", "block"])
def test_the_gradient_of_affinity_goes_into_the_student_alone(name, tokens):
    module = make(name, tokens=tokens)
    output = module.step(module.prepare(pair()))
    output.logs["affinity_gram"].backward()
    touched = {n for n, p in module.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    student = {id(p) for p in module.student_encoder.parameters()}
    assert touched and all(id(dict(module.named_parameters())[n]) in student for n in touched)


def test_gram_in_closed_form_with_and_without_padding():
    s, t = torch.randn(2, 5, 7).double(), torch.randn(2, 5, 3).double()
    s[1, 3:], t[1, 3:] = 0, 0
    wanted = []
    for b, n in ((0, 5), (1, 3)):
        x, y = (v[b, :n] / v[b, :n].norm(dim=1, keepdim=True) for v in (s, t))
        wanted.append(sum((x[i] @ x[j] - y[i] @ y[j]) ** 2 for i in range(n) for j in range(n)) / n**2)
    torch.testing.assert_close(affinity_gram(s, t, (5, 3)), sum(wanted) / 2)
    torch.testing.assert_close(affinity_gram(s[:1], t[:1]), wanted[0])
    assert affinity_gram(s, 3 * s) < 1e-30  # lengths do not matter
    x = s[1, :3] / s[1, :3].norm(dim=1, keepdim=True)
    pairs = [x[i] @ x[j] for i in range(3) for j in range(3) if i != j]
    torch.testing.assert_close(off_diagonal_affinity(s[1:], (3,)), torch.stack(pairs).mean())


@pytest.mark.parametrize("name", ["ijepa", "latent_mim", "mae", "s2mae"])
def test_the_teacher_sees_only_what_lies_under_the_students_patches(name):
    module = make(name)
    encoder = module.teacher(torch.device("cpu"))
    images = torch.randn(2, 3, 96, 128)
    groups, height, width = module.backbone.token_grid(48, 64)
    kept = torch.tensor([[0, 9, 17], [3, 30, 47]])
    seen = Tokens(torch.zeros(2, 3, 48), (groups, height, width), kept)
    under = torch.zeros(2, 1, height, width).flatten(2).scatter(2, kept[:, None], 1.0).view(2, 1, height, width)
    under = F.interpolate(under, scale_factor=16) > 0
    first = pooled_children(encoder, images, seen, 2)
    torch.testing.assert_close(first, pooled_children(encoder, torch.where(under, images, 9.0), seen, 2))
    assert not torch.allclose(first, pooled_children(encoder, torch.where(under, -images, images), seen, 2))


@pytest.mark.parametrize("name", HOSTS)
def test_in_a_step_of_any_host_the_rest_of_hr_may_be_anything(name, monkeypatch):
    module, calls = make(name), []
    terms = module.affinity_terms
    monkeypatch.setattr(module, "affinity_terms", lambda *given: calls.append(given) or terms(*given))
    module.step(module.prepare(pair()))
    ((seen, images, gsd),) = calls
    for tokens in seen:
        lengths = tokens.lengths or [tokens.kept.shape[1]] * 2
        visible = torch.zeros(2, *tokens.grid).flatten(1)
        for row, kept, length in zip(visible, tokens.kept, lengths, strict=True):
            row[kept[:length]] = 1.0
        assert 0 < visible.mean() < 1
        under = F.interpolate(visible.view(2, *tokens.grid), size=images.shape[-2:]) > 0
        alone = terms([tokens], torch.where(under, images, torch.nan), gsd)
        assert all(torch.equal(value, alone[key]) for key, value in terms([tokens], images, gsd).items())


def test_contexts_of_different_length_are_as_if_each_were_alone():
    module = make().double()
    images, encoder = torch.randn(2, 3, 96, 128).double(), module.teacher(torch.device("cpu"))
    kept, lengths = torch.tensor([[5, 9, 17, 18], [3, 30, 0, 0]]), (4, 2)
    together = pooled_children(encoder, images, Tokens(torch.zeros(2, 4, 48), (1, 6, 8), kept, lengths=lengths), 2)
    for b, n in enumerate(lengths):
        own = encoder(images[b : b + 1], keep=children(kept[b : b + 1, :n], 8, 2)).patches
        torch.testing.assert_close(together[b, :n], own.unflatten(1, (-1, 4)).mean(2)[0])
        assert not together[b, n:].any()


@pytest.mark.parametrize("sampler", ["packed", "balanced"])
def test_ijepa_says_what_its_student_saw(sampler):
    module = make(host_args={"masks": {"sampler": sampler, "contexts": 2}}).double()
    output = module.host.step({"image": (images := torch.randn(4, 3, 64, 64).double())})
    assert len(output.student) == 2
    for seen in output.student:
        again = encode_at(module.student_encoder, images, seen.kept, None, seen.lengths)
        torch.testing.assert_close(seen.x, again.x)


def test_latent_mim_cuts_both_images_alike():
    module = make("latent_mim")
    batch = pair((50, 64))
    batch["image_hr"] = F.interpolate(batch["image"], scale_factor=2.0)  # every pixel four times
    output = module.host.step(batch)
    coarse, fine = output.encoded["image"], output.encoded["image_hr"]
    assert torch.equal(F.interpolate(coarse, scale_factor=2.0), fine)


def move(module: SpatialAffinity, steps: int = 3) -> None:
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-2)
    for step in range(steps):
        torch.manual_seed(step)
        module.step(module.prepare(pair())).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        module._move_targets(None)


@pytest.mark.parametrize("name", ["ijepa", "latent_mim"])
def test_the_shared_teacher_equals_an_own_one(name):
    module = make(name, teacher="own")
    move(module)
    ours, theirs = module.own.module.state_dict(), module.host.target_encoder.module.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    student = module.student_encoder.state_dict()
    assert any(not torch.equal(value, student[key]) for key, value in ours.items())
    shared = copy.deepcopy(module)
    shared.teacher_name = "host"
    losses = [m.evaluate(pair(), seed=3).loss for m in (module, shared)]
    assert torch.equal(*losses)


def test_sources():
    batch = pair()
    paired, alone, fine, enlarged = (make(source=s) for s in ("pair", "mr", "hr", "interpolated"))
    assert "image_hr" not in alone.prepare(batch) and torch.equal(
        alone.prepare(batch)["image"], paired.prepare(batch)["image"]
    )
    assert torch.equal(fine.prepare(batch)["image"], paired.prepare(batch)["image_hr"])
    assert torch.equal(fine.prepare(batch)["gsd"], batch["gsd_hr"])
    made = enlarged.prepare(batch)
    assert made["image_hr"].shape == batch["image_hr"].shape and torch.equal(made["gsd_hr"], batch["gsd_hr"])
    torch.testing.assert_close(F.avg_pool2d(made["image_hr"], 2), made["image"], atol=0.6, rtol=0.5)
    for module in (alone, fine):
        assert "affinity_gram" not in module.step(module.prepare(batch)).logs
    assert "affinity_gram" in enlarged.step(enlarged.prepare(batch)).logs
    assert torch.equal(fine.features(batch), alone.features(batch))  # evaluated on the same images


@pytest.mark.parametrize("views", [Views(size=32), Views(size=None, intensity=0.3, band_dropout=0.5), NO_VIEWS])
def test_views_show_the_same_ground(views):
    module = make(views=views)
    batch = pair((64, 64))
    ramp = torch.linspace(-1, 1, 128).view(1, 1, 128, 1) + 0.3 * torch.linspace(-1, 1, 128)
    batch["image_hr"] = ramp.expand(2, 3, -1, -1).contiguous() * generic(3).stds[0]
    batch["image"] = F.avg_pool2d(batch["image_hr"], 2)
    torch.manual_seed(2)
    made = module.prepare(batch, augment=True)
    inside = F.avg_pool2d(made["image_hr"], 2)[..., 2:-2, 2:-2]
    torch.testing.assert_close(inside, made["image"][..., 2:-2, 2:-2], atol=5e-3, rtol=0)
    torch.testing.assert_close(made["gsd"], 2 * made["gsd_hr"])
    torch.manual_seed(2)
    alone, _ = views((batch["image"] - module.mean) / module.std, batch["gsd"])
    torch.testing.assert_close(made["image"], alone)  # the pair changes no draw


def test_aligned_positions_lie_around_the_parents():
    for position in ("sincos", "stretched", "gsd"):
        module = make(backbone=replace(PLAIN, position=position))
        positions, like = module.backbone.positions, torch.zeros(1, 1, 48)
        positions.finer = 2
        gsd = torch.tensor([5.0])
        fine = positions((1, 12, 16), like=like, gsd=gsd)
        positions.finer = 1
        coarse = positions((1, 6, 8), like=like, gsd=2 * gsd)
        pooled = F.avg_pool2d(fine.mT.unflatten(2, (12, 16)), 2).flatten(2).mT
        nearest = torch.cdist(pooled[0], coarse[0]).argmin(1)
        assert torch.equal(nearest, torch.arange(48)), position


def test_aligned_positions_change_the_teacher_only():
    native, aligned = (make(hr_positions=p).evaluate(pair(), seed=0).logs for p in ("native", "aligned"))
    assert torch.equal(native["host"], aligned["host"]) and native["affinity_gram"] != aligned["affinity_gram"]


def test_feature_norm_compares_before_the_head():
    logs = {f: make("latent_mim", feature=f).evaluate(pair(), seed=0).logs for f in ("head", "norm")}
    assert logs["head"]["affinity_gram"] != logs["norm"]["affinity_gram"]
    module = make("latent_mim", feature="norm")
    module.step(module.prepare(pair())).logs["affinity_gram"].backward()
    assert all(p.grad is None for p in module.host.head.parameters())


def test_loss_features_and_weight():
    logs = make(loss="features").evaluate(pair(), seed=0).logs
    assert {"affinity_features", "affinity_gram", "affinity_student", "affinity_teacher"} <= set(logs)
    module = make(weight=0.5)
    output = module.evaluate(pair(), seed=0)
    torch.testing.assert_close(output.loss, output.logs["host"] + 0.5 * output.logs["affinity_gram"])
    rise = Rise(2.0, 0.25, 0.5)
    assert [rise(step, 100) for step in (0, 24, 25, 50, 75, 99)] == [0, 0, 0, 1, 2, 2]
    assert Rise(2.0, 0.0, 0.0)(0, 100) == 2


@pytest.mark.parametrize("name", ["ijepa", "latent_mim", "mae", "cross_scale_mae", "s2mae"])
@pytest.mark.parametrize("source", ["pair", "interpolated", "mr", "hr"])
def test_every_host_trains_from_every_source(name, source):
    module = make(name, source=source, teacher="own" if name.endswith("mae") else "host")
    before = {key: value.clone() for key, value in module.student_encoder.state_dict().items()}
    move(module, steps=2)
    assert any(not torch.equal(value, before[key]) for key, value in module.student_encoder.state_dict().items())
    logs = module.evaluate(pair(), seed=0).logs
    assert all(bool(value.isfinite()) for value in logs.values())
    assert ("affinity_gram" in logs) == (source in ("pair", "interpolated"))


def test_weight_0_is_the_host_alone_with_the_affinities_logged():
    modules = [make(weight=0.0), make(source="mr")]
    for module in modules:
        move(module, steps=2)
    ours, alone = (module.state_dict() for module in modules)
    assert all(torch.equal(value, alone[key]) for key, value in ours.items())


def save(module, path) -> str:
    torch.save({"state_dict": module.state_dict(), checkpoints.KEY: checkpoints.metadata(module)}, path)
    return str(path)


def test_a_checkpoint_teaches_and_stays_as_it_is(tmp_path):
    torch.manual_seed(3)
    mae = MAE(bands=generic(3), backbone=replace(PLAIN, class_token=True), **DECODER)
    path = save(mae, tmp_path / "teacher.ckpt")
    module = make("mae", teacher=path, host_args={"mask_ratio": 0.5})
    move(module, steps=2)
    teacher = module.teacher(torch.device("cpu"))
    assert all(torch.equal(value, mae.backbone.state_dict()[key]) for key, value in teacher.state_dict().items())
    assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert set(module.state_dict()) == set(make("mae", source="mr").state_dict())  # it is in no checkpoint


def test_teachers_that_do_not_fit_are_refused_before_the_run(tmp_path):
    class Data:
        bands, image_size, pair_ratio = generic(3), (48, 64), 2

    for options, message in (
        ({"bands": generic(4)}, "was trained on other bands"),
        ({"backbone": replace(PLAIN, patch_size=16)}, "patches of 16 pixels in 1 group.* student of 8 in 1: take"),
    ):
        other = MAE(**{"bands": generic(3), "backbone": PLAIN, **DECODER, **options})
        module = make("mae", teacher=save(other, tmp_path / "other.ckpt"))
        with pytest.raises(UserError, match=message):
            module.check_data(Data, fitting=True)
    with pytest.raises(UserError, match=r"teacher 'no.ckpt' is no file: give host, own or the path"):
        make(teacher="no.ckpt").check_data(Data, fitting=True)
    with pytest.raises(UserError, match=r"deliver none: set data.pair_ratio to 3"):
        Data.pair_ratio = 1
        make(ratio=3).check_data(Data, fitting=True)


def test_each_sensor_has_its_own_statistics():
    class Data:
        bands, image_size, ratio = generic(3), (48, 64), 2
        bands_hr = generic(3).with_statistics([10.0, 20.0, 30.0], [1.0, 2.0, 3.0])

    module, batch = make(), pair()
    wanted = module.prepare(batch)["image_hr"]
    module.check_data(Data, fitting=True)
    unit = (batch["image_hr"] - module.mean) / module.std
    mean, std = (torch.tensor(x).view(1, 3, 1, 1) for x in (Data.bands_hr.means, Data.bands_hr.stds))
    torch.testing.assert_close(module.prepare({**batch, "image_hr": unit * std + mean})["image_hr"], wanted)
    for bands, message in (
        (generic(4), "data.bands are 3 .*and data.bands_hr 4"),
        (Data.bands_hr.with_wavelengths([0.66, 0.56, 0.49]), "band1 .0.49 um. stands beside band1 .0.66 um."),
    ):
        Data.bands_hr = bands
        module.bands = generic(3).with_wavelengths([0.49, 0.56, 0.66])
        with pytest.raises(UserError, match=message):
            module.check_data(Data, fitting=True)


def test_a_checkpoint_holds_everything_once_and_gives_everything_back(tmp_path):
    module = make()
    move(module, steps=2)
    path = save(module, tmp_path / "sa.ckpt")
    parameters = {id(p): p.numel() for p in module.parameters()}
    assert 4 * sum(parameters.values()) > 0.9 * (tmp_path / "sa.ckpt").stat().st_size
    again = checkpoints.load_method(path)
    assert torch.equal(again.features(pair()), module.features(pair()))
    encoder, _ = load_backbone(path)
    target = module.host.target.module.state_dict()  # the encoder that I-JEPA's features come from
    assert all(torch.equal(value, target[key]) for key, value in encoder.state_dict().items())
    groups = parameter_groups(module, undecayed=module.undecayed)
    counted = [id(p) for group in groups for p in group["params"]]
    assert len(counted) == len(set(counted)) == sum(p.requires_grad for p in module.parameters())


def test_maps_are_those_of_the_student_on_mr_and_the_teacher_on_hr():
    module = make("latent_mim", feature="norm", hr_positions="aligned")
    batch = pair()
    student, teacher = module.affinity_maps(batch)
    assert student.shape == (2, 48, 6, 8) and teacher.shape == (2, 48, 12, 16)
    torch.testing.assert_close(student, module.host.patch_features({k: v for k, v in batch.items() if "hr" not in k}))
    seen = Tokens(torch.zeros(2, 48, 48), (1, 6, 8), torch.arange(48).expand(2, -1))
    prepared = module.eval().prepare(batch)
    pooled = pooled_children(
        module.teacher(module.device), prepared["image_hr"], seen, 2, prepared["gsd_hr"], "aligned"
    )
    torch.testing.assert_close(F.avg_pool2d(teacher, 2).flatten(2).mT, pooled, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "mae", "teacher": "host"}, "MAE has no EMA that could teach: set teacher to own"),
        ({"host_args": {"backbone": {}}}, "host_args has backbone.*give model.backbone"),
        ({"host_args": {"mask_rato": 0.5}}, "'ijepa': there is no argument 'mask_rato'; there are masks, pred"),
        ({"host_args": {"ema_momentum": {"kind": "constant", "start": 1.0, "end": 1.0}}}, "momentum 1 and stays"),
        ({"ratio": 0}, "ratio must be"),
        ({"weight": -1.0}, "weight must not be negative"),
    ],
)
def test_wrong_options(options, message):
    with pytest.raises(UserError, match=message):
        make(**options)


def test_unknown_host():
    with pytest.raises(UserError, match=r"'ijeppa' cannot be imported.*known are mae"):
        SpatialAffinity("ijeppa")


def test_wrong_batches():
    module, batch = make(), pair()
    with pytest.raises(UserError, match=r"image_hr of 96 x 128 pixels is not 3 times.*set model.ratio to 2"):
        make(ratio=3).prepare(batch)
    with pytest.raises(UserError, match=r"of 95 x 127 pixels is not 2 times the image of 48 x 64: deliver HR"):
        module.prepare({**batch, "image_hr": batch["image_hr"][..., 1:, 1:]})
    with pytest.raises(UserError, match=r"needs batch\['image_hr'\] and the data deliver none"):
        module.prepare({"image": batch["image"], "gsd": batch["gsd"]})
    with pytest.raises(UserError, match="image has 3 bands and image_hr 2"):
        module.prepare({**batch, "image_hr": batch["image_hr"][:, :2]})
    with pytest.raises(UserError, match=r"teacher 'no.ckpt' is no file"):
        make(teacher="no.ckpt").step(module.prepare(batch))
    with pytest.raises(UserError, match="host 'spatial_affinity' needs a host itself"):
        SpatialAffinity("spatial_affinity")
