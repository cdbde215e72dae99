"""Density proxy, anomaly map and image score against their formulas and anomalib's FastFlow."""

import numpy as np
import pytest
import torch
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator as FastflowMap
from torchvision.transforms.v2.functional import gaussian_blur

from anomalib_wtflow.anomaly_map import DENSITIES, MAPS, AnomalyMapGenerator, density_proxy


def window_means(values: torch.Tensor) -> torch.Tensor:
    """Means of (N, H, W) over 3 x 3 positions, fewer at the borders, as (N, H * W)."""
    height, width = values.shape[1:]
    windows = [values[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] for i in range(height) for j in range(width)]
    return torch.stack([window.mean((1, 2)) for window in windows], dim=1)


def test_density_proxy() -> None:
    y = torch.tensor([[3.0, 4.0], [1.0, 1.0]]).view(1, 2, 2, 1)
    torch.testing.assert_close(density_proxy(y).flatten(), torch.tensor([-2.5, -4.25]))


@pytest.mark.parametrize("kind", DENSITIES)
def test_density_of_each_layer(kind: str) -> None:
    y = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    energies = torch.stack([(part**2).sum(1) / (2 * part.shape[1]) for part in (y[:, :2], y[:, 2:])], dim=1)
    expected = -energies if kind == "gaussian" else -(1 + 4 * energies).log()
    torch.testing.assert_close(density_proxy(y, [2, 3], kind), expected)


def test_heavy_tails_are_a_student_density() -> None:
    """``log(1 + 4 e)`` with one channel is that of Student's t with one degree of freedom and scale 1/sqrt(2)."""
    y = torch.linspace(-5, 5, 11, dtype=torch.float64)
    ours = density_proxy(y.view(1, 1, 1, -1), kind="student").flatten()
    theirs = torch.distributions.StudentT(torch.tensor(1.0, dtype=torch.float64), scale=0.5**0.5).log_prob(y)
    torch.testing.assert_close(ours - ours[5], theirs - theirs[5])


def test_map_weighs_layers_alike_and_score_by_channels() -> None:
    log_density = -torch.rand(3, 2, 5, 4, dtype=torch.float64)
    generator = AnomalyMapGenerator(top_fraction=0.1, image_score="features", contrast=0.5, channels=[1, 3]).double()
    anomaly_map, score = generator(log_density, (5, 4))
    torch.testing.assert_close(anomaly_map, -log_density.mean(1, keepdim=True))
    weighted = window_means(-(log_density[:, 0] + 3 * log_density[:, 1]) / 4)
    expected = weighted.sort().values[:, -2:].mean(1) - 0.5 * weighted.mean(1)
    torch.testing.assert_close(score, expected)


def test_contrast_of_the_map() -> None:
    log_density = -torch.rand(3, 1, 5, 4)
    anomaly_map, score = AnomalyMapGenerator(contrast=0.25)(log_density, (10, 8))
    _, plain = AnomalyMapGenerator()(log_density, (10, 8))
    torch.testing.assert_close(score, plain - 0.25 * anomaly_map.mean((1, 2, 3)))


def test_an_image_that_is_foreign_all_over_scores_above_a_good_one() -> None:
    good = -torch.full((1, 1, 16, 16), 0.3)
    good[..., 3:5, 3:5] = -0.6
    foreign = -torch.full((1, 1, 16, 16), 2.0)
    scores = [
        AnomalyMapGenerator(image_score="features", contrast=0.5)(image, (64, 64))[1] for image in (good, foreign)
    ]
    assert scores[1] > 2 * scores[0]


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


@pytest.mark.parametrize("kind", MAPS)
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


@pytest.mark.parametrize("kind", MAPS)
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


@pytest.mark.parametrize("image_score", ["map", "features"])
def test_contrast_takes_off_no_more_than_the_limit(image_score: str) -> None:
    """Training images of mean 0.25 to 1: a foreign image keeps what it has above, a good one is as without a limit."""
    generator = AnomalyMapGenerator(image_score=image_score, contrast=0.5, top_fraction=0.01)
    training = -torch.rand(8, 1, 4, 4) - torch.linspace(0, 0.5, 8).view(8, 1, 1, 1)
    generator.observe(training, (16, 16))
    anomaly_map = generator.map(training, (16, 16))
    largest = (anomaly_map.flatten(1) if image_score == "map" else window_means(-training[:, 0])).mean(1).max()
    torch.testing.assert_close(generator.limit, largest)
    for level in (0.2, 1.5, 4.0):
        _, score = generator(torch.full((1, 1, 4, 4), -level), (16, 16))
        torch.testing.assert_close(score, torch.tensor([level - 0.5 * min(level, float(largest))]))
    assert generator.without_limit().limit.isinf()
    assert generator.limit.isfinite()


def test_more_of_a_fault_never_scores_less_beyond_the_limit() -> None:
    """Foreign all over at 1.25 against a good image, at the limit, with a few positions at 1.3."""
    generator = AnomalyMapGenerator(image_score="map", contrast=0.5)
    good = torch.full((1, 1, 16, 16), -0.3)
    generator.observe(good, (16, 16))
    spot = good.clone()
    spot[..., 4:6, 4:8] = -1.3
    scores = [generator(image, (16, 16))[1].item() for image in (good, spot, torch.full_like(good, -1.25))]
    assert scores == pytest.approx([0.15, 1.15, 1.1])  # without a limit the last would be 0.625
    spread = [
        generator(-(0.3 + 0.9 * (torch.rand(16 * 16).argsort() < count)).view(1, 1, 16, 16), (16, 16))[1].item()
        for count in (8, 64, 128, 256)
    ]
    assert spread == pytest.approx([1.05] * 4)


def test_more_of_a_fault_never_scores_less_by_features() -> None:
    """The same where windows are averaged: a fault of 4 x 6 positions fills the 8 of them that the score is made of."""
    generator = AnomalyMapGenerator(image_score="features", contrast=0.5)
    good = torch.full((1, 1, 16, 16), -0.3)
    generator.observe(good, (64, 64))

    def score(level: float, height: int, width: int) -> float:
        image = good.clone()
        image[..., :height, :width] = -level
        return generator(image, (64, 64))[1].item()

    assert [score(0.3, 16, 16), score(1.3, 4, 6), score(1.25, 16, 16)] == pytest.approx([0.15, 1.15, 1.1])
    assert [score(1.2, *size) for size in ((4, 6), (8, 8), (8, 16), (16, 16))] == pytest.approx([1.05] * 4)


def test_score_window() -> None:
    """Means over 3 x 3 positions, fewer at the borders, before the largest are taken."""
    log_density = -torch.rand(2, 1, 5, 6)
    generator = AnomalyMapGenerator(image_score="features", top_fraction=0.1)
    _, score = generator(log_density, (20, 24))
    values = -log_density[:, 0].numpy()
    for image, got in zip(values, score.tolist(), strict=True):
        means = [image[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean() for i in range(5) for j in range(6)]
        assert got == pytest.approx(np.sort(means)[-3:].mean(), rel=1e-5)


def test_layers_must_be_those_announced() -> None:
    generator = AnomalyMapGenerator(image_score="features", channels=[1, 2, 3])
    with pytest.raises(ValueError, match="The density proxy has 2 layers and the generator 3"):
        generator(torch.zeros(1, 2, 4, 4), (8, 8))
