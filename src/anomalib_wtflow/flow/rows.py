"""What a module keeps for each product: rows of its buffers (ours).

A module names such buffers in ``per_product``; their first dimension is the number of products, at least 1.
"""

import torch
from torch import Tensor, nn

EMBEDDING_CHANNELS = 32


def allocate(module: nn.Module, count: int) -> None:
    """Make room for ``count`` products in a module; new rows repeat the first."""
    for part in module.modules():
        for name in getattr(part, "per_product", ()):
            rows = part.get_buffer(name)
            if len(rows) != count:
                new = rows[:1].expand(max(0, count - len(rows)), *rows.shape[1:])
                part.register_buffer(name, torch.cat([rows[:count], new]).clone())


def class_embeddings(count: int) -> Tensor:
    """Return class embeddings ``(count, 32)``: 0 for the first product, fixed ``N(0, I)`` draws.

    An embedding depends on the product's index alone, so a product that is added changes no other's.
    """
    rows = [torch.randn(EMBEDDING_CHANNELS, generator=torch.Generator().manual_seed(k)) for k in range(1, count)]
    return torch.stack([torch.zeros(EMBEDDING_CHANNELS), *rows])
