"""The contract suite itself: its noise, and that it notices broken methods."""

from typing import Any

import pytest
import torch
from torch import nn

from xscale_lightning import testing
from xscale_lightning.data.bands import Bands
from xscale_lightning.methods.base import SSLModule, StepOutput
from xscale_lightning.models.registry import BackboneConfig
from xscale_lightning.schedules import Schedule

SIZE = (16, 24)


@pytest.mark.parametrize("draw", [torch.rand, torch.randn])
def test_noise_depends_on_sample_and_draw_and_not_on_batch_or_type(draw):
    with testing._PerSampleNoise(0):
        whole, again = draw(4, 5), draw(4, 5)
    with testing._PerSampleNoise(2):
        rest, double, scalar = draw(2, 5), None, None
    with testing._PerSampleNoise(0):
        double = draw(4, 5, dtype=torch.float64)
        scalar = draw(())
    assert torch.equal(whole[2:], rest) and not torch.equal(whole, again)
    assert torch.equal(double.float(), whole) and double.dtype is torch.float64 and scalar.ndim == 0
    assert len(whole.unique()) == 20


class Sound(SSLModule):
    """A method that keeps every contract; the others below break one each."""

    def __init__(self, weight: float = 1.0, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.weight = weight
        self.head = nn.Linear(self.backbone.num_features, 2)
        self.declare("temperature", Schedule("linear", 0.5, 1.0))

    def step(self, batch: dict) -> StepOutput:
        noisy = batch["image"] + 0.1 * torch.randn_like(batch["image"])
        x = self.head(self.backbone.pool(self.backbone(noisy)))
        return StepOutput(self.weight * self.value("temperature") * (x - 1).square().mean())


class Unused(Sound):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.idle = nn.Linear(2, 2)


class Unseeded(Sound):
    count = 0

    def step(self, batch: dict) -> StepOutput:
        Unseeded.count += 1
        return StepOutput(super().step(batch).loss + Unseeded.count)


class Summed(Sound):
    def step(self, batch: dict) -> StepOutput:
        return StepOutput(super().step(batch).loss * len(batch["image"]))


class Rounded(Sound):
    def step(self, batch: dict) -> StepOutput:
        loss = super().step(batch).loss
        return StepOutput(loss if loss.dtype is torch.float64 else loss * 1.01)


class Forgetful(Sound):
    """Its features depend on something that no checkpoint holds."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.scale = torch.rand(()).item()

    def features(self, batch: dict) -> torch.Tensor:
        return super().features(batch) * self.scale


class Counting(Sound):
    """Its loss depends on how many steps this process has made."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.steps = 0

    def step(self, batch: dict) -> StepOutput:
        self.steps += 1
        return StepOutput(super().step(batch).loss * (1 + 0.1 * self.steps))


class Targeted(Sound):
    """Sound, with a target network."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.target = self.make_target(self.head, Schedule("linear", 0.9, 1.0))


class Still(Targeted):
    def _move_targets(self, skipped: torch.Tensor | None) -> None:
        """The target never moves."""


class Hasty(Targeted):
    """Its target moves with every micro-batch, too."""

    def step(self, batch: dict) -> StepOutput:
        self.target.update(self.head, 0.9)
        return super().step(batch)


class CountingValue(Sound):
    """Its declared float depends on how often it was asked for."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.asked = 0

    def value(self, name: str) -> float:
        self.asked += 1
        return super().value(name) + self.asked


def maker(cls: type[SSLModule]) -> testing.Make:
    def make(bands: Bands) -> SSLModule:
        torch.manual_seed(0)
        return cls(bands=bands, backbone=BackboneConfig("vit_tiny_patch8", depth=1), views=testing.NO_VIEWS)

    return make


BROKEN = [
    (Unused, testing.check_gradients_reach_everything, r"no gradient reaches \['idle\.weight', 'idle\.bias'\]"),
    (Unseeded, testing.check_seeded, "same seed gave losses"),
    (Summed, testing.check_accumulation_gradients, "accumulating 4 x 2 samples changes the gradient"),
    (Rounded, testing.check_precisions, "float32 loss .* is far from float64's"),
    (Still, testing.check_accumulation_schedules, "targets moved"),
    (Hasty, testing.check_accumulation_schedules, "targets moved"),
    (CountingValue, testing.check_accumulation_schedules, "changes the schedules"),
    (Forgetful, testing.check_save_and_load, "features differ after save and load"),
    (Counting, testing.check_resume, "losses after resuming differ"),
]


@pytest.mark.parametrize(("cls", "check", "message"), BROKEN)
def test_a_broken_method_is_noticed_and_a_sound_one_passes(cls, check, message):
    check(maker(Sound), SIZE)
    check(maker(Targeted), SIZE)
    with pytest.raises(AssertionError, match=message):
        check(maker(cls), SIZE)
