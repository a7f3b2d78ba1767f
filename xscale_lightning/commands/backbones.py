"""`xscale backbones`: the registered encoders and their sizes."""

import argparse


def main(argv: list[str]) -> None:
    """Print the table; parameters are counted without allocating them."""
    parser = argparse.ArgumentParser(prog="xscale backbones", description=__doc__)
    parser.add_argument("--bands", type=int, default=3, help="number of bands to count the parameters for")
    parser.add_argument("--verbose", action="store_true", help="the options of a backbone with their defaults, too")
    args = parser.parse_args(argv[1:])
    import torch
    from rich.console import Console
    from rich.table import Table

    from xscale_lightning.models.registry import create_backbone, list_backbones

    table = Table("name", "width", "blocks", "patch", "parameters", title="backbones: --model.init_args.backbone.name")
    for name in list_backbones():
        with torch.device("meta"):
            pad = {"pad": "edge"} if name.startswith("spectral_") else {}  # no band count is refused
            backbone = create_backbone(name, args.bands, **pad)
        count = sum(p.numel() for p in backbone.parameters()) / 1e6
        row = (backbone.num_features, backbone.depth, backbone.patch_size)
        table.add_row(name, *map(str, row), f"{count:.1f} M")
    Console().print(table)
    print("timm:NAME takes any plain Vision Transformer of timm, with its weights if backbone.pretrained is true.")
    print("package.module:NAME imports your module first, which registers NAME.")
    if args.verbose:
        from xscale_lightning.commands.methods import shown
        from xscale_lightning.models.registry import BackboneConfig

        print("\noptions of every backbone, --model.backbone.OPTION VALUE (null: the name's own):")
        for name, value in vars(BackboneConfig()).items():
            print(f"  {name:<16} {shown(value)}")
