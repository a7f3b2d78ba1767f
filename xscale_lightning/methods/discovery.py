"""Which methods there are: our own and those that installed packages announce.

A package announces a method in its pyproject.toml:

    [project.entry-points."xscale_lightning.methods"]
    my_method = "my_package.my_method:MyMethod"
"""

import importlib
from functools import cache
from importlib.metadata import EntryPoint, entry_points

from xscale_lightning.errors import UserError

GROUP = "xscale_lightning.methods"
BUILT_IN = {
    "mae": "xscale_lightning.methods.mae:MAE",
    "cross_scale_mae": "xscale_lightning.methods.cross_scale_mae:CrossScaleMAE",
    "s2mae": "xscale_lightning.methods.s2mae:S2MAE",
    "ijepa": "xscale_lightning.methods.ijepa:IJEPA",
    "latent_mim": "xscale_lightning.methods.latent_mim:LatentMIM",
    "spatial_affinity": "xscale_lightning.methods.spatial_affinity:SpatialAffinity",
}


@cache
def method_entries() -> dict[str, EntryPoint]:
    """Entry points by name; the built-in ones are there also when the package is not installed."""
    entries = {name: EntryPoint(name, value, GROUP) for name, value in BUILT_IN.items()}
    for entry in entry_points(group=GROUP):
        if entry.name not in BUILT_IN:
            entries[entry.name] = entry
    return entries


def load_method_class(name: str) -> type:
    """The method class announced under `name`.

    Raises:
        UserError: the class cannot be imported or is no `SSLModule`.
    """
    from xscale_lightning.methods.base import SSLModule

    entry = method_entries()[name]
    try:
        cls = entry.load()
    except Exception as error:
        raise UserError(f"method {name!r} ({entry.value}) cannot be imported: {error}") from error
    if not (isinstance(cls, type) and issubclass(cls, SSLModule)):
        raise UserError(f"method {name!r} ({entry.value}) is no subclass of SSLModule.")
    return cls


def load_class(path: str) -> type:
    """The method class of an announced name or of a class path `package.module.Class`.

    Raises:
        UserError: there is none.
    """
    from xscale_lightning.methods.base import SSLModule

    if path in method_entries():
        return load_method_class(path)
    module, _, name = path.rpartition(".")
    try:
        cls = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        known = ", ".join(method_entries())
        raise UserError(f"method {path!r} cannot be imported ({error}): known are {known}.") from error
    if not (isinstance(cls, type) and issubclass(cls, SSLModule)):
        raise UserError(f"{path!r} is no subclass of SSLModule.")
    return cls


def class_path(name: str) -> str:
    """`package.module.Class` for an announced name; any other text comes back unchanged."""
    entry = method_entries().get(name)
    return entry.value.replace(":", ".") if entry else name
