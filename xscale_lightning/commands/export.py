"""`xscale export CKPT OUT`: the encoder of a checkpoint as a folder that loads without the run, and in timm."""

import argparse
import hashlib
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from xscale_lightning.commands.arguments import Parser, import_method
from xscale_lightning.errors import UserError


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """Arguments of the verb.

    Raises:
        UserError: unknown options.
    """
    parser = Parser(prog="xscale export", description=__doc__, allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", metavar="CKPT", help="checkpoint, or folder of a run (its last checkpoint)")
    add("out", metavar="OUT", help="folder to write: model.safetensors, config.json, bands.json, README.md")
    add(
        "--image-size",
        type=int,
        metavar="PIXELS",
        help="side of the images timm's model is made for (default: trained)",
    )
    add("--overwrite", action="store_true", help="replace an export that exists")
    parser.add_method_option()
    return parser.parse_args(argv)


def main(argv: list[str]) -> int:
    """Export, say what was written."""
    args = parse(argv[1:])
    from dataclasses import replace

    from xscale_lightning.commands.model_card import model_card
    from xscale_lightning.exports import check_target, write_export
    from xscale_lightning.pretrained import load_backbone, locate

    out = Path(args.out)
    check_target(out.absolute(), args.overwrite)
    path = locate(args.checkpoint)
    if path.is_dir():
        raise UserError(f"CKPT '{path}' is an export already; give a checkpoint, or copy the folder.")
    import_method(args.method)
    source = load_backbone(path)
    if args.image_size is not None:
        patch = source.encoder.patch_size
        if args.image_size < 1 or args.image_size % patch:
            raise UserError(f"--image-size {args.image_size} is no multiple of the patch of {patch} pixels; give one.")
        source.origin = replace(source.origin, image_size=args.image_size)
    encoder = source.encoder
    facts = run_facts(path)
    facts["encoder"] = f"{type(encoder).__name__} of {encoder.depth} blocks, patches of {encoder.patch_size} pixels"
    config = write_export(source, out, lambda config: model_card(config, source.bands, facts), args.overwrite)
    own = config["xscale"]
    print(f"wrote {out}: encoder of {own['method']}, {len(source.bands)} bands ({', '.join(source.bands.names)})")
    print(f'  xscale_lightning.load_backbone("{out}").features(images, gsd)')
    if own["timm"]:
        print(f'  timm.create_model("local-dir:{out}", pretrained=True)')
    else:
        print(f"  timm cannot load it: {own['why_not_timm']}")
    return 0


def run_facts(path: Path) -> dict[str, Any]:
    """What the model card says of the run: method and its source, step, data, numbers, hash of the checkpoint."""
    from xscale_lightning.checkpoints import read_metadata
    from xscale_lightning.opening import read_json, read_yaml

    checkpoint, saved = read_metadata(path)
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    facts: dict[str, Any] = {
        "class_path": saved["class_path"],
        "paper": _first_line(saved["class_path"].rpartition(".")[0]),
        "steps": checkpoint.get("global_step"),
        "sha256": digest,
    }
    for folder in (path.parent, path.parent.parent):
        if "numbers" not in facts and (folder / "results.json").is_file():
            facts["numbers"] = _numbers(read_json(folder / "results.json", f"'{folder / 'results.json'}'"))
        if "data" not in facts and (folder / "config.yaml").is_file():
            content = read_yaml(folder / "config.yaml", f"'{folder / 'config.yaml'}'")
            data = content.get("data") if isinstance(content, dict) else None
            if isinstance(data, dict):
                facts["data"] = _data_name(data)
    return facts


def _first_line(module: str) -> str:
    from xscale_lightning.commands.methods import first_line
    from xscale_lightning.records import is_trusted

    try:
        return first_line(module) if is_trusted(module) and importlib.util.find_spec(module) else ""
    except (ImportError, ValueError):
        return ""


def _data_name(data: dict[str, Any]) -> str:
    """Class of the data and of the data set in it; no folders, which are nobody else's."""
    arguments = data.get("init_args")
    arguments = arguments if isinstance(arguments, dict) else {}
    inner = arguments.get("dataset") or arguments.get("datamodule") or {}
    names = [data.get("class_path"), inner.get("class_path") if isinstance(inner, dict) else None]
    return " of ".join(str(name).rsplit(".", 1)[-1] for name in names if name)


def _numbers(content: Any, prefix: str = "") -> dict[str, float]:
    """Numbers of a results file by their path, such as `knn/eurosat/top1`."""
    if isinstance(content, bool) or content is None or isinstance(content, str):
        return {}
    if isinstance(content, (int, float)):
        return {prefix: float(content)}
    if isinstance(content, dict):
        return {k: v for key, part in content.items() for k, v in _numbers(part, f"{prefix}/{key}".strip("/")).items()}
    return {}
