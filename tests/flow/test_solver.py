"""Solvers against torchdiffeq's, and against a closed form."""

import math

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.solver import Solver

pytestmark = pytest.mark.method


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * t).view(-1, 1) * x + torch.cos(x)


@pytest.mark.parametrize(("name", "oracle"), [("euler", "euler"), ("midpoint", "midpoint")])
@pytest.mark.parametrize("steps", [1, 4])
def test_against_torchdiffeq(name: str, oracle: str, steps: int) -> None:
    x, start, end = torch.randn(5, 3, dtype=torch.float64), 0.2, 0.9
    expected = odeint(
        lambda t, z: field(z, t.expand(5)), x, torch.tensor([start, end]).double(), method=oracle,
        options={"step_size": (end - start) / steps},
    )[-1]  # fmt: skip
    torch.testing.assert_close(Solver(name, steps).integrate(field, x, start, end), expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("midpoint", 2), ("rk4", 4)])
def test_order(name: str, order: int) -> None:
    """x' = -x from 1 gives exp(-1); halving the step divides the error by 2^order."""
    x = torch.ones(1, 1, dtype=torch.float64)
    errors = [abs(Solver(name, k).integrate(lambda z, _: -z, x).item() - math.exp(-1)) for k in (16, 32)]
    assert math.log2(errors[0] / errors[1]) == pytest.approx(order, abs=0.1)


def test_one_euler_step_is_one_step_inference() -> None:
    x = torch.randn(4, 2, 3, 3)
    seen = []
    y = Solver().integrate(lambda z, t: seen.append(t) or 2 * z, x)
    torch.testing.assert_close(y, x + 2 * x)
    assert [t.tolist() for t in seen] == [[0.0]]  # one time for all samples


def test_there_and_back() -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    solver = Solver("rk4", 50)
    there = solver.integrate(field, x, 0, 1)
    torch.testing.assert_close(solver.integrate(field, there, 1, 0), x, rtol=1e-6, atol=1e-6)


def test_bad_arguments() -> None:
    with pytest.raises(WTFlowError, match=r"Unknown solver 'heun': .*choose one of euler, midpoint, rk4"):
        Solver("heun")
