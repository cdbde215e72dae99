"""Regression of a vector field on a probability path, in plain torch."""

from rich.progress import track
from torch import Tensor, nn, optim, randint, randn_like

from anomalib_wtflow.flow.coupling import Coupling
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.schedule import cosine
from anomalib_wtflow.flow.times import TimeSampling, uniform
from anomalib_wtflow.loss import WTFlowLoss


def thin(x: Tensor, stride: int) -> Tensor:
    """Keep every ``stride``-th position of ``(N, C, H, W)`` in each direction, from an offset drawn at random (ours).

    A pointwise field learns the same from neighbouring positions, which are much alike: with stride 2 a training step
    costs a quarter. Maps of fewer than ``stride`` positions a side stay whole.
    """
    if stride == 1 or min(x.shape[-2:]) < stride:
        return x
    top, left = randint(stride, (2,)).tolist()
    return x[..., top::stride, left::stride]


def regress(
    field: nn.Module, x0: Tensor, path: ProbabilityPath, coupling: Coupling, times: TimeSampling
) -> tuple[Tensor, Tensor]:
    """Return ``v_theta(x_t, t)`` and ``u_t``, which the loss compares, at times drawn, ``eps ~ N(0, I)`` coupled.

    Source: arXiv 2508.05461v3.

    Args:
        field: ``v_theta(x, t)``.
        x0: Normalised features, ``(N, C, H, W)``.
        path: Probability path.
        coupling: Which noise goes with which data.
        times: Draws the times.

    Returns:
        The field's prediction and the velocity that it should match, each ``(N, C, H, W)``.
    """
    sample = path.sample(x0, coupling(x0, randn_like(x0)), times(len(x0)).to(x0.device))
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
    thinning: int = 1,
    times: TimeSampling | None = None,
    description: str | None = None,
) -> nn.Module:
    """Minimise ``E || v_theta(x_t, t) - u_t ||^2`` over features in memory; AdamW under a cosine schedule.

    What :class:`anomalib_wtflow.WTFlow` does by default, without the engine: for controls and small experiments.

    Args:
        field: Vector field; trained in place, and left in evaluation mode.
        x0: Normalised features, ``(M, C, H, W)``; batches are drawn from them with replacement.
        path: Probability path.
        coupling: Which noise goes with which data.
        steps: Training steps.
        batch_size: Samples a step.
        learning_rate: Peak learning rate.
        weight_decay: Weight decay.
        thinning: Stride of the positions of each map that a step takes, see :func:`thin`.
        times: Draws the times; None for uniform.
        description: Title of the progress bar; None for no bar.

    Returns:
        The field.
    """
    optimizer = optim.AdamW(field.parameters(), lr=learning_rate, weight_decay=weight_decay)
    scheduler = optim.lr_scheduler.LambdaLR(optimizer, cosine(steps))
    loss, times = WTFlowLoss(), times or uniform
    field.train()
    for _ in track(range(steps), description=description or "", transient=True, disable=description is None):
        batch = x0[randint(len(x0), (batch_size,), device=x0.device)]
        optimizer.zero_grad()
        loss(*regress(field, thin(batch, thinning), path, coupling, times)).backward()
        optimizer.step()
        scheduler.step()
    return field.eval()
