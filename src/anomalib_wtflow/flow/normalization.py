"""Feature normalisations: they put the features on the scale of the noise, so that ``||x0||`` is about ``sqrt(D)``."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from anomalib_wtflow.flow.registry import lookup


def whitening_matrix(covariance: Tensor, ridge: float = 1e-2) -> Tensor:
    """``U diag((l + r mean(l))^-1/2) U^T`` from the eigenvalues l of a covariance: the symmetric (ZCA) square root.

    The ridge r keeps directions that the training images hardly use from blowing up.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    scale = (values + ridge * values.mean() + torch.finfo(torch.float32).tiny).rsqrt()
    return vectors @ torch.diag(scale) @ vectors.T


class LayerNormalization(nn.Module):
    """``(x - mean) / std`` over (C, H, W) of each image, without parameters: norm exactly ``sqrt(D)`` (the authors').

    Args:
        channels: Number of channels C; not used.
    """

    fitted = True
    needs_fit = False

    def __init__(self, channels: int) -> None:
        super().__init__()
        del channels

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)``."""
        centred = features - features.mean(dim=(1, 2, 3), keepdim=True)
        variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
        return centred * torch.rsqrt(variance + 1e-12)


class Whitening(nn.Module):
    """``W (x - m)`` at each position, m and S being the training features' mean and covariance (ours).

    W is the :func:`whitening_matrix` of S.

    Args:
        channels: Number of channels C.
        ridge: r, relative to the mean eigenvalue.
    """

    needs_fit = True
    mean: Tensor
    weight: Tensor
    _fitted: Tensor

    def __init__(self, channels: int, ridge: float = 1e-2) -> None:
        super().__init__()
        self.ridge = ridge
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("weight", torch.eye(channels))
        self.register_buffer("_fitted", torch.tensor(False))
        self.reset()

    def reset(self) -> None:
        """Forget the sums gathered so far."""
        channels = self.mean.numel()
        self.sums = [
            torch.zeros((), dtype=torch.float64),
            torch.zeros(channels, dtype=torch.float64),
            torch.zeros(channels, channels, dtype=torch.float64),
        ]

    @property
    def fitted(self) -> bool:
        """Whether the mean and covariance have been estimated."""
        return bool(self._fitted)

    def update(self, features: Tensor) -> None:
        """Add a batch ``(N, C, H, W)`` to the sums over positions: count, ``sum x``, ``sum x x^T``, in float64.

        Raises:
            ValueError: If a feature is not finite.
        """
        rows = features.detach().cpu().double().movedim(1, -1).flatten(0, -2)
        if not rows.isfinite().all():
            msg = "The backbone gave NaN or infinite features: check the weights file and the images."
            raise ValueError(msg)
        for total, term in zip(self.sums, (torch.tensor(float(len(rows))), rows.sum(0), rows.T @ rows), strict=True):
            total += term

    def finalize(self, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
        """Estimate the mean and the whitening matrix from the sums, and forget the sums.

        Args:
            reduce: Adds a sum up over the processes of a distributed training.

        Returns:
            The covariance of the normalised features, ``(C, C)``, in float64.

        Raises:
            ValueError: If there are no features.
        """
        count, total, outer = (reduce(term).cpu() for term in self.sums)
        if count == 0:
            msg = "There are no features to normalise with: the training set is empty."
            raise ValueError(msg)
        mean = total / count
        covariance = outer / count - torch.outer(mean, mean)
        weight = self._matrix(covariance)
        self.mean.copy_(mean)
        self.weight.copy_(weight)
        self._fitted.fill_(True)
        self.reset()
        return weight @ covariance @ weight.T

    def _matrix(self, covariance: Tensor) -> Tensor:
        return whitening_matrix(covariance, self.ridge)

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)``."""
        bias = -self.weight @ self.mean
        return nn.functional.conv2d(features, self.weight[:, :, None, None], bias)


class ChannelNormalization(Whitening):
    """``(x_c - m_c) / sqrt(S_cc + r mean(S))``: each channel by itself, with the same ridge (ours)."""

    def _matrix(self, covariance: Tensor) -> Tensor:
        return super()._matrix(torch.diag(covariance.diagonal()))

    def forward(self, features: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)``."""
        return (features - self.mean[:, None, None]) * self.weight.diagonal()[:, None, None]


NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": LayerNormalization,
    "channel": ChannelNormalization,
    "whitening": Whitening,
}


def get_normalization(name: str, channels: int) -> nn.Module:
    """Build a normalisation by name for ``channels`` channels.

    Raises:
        ValueError: If the name is unknown.
    """
    return lookup(NORMALIZATIONS, "normalization", name)(channels)
