"""Density proxy, anomaly map and image score against their formulas and anomalib's FastFlow."""

from typing import get_args

import numpy as np
import pytest
import torch
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator as FastflowMap
from torchvision.transforms.v2.functional import gaussian_blur

from anomalib_wtflow.anomaly_map import AnomalyMapGenerator, MapName, density_proxy


def test_density_proxy() -> None:
    y = torch.tensor([[3.0, 4.0], [1.0, 1.0]]).view(1, 2, 2, 1)
    torch.testing.assert_close(density_proxy(y).flatten(), torch.tensor([-2.5, -4.25]))


def test_absolute_map_is_the_energy() -> None:
    log_density = -torch.rand(2, 1, 4, 6)
    anomaly_map, _ = AnomalyMapGenerator()(log_density, (4, 6))
    torch.testing.assert_close(anomaly_map, -log_density)


def test_relative_map_against_fastflow() -> None:
    """At the features' own size FastFlow's map is -p; the authors' is max(p) - p."""
    y = torch.randn(3, 5, 4, 4)
    anomaly_map, _ = AnomalyMapGenerator("relative")(density_proxy(y), (4, 4))
    minus_p = FastflowMap((4, 4))([y])
    torch.testing.assert_close(anomaly_map, minus_p - minus_p.amin(dim=(-2, -1), keepdim=True))
    assert anomaly_map.amin(dim=(-2, -1)).eq(0).all()


@pytest.mark.parametrize("kind", get_args(MapName))
def test_upsampling_comes_before_the_exponential(kind: str) -> None:
    log_density = -torch.rand(1, 1, 3, 3) * 4
    up = torch.nn.functional.interpolate(log_density, size=(9, 12), mode="bilinear")
    expected = -up if kind == "absolute" else up.exp().max() - up.exp()
    torch.testing.assert_close(AnomalyMapGenerator(kind)(log_density, (9, 12))[0], expected)


@pytest.mark.parametrize(("fraction", "count"), [(0.03, 8), (0.001, 1), (0.5, 128), (1.0, 256)])
def test_score_is_the_mean_of_the_largest(fraction: float, count: int) -> None:
    pixels = torch.rand(4, 1, 16, 16)
    score = AnomalyMapGenerator(top_fraction=fraction).score(pixels)
    expected = np.sort(pixels.flatten(1).numpy())[:, -count:].mean(1)
    np.testing.assert_allclose(score.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("kind", get_args(MapName))
def test_smoothing_against_torchvision(kind: str) -> None:
    log_density = -torch.rand(2, 1, 5, 6) * 4
    plain, _ = AnomalyMapGenerator(kind)(log_density, (40, 48))
    generator = AnomalyMapGenerator(kind, sigma=2.0)
    smooth, score = generator(log_density, (40, 48))
    expected = gaussian_blur(plain, [17, 17], [2.0, 2.0])
    torch.testing.assert_close(smooth, expected)
    torch.testing.assert_close(score, generator.score(expected))


def test_smoothing_needs_room() -> None:
    with pytest.raises(
        ValueError, match=r"Images of 32x64 pixels are too small to smooth with sigma=8.0, .* 32 pixels"
    ):
        AnomalyMapGenerator(sigma=8.0)(torch.zeros(1, 1, 2, 4), (32, 64))
    assert AnomalyMapGenerator(sigma=8.0)(torch.zeros(1, 1, 3, 4), (33, 64))[0].shape == (1, 1, 33, 64)


def test_a_broken_pixel_breaks_the_score() -> None:
    pixels = torch.rand(3, 1, 8, 8)
    pixels[1, 0, 2, 2] = float("nan")
    assert AnomalyMapGenerator().score(pixels).isnan().tolist() == [False, True, False]


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Unknown anomaly map 'log': choose one of absolute, relative"):
        AnomalyMapGenerator("log")
    for fraction in (0, 1.5):
        with pytest.raises(ValueError, match=f"top_fraction is {fraction}"):
            AnomalyMapGenerator(top_fraction=fraction)
    for sigma in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"sigma is {sigma}"):
            AnomalyMapGenerator(sigma=sigma)
