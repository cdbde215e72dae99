"""Solvers against torchdiffeq's, and against a closed form."""

import math

import pytest
import torch
from torch import Tensor
from torchdiffeq import odeint
from torchdiffeq._impl.odeint import SOLVERS as TORCHDIFFEQ

from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.solver import ADAPTIVE_SOLVERS, SOLVER_NAMES, SOLVERS, AdaptiveSolver, Solver, get_solver
from benchmarks.theory.oracle import GaussianField

pytestmark = pytest.mark.method


def field(x: Tensor, t: Tensor) -> Tensor:
    return torch.sin(3 * t).view(-1, 1) * x + torch.cos(x)


def test_names() -> None:
    assert tuple(SOLVER_NAMES) == (*SOLVERS, *ADAPTIVE_SOLVERS)
    assert set(ADAPTIVE_SOLVERS) <= set(TORCHDIFFEQ)


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


@pytest.mark.parametrize("name", ADAPTIVE_SOLVERS)
def test_adaptive_against_the_exact_flow(name: str) -> None:
    """The flow of Gaussian data from t = 0.1: the error falls with the tolerance and stays below 100 times it."""
    root = torch.randn(3, 3, dtype=torch.float64)
    exact = GaussianField(torch.ones(3).double(), root @ root.T, ProbabilityPath("linear"))
    x = torch.randn(20, 3, dtype=torch.float64)
    start, end = torch.full((20,), 0.1, dtype=torch.float64), torch.ones(20, dtype=torch.float64)
    errors = [
        (AdaptiveSolver(name, tol, tol).integrate(exact, x, 0.1, 1.0) - exact.transport(x, start, end)).abs().max()
        for tol in (1e-4, 1e-6)
    ]
    assert errors[0] < 1e-2
    assert errors[1] < 1e-4
    assert errors[1] < errors[0] / 3


@pytest.mark.parametrize("name", ADAPTIVE_SOLVERS)
def test_adaptive_there_and_back(name: str) -> None:
    x = torch.randn(3, 2, dtype=torch.float64)
    solver = AdaptiveSolver(name, 1e-7, 1e-7)
    there = solver.integrate(field, x, 0, 1)
    torch.testing.assert_close(solver.integrate(field, there, 1, 0), x, rtol=0, atol=1e-5)


def test_adaptive_refuses_a_traced_export() -> None:
    class Flow(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return AdaptiveSolver("dopri5").integrate(lambda z, _: -z, x)

    with pytest.raises(WTFlowError, match="Solver 'dopri5' chooses its steps from the data and does not export: give"):
        torch.export.export(Flow(), (torch.ones(2, 1),), strict=False)


def test_by_name() -> None:
    assert isinstance(get_solver("rk4", 3), Solver)
    assert isinstance(get_solver("dopri8"), AdaptiveSolver)
    with pytest.raises(
        ValueError, match=r"Unknown solver 'dopri6': did you mean 'dopri[58]'.*euler, midpoint, rk4, dopri5"
    ):
        get_solver("dopri6")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"Unknown solver 'heun': .*choose one of euler, midpoint, rk4"):
        Solver("heun")
    with pytest.raises(ValueError, match="rtol is 0 and atol 1: choose tolerances above 0"):
        AdaptiveSolver("dopri5", 0, 1)
