"""Feature normalisations: they put the features on the scale of the noise, so that ``||x0||`` is about ``sqrt(D)``."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from anomalib_wtflow.flow.registry import lookup
from anomalib_wtflow.flow.rows import own


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

    def forward(self, features: Tensor, product: Tensor | None = None) -> Tensor:
        """Normalise ``(N, C, H, W)``; the products do not matter."""
        del product
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

    needs_fit = True
    per_product = ("mean", "weight", "_fitted")
    mean: Tensor
    weight: Tensor
    _fitted: Tensor

    def __init__(self, channels: int, ridge: float = 1e-2) -> None:
        super().__init__()
        self.ridge = ridge
        self.register_buffer("mean", torch.zeros(1, channels))
        self.register_buffer("weight", self._weight(torch.eye(channels))[None])
        self.register_buffer("_fitted", torch.zeros(1, dtype=torch.bool))
        self.reset()

    def reset(self) -> None:
        """Forget the sums gathered so far."""
        count, channels = self.mean.shape
        self.sums = [
            torch.zeros(count, dtype=torch.float64),
            torch.zeros(count, channels, dtype=torch.float64),
            torch.zeros(count, channels, channels, dtype=torch.float64),
        ]

    @property
    def fitted(self) -> bool:
        """Whether the mean and covariance of each product have been estimated."""
        return bool(self._fitted.all())

    def update(self, features: Tensor, product: Tensor | None = None) -> None:
        """Add a batch ``(N, C, H, W)`` to the sums over positions: count, ``sum x``, ``sum x x^T``, in float64.

        Args:
            features: The batch.
            product: Place of each image's product, ``(N,)``; None for the first.

        Raises:
            ValueError: If a feature is not finite.
        """
        features = features.detach().cpu().double()
        if not features.isfinite().all():
            msg = "The backbone gave NaN or infinite features: check the weights file and the images."
            raise ValueError(msg)
        places = torch.zeros(len(features), dtype=torch.int64) if product is None else product.cpu()
        for place in places.unique().tolist():
            rows = features[places == place].movedim(1, -1).flatten(0, -2)
            terms = (torch.tensor(float(len(rows))), rows.sum(0), rows.T @ rows)
            for total, term in zip(self.sums, terms, strict=True):
                total[place] += term

    def finalize(self, reduce: Callable[[Tensor], Tensor] = lambda total: total) -> Tensor:
        """Estimate means and whitening matrices of products that have none yet, and forget the sums.

        Args:
            reduce: Adds a sum up over the processes of a distributed training.

        Returns:
            The covariance of the normalised features within products, ``(C, C)``, in float64.

        Raises:
            ValueError: If a product has no features.
        """
        counts, totals, outers = (reduce(term).cpu() for term in self.sums)
        if (counts == 0).any():
            msg = "There are no features to normalise with: the training set is empty, or a product's part of it."
            raise ValueError(msg)
        within = torch.zeros_like(outers[0])
        for place, (count, total, outer) in enumerate(zip(counts, totals, outers, strict=True)):
            mean = total / count
            covariance = outer / count - torch.outer(mean, mean)
            if not self._fitted[place]:
                self.mean[place] = mean.to(self.mean)
                self.weight[place] = self._weight(self._matrix(covariance)).to(self.weight)
            weight = self._as_matrix(self.weight[place].cpu().double())
            within += weight @ covariance @ weight.T * (count / counts.sum())
        self._fitted.fill_(True)
        self.reset()
        return within

    def _matrix(self, covariance: Tensor) -> Tensor:
        return whitening_matrix(covariance, self.ridge)

    @staticmethod
    def _weight(matrix: Tensor) -> Tensor:
        return matrix

    @staticmethod
    def _as_matrix(weight: Tensor) -> Tensor:
        return weight

    def forward(self, features: Tensor, product: Tensor | None = None) -> Tensor:
        """Normalise ``(N, C, H, W)`` of images of the products in these places, ``(N,)``; None for the only one."""
        weight, mean = own(self.weight, product), own(self.mean, product)
        return (weight @ (features.flatten(2) - mean[:, :, None])).unflatten(2, features.shape[2:])


class ChannelNormalization(Whitening):
    """``(x_c - m_c) / sqrt(S_cc + r mean(S))``: each channel by itself, with the same ridge (ours)."""

    def _matrix(self, covariance: Tensor) -> Tensor:
        return super()._matrix(torch.diag(covariance.diagonal()))

    @staticmethod
    def _weight(matrix: Tensor) -> Tensor:
        return matrix.diagonal()

    @staticmethod
    def _as_matrix(weight: Tensor) -> Tensor:
        return weight.diag()

    def forward(self, features: Tensor, product: Tensor | None = None) -> Tensor:
        """Normalise ``(N, C, H, W)`` of images of the products in these places, ``(N,)``; None for the only one."""
        weight, mean = own(self.weight, product), own(self.mean, product)
        return (features - mean[:, :, None, None]) * weight[:, :, None, None]


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
