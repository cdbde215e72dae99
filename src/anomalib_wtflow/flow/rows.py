"""What a module keeps for each product: rows of its buffers (ours).

A module names such buffers in ``per_product``; their first dimension is the number of products.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Reduce = Callable[[Tensor, str], Tensor]
"""Reduces a value over the processes of a distributed training, by ``sum`` or ``max``."""
CODE_CHANNELS = 32
"""Numbers of the code by which the field is told the product."""


def allocate(module: nn.Module, count: int) -> None:
    """Make room for ``count`` products in a module and those in it; new rows repeat the first until they are set."""
    for part in module.modules():
        for name in getattr(part, "per_product", ()):
            rows = part.get_buffer(name)
            if len(rows) != count:
                new = rows[:1].expand(max(0, count - len(rows)), *rows.shape[1:])
                part.register_buffer(name, torch.cat([rows[:count], new]).clone())


def own(rows: Tensor, product: Tensor | None) -> Tensor:
    """Return the row of each image's product, ``(N, ...)``; without products the only row, ``(1, ...)``.

    Raises:
        ValueError: If there are several rows and no products.
    """
    if product is not None:
        return rows[product]
    if len(rows) > 1:
        msg = f"The model has {len(rows)} products: say which each image shows, as WTFlowModel.recognition does."
        raise ValueError(msg)
    return rows


def codes(count: int) -> Tensor:
    """Return a fixed code for each product, ``(count, 32)``: 0 for the first, ``N(0, I)`` for others, by place alone.

    A model of one product is told nothing, and a product that comes later changes no other's code.
    """
    rows = [torch.randn(CODE_CHANNELS, generator=torch.Generator().manual_seed(place)) for place in range(1, count)]
    return torch.stack([torch.zeros(CODE_CHANNELS), *rows])
