"""Anomaly map and image score from where the flow leaves the features."""

from typing import Literal

import torch
from kornia.filters import gaussian_blur2d
from torch import Tensor, nn
from torch.nn import functional as F

MapName = Literal["absolute", "relative"]


def density_proxy(y: Tensor) -> Tensor:
    """``log q = -1/2 mean_c y_c^2`` at each position (arXiv 2508.05461).

    Args:
        y: End points of the flow, ``(N, C, H, W)``.

    Returns:
        ``(N, 1, H, W)``, at most 0; near 0 is normal.
    """
    return -0.5 * y.square().mean(dim=1, keepdim=True)


class AnomalyMapGenerator(nn.Module):
    """Up-sample the density proxy to the input size and turn it into an anomaly map and an image score.

    ``absolute`` (ours): map = ``-log q``, comparable between images. ``relative`` (the authors' code): with
    ``p = exp(log q)``, map = ``max(p) - p``, the maximum taken over the image: where all of an image is foreign, p
    is 0 everywhere and so is the map, so that a wrong part can pass as normal. With ``sigma > 0`` the map is then
    convolved with ``exp(-(i^2 + j^2) / (2 sigma^2))``, i and j up to 4 sigma, mirrored at the borders, as in anomalib's
    PatchCore. Score: mean of the largest ``ceil(top_fraction * H * W)`` pixels of the map. A NaN pixel makes the
    score NaN.

    Args:
        kind: ``absolute`` or ``relative``.
        top_fraction: Share of the pixels that makes the image score, in (0, 1].
        sigma: Standard deviation of the Gaussian that smooths the map, in pixels of the input; 0 for none.

    Raises:
        ValueError: If the kind is unknown, the fraction is outside (0, 1] or sigma is negative or not finite.
    """

    def __init__(self, kind: str = "absolute", top_fraction: float = 0.03, sigma: float = 0.0) -> None:
        super().__init__()
        if kind not in ("absolute", "relative"):
            msg = f"Unknown anomaly map '{kind}': choose one of absolute, relative."
            raise ValueError(msg)
        if not 0 < top_fraction <= 1:
            msg = f"top_fraction is {top_fraction}: choose a share of the pixels in (0, 1]."
            raise ValueError(msg)
        self.kind = kind
        if not 0 <= sigma < float("inf"):
            msg = f"sigma is {sigma}: choose a standard deviation in pixels, or 0 for no smoothing."
            raise ValueError(msg)
        self.top_fraction = top_fraction
        self.sigma = float(sigma)
        self.reach = int(4 * sigma + 0.5)

    def forward(self, log_density: Tensor, image_size: tuple[int, int] | torch.Size) -> tuple[Tensor, Tensor]:
        """Make the map and the score.

        Args:
            log_density: ``log q``, ``(N, 1, H, W)``.
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
        log_density = F.interpolate(log_density, size=tuple(image_size), mode="bilinear", align_corners=False)
        if self.kind == "absolute":
            anomaly_map = -log_density
        else:
            density = log_density.exp()
            anomaly_map = density.amax(dim=(-2, -1), keepdim=True) - density
        if self.reach:
            side = 2 * self.reach + 1
            anomaly_map = gaussian_blur2d(anomaly_map, (side, side), (self.sigma, self.sigma), "reflect")
        return anomaly_map, self.score(anomaly_map)

    def score(self, anomaly_map: Tensor) -> Tensor:
        """Mean of the largest ``top_fraction`` of the pixels of ``(N, 1, H, W)``, as ``(N,)``."""
        pixels = anomaly_map.flatten(1)
        count = -int(-self.top_fraction * pixels.shape[1] // 1)
        top = pixels.topk(max(1, count), dim=1, sorted=False).values.mean(dim=1)
        # What a top-k does with NaN depends on the runtime; a broken pixel must not pass as normal in any of them.
        return torch.where(pixels.isnan().any(dim=1), torch.full_like(top, float("nan")), top)
