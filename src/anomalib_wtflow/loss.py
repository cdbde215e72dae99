"""Loss of WT-Flow."""

from torch import Tensor, nn

from anomalib_wtflow.flow.regression import matching_loss


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
        return matching_loss(prediction, velocity)
