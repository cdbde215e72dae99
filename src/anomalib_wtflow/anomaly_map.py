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

MAPS = dict.fromkeys(("absolute", "relative"))
IMAGE_SCORES = dict.fromkeys(("map", "features"))
WINDOW = 3
"""Side, in positions, of the window over which the values of the ``features``' score are averaged."""


def gaussian(energy: Tensor) -> Tensor:
    """``log q = -e``, of a standard normal (arXiv 2508.05461)."""
    return -energy


def student(energy: Tensor) -> Tensor:
    """``log q = -log(1 + 4 e)``, of heavy tails (ours): one layer that is far off cannot drown the others."""
    return -torch.log1p(4 * energy)


DENSITIES: dict[str, Callable[[Tensor], Tensor]] = {"gaussian": gaussian, "student": student}


def density_proxy(y: Tensor, channels: Sequence[int] | None = None, kind: str = "gaussian") -> Tensor:
    """``log q(e_l)`` with ``e_l = 1/2 mean_c y_c^2`` over the channels of layer l, at each position.

    With one layer and ``gaussian``, ``log q = -1/2 mean_c y_c^2`` (arXiv 2508.05461); layers by themselves are ours.

    Args:
        y: End points of the flow, ``(N, C, H, W)``.
        channels: Channels of each of the L layers that make up C; None for a single one.
        kind: One of :data:`DENSITIES`.

    Returns:
        ``(N, L, H, W)``, at most 0; near 0 is normal.
    """
    log_density = DENSITIES[kind]
    sizes = [y.shape[1]] if channels is None else list(channels)
    if not torch.compiler.is_exporting():
        layers = y.split(sizes, dim=1)
        return log_density(0.5 * torch.cat([layer.square().mean(dim=1, keepdim=True) for layer in layers], dim=1))
    # One convolution where the graph would hold three operations for each layer.
    halves = torch.block_diag(*(y.new_full((1, size), 0.5 / size) for size in sizes))
    return log_density(F.conv2d(y.square(), halves[:, :, None, None]))


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

    Score: ``mean of the largest ceil(top_fraction * H * W) values - contrast * min(mean of all, limit)``. Of the map's
    pixels for ``map`` (the authors', with ``contrast = 0``); for ``features`` (ours) of ``-sum_l (C_l / C) log q_l`` at
    the features' own positions (the deep layers, which have more channels, decide on the image, and all layers alike
    on where), averaged over windows of 3 x 3 positions.
    The limit is the largest mean among training images, see :meth:`observe`: exposure and texture, which move all
    positions of a good image alike, are taken off, and an image that is foreign all over keeps its score.
    A NaN makes the score NaN.

    Args:
        kind: ``absolute`` or ``relative``.
        top_fraction: Share of the values that makes the image score, in (0, 1].
        sigma: Standard deviation of the Gaussian that smooths the map, in pixels of the input; 0 for none.
        image_score: ``map`` or ``features``.
        contrast: Share of the image's mean that is taken off, in [0, 1).
        channels: Channels C_l of each of the L layers; None for a single one.
    """

    weights: Tensor
    limit: Tensor

    def __init__(
        self,
        kind: str = "absolute",
        top_fraction: float = 0.03,
        sigma: float = 0.0,
        image_score: str = "map",
        contrast: float = 0.0,
        channels: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.kind = kind
        self.top_fraction = top_fraction
        self.sigma = float(sigma)
        self.image_score = image_score
        self.contrast = contrast
        sizes = torch.tensor([1.0] if channels is None else [float(size) for size in channels])
        self.register_buffer("weights", (sizes / sizes.sum()).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("limit", torch.tensor(float("inf")))

    def forward(self, log_density: Tensor, image_size: tuple[int, int] | torch.Size) -> tuple[Tensor, Tensor]:
        """Make the map and the score.

        Args:
            log_density: ``log q_l``, ``(N, L, H, W)``; ``(N, 1, H, W)`` for one that is not split into layers.
            image_size: Height and width of the model's input.

        Returns:
            The anomaly map, ``(N, 1, *image_size)``, and the image score, ``(N,)``; both at least 0.

        Raises:
            ValueError: If the image is smaller than the Gaussian, or the layers are not those of ``channels``.
        """
        anomaly_map = self.map(log_density, image_size)
        return anomaly_map, self.score(self.values(log_density, anomaly_map))

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

    def values(self, log_density: Tensor, anomaly_map: Tensor) -> Tensor:
        """Return what the image score is taken from: ``(N, 1, H, W)``, at the map's pixels or the features' positions.

        Raises:
            ValueError: If the layers are not those of ``channels``.
        """
        if self.image_score == "map":
            return anomaly_map
        layers, expected = log_density.shape[1], self.weights.shape[1]
        if layers not in (1, expected):
            msg = f"The density proxy has {layers} layers and the generator {expected}: give it the channels of each."
            raise ValueError(msg)
        values = -(self.weights * log_density).sum(dim=1, keepdim=True) if layers == expected else -log_density
        return F.avg_pool2d(values, WINDOW, 1, WINDOW // 2, count_include_pad=False)

    def score(self, values: Tensor) -> Tensor:
        """Mean of the largest ``top_fraction`` of ``(N, 1, H, W)``, less what the contrast takes off: ``(N,)``."""
        values = values.flatten(1)
        count = -int(-self.top_fraction * values.shape[1] // 1)
        top = values.topk(max(1, count), dim=1, sorted=False).values.mean(dim=1)
        mean = values.mean(dim=1)
        if self.contrast:
            top = top - self.contrast * mean.minimum(self.limit)
        # What a top-k does with NaN depends on the runtime; a broken pixel must not pass as normal in any of them.
        return torch.where(mean.isnan(), mean, top)

    def without_limit(self) -> "AnomalyMapGenerator":
        """Return a copy without the limit, which goes with the flow that it was observed with."""
        other = copy.deepcopy(self)
        other.limit.fill_(float("inf"))
        return other

    def observe(self, log_density: Tensor, image_size: tuple[int, int] | torch.Size) -> None:
        """Set the limit to the largest mean among the training images of ``log q_l``, ``(N, L, H, W)`` (ours)."""
        means = self.values(log_density, self.map(log_density, image_size)).flatten(1).mean(dim=1)
        self.limit.copy_(means.max())
