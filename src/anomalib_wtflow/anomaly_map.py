"""Anomaly map and image score from where the flow leaves the features."""

import copy
from collections.abc import Callable, Sequence
from functools import lru_cache
from operator import index

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.flow.finite import nan_unless_finite
from anomalib_wtflow.flow.rows import Reduce, own

MAPS = dict.fromkeys(("absolute", "relative"))
IMAGE_SCORES = dict.fromkeys(("map", "features"))
WINDOW = 3
"""Side, in positions, of the window over which the values of the ``features``' score are averaged."""
QUARTER = 4
"""One value in so many lies below the level of an image: the lower quartile."""
SLOPES = (0.75, 1.25)
"""Range of the slope of the level."""
MARGIN = 2.0
"""How far above the highest level of good images the limit lies, in distances of that from their mean level."""
EQUAL = 1e-10
"""Variance, relative to the square of the mean, below which levels are equal."""


def gaussian(energy: Tensor) -> Tensor:
    """``log q = -e``, of a standard normal (arXiv 2508.05461)."""
    return -energy


def student(energy: Tensor) -> Tensor:
    """``log q = -log(1 + 4 e)``, of heavy tails (ours): one layer that is far off cannot drown the others."""
    return -torch.log1p(4 * energy)


DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {"gaussian": gaussian, "student": student}


def density_proxy(
    y: Tensor, channels: Sequence[int] | None = None, kind: str = "gaussian", detail: Sequence[int] | None = None
) -> Tensor:
    """``log q(e_l)`` with ``e_l = 1/2 mean_c y_c^2`` over the channels of layer l, at each position.

    With one layer and ``gaussian``, ``log q = -1/2 mean_c y_c^2`` (arXiv 2508.05461); layers by themselves are ours.

    Args:
        y: End points of the flow, ``(N, sum_l C_l r_l^2, H, W)``.
        channels: Channels C_l of each of the L layers at a position; None for a single layer.
        kind: One of :data:`DENSITIES`.
        detail: Finer positions a side r_l that each layer has in one of y's, in its channels; None for 1.

    Returns:
        ``(N, L, r H, r W)``, r being the largest r_l; coarser layers are up-sampled bilinearly. At most 0; near 0 is
        normal.
    """
    sizes = [y.shape[1]] if channels is None else list(channels)
    finer = list(detail or [1] * len(sizes))
    places = [r * r for r in finer]
    squares = y.square()
    if torch.compiler.is_exporting():  # one convolution where the graph would hold three operations for each layer
        blocks = [
            torch.eye(count, dtype=y.dtype).repeat(1, size) * (0.5 / size)
            for size, count in zip(sizes, places, strict=True)
        ]
        energy = F.conv2d(squares, torch.block_diag(*blocks).to(y.device)[:, :, None, None])
    else:
        layers = squares.split([size * count for size, count in zip(sizes, places, strict=True)], dim=1)
        means = [
            layer.unflatten(1, (size, count)).mean(dim=1)
            for layer, size, count in zip(layers, sizes, places, strict=True)
        ]
        energy = 0.5 * torch.cat(means, dim=1)
    log_density = DENSITIES[kind](energy)
    if max(finer) == 1:
        return log_density
    size = [max(finer) * side for side in y.shape[-2:]]
    maps = [F.pixel_shuffle(layer, r) for layer, r in zip(log_density.split(places, dim=1), finer, strict=True)]
    return torch.cat(
        [
            layer if r == max(finer) else F.interpolate(layer, size=size, mode="bilinear", align_corners=False)
            for layer, r in zip(maps, finer, strict=True)
        ],
        dim=1,
    )


def resampling(inputs: int, outputs: int, sigma: float = 0.0, device: torch.device | None = None) -> Tensor:
    """Bilinear up-sampling of a line of samples, then a Gaussian blur, as one matrix ``(outputs, inputs)`` (ours).

    Both are linear and act on rows and columns by themselves: ``map = A_h x A_w^T`` is exact, and costs two small
    matrix products where a blur of the full-size map took a quarter of the time of the whole model in OpenVINO.
    """
    # In NumPy, so that an exported graph holds the matrix and not how it came about.
    positions = ((np.arange(outputs) + 0.5) * inputs / outputs - 0.5).clip(0, inputs - 1)
    matrix = np.stack([np.interp(positions, np.arange(inputs), line) for line in np.eye(inputs)], axis=1)
    if sigma:
        matrix = gaussian_filter1d(matrix, sigma, axis=0, mode="mirror", radius=reach(sigma))
    return torch.tensor(matrix, dtype=torch.float32, device=device)


_remembered_resampling = lru_cache(maxsize=64)(torch.inference_mode(mode=False)(resampling))


@torch.compiler.assume_constant_result  # which takes plain functions only, not those that remember
def constant_resampling(inputs: int, outputs: int, sigma: float, device: torch.device) -> Tensor:
    """:func:`resampling`, computed once, and a constant of compiled graphs."""
    return _remembered_resampling(inputs, outputs, sigma, device)


def reach(sigma: float) -> int:
    """Pixels from the centre to the edge of the Gaussian."""
    return int(4 * sigma + 0.5)


class AnomalyMapGenerator(nn.Module):
    """Up-sample the density proxy to the input size and turn it into an anomaly map and an image score.

    Map: ``log q`` averaged over the layers and up-sampled bilinearly. ``absolute`` (ours): map = ``-log q``, comparable
    between images. ``relative`` (the authors' code): with ``p = exp(log q)``, map = ``max(p) - p``, the maximum taken
    over the image: where all of an image is foreign, p is 0 everywhere and so is the map, and a score taken from it
    can call a wrong part normal. With ``sigma > 0`` the map is then convolved with ``exp(-(i^2 + j^2) / (2 sigma^2))``,
    i and j up to 4 sigma, mirrored at the borders, as in anomalib's PatchCore.

    Score: ``top - slope * min(level, limit) + max(slope - 1, 0) * limit``, top being the mean of the largest
    ``ceil(top_fraction * H * W)`` values and level the value that three quarters of them exceed; the last term is the
    same for all images, and keeps the score from being negative. Of the map's pixels for ``map`` (the authors', with
    ``contrast = 0``); for ``features`` (ours) of ``-sum_l w_l log q_l`` at the features' own positions, w_l in
    proportion to ``sqrt(C_l)`` (the deep layers, which have more channels, count more in the image's score, and all
    layers alike in where), averaged over windows of 3 x 3 positions.
    Exposure, texture and the drift of a process move all positions of a good image alike, and are taken off. How much
    of them, good images tell: see :meth:`observe`. The limit keeps the score of an image that is foreign all over.
    A NaN makes the score NaN.

    Args:
        kind: ``absolute`` or ``relative``.
        top_fraction: Share of the values that makes the image score, in (0, 1].
        sigma: Standard deviation of the Gaussian that smooths the map, in pixels of the input; 0 for none.
        image_score: ``map`` or ``features``.
        contrast: Slope in [0, 1]; None to have it from good images, see :meth:`observe`, and 1 until then.
        channels: Channels C_l of each of the L layers; None for a single one.
    """

    per_product = ("slope", "limit", "offset")
    weights: Tensor
    slope: Tensor
    limit: Tensor
    offset: Tensor

    def __init__(
        self,
        kind: str = "absolute",
        top_fraction: float = 0.03,
        sigma: float = 0.0,
        image_score: str = "map",
        contrast: float | None = 0.0,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.top_fraction = top_fraction
        self.sigma = float(sigma)
        self.image_score = image_score
        self.contrast = contrast
        sizes = torch.tensor([1.0] if channels is None else [float(size) for size in channels]).sqrt()
        self.register_buffer("weights", (sizes / sizes.sum()).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("slope", torch.tensor([1.0 if contrast is None else float(contrast)]))
        self.register_buffer("limit", torch.tensor([float("inf")]))
        self.register_buffer("offset", torch.tensor([0.0]))

    def forward(
        self, log_density: Tensor, image_size: tuple[int, int] | torch.Size, product: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Make the map and the score.

        Args:
            log_density: ``log q_l``, ``(N, L, H, W)``; ``(N, 1, H, W)`` for one that is not split into layers.
            image_size: Height and width of the model's input.
            product: Place of each image's product, whose slope and limit hold, ``(N,)``; None for the only one.

        Returns:
            The anomaly map, ``(N, 1, *image_size)``, and the image score, ``(N,)``; both at least 0.

        Raises:
            ValueError: If the image is smaller than the Gaussian, or the layers are not those of ``channels``.
        """
        anomaly_map = self.map(log_density, image_size)
        return anomaly_map, self.score(self.values(log_density, anomaly_map), product)

    def map(self, log_density: Tensor, image_size: tuple[int, int] | torch.Size) -> Tensor:
        """Make the anomaly map ``(N, 1, *image_size)`` of ``log q_l``, ``(N, L, H, W)``."""
        if self.sigma and min(image_size) <= reach(self.sigma):
            msg = (
                f"Images of {image_size[0]}x{image_size[1]} pixels are too small to smooth with sigma={self.sigma}, "
                f"which reaches {reach(self.sigma)} pixels: raise image_size, or lower sigma."
            )
            raise ValueError(msg)
        mean = -log_density.mean(dim=1, keepdim=True)
        if self.kind == "absolute":
            return self._resample(mean, image_size, self.sigma)
        density = (-self._resample(mean, image_size, 0.0)).exp()
        return self._resample(density.amax(dim=(-2, -1), keepdim=True) - density, image_size, self.sigma)

    def _resample(self, x: Tensor, size: tuple[int, int] | torch.Size, sigma: float) -> Tensor:
        # While a model is exported, tensors are stand-ins, which must not be remembered.
        matrix = resampling if torch.compiler.is_exporting() else constant_resampling
        # `index`, unlike `int`, fixes the size in a compiled graph, which is compiled again for another.
        rows, columns = (
            matrix(index(x.shape[axis]), index(size[axis]), sigma, x.device).to(x.dtype) for axis in (-2, -1)
        )
        return rows @ x @ columns.T

    def values(self, log_density: Tensor, anomaly_map: Tensor | None) -> Tensor:
        """Return what the image score is taken from: ``(N, 1, H, W)``, at the map's pixels or the features' positions.

        The map is needed only where the score is taken from it.

        Raises:
            ValueError: If the layers are not those of ``channels``.
        """
        if self.image_score == "map":
            assert anomaly_map is not None
            return anomaly_map
        layers, expected = log_density.shape[1], self.weights.shape[1]
        if layers not in (1, expected):
            msg = f"The density proxy has {layers} layers and the generator {expected}: give it the channels of each."
            raise ValueError(msg)
        values = -(self.weights * log_density).sum(dim=1, keepdim=True) if layers == expected else -log_density
        return F.avg_pool2d(values, WINDOW, 1, WINDOW // 2, count_include_pad=False)

    def score(self, values: Tensor, product: Tensor | None = None) -> Tensor:
        """Score ``(N, 1, H, W)``: ``(N,)``, at least 0, since the level is at most the top."""
        score, level = self.top_and_level(values)
        if self.contrast != 0:
            slope, limit, offset = (own(rows, product) for rows in (self.slope, self.limit, self.offset))
            score = score - slope * level.minimum(limit) + offset
        # What a top-k does with NaN depends on the runtime; a broken pixel must not pass as normal in any of them.
        return nan_unless_finite(score, values)

    def top_and_level(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the largest ``top_fraction`` of ``(N, 1, H, W)`` and the level of the rest, ``(N,)``."""
        values = values.flatten(1)
        count = max(1, -int(-self.top_fraction * values.shape[1] // 1))
        if self.contrast == 0:
            top = values.topk(count, dim=1, sorted=False).values.mean(dim=1)
            return top, torch.zeros_like(top)
        exceeded = max(count, values.shape[1] - values.shape[1] // QUARTER)
        largest = values.topk(exceeded, dim=1).values
        return largest[:, :count].mean(dim=1), largest[:, -1]

    def without_limit(self) -> "AnomalyMapGenerator":
        """Return a copy without slope and limit of its own, which go with the flow that they were observed with."""
        other = copy.deepcopy(self)
        other.limit.fill_(float("inf"))
        other.offset.fill_(0.0)
        if self.contrast is None:
            other.slope.fill_(1.0)
        return other

    def observe(
        self,
        log_density: Tensor,
        image_size: tuple[int, int] | torch.Size,
        product: Tensor | None = None,
        reduce: Reduce | None = None,
    ) -> None:
        """Set slope and limit of each product from good training images' ``log q_l``, ``(N, L, H, W)`` (ours).

        ``slope = Cov(top, level) / Var(level)``, kept in [0.75, 1.25]: among all slopes, the scores of the good images
        then spread least. ``limit = max + 2 (max - mean)`` of the levels.

        Args:
            log_density: ``log q_l`` of good images, ``(N, L, H, W)``; N may be 0 in one of several processes.
            image_size: Height and width of the model's input.
            product: Place of each image's product, ``(N,)``; None for the only one. One without images stays as it is.
            reduce: Reduces a value over the processes of a distributed training, by ``sum`` or ``max``; None for one.
        """
        if len(log_density):
            anomaly_map = self.map(log_density, image_size) if self.image_score == "map" else None
            top, level = self.top_and_level(self.values(log_density, anomaly_map))
        else:
            top = level = log_density.new_empty(0)
        top, level = top.cpu().double(), level.cpu().double()  # not all accelerators have float64
        places = torch.zeros(len(top), dtype=torch.int64) if product is None else product.cpu()
        terms = torch.stack([torch.ones_like(top), level, top, level * level, level * top], dim=1)
        sums = terms.new_zeros(len(self.limit), 5).index_add_(0, places, terms)
        largest = sums.new_full((len(self.limit),), -torch.inf).scatter_reduce_(0, places, level, "amax")
        if reduce is not None:
            sums, largest = reduce(sums, "sum"), reduce(largest, "max")
        count, levels, tops, squares, products = sums.T
        seen, mean = count > 0, levels / count
        self._set("limit", seen, largest + MARGIN * (largest - mean))
        if self.contrast is None:
            variance = squares / count - mean.square()
            slope = ((products / count - mean * tops / count) / variance).clamp(*SLOPES)
            # One image, or images that are all alike, tell no slope.
            self._set("slope", seen, torch.where(variance > EQUAL * mean.square(), slope, 1.0))
            # The same for all images: it changes no order, and keeps the scores from being negative.
            self._set("offset", seen, (self.slope - 1).clamp(min=0) * self.limit)

    def _set(self, name: str, which: Tensor, values: Tensor) -> None:
        rows = self.get_buffer(name)
        rows.copy_(torch.where(which.to(rows.device), values.to(rows), rows))
