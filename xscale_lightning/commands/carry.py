"""What goes from one stage of training to the next: weights by name, and AdamW's moments by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from xscale_lightning import checkpoints
from xscale_lightning.errors import UserError
from xscale_lightning.methods.base import SSLModule
from xscale_lightning.models.resizing import Tables, fit_tables
from xscale_lightning.optim import parameter_groups

Moments = dict[str, dict[str, Any]]
# Arguments that a stage may change, besides rates and weights: what it sees and how it learns, not what the model is.
FREE = (
    *checkpoints.FREE,
    *("scale_view", "backbone.image_size", "backbone.wavelengths", "backbone.pretrained"),
)


@dataclass
class EndState:
    """Where a stage ended.

    Attributes:
        weights: parameters, target networks and buffers by name.
        arguments: those of its method, plain.
        moments: AdamW's state by the name of the parameter.
    """

    weights: Mapping[str, Tensor]
    arguments: Mapping[str, Any]
    moments: Moments

    @classmethod
    def of(cls, module: SSLModule, moments: Moments) -> "EndState":
        """The state of a method as it is."""
        return cls(module.state_dict(), checkpoints.metadata(module)["init_args"], moments)


def check_architecture(module: SSLModule, arguments: Mapping[str, Any]) -> None:
    """Refuse a stage whose method is not that of the stage before, also where the shapes of the weights are the same.

    Switches outside of the backbone, such as `norm_pix_loss`, are of the objective, which may change.

    Raises:
        UserError: naming the argument and both values.
    """
    here = checkpoints.metadata(module)["init_args"]
    before, now = ({k: v for k, v in args.items() if not isinstance(v, bool)} for args in (arguments, here))
    if changed := checkpoints.other_argument(before, now, FREE):
        name, old, new = changed
        raise UserError(
            f"the stage before is of another architecture: {name} is {old} there and {new} here; set model.{name} "
            "once, for all stages."
        )


def carry_weights(module: SSLModule, weights: Mapping[str, Tensor], tables: Tables) -> list[str]:
    """Load the weights of the stage before, learned position tables fitted to this stage's size.

    Returns:
        The names of the tables that have another size now.

    Raises:
        UserError: any other tensor differs in shape, or is in one of the two stages only.
    """
    fitted, changed = fit_tables(module, weights, tables)
    ours = module.state_dict()
    for name in sorted(set(fitted) ^ set(ours)):
        side = "only in the stage before" if name in fitted else "missing there"
        raise UserError(f"the stage before is of another architecture: tensor {name!r} is {side}.")
    for name, tensor in fitted.items():
        if tensor.shape != ours[name].shape:
            raise UserError(
                f"the stage before is of another architecture: {name!r} is {list(tensor.shape)} there and "
                f"{list(ours[name].shape)} here."
            )
    module.load_state_dict(fitted)
    return changed


def parameter_names(module: SSLModule) -> list[str]:
    """Names of the parameters in the order in which the module's optimizer numbers them."""
    encoder = module.backbone
    groups = parameter_groups(module, module.optimizer_config.layer_decay, encoder.layer_index, encoder.depth)
    return [name for group in groups for name in group["names"]]


def moments_by_name(module: SSLModule, optimizer_state: Mapping[str, Any]) -> Moments:
    """State of the parameters, by name, in the state dict of the optimizer that the base module makes."""
    numbers = [number for group in optimizer_state["param_groups"] for number in group["params"]]
    named = zip(parameter_names(module), numbers, strict=True)
    return {name: optimizer_state["state"][number] for name, number in named if number in optimizer_state["state"]}


class CarryMoments(Callback):
    """Gives the optimizer the moments of the stage before; the learning rate and its schedule stay the stage's own.

    Args:
        moments: by the name of the parameter; a parameter without any starts from nothing.
    """

    def __init__(self, moments: Moments) -> None:
        super().__init__()
        self.moments = moments

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The optimizer exists by now, and nothing has been trained."""
        assert isinstance(pl_module, SSLModule)
        (optimizer,) = trainer.optimizers
        state = optimizer.state_dict()
        names = parameter_names(pl_module)
        state["state"] = {number: self.moments[name] for number, name in enumerate(names) if name in self.moments}
        optimizer.load_state_dict(state)
        self.moments = {}  # they belong to the optimizer now
