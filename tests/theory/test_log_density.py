"""Log-density along the flow against Gaussian and mixture densities in closed form."""

import pytest
import torch
from torch import Tensor

from anomalib_wtflow.flow.field import PointwiseField
from anomalib_wtflow.flow.path import PATHS, ProbabilityPath
from benchmarks.theory.adaptive import AdaptiveSolver
from benchmarks.theory.log_density import divergence, log_density
from benchmarks.theory.oracle import GaussianField

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


def test_divergence_is_the_trace_at_each_position() -> None:
    network = PointwiseField(2, 8, 2).double()
    x, t = double(3, 2, 1, 2), torch.tensor([0.1, 0.5, 0.9]).double()
    exact = divergence(network, x, t)[1]
    for n in range(3):
        jacobian = torch.autograd.functional.jacobian(lambda z, n=n: network(z[None], t[n : n + 1])[0], x[n])
        torch.testing.assert_close(exact[n, 0], torch.einsum("chwchw->hw", jacobian))
