"""Measurements on a flow against linear algebra and closed forms."""

import pytest
import torch

from anomalib_wtflow.diagnosis.measures import centripetal_component, local_lipschitz, radius, trajectory
from anomalib_wtflow.flow.field import PointwiseField, UNetField
from anomalib_wtflow.flow.path import ProbabilityPath
from benchmarks.theory.oracle import GaussianField

pytestmark = pytest.mark.method


def test_radius_and_centripetal_component() -> None:
    x = torch.randn(2, 5, 3, 3)
    torch.testing.assert_close(radius(x), x.norm(dim=1) / 5**0.5)
    sideways = torch.stack([-x[:, 1], x[:, 0], 0 * x[:, 2], -x[:, 4], x[:, 3]], dim=1)
    torch.testing.assert_close(centripetal_component(sideways - 1.5 * x, x), torch.full((2, 3, 3), -1.5))


def test_trajectory_is_the_exact_flow() -> None:
    root = torch.randn(2, 2, dtype=torch.float64)
    field = GaussianField(torch.ones(2).double(), root @ root.T, ProbabilityPath("gaussian", 0.3))
    x, times = torch.randn(6, 2, dtype=torch.float64), torch.linspace(0, 1, 21, dtype=torch.float64)
    expected = torch.stack([field.transport(x, times[:1].expand(6), t.expand(6)) for t in times])
    torch.testing.assert_close(trajectory(field, x, times), expected, rtol=1e-4, atol=1e-4)


def test_local_lipschitz_of_a_matrix() -> None:
    matrix = torch.randn(6, 6, dtype=torch.float64)
    x = torch.randn(3, 6, 1, 1, dtype=torch.float64)

    def field(z: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return t.view(-1, 1, 1, 1) * torch.einsum("cd,ndhw->nchw", matrix, z)

    times = torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    expected = times * torch.linalg.matrix_norm(matrix, ord=2)
    torch.testing.assert_close(local_lipschitz(field, x, times, 500), expected, rtol=1e-6, atol=0)
    assert (local_lipschitz(field, x, times, 3) <= expected).all()


@pytest.mark.parametrize("network", [PointwiseField(4, 16, 2), UNetField(4, 4, 1)])
def test_local_lipschitz_of_the_networks(network: torch.nn.Module) -> None:
    """Against the singular values of the whole Jacobian, to 1 % after 200 iterations."""
    network = network.double().eval()
    x, t = torch.randn(2, 4, 8, 8, dtype=torch.float64), torch.tensor([0.2, 0.7], dtype=torch.float64)
    actual = local_lipschitz(network, x, t, 200)
    for n in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda z, n=n: network(z[None], t[n : n + 1])[0], x[n])
        expected = torch.linalg.matrix_norm(jacobian.reshape(256, 256), ord=2)
        assert float(actual[n]) == pytest.approx(float(expected), rel=1e-2)
