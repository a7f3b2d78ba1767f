"""Files that may come from strangers are opened here: nothing in them is run, and their claims are checked first.

What a file says of itself (sizes, shapes, depths, counts) is compared with the bytes that are there before memory is
asked for. Every refusal is a `UserError` of one or two lines.
"""

from xscale_lightning.opening.archive import load_torch, read_record
from xscale_lightning.opening.limits import check_names
from xscale_lightning.opening.tensors import load_safetensors
from xscale_lightning.opening.text import check_file, check_yaml, read_json, read_yaml, within

__all__ = [
    "check_file",
    "check_names",
    "check_yaml",
    "load_safetensors",
    "load_torch",
    "read_json",
    "read_record",
    "read_yaml",
    "within",
]
