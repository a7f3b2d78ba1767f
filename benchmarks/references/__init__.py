"""Plain eager references, one file per method: the original papers' arithmetic, nothing fused and nothing shared.

Each has the parameter names of ours, so that a test can show that both compute the same loss and gradients.
"""

from sizes import Size

from references.parts import Reference, ReferenceStep

__all__ = ["Reference", "ReferenceStep", "build_reference"]


def build_reference(size: Size) -> Reference:
    """The reference of the method that `size` names."""
    if size.paired:
        from references.spatial_affinity import ReferenceAffinity as cls
    elif size.method == "mae":
        from references.mae import ReferenceMAE as cls
    elif size.method == "cross_scale_mae":
        from references.cross_scale_mae import ReferenceCrossScale as cls
    elif size.method == "s2mae":
        from references.s2mae import ReferenceS2MAE as cls
    elif size.method == "ijepa":
        from references.ijepa import ReferenceIJEPA as cls
    else:
        from references.latent_mim import ReferenceLatentMIM as cls
    return cls(size)
