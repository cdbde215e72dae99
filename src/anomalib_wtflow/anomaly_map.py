"""Anomaly map and image score from where the flow leaves the features."""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow._registry import lookup

MapName = Literal["absolute", "relative"]
DensityName = Literal["gaussian", "student"]
ImageScoreName = Literal["map", "features"]


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

    Raises:
        ValueError: If the kind is unknown.
    """
    log_density = lookup(DENSITIES, "density", kind)
    layers = [y] if channels is None else y.split(list(channels), dim=1)
    return log_density(torch.cat([0.5 * layer.square().mean(dim=1, keepdim=True) for layer in layers], dim=1))


class AnomalyMapGenerator(nn.Module):
    """Up-sample the density proxy to the input size and turn it into an anomaly map and an image score.

    Map: ``log q`` averaged over the layers and up-sampled bilinearly. ``absolute`` (ours): map = ``-log q``, comparable
    between images. ``relative`` (the authors' code): with ``p = exp(log q)``, map = ``max(p) - p``, the maximum taken
    over the image: where all of an image is foreign, p is 0 everywhere and so is the map, and a score taken from it
    can call a wrong part normal. With ``sigma > 0`` the map is then convolved with ``exp(-(i^2 + j^2) / (2 sigma^2))``,
    i and j up to 4 sigma, mirrored at the borders, as in anomalib's PatchCore.

    Score: ``mean of the largest ceil(top_fraction * H * W) values - contrast * mean of all``. Of the map's pixels for
    ``map`` (the authors', with ``contrast = 0``); of ``-sum_l (C_l / C) log q_l`` at the features' own positions for
    ``features`` (ours: the deep layers, which have more channels, decide on the image, and all layers alike on where).
    A NaN makes the score NaN.

    Args:
        kind: ``absolute`` or ``relative``.
        top_fraction: Share of the values that makes the image score, in (0, 1].
        sigma: Standard deviation of the Gaussian that smooths the map, in pixels of the input; 0 for none.
        image_score: ``map`` or ``features``.
        contrast: Share of the image's mean that is taken off, in [0, 1). Above 0 the score falls as a fault
            spreads over the image: choose 0 where a wrong part is possible.
        channels: Channels C_l of each layer; None for a single one.

    Raises:
        ValueError: If a name is unknown, the fraction is outside (0, 1], sigma is negative or not finite, or the
            contrast is outside [0, 1).
    """

    weights: Tensor

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
        if kind not in ("absolute", "relative"):
            msg = f"Unknown anomaly map '{kind}': choose one of absolute, relative."
            raise ValueError(msg)
        if image_score not in ("map", "features"):
            msg = f"Unknown image score '{image_score}': choose one of map, features."
            raise ValueError(msg)
        if not 0 < top_fraction <= 1:
            msg = f"top_fraction is {top_fraction}: choose a share of the pixels in (0, 1]."
            raise ValueError(msg)
        if not 0 <= sigma < float("inf"):
            msg = f"sigma is {sigma}: choose a standard deviation in pixels, or 0 for no smoothing."
            raise ValueError(msg)
        if not 0 <= contrast < 1:
            msg = f"contrast is {contrast}: choose a share in [0, 1); at 1 an image that is foreign all over scores 0."
            raise ValueError(msg)
        self.kind = kind
        self.top_fraction = top_fraction
        self.sigma = float(sigma)
        self.reach = int(4 * sigma + 0.5)
        self.image_score = image_score
        self.contrast = contrast
        sizes = torch.tensor([1.0] if channels is None else [float(size) for size in channels])
        self.register_buffer("weights", (sizes / sizes.sum()).view(1, -1, 1, 1), persistent=False)

    def forward(self, log_density: Tensor, image_size: tuple[int, int] | torch.Size) -> tuple[Tensor, Tensor]:
        """Make the map and the score.

        Args:
            log_density: ``log q_l``, ``(N, L, H, W)``; ``(N, 1, H, W)`` for one that is not split into layers.
            image_size: Height and width of the model's input.

        Returns:
            The anomaly map, ``(N, 1, *image_size)``, and the image score, ``(N,)``; both at least 0.

        Raises:
            ValueError: If the image is smaller than the Gaussian.
        """
        if self.reach and min(image_size) <= self.reach:
            msg = (
                f"Images of {image_size[0]}x{image_size[1]} pixels are too small to smooth with sigma={self.sigma}, "
                f"which reaches {self.reach} pixels: raise image_size, or lower sigma."
            )
            raise ValueError(msg)
        mean = log_density.mean(dim=1, keepdim=True)
        up = F.interpolate(mean, size=tuple(image_size), mode="bilinear", align_corners=False)
        if self.kind == "absolute":
            anomaly_map = -up
        else:
            density = up.exp()
            anomaly_map = density.amax(dim=(-2, -1), keepdim=True) - density
        if self.reach:
            side = 2 * self.reach + 1
            anomaly_map = gaussian_blur2d(anomaly_map, (side, side), (self.sigma, self.sigma), "reflect")
        if self.image_score == "map":
            return anomaly_map, self.score(anomaly_map)
        split = log_density.shape[1] == self.weights.shape[1]
        return anomaly_map, self.score(-(self.weights * log_density).sum(dim=1, keepdim=True) if split else -mean)

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the largest ``top_fraction`` of ``(N, 1, H, W)``, less ``contrast`` times the mean: ``(N,)``."""
        pixels = anomaly_map.flatten(1)
        count = -int(-self.top_fraction * pixels.shape[1] // 1)
        top = pixels.topk(max(1, count), dim=1, sorted=False).values.mean(dim=1)
        if self.contrast:
            top = top - self.contrast * pixels.mean(dim=1)
        # What a top-k does with NaN depends on the runtime; a broken pixel must not pass as normal in any of them.
        return torch.where(pixels.isnan().any(dim=1), torch.full_like(top, float("nan")), top)
