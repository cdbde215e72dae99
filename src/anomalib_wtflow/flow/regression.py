"""Regression of a vector field on a probability path, in plain torch."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn, optim

from anomalib_wtflow.flow.coupling import Coupling
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.schedule import cosine


def matching_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """``mean || v_theta(x_t, t) - u_t ||^2`` per element: conditional flow matching (arXiv 2508.05461v3)."""
    return nn.functional.mse_loss(prediction, velocity)


def regress(
    field: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    path: ProbabilityPath,
    coupling: Coupling,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``v_theta(x_t, t)`` and ``u_t``, which the loss compares: ``t ~ U(0, 1)``, ``eps ~ N(0, I)`` coupled.

    Source: arXiv 2508.05461v3.

    Args:
        field: ``v_theta(x, t)``.
        x0: Normalised features, ``(N, C, H, W)``.
        path: Probability path.
        coupling: Which noise goes with which data.
        generator: Draws the times and the noise, on the device of ``x0``; None for torch's own.

    Returns:
        The field's prediction and the velocity that it should match, each ``(N, C, H, W)``.
    """
    noise = torch.randn(x0.shape, dtype=x0.dtype, device=x0.device, generator=generator)
    times = torch.rand(len(x0), device=x0.device, generator=generator)
    sample = path.sample(x0, coupling(x0, noise), times)
    return field(sample.x_t, sample.t), sample.velocity


def fit_field(
    field: nn.Module,
    x0: Tensor,
    path: ProbabilityPath,
    coupling: Coupling,
    steps: int,
    batch_size: int = 32,
    learning_rate: float = 1e-3,
    weight_decay: float = 1e-2,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    sampling: Callable[[Tensor], Tensor] | None = None,
    condition: Tensor | None = None,
) -> nn.Module:
    """Minimise ``E || v_theta(x_t, t) - u_t ||^2`` over features in memory; AdamW under a cosine schedule.

    For controls and small experiments, without the engine.

    Args:
        field: Vector field; trained in place, and left in evaluation mode.
        x0: Normalised features, ``(M, C, H, W)``; batches are drawn from them with replacement.
        path: Probability path.
        coupling: Which noise goes with which data.
        steps: Training steps.
        batch_size: Samples a step.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay.
        progress: Shows how far the steps are.
        sampling: Draws the positions that a pointwise field sees in a step; None for all.
        condition: What the field is told of each sample, ``(M, K)``; None for nothing.

    Returns:
        The field.
    """
    optimizer = optim.AdamW(field.parameters(), lr=learning_rate, weight_decay=weight_decay)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, cosine(steps))
    field.train()
    for _ in progress(range(steps)):
        drawn = torch.randint(len(x0), (batch_size,), device=x0.device)
        batch = x0[drawn]
        optimizer.zero_grad()
        velocity: Any
        velocity, shown = (field, batch) if sampling is None else (field.points, sampling(batch))
        if condition is not None:
            velocity = partial(velocity, condition=condition[drawn])
        matching_loss(*regress(velocity, shown, path, coupling)).backward()
        optimizer.step()
        scheduler.step()
    return field.eval()
