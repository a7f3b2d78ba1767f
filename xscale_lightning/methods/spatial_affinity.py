"""Spatial affinity: Waithaka, Bwirayesu, Busogi, arXiv 2601.12964 (2026).

Let a method see medium resolution (MR), and ask that its patches resemble each other as the patches of high resolution
(HR) do, which a teacher sees of the same ground:

    s_i = student's token of MR patch i, for the patches that the host method shows it anyway
    t_i = mean over the r x r HR patches under patch i of the teacher's tokens; it sees those patches alone, no gradient
    A(x)_ij = <x_i, x_j> / |x_i| |x_j|                           affinity of two patches of one image
    L   = L_host + w mean over images, i, j of (A(s) - A(t))^2

The teacher is an EMA of the student. The published code keeps one for the host's targets and another for HR, from the
same start and with the same momentum: they are equal, so here one network serves as both (`teacher: host`).

Differences from the published code: pairs are cut and turned exactly alike, Gram matrices are in float32, all contexts
count and not the first alone, any ratio pools by the mean, and any method can be the host that says what its student
saw (`StepOutput.student`).
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from xscale_lightning.data.bands import Bands
from xscale_lightning.data.views import Views
from xscale_lightning.ema import EMA
from xscale_lightning.errors import UserError
from xscale_lightning.losses import affinity_features, affinity_gram, off_diagonal_affinity
from xscale_lightning.methods.affinity_pairs import (
    check_pair,
    check_paired_data,
    enlarged,
    hr_alone,
    hr_in_units_of_mr,
    pair_fits,
    without_hr,
)
from xscale_lightning.methods.affinity_parts import (
    encode_at,
    load_teacher,
    outputs,
    pooled_children,
    random_block,
)
from xscale_lightning.methods.base import Batch, StepOutput
from xscale_lightning.methods.hosted import HostedMethod
from xscale_lightning.methods.measure import evaluation
from xscale_lightning.models.attention import Backend
from xscale_lightning.models.heads import ProjectedEncoder
from xscale_lightning.models.pos_embed import finer_positions
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.optim import OptimizerConfig
from xscale_lightning.schedules import Rise, Schedule

Source = Literal["pair", "mr", "hr", "interpolated"]
LOSSES = {"gram": affinity_gram, "features": affinity_features}


class SpatialAffinity(HostedMethod):
    """A host method whose student also learns how high-resolution patches resemble each other.

    Args:
        host: the method: its announced name, or the class path of an `SSLModule`.
        host_args: its own arguments; bands, backbone, optimizer, views and attention are those given here.
        ratio: HR pixels per MR pixel and axis; `image_hr` must be exactly so many times larger than `image`.
        weight: of the affinity loss.
        start: share of the run before the affinity loss begins; published 0.
        warmup: share of the run over which its weight then rises; published 0.
        source: `pair` (image and image_hr), or the comparisons of the paper: `mr` (the host alone on image), `hr` (the
            host alone on image_hr), `interpolated` (the teacher sees image, enlarged).
        pool: how HR tokens become one per MR patch.
        tokens: compare the patches that the host's student saw (`host`), or those of one random rectangle per image,
            at the price of a second pass of the student (`block`).
        feature: compare what the host works with (`head`: LatentMIM's projected tokens) or what the encoder itself
            makes (`norm`: after its last norm); the same for hosts without a projection head.
        teacher: `host` (the EMA that makes the host's targets), `own` (an EMA for affinity alone, also for hosts
            without one), or the path of a checkpoint, whose encoder stays as it is.
        ema_momentum: of an own EMA, if the host has none to take it from.
        hr_positions: positions of HR patches: `native`, as in any image of that size (published), or `aligned`, around
            the position of the MR patch they belong to.
        loss: `gram`, or `features`, the published ablation: tokens are compared themselves.
        bands: record of the data's bands.
        backbone: the encoder; the host's.
        optimizer: AdamW and its schedules.
        views: augmentation; the same crop, flips and turns for image and image_hr.
        attention: attention backend of every layer.
        init_from: weights that the encoder starts from, see `SSLModule`.
        adapt_bands: allow `init_from` weights of other bands.
        activation_checkpointing: see `SSLModule`.
        compile_blocks: see `SSLModule`.

    Attributes:
        host: the host method.

    Raises:
        UserError: a host that cannot be built or has no EMA where one is asked for, numbers out of range; in the first
            batch, image_hr missing, of another size than `ratio` says, or with another number of bands.
    """

    def __init__(
        self,
        host: str = "ijepa",
        host_args: dict[str, Any] | None = None,
        ratio: int = 2,
        weight: float = 1.0,
        start: float = 0.0,
        warmup: float = 0.0,
        source: Source = "pair",
        pool: Literal["mean"] = "mean",
        tokens: Literal["host", "block"] = "host",
        feature: Literal["head", "norm"] = "head",
        teacher: str = "host",
        ema_momentum: Schedule = Schedule("linear", 0.996, 1.0),  # noqa: B008 (frozen; shown as default in --help)
        hr_positions: Literal["native", "aligned"] = "native",
        loss: Literal["gram", "features"] = "gram",
        bands: Bands | None = None,
        backbone: BackboneConfig = BackboneConfig(class_token=False),  # noqa: B008
        optimizer: OptimizerConfig = OptimizerConfig(),  # noqa: B008
        views: Views = Views(),  # noqa: B008
        attention: Backend = "auto",
        init_from: str | None = None,
        adapt_bands: bool = False,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        rest = (init_from, adapt_bands, activation_checkpointing, compile_blocks)
        super().__init__(host, host_args, bands, backbone, optimizer, views, attention, *rest)
        if ratio < 1:
            raise UserError(f"ratio must be a whole number of HR pixels per MR pixel, at least 1, got {ratio}.")
        if weight < 0 or not 0 <= start <= 1 or not 0 <= warmup <= 1:
            raise UserError(
                f"weight must not be negative, start and warmup must be in [0, 1], got {weight}, {start}, {warmup}."
            )
        self.sample_wise = self.host.sample_wise and tokens == "host"
        self.ratio, self.source, self.tokens, self.feature = ratio, source, tokens, feature
        self.hr_positions: Literal["native", "aligned"] = hr_positions
        self.kind, self.affinity = loss, LOSSES[loss]
        self.host.paired = True  # what it gets has HR for `pair` alone
        self.teacher_name, self._frozen, self.bands_hr = teacher, (), self.bands
        self.register_buffer("gain_hr", torch.ones_like(self.mean), persistent=False)
        self.register_buffer("shift_hr", torch.zeros_like(self.mean), persistent=False)
        if self.compares:
            self.declare("affinity_weight", Rise(weight, start, warmup))
            self._choose_teacher(teacher, ema_momentum)

    @property
    def compares(self) -> bool:
        """Whether there is an affinity loss at all; without, the host runs alone."""
        return self.source in ("pair", "interpolated")

    def _choose_teacher(self, name: str, momentum: Schedule) -> None:
        if name == "own":
            declared = self._schedules.get("ema_momentum", momentum)
            self.own = self.make_target(self.host.student_encoder, declared)  # type: ignore[arg-type]
        elif name == "host" and self.host.target_encoder is None:
            raise UserError(f"{type(self.host).__name__} has no EMA that could teach: set teacher to own.")
        elif name == "host" and _never_moves(self._schedules.get("ema_momentum")):
            raise UserError("the host's target has momentum 1 and stays as it was drawn: set teacher to own.")

    @property
    def method_name(self) -> str:
        """`sa_` and the host's."""
        return f"sa_{self.host.method_name}"

    # ---- data ------------------------------------------------------------------------------------------------------

    def check_data(self, data: Any, fitting: bool) -> None:
        """Refuse also pairs that do not fit and a teacher that cannot teach; learn the statistics of HR."""
        if fitting and self.source in ("pair", "hr"):
            check_paired_data(data, self.bands, self.ratio, self.source)
        finer: Bands | None = getattr(data, "bands_hr", None)
        if finer is not None and len(finer) == len(self.bands):
            self.bands_hr = finer
            self.gain_hr, self.shift_hr = hr_in_units_of_mr(self.bands, finer, like=self.mean)
        if fitting and self.compares:
            self.teacher(self.mean.device)
        super().check_data(data, fitting)
        if self.source == "hr" and getattr(data, "image_size", None):
            self.check_size(*(self.ratio * side for side in data.image_size))  # what validation sees

    def encode(self, batch: Batch) -> Tokens:
        """Tokens of the batch's `image`, whatever the source of training."""
        return self.host.encode(without_hr(batch))

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """As the host; with `image_hr` in MR's units and augmented by the same draws, as the source says."""
        if self.source in ("pair", "hr"):
            check_pair(batch, self.ratio, self.source)
        if self.source == "pair":
            return self._prepare_pair(batch, augment)
        if self.source == "hr":
            return self.host.prepare(hr_alone(self._in_units_of_mr(batch)), augment)
        batch = self.host.prepare(without_hr(batch), augment)
        return enlarged(batch, self.ratio) if self.source == "interpolated" else batch

    def _prepare_pair(self, batch: Batch, augment: bool) -> Batch:
        return self.host.prepare(self._in_units_of_mr(batch), augment)

    def _in_units_of_mr(self, batch: Batch) -> Batch:
        return {**batch, "image_hr": batch["image_hr"].to(self.mean.dtype) * self.gain_hr + self.shift_hr}

    # ---- one step --------------------------------------------------------------------------------------------------

    def step(self, batch: Batch) -> StepOutput:
        """The host's loss, and the affinity loss of what its student saw."""
        if not self.compares:
            return self.host.step(batch)
        beheaded = self._part(self.student_encoder) is not self.student_encoder
        with outputs(self.backbone, watching=beheaded) as unprojected:
            output = self.host.step(batch)
        seen = list(unprojected or output.student)
        batch = output.encoded or batch
        if self.tokens == "block":
            images = batch["image"]
            places = random_block(len(images), self.backbone.grid(images), images.device)
            seen = [encode_at(self._part(self.student_encoder), images, places, batch.get("gsd"))]
        if not seen:
            raise UserError(f"{type(self.host).__name__} does not say what its student saw: set tokens to block.")
        terms = self.affinity_terms(seen, batch["image_hr"], batch.get("gsd_hr"))
        output.logs = {"host": output.loss, **output.logs, **terms}
        output.loss = output.loss + self.value("affinity_weight") * terms[f"affinity_{self.kind}"]
        return output

    def affinity_terms(self, seen: list[Tokens], images: Tensor, gsd: Tensor | None = None) -> dict[str, Tensor]:
        """Affinity loss of the student's tokens, one entry per mask, and how alike tokens are on either side.

        Args:
            seen: what the student saw, with `kept`.
            images: `image_hr [B, C, r * H, r * W]` as the host encoded its `image`.
            gsd: its metres per pixel `[B]`.

        Returns:
            `affinity_gram` (always; it is the error of the Gram matrices), the loss under its name if it is another,
            `affinity_student` and `affinity_teacher`: mean cosine between different patches; near 1 means collapse.
        """
        found: dict[str, list[Tensor]] = {}
        for tokens in seen:
            with torch.no_grad():
                encoder = self.teacher(images.device)
                wanted = pooled_children(encoder, images, tokens, self.ratio, gsd, self.hr_positions)
            s, lengths = tokens.patches, tokens.lengths
            if self.kind == "features" and s.shape[-1] != wanted.shape[-1]:
                raise UserError(
                    f"loss features compares tokens of width {s.shape[-1]} with the teacher's {wanted.shape[-1]}: "
                    "set loss to gram."
                )
            found.setdefault("affinity_gram", []).append(affinity_gram(s, wanted, lengths))
            if self.kind != "gram":
                found.setdefault(f"affinity_{self.kind}", []).append(self.affinity(s, wanted, lengths))
            for name, x in (("student", s.detach()), ("teacher", wanted)):
                found.setdefault(f"affinity_{name}", []).append(off_diagonal_affinity(x, lengths))
        return {name: torch.stack(values).mean() for name, values in found.items()}

    def affinity_maps(self, batch: Batch) -> tuple[Tensor, Tensor] | None:
        """What can be compared in a raw batch of which nothing is hidden, in evaluation mode and without gradients.

        Of real HR wherever the batch has it, whatever the source of training, so that runs can be compared.

        Returns:
            The student's tokens of MR `[B, D, h, w]` and the teacher's of HR `[B, D', r * h, r * w]`, float32; None
            without an affinity loss where the host has no EMA, or the batch no HR.
        """
        alone, real = not self.compares, pair_fits(batch, self.ratio)
        if alone and not (real and self.teacher_name == "host" and self.target_encoder is not None):
            return None
        with evaluation(self):
            batch = self._prepare_pair(batch, False) if real else self.prepare(batch)
            images, finer = batch["image"], batch["image_hr"]
            student, teacher = self._part(self.student_encoder), self.teacher(images.device)
            seen = student(images, gsd=batch.get("gsd"))
            with finer_positions(teacher, self.ratio if self.hr_positions == "aligned" else 1):
                wanted = teacher(finer, gsd=batch.get("gsd_hr"))
            return seen.feature_map().float(), wanted.feature_map().float()

    def teacher(self, device: torch.device) -> nn.Module:
        """The network that sees HR, on `device`."""
        if self.teacher_name in ("host", "own"):
            ema = self.own if self.teacher_name == "own" else self.host.target_encoder
            assert isinstance(ema, EMA)
            return self._part(ema.module)
        if not self._frozen:  # not registered: it is in no checkpoint of ours, and only training needs its file
            self._frozen = (load_teacher(self.teacher_name, self.backbone, (self.bands, self.bands_hr)),)
        self._frozen[0].to(device, self.mean.dtype)
        return self._frozen[0]

    def _part(self, encoder: nn.Module) -> nn.Module:
        """`encoder`, without its projection head if that is not to be compared."""
        return encoder.backbone if self.feature == "norm" and isinstance(encoder, ProjectedEncoder) else encoder


def _never_moves(momentum: object) -> bool:
    return isinstance(momentum, Schedule) and momentum.start == momentum.end == 1
