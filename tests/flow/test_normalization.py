"""Feature normalisations against SciPy, and against their definitions."""

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power

from anomalib_wtflow.flow.normalization import (
    ChannelNormalization,
    LayerNormalization,
    Whitening,
)


def features(n: int = 8) -> torch.Tensor:
    mix = torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [-1, 0.2, 3]])
    return torch.einsum("dc,nchw->ndhw", mix, torch.randn(n, 3, 6, 5)) + torch.tensor([1.0, -2, 5]).view(1, 3, 1, 1)


FIRST = torch.zeros(9, dtype=torch.int64)
"""The indices of images of the only product."""


def one(*batches: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of one product."""
    return [(batch, FIRST[: len(batch)]) for batch in batches]


def rows(x: torch.Tensor) -> np.ndarray:
    return x.movedim(1, -1).flatten(0, -2).double().numpy()


def test_layer_normalization_is_torchs() -> None:
    x = features()
    y = LayerNormalization(3)(x, FIRST[:8])
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, x.shape[1:], eps=1e-12))
    torch.testing.assert_close(y.flatten(1).norm(dim=1), torch.full((8,), (3 * 6 * 5) ** 0.5))


def test_whitening_against_scipy() -> None:
    x = features()
    whitening = Whitening(3, ridge=0.0)
    whitening.fit(one(x))
    covariance = np.cov(rows(x).T, bias=True)
    np.testing.assert_allclose(
        whitening.weight[0].numpy(), fractional_matrix_power(covariance, -0.5), rtol=1e-4, atol=1e-5
    )
    y = rows(whitening(x, FIRST[:8]))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(3), atol=1e-4)


def test_the_ridge_is_relative_to_the_mean_eigenvalue() -> None:
    x = features()
    whitening = Whitening(3, ridge=0.5)
    whitening.fit(one(x))
    covariance = np.cov(rows(x).T, bias=True)
    ridged = covariance + 0.5 * np.trace(covariance) / 3 * np.eye(3)
    np.testing.assert_allclose(whitening.weight[0].numpy(), fractional_matrix_power(ridged, -0.5), rtol=1e-4, atol=1e-5)


def test_channel_normalization() -> None:
    x = features()
    channel = ChannelNormalization(3, ridge=0.0)
    channel.fit(one(x))
    expected = (rows(x) - rows(x).mean(0)) / rows(x).std(0)
    np.testing.assert_allclose(rows(channel(x, FIRST[:8])), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Whitening, ChannelNormalization])
def test_batches_add_up(kind: type[Whitening]) -> None:
    x = features(9)
    whole, parts = kind(3), kind(3)
    whole.fit(one(x))
    parts.fit(one(*x.split([4, 4, 1])))
    torch.testing.assert_close(whole.weight, parts.weight)
    torch.testing.assert_close(whole.mean, parts.mean)


@pytest.mark.parametrize("kind", [Whitening, ChannelNormalization])
def test_what_is_left_of_the_covariance(kind: type[Whitening]) -> None:
    """``fit`` returns the covariance of the normalised features, in float64."""
    x = features()
    normalization = kind(3, ridge=0.3)
    left = normalization.fit(one(x))
    assert left.dtype == torch.float64
    expected = np.cov(rows(normalization(x, FIRST[:8])).T, bias=True)
    np.testing.assert_allclose(left.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - np.eye(3)).max() > 0.1  # the ridge leaves it short of the identity


def test_fitted_and_restored() -> None:
    x = features()
    whitening, other = Whitening(3), Whitening(3)
    assert not whitening.fitted
    whitening.fit(one(x))
    other.load_state_dict(whitening.state_dict())
    assert other.fitted
    torch.testing.assert_close(other(x, FIRST[:8]), whitening(x, FIRST[:8]))


def test_constant_features_stay_finite() -> None:
    whitening = Whitening(3)
    whitening.fit(one(torch.ones(2, 3, 4, 4)))
    assert whitening(torch.ones(2, 3, 4, 4), FIRST[:2]).abs().max() < 1e-3
