"""Which product an image shows: the nearest centroid of pooled backbone features (ours)."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pdist

from anomalib_wtflow.flow.normalization import Batches, whitening_matrix

UNKNOWN = "unknown product"
RIDGE = 1.0
"""Added to the spread within products: what other days bring is not seen in training."""
DISTANCE_MARGIN = 2.0
"""How far beyond the farthest training image the limit lies, in distances of that from their mean."""


class Recognition(NamedTuple):
    """The product's index, ``(N,)`` int64, and the relative distance, ``(N,)``, of images.

    Above a distance of 1 the image shows none of the known products.
    """

    index: Tensor  # type: ignore[assignment]  # not the method of tuples
    distance: Tensor

    @property
    def unknown(self) -> Tensor:
        """Return whether each image shows none of the known products, ``(N,)``."""
        return self.distance > 1

    def names(self, products: list[str]) -> list[str]:
        """Name the product of each image, or ``unknown product``."""
        pairs = zip(self.index.tolist(), self.unknown.tolist(), strict=True)
        return [UNKNOWN if unknown else products[k] for k, unknown in pairs]


class ProductRecognizer(nn.Module):
    """``argmin_p d_p``, ``d_p = mean_c (W (f - c_p))_c^2``, f: features averaged over positions.

    c_p is the mean f of product p's training images, and W the whitening matrix (ridge 1) of the covariance within
    products, each counting alike. ``distance = min_p d_p / limit``. The limit is ``max + 2 (max - mean)`` of the
    training images' distances to their nearest centroid, and at least half the way between the two products that are
    most alike (a quarter of their squared distance), so that a defect does not make a product unknown. A model of one
    product has an infinite limit. All of it is fixed before the threshold is set, so that the images that show a
    product by this rule stay exchangeable (Vovk et al., 2005: Mondrian conformal prediction).

    Args:
        channels: Feature channels C.
    """

    per_product = ("centroids", "fitted_rows")
    centroids: Tensor
    weight: Tensor
    limit: Tensor
    fitted_rows: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(1, channels))
        self.register_buffer("weight", torch.eye(channels))
        self.register_buffer("limit", torch.tensor(float("inf")))
        self.register_buffer("fitted_rows", torch.zeros(1, dtype=torch.bool))

    @property
    def fitted(self) -> bool:
        """Return whether each product has a centroid."""
        return bool(self.fitted_rows.all())

    def fit(self, batches: Batches) -> None:
        """Set the centroids of products that have none yet, and the limit.

        W is estimated with the first products and kept when others are added.

        Args:
            batches: Features of training images, and the indices of their products.
        """
        pairs = [(self._pooled(features).cpu().double(), index.cpu()) for features, index in batches]
        pooled, index = (torch.cat(parts) for parts in zip(*pairs, strict=True))
        rows = len(self.centroids)
        count = torch.bincount(index, minlength=rows).double()
        mean = pooled.new_zeros(rows, pooled.shape[1]).index_add_(0, index, pooled) / count[:, None]
        new = ~self.fitted_rows.cpu()
        if new.all():
            apart = (pooled - mean[index]) / count[index, None].sqrt()
            covariance = apart.T @ apart / rows
            known = covariance.diagonal().sum() > 0  # not where each product has one image
            self.weight.copy_(whitening_matrix(covariance, RIDGE) if known else torch.eye(pooled.shape[1]))
        self.centroids[new] = (mean @ self.weight.cpu().double().T)[new].to(self.centroids)
        self.fitted_rows.fill_(True)
        self.limit.fill_(torch.inf)
        if rows > 1:
            nearest = self._distances(pooled.to(self.weight)).amin(dim=1).cpu().double()
            between = pdist(self.centroids.cpu().double()).square().amin() / pooled.shape[1]
            self.limit.copy_(
                torch.maximum(nearest.max() + DISTANCE_MARGIN * (nearest.max() - nearest.mean()), between / 4)
            )

    @staticmethod
    def _pooled(features: Tensor) -> Tensor:
        return features.float().mean(dim=(2, 3))

    def _distances(self, pooled: Tensor) -> Tensor:
        return ((pooled @ self.weight.T)[:, None] - self.centroids).square().mean(dim=2)

    def forward(self, features: Tensor) -> Recognition:
        """Recognise the products of images by features ``(N, C, H, W)``, in float32."""
        if torch.compiler.is_exporting():
            nearest, index = self._distances(self._pooled(features)).min(dim=1)
            return Recognition(index, nearest / self.limit)
        with torch.autocast(features.device.type, enabled=False):
            nearest, index = self._distances(self._pooled(features)).min(dim=1)
        return Recognition(index, nearest / self.limit)
