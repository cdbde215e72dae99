"""Which positions a training step sees: exact probabilities, and that what is drawn are positions of the features."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.linalg import fractional_matrix_power

from anomalib_wtflow.flow.sampling import LEAST, SHARE, PositionSampling

CHANNELS = [2, 3]


def positions(x0: torch.Tensor) -> list[torch.Tensor]:
    """Vectors at each position of each layer, ``(N, C_l, H W)``, row by row."""
    return list(x0.flatten(2).split(CHANNELS, dim=1))


def fitted(importance: float = 1.0) -> PositionSampling:
    """Fitted to a covariance that is far from the identity."""
    sampling = PositionSampling(CHANNELS, importance)
    mix = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    sampling.fit(mix @ mix.T)
    return sampling


def indices_of(drawn: torch.Tensor, points: list[torch.Tensor]) -> list[torch.Tensor]:
    """Which position of its layer each drawn vector is, ``(N, P)``; each must be exactly one."""
    indices = []
    for part, layer in zip(drawn[..., 0].split(CHANNELS, dim=1), points, strict=True):
        equal = (part[:, :, :, None] == layer[:, :, None]).all(dim=1)
        assert (equal.sum(dim=2) == 1).all()
        indices.append(equal.int().argmax(dim=2))
    return indices


@pytest.mark.parametrize("importance", [0.0, 0.5, 1.0, 2.0])
def test_probabilities(importance: float) -> None:
    """40000 draws from 3 positions of each layer, which are drawn independently (chi-squared)."""
    sampling, draws = fitted(importance), 40000
    images = draws // LEAST
    x0 = torch.randn(1, 5, 3, 1)  # a single column is taken whole
    points = positions(x0)
    exact = []
    for layer, weight in zip(points, sampling.whitening, strict=True):
        rarity = np.array([np.square(weight.double().numpy() @ x).mean() for x in layer[0].double().numpy().T])
        exact.append(rarity**importance / (rarity**importance).sum())
    before = torch.get_rng_state()
    drawn = sampling(x0.expand(images, -1, -1, -1), torch.Generator().manual_seed(0))
    assert torch.get_rng_state().equal(before)
    assert drawn.shape == (images, 5, LEAST, 1)
    first, second = (i.flatten().numpy() for i in indices_of(drawn, [p.expand(images, -1, -1) for p in points]))
    joint, expected = np.bincount(3 * first + second, minlength=9), draws * np.outer(*exact).ravel()
    assert expected.min() > 5
    assert stats.chisquare(joint, expected).pvalue > 1e-3
    assert (stats.chisquare(joint, np.full(9, draws / 9)).pvalue > 1e-3) == (importance == 0)


@pytest.mark.parametrize("size", [(4, 4), (3, 5), (1, 7), (1, 1)])
def test_what_is_drawn_are_positions_of_each_layer(size: tuple[int, int]) -> None:
    """As many of each layer as the grid has, divided by ``SHARE``, or ``LEAST``; each layer has its own."""
    x0 = torch.randn(6, 5, *size)
    drawn = fitted()(x0)
    count = max(LEAST, math.ceil(size[0] * size[1] / SHARE))
    assert drawn.shape == (6, 5, count, 1)
    fine, coarse = indices_of(drawn, positions(x0))
    assert fine.max() < size[0] * size[1]
    assert coarse.max() < size[0] * size[1]
    assert size == (1, 1) or not torch.equal(fine, coarse)


def test_positions_come_from_every_second_row_and_column() -> None:
    """One offset for all of a step, each of the four as often (chi-squared); a single row or column is taken whole."""
    x0 = torch.randn(2, 5, 3, 4)
    sampling, points, offsets = fitted(), positions(x0), []
    for seed in range(400):
        fine, coarse = indices_of(sampling(x0, torch.Generator().manual_seed(seed)), points)
        rows, columns = coarse // 4 % 2, coarse % 4 % 2
        assert torch.equal(rows, rows[:1, :1].expand_as(rows))
        assert torch.equal(columns, columns[:1, :1].expand_as(columns))
        assert (fine // 4 % 2 == rows[0, 0]).all()
        assert (fine % 4 % 2 == columns[0, 0]).all()
        offsets.append(int(2 * rows[0, 0] + columns[0, 0]))
    assert stats.chisquare(np.bincount(offsets, minlength=4)).pvalue > 1e-3
    for line in (torch.randn(500, 5, 1, 4), torch.randn(500, 5, 4, 1)):
        _, coarse = indices_of(PositionSampling(CHANNELS, 0.0)(line), positions(line))
        assert set(coarse.flatten().tolist()) == {0, 1, 2, 3}


def test_a_position_may_be_drawn_more_than_once() -> None:
    """Where one position of each layer has all the weight, it is drawn every time; without any, all are drawn."""
    x0 = torch.zeros(3, 5, 1, 32)
    x0[:, 1, 0, 21], x0[:, 3, 0, 12] = 2.0, -3.0
    drawn = fitted()(x0)
    assert drawn.shape == (3, 5, LEAST, 1)
    assert (drawn == torch.tensor([0, 2.0, 0, -3, 0]).view(1, 5, 1, 1)).all()
    assert torch.equal(fitted()(torch.zeros_like(x0)), torch.zeros_like(drawn))


def test_whitening_is_that_of_each_layer() -> None:
    """Against SciPy, from the covariance of each layer."""
    rows = torch.randn(500, 5, dtype=torch.float64) @ torch.randn(5, 5, dtype=torch.float64)
    covariance = np.cov(rows.T.numpy(), bias=True)
    sampling = PositionSampling(CHANNELS)
    assert all(torch.equal(w, torch.eye(size)) for w, size in zip(sampling.whitening, CHANNELS, strict=True))
    sampling.fit(torch.from_numpy(covariance))
    for weight, block in zip(sampling.whitening, (covariance[:2, :2], covariance[2:, 2:]), strict=True):
        ridged = block + 0.01 * np.trace(block) / len(block) * np.eye(len(block))
        np.testing.assert_allclose(weight.numpy(), fractional_matrix_power(ridged, -0.5), rtol=1e-5, atol=1e-6)


def test_rare_is_what_the_training_features_seldom_are() -> None:
    """Of two positions of equal norm the one along the direction of little variance is drawn more often."""
    sampling, draws = PositionSampling([2]), 20000
    x0 = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).view(1, 2, 1, 2).expand(draws, -1, -1, -1)

    def share() -> float:
        """How often the second position is drawn."""
        return sampling(x0, torch.Generator().manual_seed(1))[:, 1].mean().item()

    assert abs(share() - 1 / 2) < 5 * (1 / 4 / draws) ** 0.5
    sampling.fit(
        torch.diag(torch.tensor([25.26, 0.74], dtype=torch.float64))
    )  # a ridge of 0.13 makes it 25.39 and 0.87
    exact = 25.39 / (25.39 + 0.87)
    assert abs(share() - exact) < 5 * (exact * (1 - exact) / draws) ** 0.5


def test_the_whitening_goes_into_the_state() -> None:
    sampling, other = fitted(), PositionSampling(CHANNELS)
    other.load_state_dict(sampling.state_dict())
    for one, two in zip(sampling.whitening, other.whitening, strict=True):
        assert torch.equal(one, two)
    assert not list(sampling.parameters())
