"""Exact fields against sampled conditional means, automatic differentiation, the continuity equation and each other."""

import math

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from anomalib_wtflow.flow.coupling import COUPLINGS
from anomalib_wtflow.flow.field import PointwiseField
from anomalib_wtflow.flow.path import PATHS, ProbabilityPath
from anomalib_wtflow.flow.regression import FieldTraining, TrainingPlan, fit_field
from benchmarks.theory.adaptive import AdaptiveSolver
from benchmarks.theory.oracle import EmpiricalField, GaussianField

pytestmark = pytest.mark.method
LINEAR = ProbabilityPath("linear")


def data(count: int = 6, dim: int = 3) -> Tensor:
    return torch.randn(count, dim, dtype=torch.float64)


def on_paths(field: EmpiricalField, coupling: str, count: int, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Points on the field's conditional paths, their velocities and times, flat."""
    x0 = field.data[torch.randint(len(field.data), (count,))][:, :, None, None]
    noise = COUPLINGS[coupling](x0, torch.randn_like(x0))
    sample = field.path.sample(x0, noise, t)
    return sample.x_t.flatten(1), sample.velocity.flatten(1), t


@pytest.mark.parametrize("coupling", ["independent", "worst_of_two"])
@pytest.mark.parametrize("path", PATHS)
def test_is_the_conditional_mean_of_the_regression_target(path: str, coupling: str) -> None:
    """E[u phi(X_t)] = E[u_t(X_t) phi(X_t)] for test functions phi, within five standard errors of 200,000 draws."""
    field = EmpiricalField(data(dim=2), ProbabilityPath(path, 0.1), coupling)
    x, u, t = on_paths(field, coupling, 200_000, torch.rand(200_000, dtype=torch.float64) * 0.9 + 0.1)
    error = u - field(x, t)
    functions = [
        torch.ones(len(x)),
        x[:, 0],
        x[:, 1],
        (3 * x[:, 0]).sin(),
        (2 * x[:, 1] - x[:, 0]).cos(),
        (4 * t).sin(),
    ]
    for phi in functions:
        terms = error * phi[:, None]
        assert (terms.mean(0).abs() < 5 * terms.std(0) / len(x) ** 0.5).all()


@pytest.mark.parametrize("coupling", ["independent", "worst_of_two"])
@pytest.mark.parametrize("path", PATHS)
def test_continuity_equation(path: str, coupling: str) -> None:
    """d/dt log p + div u + <u, grad log p> = 0 at points of the paths, to 1e-8."""
    field = EmpiricalField(data(), ProbabilityPath(path, 0.1), coupling)
    x, _, t = on_paths(field, coupling, 50, torch.linspace(0.1, 0.95, 50, dtype=torch.float64))
    x.requires_grad_()
    t.requires_grad_()
    grad, rate = torch.autograd.grad(field.log_density(x, t).sum(), (x, t))
    divergence = field.jacobian(x, t).diagonal(dim1=1, dim2=2).sum(1)
    residual = rate + divergence + (field(x, t) * grad).sum(1)
    torch.testing.assert_close(residual, torch.zeros_like(residual), rtol=0, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_jacobian_against_automatic_differentiation(path: str) -> None:
    field = EmpiricalField(data(), ProbabilityPath(path, 0.1))
    x, t = data(4), torch.tensor([0.1, 0.4, 0.7, 0.9], dtype=torch.float64)
    for n in range(4):
        expected = torch.autograd.functional.jacobian(lambda z, n=n: field(z[None], t[n : n + 1])[0], x[n])
        torch.testing.assert_close(field.jacobian(x, t)[n], expected)


def test_stable_where_exponentials_underflow() -> None:
    """At t = 1e-4 beside a data point all weights but one underflow: u = (x - (1 - t) x0) / t - x0."""
    points = 10 * data()
    t = torch.full((6,), 1e-4, dtype=torch.float64)
    noise = torch.randn_like(points)
    x = (1 - 1e-4) * points + 1e-4 * noise
    torch.testing.assert_close(EmpiricalField(points, LINEAR)(x, t), noise - points, rtol=1e-8, atol=1e-8)
    assert EmpiricalField(points, LINEAR).log_density(1e3 * x, t).isfinite().all()


def test_exact_flow_carries_the_data_to_the_gaussian() -> None:
    """From t = 0.01 to 1 with dopri5: moments within five standard errors, sliced Wasserstein-1 below 0.04.

    4000 draws from N(0, I) themselves have a distance of about 0.013 along each direction.
    """
    field = EmpiricalField(data(16, 2), LINEAR)
    x, _, _ = on_paths(field, "independent", 4000, torch.full((4000,), 0.01, dtype=torch.float64))
    y = AdaptiveSolver("dopri5", 1e-5, 1e-6).integrate(field, x, 0.01, 1.0)
    assert (y.mean(0).abs() < 5 / 4000**0.5).all()
    assert ((y.T @ y / 4000 - torch.eye(2)).abs() < 5 * 2**0.5 / 4000**0.5).all()
    quantiles = torch.from_numpy(norm.ppf((torch.arange(4000) + 0.5).numpy() / 4000))
    angles = torch.arange(8) * torch.pi / 8
    projections = y @ torch.stack([angles.cos(), angles.sin()]).double()
    assert (projections.sort(0).values - quantiles[:, None]).abs().mean(0).max() < 0.04


@pytest.mark.slow
def test_a_trained_network_approaches_the_field() -> None:
    """A small network on 8 points of the plane, 2000 steps: relative RMS error below 10 % at points of the paths."""
    angle = torch.arange(8) * math.pi / 4
    points = 2**0.5 * torch.stack([angle.cos(), angle.sin()], 1)
    path = ProbabilityPath("gaussian", 0.3)
    network = PointwiseField(2, 64, 2)
    untrained = relative_error(network, EmpiricalField(points, path))
    plan = TrainingPlan(125, 512, learning_rate=3e-3, scheduler="cosine", averaging=0, plateau=0)
    fit_field(FieldTraining(network, points[:, :, None, None].repeat(1024, 1, 1, 1), path, "independent", plan))
    assert untrained > 0.9
    assert relative_error(network, EmpiricalField(points, path)) < 0.10


def relative_error(network: PointwiseField, field: EmpiricalField) -> float:
    x, _, t = on_paths(field, "independent", 4000, torch.rand(4000))
    exact = field(x, t)
    with torch.no_grad():
        error = network(x[:, :, None, None], t).flatten(1) - exact
    return float(error.norm() / exact.norm())


# Gaussian data -------------------------------------------------------------------------------------------------------


def gaussian(path: str) -> tuple[GaussianField, Tensor, Tensor]:
    mean, root = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64), data(3)
    return GaussianField(mean, root @ root.T, ProbabilityPath(path, 0.1)), mean, root @ root.T


@pytest.mark.parametrize("path", PATHS)
def test_gaussian_transport_against_a_solver(path: str) -> None:
    field, mean, covariance = gaussian(path)
    x = mean + data(50) @ torch.linalg.cholesky(covariance).T
    start, end = torch.full((50,), 0.1, dtype=torch.float64), torch.ones(50, dtype=torch.float64)
    expected = AdaptiveSolver("dopri8", 1e-9, 1e-9).integrate(field, x, 0.1, 1.0)
    torch.testing.assert_close(field.transport(x, start, end), expected, rtol=1e-6, atol=1e-6)


# Errors --------------------------------------------------------------------------------------------------------------


def test_no_noise_no_field() -> None:
    with pytest.raises(ValueError, match=r"not defined at t = 0, where its noise level is 0: ask for t > 0"):
        EmpiricalField(data(), LINEAR)(torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1))
