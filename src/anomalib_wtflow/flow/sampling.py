"""Which positions of the features a training step sees."""

from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from anomalib_wtflow.flow.normalization import whitening_matrix

SHARE, LEAST = 8, 32
"""A step sees as many positions of each layer and image as the grid has, divided by the first, and at least so many."""


class PositionSampling(nn.Module):
    """Positions drawn in proportion to ``|| W_l x ||^(2 importance)``, by layer (ours).

    W_l whitens the layer's training features, so positions that are rare under a Gaussian count more. Most positions of
    good images are alike (background). A field trained on all equally learns rare normal ones (edges, threads) last,
    and calls them anomalous until then. Only the distribution of the data changes, not path, noise or loss.

    Args:
        channels: Channels C_l of each layer.
        importance: 0 for all positions alike.
    """

    def __init__(self, channels: Sequence[int], importance: float = 1.0) -> None:
        super().__init__()
        self.channels, self.importance = list(channels), importance
        for index, size in enumerate(channels):
            self.register_buffer(f"whitening_{index}", torch.eye(size))

    @property
    def whitening(self) -> list[Tensor]:
        """Return W_l of each layer, ``(C_l, C_l)``."""
        return [self.get_buffer(f"whitening_{index}") for index in range(len(self.channels))]

    def fit(self, covariance: Tensor) -> None:
        """Set W_l from the covariance ``(sum_l C_l,) * 2`` of the normalised features."""
        layers = torch.arange(len(covariance)).split(self.channels)
        for weight, rows in zip(self.whitening, layers, strict=True):
            weight.copy_(whitening_matrix(covariance[rows][:, rows]))

    def forward(self, x0: Tensor, generator: Generator | None = None) -> Tensor:
        """Draw positions, with replacement, from normalised features.

        They come from every second row and column of the grid, from an offset drawn at random, and are in proportion
        among these: a quarter of the features is enough to draw an eighth from.

        Args:
            x0: ``(N, sum_l C_l, H, W)``.
            generator: Draws them, on the features' device; None for torch's own.

        Returns:
            ``(N, sum_l C_l, P, 1)`` with ``P = max(32, ceil(H W / 8))``; each layer has its own positions.
        """
        count = max(LEAST, -(-x0.shape[-2] * x0.shape[-1] // SHARE))
        if min(x0.shape[-2:]) > 1:
            device = None if generator is None else generator.device
            top, left = torch.randint(2, (2,), generator=generator, device=device).tolist()
            x0 = x0[..., top::2, left::2]
        parts = []
        for points, weight in zip(x0.flatten(2).split(self.channels, dim=1), self.whitening, strict=True):
            rarity = (weight @ points).square().mean(dim=1)
            # Relative to the rarest, so that no power of it overflows; no weight at all would leave nothing to draw.
            tiny = torch.finfo(rarity.dtype).tiny
            rarity = (rarity / rarity.amax(dim=1, keepdim=True).clamp(min=tiny)) ** self.importance
            drawn = torch.multinomial(rarity.clamp(min=tiny), count, replacement=True, generator=generator)
            parts.append(points.gather(2, drawn[:, None].expand(-1, points.shape[1], -1)))
        return torch.cat(parts, dim=1)[..., None]
