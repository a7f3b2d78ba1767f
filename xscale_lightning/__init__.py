"""Self-supervised pretraining on satellite imagery of several resolutions and many bands.

The public names below are imported when first used: `import xscale_lightning` alone loads neither torch nor Lightning,
so that `xscale --help` answers at once.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from xscale_lightning.errors import UserError
    from xscale_lightning.init_from import load_encoder
    from xscale_lightning.methods.base import Reconstruction, SSLModule, StepOutput
    from xscale_lightning.models.registry import create_backbone, register_backbone
    from xscale_lightning.pretrained import load_backbone

__version__ = "0.1.0"

__all__ = [
    "Reconstruction",
    "SSLModule",
    "StepOutput",
    "UserError",
    "__version__",
    "create_backbone",
    "load_backbone",
    "load_encoder",
    "register_backbone",
]

_HOME = {
    "Reconstruction": "xscale_lightning.methods.base",
    "SSLModule": "xscale_lightning.methods.base",
    "StepOutput": "xscale_lightning.methods.base",
    "UserError": "xscale_lightning.errors",
    "create_backbone": "xscale_lightning.models.registry",
    "load_backbone": "xscale_lightning.pretrained",
    "load_encoder": "xscale_lightning.init_from",
    "register_backbone": "xscale_lightning.models.registry",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its module on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported or not."""
    return sorted(__all__)
