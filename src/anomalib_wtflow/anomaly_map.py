"""Anomaly map and image score from where the flow leaves the features."""

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from scipy.ndimage import gaussian_filter1d
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.finite import nan_unless_finite

MAPS = dict.fromkeys(("absolute", "relative"))
IMAGE_SCORES = dict.fromkeys(("map", "features"))
WINDOW = 3
"""Side, in positions, of the window over which the values of the ``features``' score are averaged."""
QUARTER = 4
"""One value in so many lies below the background level of an image: the lower quartile."""
SLOPES = (0.75, 1.25)
"""Range of the background slope."""
LEVEL_MARGIN = 2.0
"""How far above the highest level of good images the limit lies, in distances of that from their mean level."""
EQUAL = 1e-10
"""Variance, relative to the square of the mean, below which levels are equal."""


def gaussian_density(energy: Tensor) -> Tensor:
    """``log q = -e``: a standard normal (arXiv 2508.05461)."""
    return -energy


def student_density(energy: Tensor) -> Tensor:
    """``log q = -log(1 + 4 e)``, heavy-tailed (ours): no single layer drowns the others."""
    return -torch.log1p(4 * energy)


DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {"gaussian": gaussian_density, "student": student_density}


def density_proxy(y: Tensor, channels: Sequence[int] | None = None, kind: str = "gaussian") -> Tensor:
    """``log q(e_l)``, ``e_l = 1/2 mean_c y_c^2`` over the channels of layer l, by position.

    With one layer and ``gaussian``, ``log q = -1/2 mean_c y_c^2`` (arXiv 2508.05461); layers by themselves are ours.

    Args:
        y: End points of the flow, ``(N, sum_l C_l, H, W)``.
        channels: Channels C_l of each of the L layers; None for a single layer.
        kind: One of :data:`DENSITIES`.

    Returns:
        ``(N, L, H, W)``, at most 0; near 0 is normal.
    """
    sizes = [y.shape[1]] if channels is None else list(channels)
    squares = y.square()
    if torch.compiler.is_exporting():  # one convolution where the graph would hold three operations for each layer
        blocks = [y.new_full((1, size), 0.5 / size) for size in sizes]
        energy = F.conv2d(squares, torch.block_diag(*blocks)[:, :, None, None])
    else:
        energy = 0.5 * torch.stack([layer.mean(dim=1) for layer in squares.split(sizes, dim=1)], dim=1)
    return DENSITIES[kind](energy)


def resampling(inputs: int, outputs: int, sigma: float = 0.0, device: torch.device | None = None) -> Tensor:
    """Return bilinear up-sampling, then Gaussian blur, as a matrix ``(outputs, inputs)``.

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
    """Return :func:`resampling`, computed once, as a constant of compiled graphs."""
    return _remembered_resampling(inputs, outputs, sigma, device)


def reach(sigma: float) -> int:
    """Return the number of pixels from the centre to the edge of the Gaussian."""
    return int(4 * sigma + 0.5)


class AnomalyMapGenerator(nn.Module):
    """Anomaly map and image score from the density proxy, up-sampled to the input size.

    Map: ``log q`` averaged over the layers and up-sampled bilinearly. ``absolute`` (ours): map = ``-log q``, comparable
    between images. ``relative`` (the authors' code): with ``p = exp(log q)``, map = ``max(p) - p``, the maximum taken
    over the image. With ``sigma > 0`` the map is then convolved with ``exp(-(i^2 + j^2) / (2 sigma^2))``, i and j up to
    4 sigma, mirrored at the borders, as in anomalib's PatchCore.

    Score: ``top - slope * min(level, limit) + max(slope - 1, 0) * limit``. ``top`` is the mean of the largest
    ``ceil(top_fraction * H * W)`` values, and ``level``, the background level, the value that three quarters of them
    exceed. The last term is the same for all images, and keeps the score from being negative. The values are the map's
    pixels for ``map`` (the authors', with slope 0). For ``features`` (ours) they are ``-sum_l w_l log q_l`` at the
    features' own positions, averaged over windows of 3 x 3, with w_l in proportion to ``sqrt(C_l)``. Exposure, texture
    and the drift of a process raise all positions of a good image alike, and the background level takes that off. The
    limit keeps the score of an image that is foreign all over. A NaN makes the score NaN.

    Args:
        kind: ``absolute`` or ``relative``.
        top_fraction: Share of the values that makes the image score, in (0, 1].
        sigma: Standard deviation of the Gaussian that smooths the map, in pixels of the input; 0 for none.
        image_score: ``map`` or ``features``.
        background_slope: Slope in [0, 1]; None to have it from good images, see :meth:`fit`, and 1 until then.
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
        background_slope: float | None = 0.0,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.top_fraction = top_fraction
        self.sigma = float(sigma)
        self.image_score = image_score
        self.background_slope = background_slope
        sizes = torch.tensor([1.0] if channels is None else [float(size) for size in channels]).sqrt()
        self.register_buffer("weights", (sizes / sizes.sum()).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("slope", torch.tensor([1.0 if background_slope is None else float(background_slope)]))
        self.register_buffer("limit", torch.tensor([float("inf")]))
        self.register_buffer("offset", torch.tensor([0.0]))

    def forward(
        self, log_density: Tensor, image_size: tuple[int, int] | torch.Size, index: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the map ``(N, 1, *image_size)`` and the score ``(N,)``, both >= 0."""
        anomaly_map = self.map(log_density, image_size)
        return anomaly_map, self.score(self.values(log_density, anomaly_map), index)

    def map(self, log_density: Tensor, image_size: tuple[int, int] | torch.Size) -> Tensor:
        """Make the anomaly map ``(N, 1, *image_size)`` of ``log q_l``, ``(N, L, H, W)``.

        Raises:
            WTFlowError: If the image is smaller than the Gaussian.
        """
        if self.sigma and min(image_size) <= reach(self.sigma):
            msg = (
                f"Images of {image_size[0]}x{image_size[1]} pixels are too small to smooth with sigma={self.sigma}, "
                f"which reaches {reach(self.sigma)} pixels: raise image_size, or lower sigma."
            )
            raise WTFlowError(msg)
        mean = -log_density.mean(dim=1, keepdim=True)
        if self.kind == "absolute":
            return self._resample(mean, image_size, self.sigma)
        density = (-self._resample(mean, image_size, 0.0)).exp()
        return self._resample(density.amax(dim=(-2, -1), keepdim=True) - density, image_size, self.sigma)

    def _resample(self, x: Tensor, size: tuple[int, int] | torch.Size, sigma: float) -> Tensor:
        # While a model is exported, tensors are stand-ins, which must not be remembered.
        matrix = resampling if torch.compiler.is_exporting() else constant_resampling
        # `operator.index`, unlike `int`, fixes the size in a compiled graph, which is compiled again for another.
        rows, columns = (
            matrix(operator.index(x.shape[axis]), operator.index(size[axis]), sigma, x.device).to(x.dtype)
            for axis in (-2, -1)
        )
        return rows @ x @ columns.T

    def values(self, log_density: Tensor, anomaly_map: Tensor | None) -> Tensor:
        """Return the values behind the score, ``(N, 1, H, W)``: at pixels or feature positions.

        The map is needed only where the score is taken from it.
        """
        if self.image_score == "map":
            assert anomaly_map is not None
            return anomaly_map
        values = -(self.weights * log_density).sum(dim=1, keepdim=True)
        return F.avg_pool2d(values, WINDOW, 1, WINDOW // 2, count_include_pad=False)

    def score(self, values: Tensor, index: Tensor) -> Tensor:
        """Score ``(N, 1, H, W)``: ``(N,)``, at least 0, since the level is at most the top."""
        score, level = self.top_and_level(values)
        if self.background_slope != 0:
            score = score - self.slope[index] * level.minimum(self.limit[index]) + self.offset[index]
        # What a top-k does with NaN depends on the runtime; a broken pixel must not pass as normal in any of them.
        return nan_unless_finite(score, values)

    def top_and_level(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean of the largest values and the background level, ``(N,)`` each."""
        values = values.flatten(1)
        count = max(1, -int(-self.top_fraction * values.shape[1] // 1))
        if self.background_slope == 0:
            top = values.topk(count, dim=1, sorted=False).values.mean(dim=1)
            return top, torch.zeros_like(top)
        exceeded = max(count, values.shape[1] - values.shape[1] // QUARTER)
        largest = values.topk(exceeded, dim=1).values
        return largest[:, :count].mean(dim=1), largest[:, -1]

    @torch.no_grad()
    def fit(self, log_density: Tensor, image_size: tuple[int, int] | torch.Size, index: Tensor) -> None:
        """Set slope and limit of each product from the ``log q_l`` of good images (ours).

        ``slope = Cov(top, level) / Var(level)``, kept in [0.75, 1.25]: among all slopes, the scores of the good images
        then spread least. ``limit = max + 2 (max - mean)`` of the levels. A product without images keeps its own.

        Args:
            log_density: ``log q_l``, ``(N, L, H, W)``.
            image_size: Height and width of the model's input.
            index: Index of each image's product, ``(N,)``.
        """
        anomaly_map = self.map(log_density, image_size) if self.image_score == "map" else None
        pairs = self.top_and_level(self.values(log_density, anomaly_map))
        tops, levels = (each.cpu().double() for each in pairs)  # not all accelerators have float64
        for k in index.unique().tolist():
            top, level = (each[index.cpu() == k] for each in (tops, levels))
            mean, variance = level.mean(), level.var(unbiased=False)
            self.limit[k] = level.max() + LEVEL_MARGIN * (level.max() - mean)
            if self.background_slope is None:
                # One image, or images that are all alike, tell no slope.
                varied = variance > EQUAL * mean.square()
                slope = ((top * level).mean() - mean * top.mean()) / variance
                self.slope[k] = slope.clamp(*SLOPES) if varied else 1.0
                # The same for all images: it changes no order, and keeps the scores from being negative.
                self.offset[k] = (self.slope[k] - 1).clamp(min=0) * self.limit[k]
