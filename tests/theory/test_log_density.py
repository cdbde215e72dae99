"""Log-density along the flow against Gaussian and mixture densities in closed form."""

from itertools import product

import pytest
import torch
from torch import Tensor

from anomalib_wtflow.flow.field import PointwiseField
from anomalib_wtflow.flow.path import PATHS, ProbabilityPath
from anomalib_wtflow.flow.solver import AdaptiveSolver, Solver
from benchmarks.theory.log_density import divergence, log_density
from benchmarks.theory.oracle import EmpiricalField, GaussianField

pytestmark = pytest.mark.method
FINE = AdaptiveSolver("dopri5", 1e-8, 1e-8)


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("path", PATHS)
def test_gaussian_data(path: str) -> None:
    """dopri5 at 1e-8 gives N(m, S)'s log-density to 1e-6."""
    root = double(3, 3)
    field = GaussianField(double(3), root @ root.T, ProbabilityPath(path, 0.1))
    x = double(10, 3)
    start = torch.full((10,), 0.1, dtype=torch.float64)
    actual = log_density(field, x, start=0.1, solver=FINE)
    assert actual.shape == (10, 1)
    torch.testing.assert_close(actual[:, 0], field.log_density(x, start), rtol=1e-6, atol=1e-6)


def test_finite_data() -> None:
    """A mixture of five Gaussians of width 0.2: the flow's log-density is the mixture's, to 1e-5."""
    field = EmpiricalField(double(5, 2), ProbabilityPath("gaussian", 0.2))
    x = field.data + 0.2 * double(5, 2)
    torch.testing.assert_close(
        log_density(field, x, solver=FINE)[:, 0], field.log_density(x, torch.zeros(5).double()), rtol=0, atol=1e-5
    )


def test_fixed_steps_converge_to_it() -> None:
    root = double(2, 2)
    field = GaussianField(double(2), root @ root.T, ProbabilityPath("gaussian", 0.5))
    x = double(4, 2)
    exact = field.log_density(x, torch.zeros(4).double())
    errors = [(log_density(field, x, solver=Solver("rk4", k))[:, 0] - exact).abs().max() for k in (8, 16)]
    assert 12 < errors[0] / errors[1] < 20  # order 4: 16


def test_hutchinson_over_all_signs_is_exact() -> None:
    """The mean of z^T J z over all 2^D sign vectors z is the trace, at each position of a map."""
    network = PointwiseField(2, 8, 2).double()
    x, t = double(3, 2, 1, 2), torch.tensor([0.1, 0.5, 0.9]).double()
    signs = torch.tensor(list(product([-1.0, 1.0], repeat=4)), dtype=torch.float64).view(16, 1, 2, 1, 2)
    velocity, exact = divergence(network, x, t)
    torch.testing.assert_close(divergence(network, x, t, signs.expand(16, 3, 2, 1, 2)), (velocity, exact))
    for n in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z, n=n: network(z[None], t[n : n + 1])[0], x[n])
        expected = torch.einsum("chwchw->hw", jacobian)
        torch.testing.assert_close(exact[n, 0], expected)


def test_hutchinson_is_unbiased() -> None:
    """A linear field's probes differ by the off-diagonal terms only: 400 of them agree within five standard errors."""
    root = double(4, 4)
    field = GaussianField(double(4), root @ root.T, ProbabilityPath("linear"))
    x = double(1, 4)
    exact = log_density(field, x, start=0.2, solver=Solver("rk4", 20)).item()
    drawn = torch.tensor(
        [log_density(field, x, start=0.2, method="hutchinson", solver=Solver("rk4", 20)).item() for _ in range(400)]
    )
    assert drawn.std() > 0
    assert abs(float(drawn.mean()) - exact) < 5 * float(drawn.std()) / 20


def test_positions_of_a_pointwise_field() -> None:
    """A map's value at a position is the log-density of that position as a sample of its own."""
    network = PointwiseField(3, 8, 2).double()
    x = double(2, 3, 2, 2)
    solver = Solver("rk4", 4)
    positions = x.permute(0, 2, 3, 1).reshape(-1, 3, 1, 1)
    alone = log_density(network, positions, solver=solver).view(2, 2, 2)
    torch.testing.assert_close(log_density(network, x, solver=solver)[:, 0], alone)


def test_errors() -> None:
    with pytest.raises(ValueError, match="Unknown divergence 'trace': choose one of exact, hutchinson"):
        log_density(lambda x, _: -x, torch.zeros(1, 2), method="trace")
    with pytest.raises(ValueError, match="probes is 0"):
        log_density(lambda x, _: -x, torch.zeros(1, 2), probes=0)
