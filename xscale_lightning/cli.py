"""The `xscale` command. Nothing heavy is imported before a verb needs it, so `xscale --help` answers at once."""

import importlib
import os
import sys
from collections.abc import Sequence

from xscale_lightning import __version__
from xscale_lightning.errors import Stopped, describe, is_users
from xscale_lightning.launched import leave_with_launcher

# verb -> (module with `main(argv) -> int | None`, one line of help)
COMMANDS = {
    "fit": ("xscale_lightning.commands.stages", "pretrain a method: xscale fit --config configs/mae.yaml"),
    "validate": ("xscale_lightning.commands.stages", "validation loss and online evaluations of a checkpoint"),
    "test": ("xscale_lightning.commands.stages", "evaluations of a checkpoint on the test split"),
    "predict": ("xscale_lightning.commands.stages", "write the embeddings of a data set"),
    "reconstruct": ("xscale_lightning.commands.reconstruct", "hide parts of an image, put them back: picture, numbers"),
    "export": ("xscale_lightning.commands.export", "the encoder of a checkpoint as a folder, for here and for timm"),
    "embed": ("xscale_lightning.commands.embed", "embeddings of scenes or of a data set: Parquet, feature map"),
    "pack": ("xscale_lightning.commands.pack", "decode a data set once, into memory-mapped shards for PackedData"),
    "sweep": ("xscale_lightning.commands.sweep", "run fit in variants, and compare them: xscale sweep FILE [options]"),
    "bench": ("xscale_lightning.commands.bench", "compare models by evaluations, with seeds: xscale bench FILE"),
    "stats": ("xscale_lightning.commands.stats", "statistics of a data set's bands, ready for a configuration"),
    "methods": ("xscale_lightning.commands.methods", "table of methods, plug-ins included"),
    "backbones": ("xscale_lightning.commands.backbones", "table of backbones"),
    "doctor": ("xscale_lightning.commands.doctor", "check this machine: versions, devices, attention, two steps"),
    "schema": ("xscale_lightning.commands.schema", "write the JSON schema of configurations, for editors"),
    "completion": ("xscale_lightning.commands.completion", "print the completion script of bash, zsh or fish"),
    "new-method": ("xscale_lightning.commands.new_method", "write a working method, config and test into your folder"),
}


def usage() -> str:
    """Text of `xscale --help`."""
    verbs = "\n".join(f"  {name:<12}{text}" for name, (_, text) in COMMANDS.items())
    return (
        f"xscale {__version__}: self-supervised pretraining on satellite imagery\n\n"
        f"usage: xscale VERB [options]     xscale VERB --help shows the options of one verb\n\n{verbs}\n\n"
        "  --version   print the version\n  --debug     show the traceback of an error\n"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. Errors are one or two lines; `--debug` shows the traceback."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    if debug:
        args.remove("--debug")
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"xscale {__version__}")
        return 0
    verb, rest = args[0], args[1:]
    if verb not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(verb, COMMANDS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        print(f"xscale: error: unknown verb {verb!r}: {hint}`xscale --help` lists them.", file=sys.stderr)
        return 2
    leave_with_launcher()
    try:
        return importlib.import_module(COMMANDS[verb][0]).main([verb, *rest]) or 0
    except Stopped as stopped:
        print(f"xscale: {stopped}", file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print("xscale: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `xscale methods | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if debug:
            raise
        print(f"xscale: error: {describe(error)}", file=sys.stderr)
        return 2 if is_users(error) else 1


if __name__ == "__main__":
    sys.exit(main())
