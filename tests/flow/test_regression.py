"""What a training step draws: positions, times and noise."""

import torch
from scipy import stats
from torch import Tensor

from anomalib_wtflow.flow.coupling import independent
from anomalib_wtflow.flow.field import get_field
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import FieldTraining, TrainingPlan, fit_field, regress
from anomalib_wtflow.flow.sampling import LEAST, PositionSampling

PATH = ProbabilityPath("linear")


class Recorder(torch.nn.Module):
    """A field that keeps what it is asked."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(()))
        self.asked: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.asked.append((x, t))
        return self.scale * x


def test_times_and_noise() -> None:
    field = Recorder()
    _, velocity = regress(field, torch.zeros(4000, 1, 1, 1), PATH, independent)
    ((x_t, times),) = field.asked
    assert stats.kstest(times.double().numpy(), "uniform").pvalue > 1e-3
    assert stats.kstest(velocity.flatten().double().numpy(), "norm").pvalue > 1e-3
    torch.testing.assert_close(x_t.flatten(), times * velocity.flatten())
    assert abs(stats.spearmanr(times.numpy(), velocity.flatten().numpy()).statistic) < 5 / 4000**0.5


def test_a_generator_draws_all() -> None:
    """Equal seeds give equal steps; torch's own generator is neither read nor moved."""
    x0 = torch.randn(4, 3, 6, 6)

    def step(seed: int, elsewhere: int) -> list[Tensor]:
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        generator = torch.Generator().manual_seed(seed)
        shown = PositionSampling([3])(x0, generator)
        field = Recorder()
        drawn = [shown, *regress(field, shown, PATH, independent, generator), field.asked[0][1]]
        assert torch.get_rng_state().equal(before)
        return drawn

    first, again, other = step(1, 1), step(1, 2), step(2, 1)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_a_field_is_fitted_to_what_is_sampled() -> None:
    """At the positions that are drawn, or at whole maps."""
    x0, plan = torch.randn(5, 2, 6, 6), TrainingPlan(max_epochs=3, batch_size=4, averaging=0.0, plateau=0.0)
    whole, drawn = Recorder(), Recorder()
    fit_field(FieldTraining(whole, x0, PATH, "independent", plan))
    assert [x.shape for x, _ in whole.asked] == [(4, 2, 6, 6), (1, 2, 6, 6)] * 3
    fit_field(FieldTraining(drawn, x0, PATH, "independent", plan, PositionSampling([2])))
    assert [x.shape for x, _ in drawn.asked] == [(4, 2, LEAST, 1), (1, 2, LEAST, 1)] * 3
    assert not whole.training
    assert not drawn.training


def test_precision_is_that_of_the_data() -> None:
    field = get_field("pointwise", [3], width=8).double()
    prediction, velocity = regress(field, torch.randn(2, 3, 4, 4, dtype=torch.float64), PATH, independent)
    assert prediction.dtype == velocity.dtype == torch.float64
