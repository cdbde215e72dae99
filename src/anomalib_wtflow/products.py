"""Which product an image shows, told by the model itself (ours): nearest centroid of pooled backbone features."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from anomalib_wtflow.flow.normalization import whitening_matrix
from anomalib_wtflow.flow.rows import Reduce

UNKNOWN = "unknown product"
RIDGE = 1.0
"""Added to the spread within products: what other days bring is not seen in training."""
MARGIN = 2.0
"""How far beyond the farthest training image the limit lies, in distances of that from their mean."""


class Recognition(NamedTuple):
    """What product images show, ``(N,)`` int64, and how unlike all products they are, ``(N,)``: above 1, unknown."""

    product: Tensor
    strangeness: Tensor


class ProductRecognition(nn.Module):
    """``argmin_p d_p``, ``d_p = mean_c (W (f - c_p))_c^2``, f being an image's features averaged over positions (ours).

    c_p is the mean f of product p's training images, and W the whitening matrix (ridge 1) of the covariance within
    products, each counting alike. ``strangeness = min_p d_p / limit``. The limit is ``max + 2 (max - mean)`` of the
    training images' distances to their nearest centroid, and at least half the way between the two products that are
    most alike (a quarter of their squared distance), so that a defect does not make a product unknown. A model of one
    product has nothing to tell apart, and its limit is infinite. All of it is fixed before the threshold is calibrated,
    so that the images that show a product by this rule stay exchangeable (Vovk et al., 2005: Mondrian conformal
    prediction).

    Args:
        channels: Feature channels C.
    """

    needs_fit = True
    per_product = ("centroids", "_fitted")
    centroids: Tensor
    weight: Tensor
    limit: Tensor
    _fitted: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("centroids", torch.zeros(1, channels))
        self.register_buffer("weight", torch.eye(channels))
        self.register_buffer("limit", torch.tensor(float("inf")))
        self.register_buffer("_fitted", torch.zeros(1, dtype=torch.bool))
        self.reset()

    @property
    def fitted(self) -> bool:
        """Whether each product has a centroid."""
        return bool(self._fitted.all())

    def reset(self) -> None:
        """Forget the images gathered so far."""
        self._rows = torch.empty(0, self.weight.shape[1])
        self._products: list[int] = []

    @staticmethod
    def _pooled(features: Tensor) -> Tensor:
        return features.float().mean(dim=(2, 3))

    def update(self, features: Tensor, product: Tensor) -> None:
        """Gather a batch of training images: features ``(N, C, H, W)`` and the places of their products, ``(N,)``."""
        rows = self._pooled(features.detach()).cpu()
        start, end = len(self._products), len(self._products) + len(rows)
        if end > len(self._rows):
            # Twice the room: a small tensor kept of each batch, between large ones, scatters the memory.
            self._rows = torch.cat([self._rows[:start], torch.empty(end, rows.shape[1])])
        self._rows[start:end] = rows
        self._products += product.tolist()

    def finalize(self, reduce: Reduce = lambda value, _: value) -> None:
        """Set the centroids of products that have none yet, and the limit, from the images gathered; forget these.

        W is estimated with the first products and kept when others are added.

        Args:
            reduce: Reduces a value over the processes of a distributed training, by ``sum`` or ``max``.
        """
        count, channels = self.centroids.shape
        product = torch.tensor(self._products, dtype=torch.int64)
        rows = self._rows[: len(product)].double()
        new = ~self._fitted.cpu()
        number = reduce(torch.bincount(product, minlength=count).double(), "sum").cpu()
        mean = reduce(rows.new_zeros(count, channels).index_add_(0, product, rows), "sum").cpu() / number[:, None]
        if new.all():
            apart = (rows - mean[product]) / number[product, None].sqrt()
            covariance = reduce(apart.T @ apart, "sum").cpu() / count
            known = covariance.diagonal().sum() > 0  # not where each product has one image
            self.weight.copy_(whitening_matrix(covariance, RIDGE) if known else torch.eye(channels))
        self.centroids[new] = (mean @ self.weight.cpu().double().T)[new].to(self.centroids)
        self._fitted.fill_(True)
        nearest = self._distances(rows.float().to(self.weight.device)).amin(dim=1).cpu().double()
        largest = reduce(nearest.amax() if len(nearest) else nearest.new_tensor(-torch.inf), "max").cpu()
        average = reduce(nearest.sum(), "sum").cpu() / number.sum()
        if count == 1:
            self.limit.fill_(torch.inf)
        else:
            between = torch.nn.functional.pdist(self.centroids.cpu().double()).square().amin() / channels
            self.limit.copy_(torch.maximum(largest + MARGIN * (largest - average), between / 4))
        self.reset()

    def _distances(self, pooled: Tensor) -> Tensor:
        return ((pooled @ self.weight.T)[:, None] - self.centroids).square().mean(dim=2)

    def forward(self, features: Tensor) -> Recognition:
        """Recognise the products of images by their features ``(N, C, H, W)``, in float32 whatever the precision."""
        if torch.compiler.is_exporting():
            nearest, product = self._distances(self._pooled(features)).min(dim=1)
            return Recognition(product, nearest / self.limit)
        with torch.autocast(features.device.type, enabled=False):
            nearest, product = self._distances(self._pooled(features)).min(dim=1)
        return Recognition(product, nearest / self.limit)


def places(names: Sequence[str], known: Sequence[str]) -> Tensor:
    """Return where each name stands among the known ones, ``(len(names),)``.

    Raises:
        ValueError: If one is not known.
    """
    where = {name: place for place, name in enumerate(known)}
    missing = sorted(set(names) - set(known))
    if missing:
        msg = f"The product '{missing[0]}' is none of the model's ({', '.join(known)}): give it training images."
        raise ValueError(msg)
    return torch.tensor([where[name] for name in names], dtype=torch.int64)
