"""Batch normalisations of a frozen network folded into the convolutions before them (ours)."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


@torch.no_grad()
def fold_batch_norms(network: nn.Module, images: Tensor) -> nn.Module:
    """Fold ``bn(conv(x))`` into ``conv(x)`` where a batch norm directly follows.

    What follows the normalisation inside timm's modules, its activation, stays. Which goes with which is seen by
    running the network, so that it works for any architecture.

    Args:
        network: A network in evaluation mode, which returns a list of tensors.
        images: Images ``(N, 3, H, W)`` to run it on.

    Returns:
        The folded copy; the network itself where nothing can be folded, or where the copy gives something else.
    """
    if not any(isinstance(module, nn.BatchNorm2d) for module in network.modules()):
        return network
    shared = {id(tensor): tensor for tensor in (*network.parameters(), *network.buffers())}
    folded = copy.deepcopy(network, shared)  # the copy's tensors are replaced, not changed
    expected, pairs = _observe(folded, images)
    for norm, conv in pairs.items():
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
        )
        rest = [part for part in (getattr(norm, "drop", None), getattr(norm, "act", None)) if part is not None]
        _replace(folded, norm, nn.Sequential(*rest))
    given = folded(images)
    same = [torch.allclose(a, b, 1e-3, 1e-3 * float(a.abs().max())) for a, b in zip(expected, given, strict=True)]
    return folded if all(same) else network


def _observe(network: nn.Module, images: Tensor) -> tuple[Sequence[Tensor], dict[Any, Any]]:
    """Return a network's output, and each batch norm that follows a convolution, with it."""
    outputs: dict[int, tuple[nn.Conv2d, Tensor]] = {}
    pairs: dict[Any, Any] = {}

    def gave(module: nn.Conv2d, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        del inputs
        outputs[id(output)] = module, output  # held, so that no other tensor gets its id

    def reads(module: nn.BatchNorm2d, inputs: tuple[Tensor, ...]) -> None:
        if id(inputs[0]) in outputs:
            pairs[module] = outputs[id(inputs[0])][0]

    hooks = []
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            hooks.append(module.register_forward_hook(gave))
        elif isinstance(module, nn.BatchNorm2d) and module.track_running_stats and module.affine:
            hooks.append(module.register_forward_pre_hook(reads))
    maps = network(images)
    for hook in hooks:
        hook.remove()
    return maps, pairs


def _replace(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    for module in network.modules():
        for name, child in module.named_children():
            if child is old:
                setattr(module, name, new)
