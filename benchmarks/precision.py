"""Training in bfloat16 beside float32: the same seeds, masks, views and data, a short run each.

    python benchmarks/precision.py                                     both methods, some minutes on two CPU cores
    python benchmarks/precision.py --methods mae --steps 100
    python benchmarks/precision.py --draw                              the figure alone

Trains the configuration of configs/quickstart.yaml on the imagery inside the package, through Lightning's Trainer as
`xscale fit` does, once per precision. Writes results/precision.json, one entry per method, and
docs/images/precision.png.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import common

IMAGE = Path(__file__).resolve().parents[1] / "docs" / "images" / "precision.png"
METHODS = ("mae", "cross_scale_mae")
PRECISIONS = {"float32": "32-true", "bfloat16": "bf16-mixed"}
LAST = 0.1  # share of the run over which the final losses are compared


def build(method: str, bands: Any, size: dict[str, int]) -> Any:
    """The method with the arguments of configs/quickstart.yaml."""
    import ours  # noqa: F401 (puts the checkout on the path)

    from xscale_lightning.data.views import Views
    from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
    from xscale_lightning.methods.mae import MAE
    from xscale_lightning.models.registry import BackboneConfig
    from xscale_lightning.optim import OptimizerConfig

    backbone = BackboneConfig(
        "vit_tiny_patch8", image_size=size["image"], dim=size["dim"], depth=size["depth"], num_heads=3
    )
    return {"mae": MAE, "cross_scale_mae": CrossScaleMAE}[method](
        bands=bands,
        backbone=backbone,
        views=Views(scale=(1.0, 1.0), ratio=(1.0, 1.0)),
        optimizer=OptimizerConfig(lr=1.2e-2, warmup_epochs=1),
        decoder_dim=128,
        decoder_depth=3,
        decoder_heads=4,
    )


def train(method: str, precision: str, steps: int, size: dict[str, int]) -> dict[str, Any]:
    """Losses `train/loss` of every step, and the validation loss at the end."""
    import ours  # noqa: F401 (puts the checkout on the path)
    from lightning.pytorch import Callback, Trainer, seed_everything

    from xscale_lightning.data.sample import SampleScene

    losses: list[Any] = []

    class Record(Callback):
        def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *rest: Any) -> None:
            losses.append(outputs["loss"].detach().float())

    seed_everything(0, verbose=False)
    batch = size["batch"]
    data = SampleScene(image_size=size["image"], batch_size=batch, samples_per_epoch=min(steps, 64) * batch)
    module = build(method, data.bands, size)
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=1,
        precision=PRECISIONS[precision],  # type: ignore[arg-type]
        limit_val_batches=0,
        num_sanity_val_steps=0,
        callbacks=[Record()],
        **quiet,
    )
    trainer.fit(module, data)
    trainer.limit_val_batches = 1.0
    value = trainer.validate(module, data, verbose=False)[0]["val/loss"]
    return {"train_loss": [round(float(loss), 6) for loss in losses], "val_loss": float(value)}


def compare(runs: dict[str, dict[str, Any]]) -> dict[str, float]:
    """How far the bfloat16 run ends from the float32 one, relative to float32."""
    low, high = runs["bfloat16"], runs["float32"]
    count = max(1, round(LAST * len(high["train_loss"])))
    ends = {name: statistics.mean(run["train_loss"][-count:]) for name, run in runs.items()}
    return {
        "train_loss_end": ends["bfloat16"] / ends["float32"] - 1,
        "val_loss": low["val_loss"] / high["val_loss"] - 1,
        "largest_step": max(abs(a / b - 1) for a, b in zip(low["train_loss"], high["train_loss"], strict=True)),
    }


def draw(record: dict[str, Any], path: Path = IMAGE) -> None:
    """One panel per method of which both curves are there."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [name for name in METHODS if len(record.get(name, {}).get("runs", {})) == len(PRECISIONS)]
    if not found:
        return
    figure, axes = pyplot.subplots(1, len(found), figsize=(5.5 * len(found), 3.6), squeeze=False)
    for panel, method in zip(axes[0], found, strict=True):
        for name, style, colour in (("float32", "-", "#4477aa"), ("bfloat16", "--", "#cc6633")):
            losses = record[method]["runs"][name]["train_loss"]
            panel.plot(range(1, len(losses) + 1), losses, style, color=colour, lw=1.3, label=name)
        panel.set_yscale("log")
        panel.set_title(method, fontsize=11)
        panel.set_xlabel("step")
        panel.set_ylabel("training loss")
        panel.grid(alpha=0.25)
        panel.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Train, print how far the curves are apart, write JSON and figure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS), help="names with commas")
    parser.add_argument("--precisions", default=",".join(PRECISIONS), help="names with commas")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--draw", action="store_true", help="draw what was measured before, train nothing")
    parser.add_argument("--output", help="folder for JSON and figure; benchmarks/results and docs/images unless given")
    args = parser.parse_args(argv)
    path = common.result_path("precision", args.output)
    shape = {"image": 64, "dim": 192, "depth": 4, "batch": args.batch, "steps": args.steps}
    for method in [] if args.draw else args.methods.split(","):
        import torch

        head = {**common.environment(torch.device("cpu")), "shape": shape, "steps": args.steps}
        for name in args.precisions.split(","):  # written after each: a run that is cut off loses one
            run = {**shape, **train(method, name, args.steps, shape)}
            common.merge_result("precision", (method,), {**head, "runs": {name: run}}, args.output)
        runs = json.loads(path.read_text(encoding="utf-8"))[method]["runs"]
        if all({**run, **shape} == run for run in runs.values()) and len(runs) == len(PRECISIONS):
            apart = compare(runs)
            common.merge_result("precision", (method,), {"apart": apart}, args.output)
            print(f"{method}: " + ", ".join(f"{name} {value:+.2%}" for name, value in apart.items()), flush=True)
    draw(json.loads(path.read_text(encoding="utf-8")), Path(args.output) / "precision.png" if args.output else IMAGE)
    print("written:", path)


if __name__ == "__main__":
    main()
