"""Networks that predict one view's tokens from another's."""

from typing import Literal

from torch import Tensor, nn

from xscale_lightning.errors import UserError
from xscale_lightning.models.blocks import init_weights

PredictorNorm = Literal["bn_position", "bn_channel", "ln"]


class MLPPredictor(nn.Module):
    """Two linear layers with a normalisation and a ReLU between them, token by token.

    Args:
        dim: width of the tokens.
        hidden_dim: width between the layers.
        norm: `bn_position`, one batch-norm channel per token position (statistics over batch and hidden units);
            `bn_channel`, one per hidden unit (statistics over batch and positions); `ln`, LayerNorm per token.
        positions: number of token positions, which `bn_position` needs.

    Source: Tang et al. 2023 (Cross-Scale MAE), published code, with `bn_position`.
    """

    def __init__(self, dim: int, hidden_dim: int, norm: PredictorNorm = "ln", positions: int = 0) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        sizes = {"bn_position": positions, "bn_channel": hidden_dim}
        self.norm = nn.LayerNorm(hidden_dim) if norm == "ln" else nn.BatchNorm1d(sizes[norm])
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.norm_over: PredictorNorm = norm
        self.positions = positions
        self.apply(init_weights)

    def forward(self, x: Tensor) -> Tensor:
        """Predict from tokens `[B, L, dim]` -> `[B, L, dim]`.

        Raises:
            UserError: `bn_position` and another number of positions than it was made for.
        """
        if self.norm_over == "bn_position" and x.shape[1] != self.positions:
            raise UserError(
                f"predictor_norm bn_position was made for {self.positions} patches and the view has {x.shape[1]}: "
                "keep the grid, set backbone.image_size to the new one, or take bn_channel or ln."
            )
        x = self.fc1(x)
        x = self.norm(x.flatten(0, 1)).unflatten(0, x.shape[:2]) if self.norm_over == "bn_channel" else self.norm(x)
        return self.fc2(x.relu())
