"""Every method passes the contract suite."""

import pytest

from xscale_lightning.methods.mae import MAE
from xscale_lightning.testing import check_method

SMALL_DECODER = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}


@pytest.mark.parametrize("options", [{}, {"norm_pix_loss": True, "mask_ratio": 0.5}])
def test_mae_passes_the_contract_suite(options):
    check_method(MAE, **SMALL_DECODER, **options)
