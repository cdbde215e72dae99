"""Regression of a vector field on a path: one loss, one training loop, in plain torch."""

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn, optim

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.coupling import BATCH_COUPLINGS, COUPLINGS, Coupling
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.schedule import SCHEDULERS

CHECK_EVERY = 5
"""Epochs between two looks at the loss of the averaged weights."""
FIRST_CHECK = 20
"""First epoch after which the training may stop: an average over fewer steps is not settled."""
EVALUATED = 32
"""Data points whose loss is evaluated at a time."""
REFERENCE_ROWS = 96
"""Data points whose loss decides when the training stops."""


def matching_loss(prediction: Tensor, velocity: Tensor) -> Tensor:
    """``mean || v_theta(x_t, t) - u_t ||^2``: flow matching loss (arXiv 2508.05461v3)."""
    return nn.functional.mse_loss(prediction, velocity)


def regress(
    field: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    path: ProbabilityPath,
    coupling: Coupling,
    generator: Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``v_theta(x_t, t)`` and ``u_t`` with ``t ~ U(0, 1)``, coupled ``eps ~ N(0, I)``.

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


@dataclass(frozen=True)
class TrainingPlan:
    """How a field is trained: the :class:`anomalib_wtflow.settings.Settings` of these names."""

    max_epochs: int = 80
    batch_size: int = 32
    learning_rate: float = 3e-3
    weight_decay: float = 1e-2
    scheduler: str = "constant"
    averaging: float = 0.2
    plateau: float = 0.01
    seed: int = 0


class FieldTraining:
    """Draws, steps, and the running average of the weights.

    Args:
        field: Vector field, on the device to train on.
        x0: Normalised features, ``(M, C, H, W)``, or M tensors ``(C, H, W)``; on any device.
        path: Probability path.
        coupling: One of :data:`anomalib_wtflow.flow.coupling.COUPLINGS`.
        plan: Epochs, batches, optimiser, when to stop, seed.
        sampling: Draws the positions that a pointwise field sees in a step; None for all.
        class_embedding: Class embedding of each data point, ``(M, K)``; None for none.

    Raises:
        WTFlowError: If the coupling rearranges noise between the data points of a batch, and a batch has one.
    """

    def __init__(
        self,
        field: nn.Module,
        x0: Sequence[Tensor] | Tensor,
        path: ProbabilityPath,
        coupling: str,
        plan: TrainingPlan,
        sampling: Callable[[Tensor, Generator], Tensor] | None = None,
        class_embedding: Tensor | None = None,
    ) -> None:
        if coupling in BATCH_COUPLINGS and min(len(x0), plan.batch_size) == 1:
            msg = (
                f"coupling '{coupling}' rearranges noise between the images of a batch, and batches have 1 image: give "
                "more good images, raise batch_size, or choose worst_of_two, antipodal or independent."
            )
            raise WTFlowError(msg)
        self.field, self.x0, self.path, self.coupling, self.plan = field, x0, path, COUPLINGS[coupling], plan
        self.sampling, self.class_embedding = sampling, class_embedding
        self.device = next(field.parameters()).device
        # Reused: a new batch would be mapped anew by the C library in each step, which takes longer than to fill it.
        self.batch = x0[0].new_empty(max(plan.batch_size, EVALUATED), *x0[0].shape)
        self.order = Generator().manual_seed(plan.seed)
        noise_seed, self.reference_seed = torch.randint(2**62, (2,), generator=self.order).tolist()
        self.noise = Generator(self.device).manual_seed(noise_seed)
        self.averaged = copy.deepcopy(field) if plan.averaging else field
        # Fused, a step takes 15 % less on two cores.
        self.optimizer = optim.AdamW(field.parameters(), plan.learning_rate, weight_decay=plan.weight_decay, fused=True)
        steps = plan.max_epochs * math.ceil(len(x0) / plan.batch_size)
        self.schedule = optim.lr_scheduler.LambdaLR(self.optimizer, SCHEDULERS[plan.scheduler](steps))
        self.reference = torch.linspace(0, len(x0) - 1, min(len(x0), REFERENCE_ROWS)).long()
        self.steps = 0

    def loss(self, field: nn.Module, rows: Tensor, generator: Generator) -> Tensor:
        """Return the matching loss of a field on some data points, by their indices."""
        x0 = torch.stack([self.x0[k] for k in rows.tolist()], out=self.batch[: len(rows)]).to(self.device)
        velocity: Any = field
        if self.sampling is not None:
            x0 = self.sampling(x0, generator)
        if self.class_embedding is not None:
            velocity = partial(velocity, class_embedding=self.class_embedding[rows].to(self.device))
        return matching_loss(*regress(velocity, x0, self.path, self.coupling, generator))

    def epoch(self) -> float:
        """Take the steps of an epoch, and return their mean loss."""
        self.field.train()
        total = torch.zeros((), device=self.device)
        for rows in torch.randperm(len(self.x0), generator=self.order).split(self.plan.batch_size):
            loss = self.loss(self.field, rows, self.noise)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            self.schedule.step()
            self._average()
            total += loss.detach() * len(rows)
        return float(total) / len(self.x0)

    @torch.no_grad()
    def _average(self) -> None:
        """``m_n = m_{n-1} + (w_n - m_{n-1}) / (1 + averaging (n - 1))``: average the weights.

        It covers about the last ``averaging`` of the steps so far, so the end of the training need not be known.
        """
        if self.averaged is not self.field:
            share = 1 / (1 + self.plan.averaging * self.steps)
            for mean, value in zip(self.averaged.parameters(), self.field.parameters(), strict=True):
                mean.lerp_(value, share)
            for kept, current in zip(self.averaged.buffers(), self.field.buffers(), strict=True):
                kept.copy_(current)
        self.steps += 1

    @torch.no_grad()
    def reference_loss(self) -> float:
        """Return the averaged weights' loss on data, times and noise that are always the same."""
        self.averaged.eval()
        noise = Generator(self.device).manual_seed(self.reference_seed)
        parts = [self.loss(self.averaged, rows, noise) * len(rows) for rows in self.reference.split(EVALUATED)]
        return float(sum(parts)) / len(self.reference)


def has_settled(losses: dict[int, float], epoch: int, plateau: float) -> bool:
    """Return whether ``L(e) > (1 - plateau) L(e / 2)`` for the loss L at epoch e (ours)."""
    before = losses.get(epoch // 2)
    return epoch >= FIRST_CHECK and before is not None and losses[epoch] > (1 - plateau) * before


def fit_field(
    training: FieldTraining,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
    log: Callable[[int, float], None] = lambda *_: None,
) -> list[float]:
    """Minimise ``E || v_theta(x_t, t) - u_t ||^2``; the field gets the averaged weights.

    The loss is that of arXiv 2508.05461v3. The training stops early if the loss of the averaged weights fell by less
    than ``plateau`` in the last half of the epochs (ours).

    Args:
        training: The field and its data; the field is left in evaluation mode.
        progress: Wraps the iteration over epochs.
        log: Is given each epoch, from 0, and its training loss.

    Returns:
        The training loss of each epoch.

    Raises:
        WTFlowError: If the loss becomes NaN or infinite.
    """
    plan = training.plan
    losses: list[float] = []
    settled: dict[int, float] = {}
    for epoch in progress(range(1, plan.max_epochs + 1)):
        losses.append(training.epoch())
        log(epoch - 1, losses[-1])
        if not math.isfinite(losses[-1]):
            msg = f"The training loss became {losses[-1]} in epoch {epoch}: lower learning_rate ({plan.learning_rate})."
            raise WTFlowError(msg)
        if plan.plateau and epoch % CHECK_EVERY == 0:
            settled[epoch] = training.reference_loss()
            if has_settled(settled, epoch, plan.plateau):
                break
    training.field.load_state_dict(training.averaged.state_dict())
    training.field.eval()
    return losses
