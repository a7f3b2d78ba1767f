"""A thousand damaged files under four data modules: each is told by its kind, none reaches the model in `xscale fit`.

`python tests/data/run_damage.py FOLDER [COUNT] [MODULE...]` prints the numbers and ends with 1 where one is wrong; with
`more` among the modules' names the damages are those of `make_more_damage.py`.
"""

import contextlib
import io
import json
import logging
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from make_damage import BANDS, HARD, KINDS, PIXELS, SIDE, fabricate, good, write
from make_more_damage import OUTCOMES

RGB = ["--data.bands.sensor=generic", "--data.bands.names=[R, G, B]", "--data.num_workers=0", "--data.batch_size=64"]
RGB += ["--data.bands.mean=[1700, 1700, 1700]", "--data.bands.std=[700, 700, 700]"]
FILES = ["--data.file_bands=[R, G, B]", f"--data.image_size={SIDE}"]
TINY = ["--model.backbone.name=vit_tiny_patch8", "--model.backbone.depth=1", "--model.backbone.dim=16"]
TINY += ["--model.backbone.num_heads=2", "--model.decoder_dim=16", "--model.decoder_depth=1", "--model.decoder_heads=2"]
RUN = ["--trainer.accelerator=cpu", "--trainer.max_epochs=1", "--trainer.enable_progress_bar=false"]
RUN += ["--knn.every_n_epochs=0", "--geometry.every_n_epochs=0", "--pictures.every_n_epochs=0"]
ALLOWED = {kind: {kind} for kind in KINDS} | {kind: set(kinds) for kind, (_, kinds) in OUTCOMES.items()}
TWO = ("MaskFolder", "PairedFolders")
MODULES = ("SceneFolder", "ImageFolderData", "MaskFolder", "PairedFolders")


def make(root: Path, module: str, kinds: tuple[str, ...], count: int) -> tuple[dict[str, str], list[str]]:
    """At least `count` damaged files and twice as many good ones: their kinds by path, and the module's options."""
    rng, each = np.random.default_rng(1), -(-count // len(kinds))
    if module == "ImageFolderData":
        parts = [fabricate(root / "set" / name, -(-each // 2), count, kinds) for name in ("a", "b")]
        return parts[0] | parts[1], [f"--data.root={root / 'set'}", "--data.channels=[R, G, B]", "--data.gsd=10",
                                     f"--data.image_size={SIDE}", *RGB]  # fmt: skip
    expected = fabricate(root / "images", each, 2 * count, kinds)
    options = [f"--data.root={root / 'images'}", *FILES, *RGB, f"--data.samples_per_epoch={2 * count}"]
    paths = [root / "images" / path.name for path in (root / "images").iterdir()] if module in TWO else []
    for path in paths:
        if module == "MaskFolder":
            write(root / "masks" / path.name, rng.integers(0, 2, (1, SIDE, SIDE)).astype("uint8"))
        else:
            write(root / "fine" / path.name, good(rng, side=2 * SIDE), gsd=5.0)
    if module == "MaskFolder":
        options += [f"--data.root_masks={root / 'masks'}", "--data.num_classes=2"]
    if module == "PairedFolders":
        options += [f"--data.root_hr={root / 'fine'}", "--data.file_bands_hr=[R, G, B]"]
        options += ["--data.fractions=[1.0, 0.0, 0.0]"]  # all show the same ground
        options += [option.replace("--data.bands.", "--data.bands_hr.") for option in RGB if ".bands." in option]
    return expected, options


def told(root: Path, module: str, count: int, kinds: tuple[str, ...]) -> dict[str, Any]:
    """What `xscale doctor --data` says of them."""
    from xscale_lightning import cli

    expected, options = make(root, module, kinds, count)
    start = time.time()
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(["doctor", "--data", module, *options, "--report", str(root / "report.json")])
    found = {row["path"]: row["kind"] for row in json.loads((root / "report.json").read_text())}
    wrong = {
        path: (kind, found.get(path, "absent"))
        for path, kind in expected.items()
        if found.get(path, "absent") not in ALLOWED[kind]
    }
    spoilt = {Path(path).name for path in expected}  # whose masks do not have the size that their images say
    false = {
        path: kind
        for path, kind in found.items()
        if kind and path not in expected and not (kind == "size" and "masks" in path and Path(path).name in spoilt)
    }
    return {"files": len(found), "damaged": len(expected), "code": code, "seconds": round(time.time() - start, 1),
            "told as another kind": len(wrong), "good ones told": len(false),
            "first": [*wrong.items(), *false.items()][:3]}  # fmt: skip


def trained(root: Path, module: str, count: int, kinds: tuple[str, ...], strict: bool) -> dict[str, Any]:
    """What reaches the model in `xscale fit`; without `strict` images of other values than the good ones may."""
    from xscale_lightning import cli
    from xscale_lightning.methods.mae import MAE

    kinds = tuple(kind for kind in kinds if module != "ImageFolderData" or kind != "size")
    expected, options = make(root, module, kinds, count)
    step, seen = MAE.training_step, {"images": 0, "damaged": 0}

    def watched(self: MAE, batch: Any, *args: Any) -> Any:
        for key in ("image", "image_hr"):
            images = batch[key].flatten(1) if key in batch else []
            for image in images:
                bad = not image.isfinite().all() or image.std() < 1e-3 or (image == 0).float().mean() > 0.2
                bad |= strict and bool(image.min() < PIXELS[0] or image.max() >= PIXELS[1])
                seen["images"] += 1
                seen["damaged"] += int(bad)
        return step(self, batch, *args)

    MAE.training_step = watched  # type: ignore[method-assign]
    start, text = time.time(), io.StringIO()
    try:
        with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
            code = cli.main(
                ["fit", "--model", "mae", *TINY, "--data", module, *options, *RUN, "--output", str(root / "runs")]
            )
    finally:
        MAE.training_step = step  # type: ignore[method-assign]
    results = next((json.loads(path.read_text()) for path in (root / "runs").rglob("results.json")), {})
    counted = {"skipped_samples": results.get("skipped_samples"), "left_out": results.get("left_out", {}).get("count")}
    return {"damaged": len(expected), "code": code, "seconds": round(time.time() - start, 1), **counted,
            "images that reached the model": seen["images"], "damaged images among them": seen["damaged"],
            **({"message": text.getvalue()[-300:]} if code else {})}  # fmt: skip


if __name__ == "__main__":
    place, number = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1000
    logging.disable(logging.WARNING)
    assert BANDS == 3
    bad, more, chosen = False, "more" in sys.argv[3:], [name for name in sys.argv[3:] if name != "more"]
    KINDS.update({kind: made for kind, (made, _) in OUTCOMES.items()} if more else {})
    all_kinds = tuple(OUTCOMES if more else KINDS)
    for name in chosen or MODULES:
        ahead = told(place / name / "doctor", name, number, all_kinds)
        print(name, "doctor:", ahead, flush=True)
        run = trained(place / name / "fit", name, number, all_kinds if more else HARD, not more)
        print(name, "fit:", run, flush=True)
        bad |= bool(ahead["told as another kind"] or ahead["good ones told"] or run["code"])
        bad |= bool(run["damaged images among them"] or not run["images that reached the model"])
    sys.exit(int(bad))
