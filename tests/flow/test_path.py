"""Probability paths against their definitions, and their derivatives against automatic differentiation."""

import math

import pytest
import torch

from anomalib_wtflow.flow.path import PATHS, ProbabilityPath

pytestmark = pytest.mark.method
TIMES = torch.linspace(0, 1, 11, dtype=torch.float64)


@pytest.mark.parametrize("name", PATHS)
@pytest.mark.parametrize("s_min", [0.0, 0.01, 0.3])
def test_derivatives(name: str, s_min: float) -> None:
    path = ProbabilityPath(name, s_min)
    for index in (0, 1):
        expected = torch.autograd.functional.jvp(
            lambda t, i=index: path.coefficients(t)[i], TIMES, torch.ones(11).double()
        )
        torch.testing.assert_close(path.coefficients(TIMES)[index + 2], expected[1])


@pytest.mark.parametrize(
    ("name", "start", "end"),
    [
        ("linear", (1, 0), (0, 1)),
        ("gaussian", (1, 0.1), (0, 1)),
        ("variance_preserving", (math.sqrt(0.99), 0.1), (0, 1)),
    ],
)
def test_end_points(name: str, start: tuple[float, float], end: tuple[float, float]) -> None:
    a, s, _, _ = ProbabilityPath(name, 0.1).coefficients(TIMES)
    assert (a[0].item(), s[0].item()) == pytest.approx(start)
    assert (a[-1].item(), s[-1].item()) == pytest.approx(end, abs=1e-12)


def test_variance_is_preserved() -> None:
    a, s, _, _ = ProbabilityPath("variance_preserving", 0.1).coefficients(TIMES)
    torch.testing.assert_close(a**2 + s**2, torch.ones_like(a))


def test_linear_sample() -> None:
    x0, noise, t = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5), torch.tensor([0.0, 0.25, 1.0])
    sample = ProbabilityPath("linear").sample(x0, noise, t)
    torch.testing.assert_close(sample.velocity, noise - x0)
    torch.testing.assert_close(sample.x_t[0], x0[0])
    torch.testing.assert_close(sample.x_t[1], 0.75 * x0[1] + 0.25 * noise[1])
    torch.testing.assert_close(sample.x_t[2], noise[2])
    assert sample.t is t


@pytest.mark.parametrize("name", PATHS)
def test_velocity_in_terms_of_the_point(name: str) -> None:
    """The second form in method.md: u_t = (s' / s)(x_t - a x0) + a' x0."""
    x0, noise, t = (z.double() for z in (torch.randn(4, 3, 2, 2), torch.randn(4, 3, 2, 2), torch.rand(4) * 0.9 + 0.1))
    path = ProbabilityPath(name, 0.05)
    sample = path.sample(x0, noise, t)
    a, s, da, ds = (c.view(-1, 1, 1, 1) for c in path.coefficients(t))
    torch.testing.assert_close(sample.velocity, ds / s * (sample.x_t - a * x0) + da * x0)


def test_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(
        ValueError, match=r"Unknown path 'linaer': did you mean 'linear'\? choose one of linear, gaussian"
    ):
        ProbabilityPath("linaer")
