"""A method around another one, its host: whatever the wrapper does not say itself is the host's."""

import inspect
from argparse import ArgumentError
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from xscale_lightning import checkpoints
from xscale_lightning.data.bands import Bands
from xscale_lightning.data.views import Views
from xscale_lightning.ema import EMA
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import Batch, SSLModule, StepOutput
from xscale_lightning.methods.discovery import load_class
from xscale_lightning.models.attention import Backend
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.models.tokens import Tokens
from xscale_lightning.optim import OptimizerConfig

SHARED = ("bands", "backbone", "optimizer", "views", "attention", "activation_checkpointing", "compile_blocks")


class HostedMethod(SSLModule):
    """Base of add-ons: holds the host method and hands it what it needs from the run.

    The host's backbone is registered as the wrapper's, too, so that the encoder has the same names in every checkpoint.

    Args:
        host: the method: its announced name, or the class path of an `SSLModule`.
        host_args: its own arguments; those below are shared.
        bands: record of the data's bands.
        backbone: the encoder.
        optimizer: AdamW and its schedules.
        views: augmentation.
        attention: attention backend of every layer.
        init_from: as in `SSLModule`; for the backbone that both share.
        adapt_bands: as in `SSLModule`.
        activation_checkpointing: as in `SSLModule`.
        compile_blocks: as in `SSLModule`.

    Attributes:
        host: the host method.

    Raises:
        UserError: a host that cannot be built.
    """

    def __init__(
        self,
        host: str,
        host_args: dict[str, Any] | None,
        bands: Bands | None,
        backbone: BackboneConfig,
        optimizer: OptimizerConfig,
        views: Views,
        attention: Backend,
        init_from: str | None = None,
        adapt_bands: bool = False,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
    ) -> None:
        start = (init_from, adapt_bands)
        super().__init__(bands, backbone, optimizer, views, attention, *start, activation_checkpointing, compile_blocks)
        shared = {"bands": self.bands, "backbone": backbone, "optimizer": optimizer, "views": views}
        self.host = build_host(host, host_args or {}, {**shared, "attention": attention})
        self.backbone, self.views = self.host.backbone, self.host.views
        self.sample_wise, self.undecayed = self.host.sample_wise, self.host.undecayed
        self._targets, self._schedules = self.host._targets, self.host._schedules  # one list of each for both

    def step(self, batch: Batch) -> StepOutput:
        """The host's."""
        return self.host.step(batch)

    @property
    def feature_encoder(self) -> Any:
        """The host's."""
        return self.host.feature_encoder

    @property
    def student_encoder(self) -> nn.Module:
        """The host's."""
        return self.host.student_encoder

    @property
    def target_encoder(self) -> EMA | None:
        """The host's."""
        return self.host.target_encoder

    def scaling(self, raw: Tensor) -> tuple[Tensor, Tensor]:
        """The host's."""
        return self.host.scaling(raw)

    def prepare(self, batch: Batch, augment: bool = False) -> Batch:
        """As the host."""
        return self.host.prepare(batch, augment)

    def encode(self, batch: Batch) -> Tokens:
        """As the host."""
        return self.host.encode(batch)

    def token_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """The host's."""
        return self.host.token_grid(height, width)

    def check_size(self, height: int, width: int) -> None:
        """Refuse what the host refuses."""
        self.host.check_size(height, width)

    def check_data(self, data: Any, fitting: bool) -> None:
        """Refuse what the host refuses."""
        self.host.check_data(data, fitting)
        super().check_data(data, fitting)

    def on_train_start(self) -> None:
        """As the host."""
        self.host.on_train_start()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """As the base; the host's schedules follow the same plan."""
        optimizer = super().configure_optimizers()
        self.host.plan = self.plan
        return optimizer


def arguments_of(cls: type) -> list[str]:
    """Names of the constructor arguments of `cls`, and of its bases where it passes `**kwargs` on."""
    names: list[str] = []
    for base in cls.__mro__:
        parameters = inspect.signature(base.__init__).parameters.values()
        names += [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL) and p.name != "self"]
        if all(parameter.kind is not parameter.VAR_KEYWORD for parameter in parameters):
            break
    return list(dict.fromkeys(names))


def build_host(name: str, arguments: Mapping[str, Any], shared: Mapping[str, Any]) -> SSLModule:
    """The host method `name` (announced name or class path) with its own and the shared arguments.

    Raises:
        UserError: no such method, one that needs a host itself, arguments it does not have, or shared ones.
    """
    if twice := sorted(set(arguments) & set(SHARED)):
        raise UserError(f"model.host_args has {twice[0]}, which host and wrapper share: give model.{twice[0]} instead.")
    cls = load_class(name)
    if issubclass(cls, HostedMethod):
        raise UserError(f"host {name!r} needs a host itself: name a method such as ijepa or mae.")
    try:
        return checkpoints.build_method(cls, checkpoints.plain({**arguments, **shared}))
    except ArgumentError as error:
        reason = " ".join(str(error).split()).replace("Group 'method' does not accept option", "there is no argument")
        reason = reason.replace("method.", "")[:300]
        if "there is no argument" in reason:
            own = [argument for argument in arguments_of(cls) if argument not in SHARED]
            reason = f"{reason.rstrip('.')}; there are {', '.join(own) or 'none'}."
        raise UserError(f"model.host_args do not fit host {name!r}: {reason}") from error
