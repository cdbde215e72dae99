"""Frozen, pre-trained backbones by timm name, with their pre-processing."""

from collections.abc import Sequence
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Format
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.features.folding import fold_batch_norms
from anomalib_wtflow.features.weights import packaged_weights, weights_of_file

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
CPU_CHUNK = 2
"""Images that pass the backbone at a time on a CPU."""


class DataConfig(NamedTuple):
    """A backbone's input: ``(x - mean) / std`` of RGB in [0, 1], at about ``image_size``.

    A ``fixed`` backbone, as most transformers are, accepts only the size for which it is built.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    fixed: bool


def get_data_config(backbone: str) -> DataConfig:
    """Read a backbone's own mean, deviation and input size from timm.

    The size is ``input_size / crop_pct``, to which timm resizes before it crops: it shows objects at the scale that the
    backbone was trained on without cutting the border off, where parts can be broken too. That of a fixed backbone is
    ``input_size``: a multiple of its patch, for which its positions need no resampling.

    Raises:
        WTFlowError: If timm has no such model.
    """
    if not timm.is_model(backbone):
        close = get_close_matches(backbone, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        msg = f"Unknown backbone '{backbone}': {hint}`timm.list_models()` lists the valid names."
        raise WTFlowError(msg)
    config: Any = timm.get_pretrained_cfg(backbone, allow_unregistered=False)
    fixed = config.fixed_input_size
    height, width = (side if fixed else int(side / config.crop_pct) for side in config.input_size[-2:])
    return DataConfig(tuple(config.mean), tuple(config.std), (height, width), fixed)


def get_image_size(backbone: str, image_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Return height and width of the images, from a side or both; None is the backbone's own.

    Raises:
        WTFlowError: If timm has no such model.
    """
    if image_size is None:
        return get_data_config(backbone).image_size
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


@cache
def all_layers(backbone: str) -> tuple[list[str], list[int]]:
    """Return the names of all feature layers of a timm model, finest first, and their strides."""
    with torch.device("meta"):  # no weights are drawn
        network: Any = timm.create_model(backbone, features_only=True, exportable=True)
    info = network.feature_info.info
    return [layer["module"] for layer in info], [layer["reduction"] for layer in info]


def default_layers(strides: Sequence[int]) -> list[int]:
    """Choose layers by the strides of all that there are.

    The last at each of the strides 4, 8 and 16, or the last of all if there are none. Where all are at one stride, as
    the blocks of a plain transformer, those after a quarter, a half and three quarters of them: they span the middle,
    which Dinomaly takes (blocks 2 to 9 of 12, arXiv 2405.14325), and three maps cost what a CNN's do.
    """
    if len(strides) > 3 and len(set(strides)) == 1:
        return [quarter * len(strides) // 4 - 1 for quarter in (1, 2, 3)]
    last = {stride: index for index, stride in enumerate(strides)}
    return sorted(last[stride] for stride in (4, 8, 16) if stride in last) or [len(strides) - 1]


def layer_indices(backbone: str, layers: Sequence[str] | None) -> list[int]:
    """Return the indices of layers in a backbone; None is :func:`default_layers`.

    Raises:
        WTFlowError: If a layer is unknown, or they are not in order.
    """
    names, strides = all_layers(backbone)
    if layers is None:
        return default_layers(strides)
    for layer in layers:
        if layer not in names:
            msg = f"Unknown layer '{layer}' of backbone '{backbone}': choose from {', '.join(names)}."
            raise WTFlowError(msg)
    indices = [names.index(layer) for layer in layers]
    if indices != sorted(set(indices)):
        msg = f"layers is {list(layers)}: name each layer once, the finest first ({', '.join(names)})."
        raise WTFlowError(msg)
    return indices


class FeatureExtractor(nn.Module):
    """Features of a frozen timm model: one or several layers, merged to a single scale.

    Any model of which timm gives feature maps; the tokens of a transformer become maps, and its prefix tokens (class,
    registers) are left out. Batch normalisations that follow a convolution are folded into it; other norms stay.

    ``(N, 3, H, W)`` -> ``(N, sum_l C_l, H', W')``. Each layer is averaged over ``pool_size x pool_size`` neighbours
    with stride ``pool_stride`` and resized bilinearly to the size of the coarsest, and the layers are stacked.

    Args:
        backbone: Name of a timm model.
        layers: Names of its feature layers, finest first; None for :func:`default_layers`.
        pre_trained: Whether to load weights; False leaves the backbone random (for tests and controls).
        weights: Local ``.safetensors`` or ``.pth`` file to take them from; None for the packaged ones
            (``tf_efficientnet_lite0``) or timm's hub (any other).
        pool_size: Side of the averaging window, odd; 1 for none.
        pool_stride: Stride of the averaging window.
        image_size: Side, or height and width, that a backbone of a fixed size is built for; None for its own. Others
            take images of any size.

    Raises:
        WTFlowError: If the backbone or a layer is unknown, the weights file does not fit, the hub gives no weights, or
            the size is not a multiple of a transformer's patch.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        pool_size: int = 1,
        pool_stride: int = 1,
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.image_size = self._built_size(image_size)
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        self.network = self._build(layer_indices(backbone, layers), pre_trained, weights)
        info = self.network.feature_info
        self.channels: list[int] = list(info.channels())
        self.stride = max(info.reduction())
        self.out_channels = sum(self.channels)
        self._drop_unused_blocks()
        self.eval()
        # On two cores, 256 px, one image: 20 ms as timm builds it, 14.6 folded, 12.0 with channels last too.
        self.network = fold_batch_norms(self.network, self.draw_image()).to(memory_format=torch.channels_last)
        self.network.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode: the backbone is frozen, its batch statistics too."""
        del mode
        return super().train(mode=False)

    def draw_image(self, seed: int = 0) -> Tensor:
        """Draw an image ``(1, 3, H, W)`` of a size that the backbone can take, uniform in [-1, 1]."""
        side = 2 * max(32, self.stride)
        size = self.image_size or (side, side)
        return torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1

    def _built_size(self, image_size: int | Sequence[int] | None) -> tuple[int, int] | None:
        """Return the size for which a fixed backbone is built; None for any other backbone."""
        own, size = get_data_config(self.backbone), get_image_size(self.backbone, image_size)
        if not own.fixed or size == own.image_size:
            return size if own.fixed else None
        step = max(all_layers(self.backbone)[1])
        above = [-(-side // step) * step for side in size]
        if above != list(size):
            below = [max(step, side // step * step) for side in size]
            nearest = [str(sides[0] if sides[0] == sides[1] else sides) for sides in (below, above)]
            msg = (
                f"image_size is {size[0]}x{size[1]}, and '{self.backbone}' takes sides that are multiples of {step}: "
                f"choose {' or '.join(dict.fromkeys(nearest))}."
            )
            raise WTFlowError(msg)
        return size

    def _build(self, indices: list[int], pre_trained: bool, weights: str | Path | None) -> Any:
        # Not timm's `dynamic_img_size`, which resamples the positions for each batch, in exported graphs too.
        fixed: dict[str, Any] = {} if self.image_size is None else {"img_size": self.image_size}
        options = {"features_only": True, "exportable": True, "out_indices": indices, **fixed}
        if pre_trained and weights is None and self.backbone.split(".")[0] != DEFAULT_BACKBONE:
            try:
                return timm.create_model(self.backbone, pretrained=True, **options)
            except Exception as error:
                msg = (
                    f"The weights of '{self.backbone}' could not be fetched from the hub ({type(error).__name__}): "
                    f"give a local file as weights=PATH, or take '{DEFAULT_BACKBONE}', which brings its own."
                )
                raise WTFlowError(msg) from error
        network = timm.create_model(self.backbone, **options)
        if pre_trained and weights is None:
            network.load_state_dict(packaged_weights(network))
        elif pre_trained and weights is not None:
            network.load_state_dict(weights_of_file(weights, network, self.backbone, **fixed))
        return network

    def _drop_unused_blocks(self) -> None:
        """Cut what timm runs behind the last layer and throws away."""
        blocks = getattr(self.network, "blocks", None)
        name, _, last = self.network.feature_info.module_name()[-1].rpartition(".")
        if isinstance(blocks, nn.Sequential) and name == "blocks" and last.isdecimal():
            self.network.blocks = blocks[: int(last) + 1]

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Extract features of pre-processed images ``(N, 3, H, W)``, as ``(N, C, H', W')``.

        Raises:
            WTFlowError: If the images are too small for the backbone.
        """
        if min(images.shape[-2:]) < self.stride:
            msg = (
                f"Images of {images.shape[-2]}x{images.shape[-1]} pixels are smaller than the stride {self.stride} "
                f"of the layers of '{self.backbone}': raise image_size, or choose finer layers."
            )
            raise WTFlowError(msg)
        return self.stack(self._maps(images.contiguous(memory_format=torch.channels_last)))

    def stack(self, maps: Sequence[Tensor]) -> Tensor:
        """Average, resize and stack the network's layers, finest first, each ``(N, C_l, H_l, W_l)``."""
        if self.pool_size > 1 or self.pool_stride > 1:
            maps = [F.avg_pool2d(m, self.pool_size, self.pool_stride, self.pool_size // 2) for m in maps]
        size = maps[-1].shape[-2:]
        finer = [F.interpolate(layer, size=size, mode="bilinear", align_corners=False) for layer in maps[:-1]]
        return torch.cat([*finer, maps[-1]], dim=1)

    def _maps(self, images: Tensor) -> list[Tensor]:
        if images.device.type != "cpu" or torch.compiler.is_compiling() or len(images) <= CPU_CHUNK:
            return self._run(images)
        # Larger activations than the C library keeps for reuse are mapped anew for every layer: on two cores,
        # 256 px, two images at a time took 16 ms an image and 32 at a time 47 ms.
        chunks = [self._run(chunk) for chunk in images.split(CPU_CHUNK)]
        return [torch.cat(layer) for layer in zip(*chunks, strict=True)]

    def _run(self, images: Tensor) -> list[Tensor]:
        maps = self.network(images)
        if getattr(self.network, "output_fmt", None) == Format.NHWC:  # Swin's
            return [layer.permute(0, 3, 1, 2) for layer in maps]
        return maps
