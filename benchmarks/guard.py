"""What the finite guard costs: one training in which it watches every other step.

    python benchmarks/guard.py --seconds 45                 mae at ViT-B's width and 4 blocks
    python benchmarks/guard.py --method ijepa --threads 1

The Trainer runs the whole time, with the same model and batch. A step is timed from before it to after it, and the
ratio is the median over pairs of neighbouring steps, the guard in the first of a pair and in the second of the next. So
whatever else the machine does meets both alike. Of a wrapped method (`sa_...`) the host stands for it.
"""

import argparse
import statistics
import time
import warnings
from typing import Any

import common
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from ours import build
from sizes import METHODS, SIZES

from xscale_lightning.allocator import keep_freed_memory
from xscale_lightning.callbacks.guard import FiniteGuard
from xscale_lightning.optim import OptimizerConfig

WARM_UP = 4  # untimed steps


class Same(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """One batch as often as it is asked for."""

    def __init__(self, batch: dict[str, torch.Tensor]) -> None:
        self.batch = batch

    def __len__(self) -> int:
        """More than anybody waits for."""
        return 100_000

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """The batch."""
        return self.batch


class Turns(Callback):
    """Lets the guard watch every other step, and times every one."""

    def __init__(self, guard: FiniteGuard, seconds: float) -> None:
        self.guard, self.seconds = guard, seconds
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self.begun = self.end = 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """On, off, off, on; then the clock starts."""
        self.guard.enabled = batch_idx % 4 in (0, 3)
        if batch_idx == WARM_UP:
            self.end = time.perf_counter() + self.seconds
        self.begun = self._now(pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """The clock stops; after a pair the time may be over."""
        if batch_idx < WARM_UP:
            return
        self.times[self.guard.enabled].append(self._now(pl_module) - self.begun)
        pairs = {len(times) for times in self.times.values()}
        if len(pairs) == 1 and pairs.pop() >= 2 and time.perf_counter() > self.end:
            trainer.should_stop = True

    @staticmethod
    def _now(module: LightningModule) -> float:
        if module.device.type == "cuda":
            torch.cuda.synchronize(module.device)
        return time.perf_counter()


def measure(method: str, size_name: str, device: torch.device, seconds: float, precision: Any) -> dict[str, object]:
    """Median seconds of a step with the guard and without it, and the median of the ratios of pairs."""
    size = SIZES[size_name][method]
    batch = {
        "image": torch.rand(size.batch, size.bands, size.image, size.image),
        "gsd": torch.full((size.batch,), 10.0),
    }
    guard = FiniteGuard()
    turns = Turns(guard, seconds)
    trainer = Trainer(
        accelerator=device.type,
        devices=1,
        precision=precision,
        max_epochs=1,
        callbacks=[guard, turns],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = build(size, optimizer=OptimizerConfig(scale_lr=False))
    trainer.fit(module, torch.utils.data.DataLoader(Same(batch), batch_size=None))
    on, off = turns.times[True], turns.times[False]
    return {
        "pairs": len(on),
        "batch": size.batch,
        "seconds_with": statistics.median(on),
        "seconds_without": statistics.median(off),
        "ratio": common.median_ratio(on, off),
        "skipped": guard.skipped,
    }


def main(argv: list[str] | None = None) -> None:
    """Measure, print, write it down if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=[name for name in METHODS if not name.startswith("sa_")], default="mae")
    parser.add_argument("--size", choices=list(SIZES), default="base4")
    parser.add_argument("--seconds", type=float, default=30.0, help="of steps that are timed")
    parser.add_argument("--precision", default="32-true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, help="CPU threads of torch")
    parser.add_argument("--output", help="folder of a guard.json to add it to; by default none is written")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", module="lightning")
    if args.threads:
        torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    if device.type == "cpu":
        keep_freed_memory()
    found = measure(args.method, args.size, device, args.seconds, args.precision)
    print(
        f"{args.method} {args.size} {args.precision} on {device.type}: {found['seconds_with']:.4f} s with the guard, "
        f"{found['seconds_without']:.4f} s without, ratio {found['ratio']:.4f} over {found['pairs']} pairs"
    )
    if args.output:
        content = {**common.environment(device), **found}
        common.merge_result("guard", (device.type, f"{args.method} {args.size} {args.precision}"), content, args.output)


if __name__ == "__main__":
    main()
