"""Looking again at a batch whose update was skipped: the same draws, with the weights at hand."""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.methods.measure import mix_seed
from xscale_lightning.opening import load_torch

if TYPE_CHECKING:
    from xscale_lightning.methods.base import SSLModule

FORMAT = "xscale guard 1"
_KEYS = {
    **{"batch": Mapping, "precision": str, "samples": list, "parameters": list, "step": int},
    **dict.fromkeys(("total_batch_idx", "rank", "seed"), int),
}
_TYPES = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class Replay:
    """What a skipped batch gives now."""

    loss: float
    terms: dict[str, float]
    layer: str | None
    """First layer, in the order of the forward pass, whose output is not finite."""
    parameters: list[str]
    """Parameters whose gradient is not finite."""


def read_record(path: str | Path) -> dict[str, Any]:
    """Open a file of the finite guard without running code.

    Raises:
        UserError: no such file, damaged, or of another program.
    """
    problem = ""
    if not Path(path).is_file():
        problem = "it is missing"
    else:
        record = load_torch(path, "--replay")
        if not isinstance(record, Mapping) or record.get("format") != FORMAT:
            problem = "it was not written by the finite guard"
        elif wrong := [key for key, kind in _KEYS.items() if not isinstance(record.get(key), kind)]:
            problem = f"its {wrong[0]!r} is damaged"
        else:
            return dict(record)
    raise UserError(f"--replay {str(path)!r} cannot be used: {problem}; give RUN/guard/step_....pt.")


def replay(module: "SSLModule", record: Mapping[str, Any]) -> Replay:
    """One training step on the batch of `record`, with the random draws it had, without an update.

    The weights are those of `module`: a checkpoint's, so a step that failed later may pass.

    Raises:
        UserError: the record has no batch.
    """
    if "image" not in record["batch"]:
        raise UserError("the record holds no batch: it was one of many in its step; read the samples it names instead.")
    module.train()
    kind = _TYPES.get(record["precision"])
    numbers = record["total_batch_idx"], record["rank"], record["seed"]
    with torch.autocast(module.device.type, kind or torch.bfloat16, enabled=kind is not None):
        layer = first_not_finite(module, record["batch"], *numbers)
        _seed(*numbers)
        output = module.step(module.prepare(dict(record["batch"]), augment=True))
    module.zero_grad()
    output.loss.backward()
    bad = [n for n, p in module.named_parameters() if p.grad is not None and not bool(torch.isfinite(p.grad).all())]
    terms = {name: float(term.detach().float().mean()) for name, term in output.logs.items()}
    return Replay(float(output.loss.detach()), terms, layer, bad)


def first_not_finite(
    module: LightningModule, batch: Mapping[str, Any], number: int, rank: int, seed: int | None = None
) -> str | None:
    """Name of the first layer whose output is not finite in a forward pass; None where all are, or it cannot run."""
    found: list[str] = []

    def look(name: str) -> Any:
        def hook(layer: nn.Module, inputs: Any, output: Any) -> None:
            tensors = output if isinstance(output, (tuple, list)) else (output,)
            if not found and any(isinstance(t, Tensor) and not bool(torch.isfinite(t).all()) for t in tensors):
                found.append(name)

        return hook

    leaves = [(name, part) for name, part in module.named_modules() if not any(part.children())]
    handles = [part.register_forward_hook(look(name)) for name, part in leaves]
    devices = [module.device] if module.device.type == "cuda" else []
    buffers = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with torch.random.fork_rng(devices=devices), torch.no_grad():
            _seed(number, rank, seed)
            module.step(module.prepare(dict(batch), augment=True))  # type: ignore[operator, union-attr]
    except Exception:  # what fails here must not hide what is to be told
        return found[0] if found else None
    finally:
        for handle in handles:
            handle.remove()
        for buffer, value in buffers:
            buffer.copy_(value)
    return found[0] if found else None


def _seed(number: int, rank: int, seed: int | None = None) -> None:
    """The seed of a training batch, as `SSLModule` has set it."""
    given = int(os.environ.get("PL_GLOBAL_SEED", 0)) if seed is None else seed
    torch.manual_seed(mix_seed(given, rank, number))


def lines(record: Mapping[str, Any], result: Replay) -> list[str]:
    """Both, for people."""
    then = f"then: step {record['step']}, loss {record['loss']}, {len(record['parameters'])} gradients not finite"
    now = f"now:  loss {result.loss:.6g}" + "".join(f", {n} {v:.6g}" for n, v in result.terms.items())
    first = f" ({result.parameters[0]} ...)" if result.parameters else ""
    found = [
        f"first layer whose output is not finite: {result.layer or 'none'}",
        f"gradients that are not finite: {len(result.parameters)}{first}",
    ]
    image = record["batch"]["image"]
    share = 1.0 - float(torch.isfinite(image).float().mean())
    low, high = float(image.nan_to_num().min()), float(image.nan_to_num().max())
    values = f"input {list(image.shape)}: {low:g} to {high:g}, {share:.1%} not finite"
    samples = [f"samples: {', '.join(record['samples'])}"] if record["samples"] else []
    finite = math.isfinite(result.loss) and not result.parameters
    end = "this step is finite with these weights" if finite else "this step is not finite with these weights either"
    return [then, now, *found, values, *samples, end]
