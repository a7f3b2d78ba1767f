"""Names of run folders: every method its own, also where all plug-ins call their module `method`."""

import pytest

from xscale_lightning.methods.cross_scale_mae import CrossScaleMAE
from xscale_lightning.methods.mae import MAE


class VICReg(MAE):
    pass


class MyMethod(MAE):
    pass


@pytest.mark.parametrize(
    ("cls", "name"),
    [(MAE, "mae"), (CrossScaleMAE, "cross_scale_mae"), (VICReg, "vicreg"), (MyMethod, "my_method")],
)
def test_modules_name_ours_and_classes_those_of_others(cls, name):
    assert object.__new__(cls).method_name == name
