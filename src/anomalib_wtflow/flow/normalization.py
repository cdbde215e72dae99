"""Feature normalisations to the scale of the noise: ``||x0||`` is about ``sqrt(D)``."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from anomalib_wtflow.errors import WTFlowError

Batches = Iterable[tuple[Tensor, Tensor]]
"""Features ``(N, C, H, W)`` and the indices of their products, ``(N,)``."""


def whitening_matrix(covariance: Tensor, ridge: float = 1e-2) -> Tensor:
    """``U diag((l + r mean(l))^-1/2) U^T`` with eigenvalues l of a covariance (ZCA).

    The ridge r keeps directions that the training images hardly use from blowing up.
    """
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0)
    scale = (values + ridge * values.mean() + torch.finfo(torch.float32).tiny).rsqrt()
    return vectors @ torch.diag(scale) @ vectors.T


class LayerNormalization(nn.Module):
    """``(x - mean) / std`` over (C, H, W) of each image: norm ``sqrt(D)`` (the authors').

    Args:
        channels: Number of channels C; not used.
    """

    fitted = True

    def __init__(self, channels: int) -> None:
        super().__init__()
        del channels

    def fit(self, batches: Batches) -> None:
        """Return without fitting."""

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)``; the products do not matter."""
        del index
        centred = features - features.mean(dim=(1, 2, 3), keepdim=True)
        variance = centred.square().mean(dim=(1, 2, 3), keepdim=True)
        return centred * torch.rsqrt(variance + 1e-12)


class Whitening(nn.Module):
    """``W_p (x - m_p)`` at each position of an image of product p (ours).

    m_p and S_p are mean and covariance of its training features, and W_p is the :func:`whitening_matrix` of S_p.

    Args:
        channels: Number of channels C.
        ridge: r, relative to the mean eigenvalue.
    """

    per_product = ("mean", "weight", "fitted_rows")
    mean: Tensor
    weight: Tensor
    fitted_rows: Tensor

    def __init__(self, channels: int, ridge: float = 1e-2) -> None:
        super().__init__()
        self.ridge = ridge
        self.register_buffer("mean", torch.zeros(1, channels))
        self.register_buffer("weight", self._weight(torch.eye(channels))[None])
        self.register_buffer("fitted_rows", torch.zeros(1, dtype=torch.bool))

    @property
    def fitted(self) -> bool:
        """Return whether the mean and covariance of each product have been estimated."""
        return bool(self.fitted_rows.all())

    def fit(self, batches: Batches) -> Tensor:
        """Estimate means and whitening of products that have none yet, from sums in float64.

        Args:
            batches: Features of training images, and the indices of their products.

        Returns:
            The covariance of the normalised features within products, ``(C, C)``, in float64.

        Raises:
            WTFlowError: If a product has no features, or one is not finite.
        """
        rows, channels = self.mean.shape
        counts = torch.zeros(rows, dtype=torch.float64)
        totals, outers = counts.new_zeros(rows, channels), counts.new_zeros(rows, channels, channels)
        for features, index in batches:
            points = features.detach().cpu().double().flatten(2)
            for k in index.unique().tolist():
                own = points[index.cpu() == k].movedim(1, -1).flatten(0, -2)
                counts[k] += len(own)
                totals[k] += own.sum(0)
                outers[k] += own.T @ own
        if not (counts > 0).all() or not outers.isfinite().all():
            msg = "The training features are empty, NaN or infinite: check the training images and the weights file."
            raise WTFlowError(msg)
        within = torch.zeros_like(outers[0])
        for k, mean in enumerate(totals / counts[:, None]):
            covariance = outers[k] / counts[k] - torch.outer(mean, mean)
            if not self.fitted_rows[k]:
                self.mean[k] = mean.to(self.mean)
                self.weight[k] = self._weight(self._matrix(covariance)).to(self.weight)
            weight = self._as_matrix(self.weight[k].cpu().double())
            within += weight @ covariance @ weight.T * (counts[k] / counts.sum())
        self.fitted_rows.fill_(True)
        return within

    def _matrix(self, covariance: Tensor) -> Tensor:
        return whitening_matrix(covariance, self.ridge)

    @staticmethod
    def _weight(matrix: Tensor) -> Tensor:
        return matrix

    @staticmethod
    def _as_matrix(weight: Tensor) -> Tensor:
        return weight

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)`` of images of the products with these indices, ``(N,)``."""
        weight, mean = self.weight[index], self.mean[index]
        return (weight @ (features.flatten(2) - mean[:, :, None])).unflatten(2, features.shape[2:])


class ChannelNormalization(Whitening):
    """``(x_c - m_c) / sqrt(S_cc + r mean(S))``: each channel alone, same ridge (ours)."""

    def _matrix(self, covariance: Tensor) -> Tensor:
        return super()._matrix(torch.diag(covariance.diagonal()))

    @staticmethod
    def _weight(matrix: Tensor) -> Tensor:
        return matrix.diagonal()

    @staticmethod
    def _as_matrix(weight: Tensor) -> Tensor:
        return weight.diag()

    def forward(self, features: Tensor, index: Tensor) -> Tensor:
        """Normalise ``(N, C, H, W)`` of images of the products with these indices, ``(N,)``."""
        weight, mean = self.weight[index], self.mean[index]
        return (features - mean[:, :, None, None]) * weight[:, :, None, None]


NORMALIZATIONS: dict[str, Callable[[int], nn.Module]] = {
    "layer_norm": LayerNormalization,
    "channel": ChannelNormalization,
    "whitening": Whitening,
}
