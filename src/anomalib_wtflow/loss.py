"""Loss of WT-Flow."""

import torch
from torch import Tensor, nn


class WTFlowLoss(nn.Module):
    """``mean || v_theta(x_t, t) - u_t ||^2``: conditional flow matching (arXiv 2508.05461v3), per element."""

    def forward(self, prediction: Tensor, velocity: Tensor) -> Tensor:
        """Compare the field with the conditional velocity.

        Args:
            prediction: ``v_theta(x_t, t)``, ``(N, C, H, W)``.
            velocity: ``u_t``, of the same shape.

        Returns:
            The mean squared error, a scalar.
        """
        return torch.nn.functional.mse_loss(prediction, velocity)
