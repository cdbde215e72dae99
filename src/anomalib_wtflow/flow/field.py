"""Vector fields: the networks ``v_theta(x, t)`` that are trained along the paths."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.flow.registry import lookup


class TimeEmbedding(nn.Module):
    """``(sin, cos)(1000 t / 10000^r)`` with r = linspace(0, 1, width / 2).

    The authors embed 1000 t; that their frequencies fall as ``10000^-r``, as is usual, is our reading.

    Args:
        width: Even number of embedding channels.
    """

    frequencies: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        frequencies = 1000 * 10000 ** -torch.linspace(0, 1, width // 2)
        self.register_buffer("frequencies", frequencies, persistent=False)

    def forward(self, t: Tensor) -> Tensor:
        """Embed times ``(N,)`` as ``(N, width)``; ``(1,)`` for one time for all."""
        angle = t[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=1)


class PointwiseConv(nn.Conv2d):
    """1x1 convolution of ``(N, C, H, W)``.

    In eager torch a matrix product: for one small image torch takes a slow path of its convolution, which made the
    whole flow twice as slow. Exported graphs keep the convolution, which their runtimes know how to fuse.

    Args:
        inputs: Input channels.
        outputs: Output channels.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Transform ``(N, inputs, H, W)`` to ``(N, outputs, H, W)``."""
        if torch.compiler.is_exporting():
            return super().forward(x)
        return F.linear(x.movedim(1, -1), self.weight.flatten(1), self.bias).movedim(-1, 1)


class PointwiseField(nn.Module):
    """The same residual network at every position: 1x1 convolutions only (ours).

    ``h = A x + B silu(M x + T emb(t) + E c)`` with the class embedding c, then ``h <- h + B' silu(M' h + T' emb(t))``
    for each further block, ``v = C silu(h)``. It sees one position at a time, so that an unusual position cannot hide
    in its neighbourhood, and its cost is a few matrix products.

    Args:
        channels: Feature channels C.
        width: Hidden channels, even.
        depth: Number of residual blocks.
        class_channels: Channels of the class embedding, whose map E starts at 0.
    """

    min_size = 1
    pointwise = True

    def __init__(self, channels: int, width: int = 256, depth: int = 1, class_channels: int = 0) -> None:
        super().__init__()
        self.class_map = nn.Parameter(torch.zeros(width, class_channels))
        self.time_embedding = TimeEmbedding(width)
        self.stem = PointwiseConv(channels, 2 * width)  # A and M, which read the same input
        self.inner = nn.ModuleList(PointwiseConv(width, width) for _ in range(depth - 1))
        self.time = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.outer = nn.ModuleList(PointwiseConv(width, width) for _ in range(depth))
        self.head = PointwiseConv(width, channels)

    def forward(self, x: Tensor, t: Tensor, class_embedding: Tensor | None = None) -> Tensor:
        """Return the velocity at points ``(N, C, H, W)`` and times ``(N,)`` or ``(1,)``.

        Args:
            x: The points.
            t: The times; a single one is for all points.
            class_embedding: ``(N, class_channels)``, or ``(1, class_channels)`` for all; None for 0.
        """
        embedding = self.time_embedding(t)
        h, z = self.stem(x).chunk(2, dim=1)
        biases = [time(embedding) for time in self.time]
        if class_embedding is not None:
            biases[0] = biases[0] + F.linear(class_embedding, self.class_map)
        for block, (bias, outer) in enumerate(zip(biases, self.outer, strict=True)):
            z = self.inner[block - 1](h) if block else z
            h = h + outer(F.silu(z + bias[:, :, None, None]))
        return self.head(F.silu(h))


class ResidualBlock(nn.Module):
    """``shortcut(h) + (conv3x3-BN-ReLU)^2(h + T emb(t))``, as the authors' blocks.

    Args:
        inputs: Input channels.
        outputs: Output channels.
        embedding: Channels of the time embedding.
    """

    def __init__(self, inputs: int, outputs: int, embedding: int) -> None:
        super().__init__()
        self.time = nn.Linear(embedding, inputs)
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
            nn.Conv2d(outputs, outputs, 3, padding=1),
            nn.BatchNorm2d(outputs),
            nn.ReLU(inplace=True),
        )
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv2d(inputs, outputs, 1)

    def forward(self, h: Tensor, embedding: Tensor) -> Tensor:
        """Transform ``(N, inputs, H, W)`` under the time embedding ``(N, embedding)``."""
        return self.shortcut(h) + self.body(h + self.time(embedding)[:, :, None, None])


class UNetField(nn.Module):
    """The authors' mini U-Net: widths b, 2b, 4b, two residual blocks a stage, skips.

    1x1 convolution in; two down stages, each followed by a max-pool; a middle block; two up stages (nearest
    up-sampling to the size of the skip, which is concatenated, so any feature size works); 1x1 convolution out. With
    C = 1024 and b = 768 it has about 763 M parameters, which is our count of the authors' network.

    Args:
        channels: Feature channels C.
        width: b, even.
        depth: Residual blocks in each down and up stage.
        class_channels: Channels of the class embedding, whose map is added to the time's and starts at 0 (ours).
    """

    min_size = 8
    pointwise = False

    def __init__(self, channels: int, width: int = 48, depth: int = 2, class_channels: int = 0) -> None:
        super().__init__()
        self.class_map = nn.Parameter(torch.zeros(width, class_channels))

        def stage(inputs: int, outputs: int) -> nn.ModuleList:
            widths = [inputs] + [outputs] * depth
            return nn.ModuleList(ResidualBlock(widths[i], widths[i + 1], width) for i in range(depth))

        self.time_embedding = TimeEmbedding(width)
        self.stem = nn.Conv2d(channels, width, 1)
        self.down = nn.ModuleList([stage(width, 2 * width), stage(2 * width, 4 * width)])
        self.middle = ResidualBlock(4 * width, 4 * width, width)
        self.up = nn.ModuleList([stage(8 * width, 2 * width), stage(4 * width, width)])
        self.head = nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor, t: Tensor, class_embedding: Tensor | None = None) -> Tensor:
        """Return the velocity at ``(N, C, H, W)``, H and W >= 8, and times ``(N,)`` or ``(1,)``."""
        embedding = self.time_embedding(t)
        if class_embedding is not None:
            embedding = embedding + F.linear(class_embedding, self.class_map)
        h = self.stem(x)
        skips = []
        for stage in self.down:
            for block in stage.children():
                h = block(h, embedding)
            skips.append(h)
            h = F.max_pool2d(h, 2)
        h = self.middle(h, embedding)
        for stage in self.up:
            skip = skips.pop()
            h = torch.cat([F.interpolate(h, size=skip.shape[-2:], mode="nearest"), skip], dim=1)
            for block in stage.children():
                h = block(h, embedding)
        return self.head(h)


class LayerwiseField(nn.Module):
    """``v(x, t) = (v_1(x_1, t), ..., v_L(x_L, t))``: a network for each layer (ours).

    The density is then a product over the layers, so no layer hides what is anomalous in another.

    Args:
        fields: Networks v_l.
        channels: Channels C_l of each layer.
    """

    def __init__(self, fields: Sequence[PointwiseField | UNetField], channels: Sequence[int]) -> None:
        super().__init__()
        self.fields = nn.ModuleList(fields)
        self.channels = list(channels)
        self.min_size = max(field.min_size for field in fields)
        self.pointwise = all(field.pointwise for field in fields)

    def forward(self, x: Tensor, t: Tensor, class_embedding: Tensor | None = None) -> Tensor:
        """Return the velocity at points ``(N, sum_l C_l, H, W)`` and times ``(N,)`` or ``(1,)``."""
        fields = zip(self.fields, x.split(self.channels, dim=1), strict=True)
        return torch.cat([field(layer, t, class_embedding) for field, layer in fields], dim=1)


Field = PointwiseField | UNetField | LayerwiseField
FIELDS: dict[str, Callable[..., PointwiseField | UNetField]] = {"pointwise": PointwiseField, "unet": UNetField}
WIDTHS = (64, 384)


def pointwise_width(channels: int) -> int:
    """``32 round(sqrt(C))``, from 64 to 384: layers of more channels have more to learn (ours)."""
    least, most = WIDTHS
    return min(most, max(least, 32 * round(math.sqrt(channels))))


def get_field(
    name: str,
    channels: Sequence[int],
    width: int | None = None,
    depth: int | None = None,
    class_channels: int = 0,
) -> Field:
    """Build a vector field by name, with a network for each layer of the features.

    Args:
        name: ``pointwise`` or ``unet``.
        channels: Channels of each layer.
        width: Width of each network, even; None for its own: :func:`pointwise_width`, or 48 for ``unet``.
        depth: Depth of each network; None for its own default.
        class_channels: Channels of the class embedding; 0 for none.

    Raises:
        WTFlowError: If the name is unknown.
    """
    build = lookup(FIELDS, "network", name)
    depths = {} if depth is None else {"depth": depth}
    networks = []
    for size in channels:
        chosen = pointwise_width(size) if width is None and name == "pointwise" else width
        widths = {} if chosen is None else {"width": chosen}
        networks.append(build(size, **depths, **widths, class_channels=class_channels))
    return networks[0] if len(networks) == 1 else LayerwiseField(networks, channels)
