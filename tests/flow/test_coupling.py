"""Couplings against brute force over all permutations and signs."""

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anomalib_wtflow.flow.coupling import COUPLINGS, Coupling, get_coupling

pytestmark = pytest.mark.method


def cost(x0: Tensor, noise: Tensor) -> Tensor:
    return (x0 - noise).square().sum()


def best(points: Tensor, draws: Tensor, worst: bool) -> Tensor:
    """Extreme transport cost of vectors (N, D) over all permutations."""
    costs = torch.stack([cost(points, draws[list(order)]) for order in permutations(range(len(points)))])
    return costs.max() if worst else costs.min()


@given(seed=st.integers(0, 2**31), batch=st.integers(1, 4), height=st.integers(1, 2), width=st.integers(1, 3))
@settings(max_examples=25, deadline=None)
def test_assignments_against_brute_force(seed: int, batch: int, height: int, width: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x0, noise = (torch.randn(batch, 3, height, width, generator=g, dtype=torch.float64) for _ in range(2))
    flat_x, flat_n = x0.flatten(1), noise.flatten(1)
    for name, worst in (("optimal", False), ("worst", True)):
        torch.testing.assert_close(cost(x0, COUPLINGS[name](x0, noise)), best(flat_x, flat_n, worst))


def rows(noise: Tensor) -> list[tuple[float, ...]]:
    return sorted(tuple(row.tolist()) for row in noise)


def test_marginals_are_preserved() -> None:
    """The assignments only permute the noise of whole images."""
    x0, noise = torch.randn(5, 4, 3, 2), torch.randn(5, 4, 3, 2)
    for name in ("optimal", "worst"):
        assert rows(COUPLINGS[name](x0, noise).flatten(1)) == rows(noise.flatten(1))


def test_worst_of_two_against_both_signs() -> None:
    x0, noise = torch.randn(6, 5, 3, 3), torch.randn(6, 5, 3, 3)
    coupled = COUPLINGS["worst_of_two"](x0, noise)
    both = torch.stack([(x0 - noise).square().sum(1), (x0 + noise).square().sum(1)])
    torch.testing.assert_close((x0 - coupled).square().sum(1), both.amax(0))
    torch.testing.assert_close(coupled.abs(), noise.abs())


def test_worst_of_two_marginal() -> None:
    """Given x0: mean -sqrt(2 / pi) and variance 1 - 2 / pi along x0 / ||x0||, standard normal across it.

    Over a data set and its mirror image the marginal is N(0, I) again; over one point it is not. Within five standard
    errors of 200,000 draws.
    """
    count = 200_000
    x0 = torch.tensor([3.0, 4.0]).expand(count, 2)[:, :, None, None]
    coupled = COUPLINGS["worst_of_two"](x0, torch.randn_like(x0)).flatten(1)
    along, across = coupled @ torch.tensor([0.6, 0.8]), coupled @ torch.tensor([-0.8, 0.6])
    assert float(along.mean()) == pytest.approx(-((2 / torch.pi) ** 0.5), abs=5 * 0.61 / count**0.5)
    assert float(along.var()) == pytest.approx(1 - 2 / torch.pi, abs=5 * 2**0.5 / count**0.5)
    assert float(across.mean()) == pytest.approx(0, abs=5 / count**0.5)
    assert float(across.var()) == pytest.approx(1, abs=5 * 2**0.5 / count**0.5)
    mirrored = x0 * (2.0 * torch.randint(0, 2, (count, 1, 1, 1)) - 1)
    both = COUPLINGS["worst_of_two"](mirrored, torch.randn_like(x0)).flatten(1)
    assert (both.mean(0).abs() < 5 / count**0.5).all()
    assert ((both.T @ both / count - torch.eye(2)).abs() < 5 * 2**0.5 / count**0.5).all()


def test_antipodal() -> None:
    x0 = torch.randn(2, 7, 3, 3)
    x0[0, :, 0, 0] = 0
    coupled = COUPLINGS["antipodal"](x0, torch.randn_like(x0))
    assert coupled[0, :, 0, 0].eq(0).all()
    cosine = torch.nn.functional.cosine_similarity(x0, coupled)[1]
    torch.testing.assert_close(cosine, -torch.ones(3, 3))
    torch.testing.assert_close(coupled[1].norm(dim=0), torch.full((3, 3), 7**0.5))


@pytest.mark.parametrize("coupling", COUPLINGS.values())
def test_mixed_precision(coupling: Coupling) -> None:
    """Under autocast the inner products are bfloat16, which NumPy does not know."""
    x0, noise = torch.randn(4, 8, 3, 3), torch.randn(4, 8, 3, 3)
    with torch.autocast("cpu", torch.bfloat16):
        assert coupling(x0, noise).isfinite().all()


def test_broken_features() -> None:
    x0 = torch.full((2, 3, 2, 2), float("nan"))
    with pytest.raises(ValueError, match="features or the noise hold NaN or infinite values"):
        COUPLINGS["worst"](x0, torch.randn_like(x0))


def test_unknown_name() -> None:
    with pytest.raises(ValueError, match=r"Unknown coupling 'best': choose one of independent, optimal, worst"):
        get_coupling("best")
