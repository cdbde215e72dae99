"""Feature normalisations against SciPy, and against their definitions."""

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power

from anomalib_wtflow.flow.normalization import (
    ChannelNormalization,
    LayerNormalization,
    Whitening,
    get_normalization,
)


def features(n: int = 8) -> torch.Tensor:
    mix = torch.tensor([[2.0, 0, 0], [1, 0.5, 0], [-1, 0.2, 3]])
    return torch.einsum("dc,nchw->ndhw", mix, torch.randn(n, 3, 6, 5)) + torch.tensor([1.0, -2, 5]).view(1, 3, 1, 1)


def rows(x: torch.Tensor) -> np.ndarray:
    return x.movedim(1, -1).flatten(0, -2).double().numpy()


def test_layer_normalization_is_torchs() -> None:
    x = features()
    y = LayerNormalization(3)(x)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, x.shape[1:], eps=1e-12))
    torch.testing.assert_close(y.flatten(1).norm(dim=1), torch.full((8,), (3 * 6 * 5) ** 0.5))


def test_whitening_against_scipy() -> None:
    x = features()
    whitening = Whitening(3, ridge=0.0)
    whitening.update(x)
    whitening.finalize()
    covariance = np.cov(rows(x).T, bias=True)
    np.testing.assert_allclose(
        whitening.weight[0].numpy(), fractional_matrix_power(covariance, -0.5), rtol=1e-4, atol=1e-5
    )
    y = rows(whitening(x))
    np.testing.assert_allclose(y.mean(0), 0, atol=1e-5)
    np.testing.assert_allclose(np.cov(y.T, bias=True), np.eye(3), atol=1e-4)


def test_the_ridge_is_relative_to_the_mean_eigenvalue() -> None:
    x = features()
    whitening = Whitening(3, ridge=0.5)
    whitening.update(x)
    whitening.finalize()
    covariance = np.cov(rows(x).T, bias=True)
    ridged = covariance + 0.5 * np.trace(covariance) / 3 * np.eye(3)
    np.testing.assert_allclose(whitening.weight[0].numpy(), fractional_matrix_power(ridged, -0.5), rtol=1e-4, atol=1e-5)


def test_channel_normalization() -> None:
    x = features()
    channel = ChannelNormalization(3, ridge=0.0)
    channel.update(x)
    channel.finalize()
    expected = (rows(x) - rows(x).mean(0)) / rows(x).std(0)
    np.testing.assert_allclose(rows(channel(x)), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [Whitening, ChannelNormalization])
def test_batches_add_up(kind: type[Whitening]) -> None:
    x = features(9)
    whole, parts = kind(3), kind(3)
    whole.update(x)
    for part in x.split([4, 4, 1]):
        parts.update(part)
    for normalization in (whole, parts):
        normalization.finalize()
    torch.testing.assert_close(whole.weight, parts.weight)
    torch.testing.assert_close(whole.mean, parts.mean)


@pytest.mark.parametrize("kind", [Whitening, ChannelNormalization])
def test_what_is_left_of_the_covariance(kind: type[Whitening]) -> None:
    """``finalize`` returns the covariance of the normalised features, in float64."""
    x = features()
    normalization = kind(3, ridge=0.3)
    normalization.update(x)
    left = normalization.finalize()
    assert left.dtype == torch.float64
    expected = np.cov(rows(normalization(x)).T, bias=True)
    np.testing.assert_allclose(left.numpy(), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(expected - np.eye(3)).max() > 0.1  # the ridge leaves it short of the identity


def test_fitted_and_restored() -> None:
    x = features()
    whitening, other = Whitening(3), Whitening(3)
    assert not whitening.fitted
    whitening.update(x)
    whitening.finalize()
    other.load_state_dict(whitening.state_dict())
    assert other.fitted
    torch.testing.assert_close(other(x), whitening(x))


def test_constant_features_stay_finite() -> None:
    whitening = Whitening(3)
    whitening.update(torch.ones(2, 3, 4, 4))
    whitening.finalize()
    assert whitening(torch.ones(2, 3, 4, 4)).abs().max() < 1e-3


def test_bad_features() -> None:
    with pytest.raises(ValueError, match="NaN or infinite features"):
        Whitening(3).update(torch.full((1, 3, 2, 2), float("nan")))
    with pytest.raises(ValueError, match="training set is empty"):
        Whitening(3).finalize()
    with pytest.raises(
        ValueError, match=r"Unknown normalization 'batch': .*choose one of layer_norm, channel, whitening"
    ):
        get_normalization("batch", 3)
