"""Batch normalisations of a frozen network folded into the convolutions before them (ours)."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


@torch.no_grad()
def fold_batch_norms(network: nn.Module, images: Tensor) -> nn.Module:
    """Fold ``bn(conv(x))`` into ``conv(x)`` wherever a batch normalisation reads what a convolution has just given.

    What follows the normalisation inside timm's modules, its activation, stays. Which goes with which is seen by
    running the network, so that it works for any architecture; a transformer has none.

    Args:
        network: A network in evaluation mode, which returns a list of tensors; left as it is.
        images: Images ``(N, 3, H, W)`` to run it on.

    Returns:
        The folded copy; the network itself where nothing can be folded, or where the copy gives something else.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    folded = copy.deepcopy(network)
    for norm, conv in _pairs(folded, images):
        fused: Any = fuse_conv_bn_eval(conv, norm)
        conv.weight, conv.bias = fused.weight, fused.bias
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        _replace(folded, norm, nn.Sequential(*rest))
    expected, given = network(images), folded(images)
    same = all(torch.allclose(a, b, rtol=1e-3, atol=1e-3 * a.abs().max()) for a, b in zip(expected, given, strict=True))
    return folded if same else network


def _pairs(network: nn.Module, images: Tensor) -> list[tuple[Any, nn.Conv2d]]:
    """Return the batch normalisations that read a convolution's output, and those convolutions."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[nn.Module, nn.Conv2d] = {}

    def gave(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del inputs
        if isinstance(module, nn.Conv2d):
            outputs[id(output)] = module, output  # held, so that no other tensor gets its id

    def reads(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in outputs:
            pairs[module] = outputs[id(inputs[0])][0]

    hooks = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(gave))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats and module.affine:
            hooks.append(module.register_forward_pre_hook(reads))
    network(images)
    for hook in hooks:
        hook.remove()
    return list(pairs.items())


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in network.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)
