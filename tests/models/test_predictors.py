import pytest
import torch

from xscale_lightning.errors import UserError
from xscale_lightning.models.predictors import MLPPredictor


@pytest.mark.parametrize(("norm", "axes"), [("bn_position", (0, 2)), ("bn_channel", (0, 1)), ("ln", (2,))])
def test_each_norm_takes_its_statistics_over_the_axes_it_says(norm, axes):
    torch.manual_seed(0)
    predictor = MLPPredictor(6, 8, norm, positions=5).double()
    x = 3 + torch.randn(4, 5, 6, dtype=torch.float64)
    hidden = predictor.fc1(x)
    centred = hidden - hidden.mean(axes, keepdim=True)
    expected = centred / (centred.square().mean(axes, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(predictor(x), predictor.fc2(expected.relu()))


def test_norm_per_position_refuses_another_grid():
    with pytest.raises(UserError, match="made for 5 patches and the view has 4"):
        MLPPredictor(6, 8, "bn_position", positions=5)(torch.zeros(2, 4, 6))
