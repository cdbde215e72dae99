"""Density proxy, anomaly map and image score against their formulas and anomalib's FastFlow."""

import numpy as np
import pytest
import torch
from anomalib.models.image.fastflow.anomaly_map import AnomalyMapGenerator as FastflowMap
from torchvision.transforms.v2.functional import gaussian_blur

from anomalib_wtflow.anomaly_map import DENSITIES, MAPS, AnomalyMapGenerator, density_proxy

ONE = torch.zeros(1, dtype=torch.int64)
"""The index of an image of the only product."""


def first(images: torch.Tensor) -> torch.Tensor:
    """The indices of images of the only product."""
    return torch.zeros(len(images), dtype=torch.int64)


def window_means(values: torch.Tensor) -> torch.Tensor:
    """Means of (N, H, W) over 3 x 3 positions, fewer at the borders, as (N, H * W)."""
    height, width = values.shape[1:]
    windows = [values[:, max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2] for i in range(height) for j in range(width)]
    return torch.stack([window.mean((1, 2)) for window in windows], dim=1)


def lower_quartile(values: torch.Tensor) -> torch.Tensor:
    """Of (N, ...): the value that is exceeded by three quarters of each image's, or as few more as there are."""
    values = values.flatten(1)
    return values.sort(dim=1).values[:, values.shape[1] // 4]


@pytest.mark.parametrize("kind", DENSITIES)
def test_density_of_each_layer(kind: str) -> None:
    y = torch.randn(2, 5, 3, 3, dtype=torch.float64)
    energies = torch.stack([(part**2).sum(1) / (2 * part.shape[1]) for part in (y[:, :2], y[:, 2:])], dim=1)
    expected = -energies if kind == "gaussian" else -(1 + 4 * energies).log()
    torch.testing.assert_close(density_proxy(y, [2, 3], kind), expected)


@pytest.mark.parametrize("kind", DENSITIES)
def test_an_exported_density_is_that_of_eager_torch(kind: str) -> None:
    """Whose graph sums the squares by a convolution."""

    class Proxy(torch.nn.Module):
        def forward(self, y: torch.Tensor) -> torch.Tensor:
            return density_proxy(y, [2, 1, 3], kind)

    y = torch.randn(2, 6, 3, 2, dtype=torch.float64)
    exported = torch.export.export(Proxy(), (y,)).module()
    assert "conv2d" in exported.code
    torch.testing.assert_close(exported(y), density_proxy(y, [2, 1, 3], kind))


def test_map_weighs_layers_alike_and_score_by_channels() -> None:
    """The score by the square roots of the channels: 1 and 2 of 3 with 1 and 4 of them."""
    log_density = -torch.rand(3, 2, 5, 4, dtype=torch.float64)
    generator = AnomalyMapGenerator(
        top_fraction=0.1, image_score="features", background_slope=0.5, channels=[1, 4]
    ).double()
    anomaly_map, score = generator(log_density, (5, 4), first(log_density))
    torch.testing.assert_close(anomaly_map, -log_density.mean(1, keepdim=True))
    weighted = window_means(-(log_density[:, 0] + 2 * log_density[:, 1]) / 3)
    expected = weighted.sort().values[:, -2:].mean(1) - 0.5 * weighted.sort().values[:, 5]
    torch.testing.assert_close(score, expected)


def test_background_level_of_the_map() -> None:
    log_density = -torch.rand(3, 1, 5, 4)
    anomaly_map, score = AnomalyMapGenerator(background_slope=0.25)(log_density, (10, 8), first(log_density))
    _, plain = AnomalyMapGenerator()(log_density, (10, 8), first(log_density))
    torch.testing.assert_close(score, plain - 0.25 * lower_quartile(anomaly_map))


@pytest.mark.parametrize(
    ("size", "fraction", "count", "rank"),
    [((5, 4), 0.1, 2, 5), ((3, 3), 0.03, 1, 2), ((1, 3), 0.5, 2, 0), ((4, 4), 0.75, 12, 4), ((4, 4), 1.0, 16, 0)],
)
def test_top_and_level(size: tuple[int, int], fraction: float, count: int, rank: int) -> None:
    """The mean of the ``count`` largest, and the value of the ``rank`` from below: never one above the largest."""
    values = torch.rand(3, 1, *size, dtype=torch.float64)
    ascending = values.flatten(1).sort(dim=1).values
    top, level = AnomalyMapGenerator(top_fraction=fraction, background_slope=None).top_and_level(values)
    torch.testing.assert_close(top, ascending[:, -count:].mean(1))
    assert torch.equal(level, ascending[:, rank])


def test_relative_map_against_fastflow() -> None:
    """At the features' own size FastFlow's map is -p; the authors' is max(p) - p."""
    y = torch.randn(3, 5, 4, 4)
    anomaly_map, _ = AnomalyMapGenerator("relative")(density_proxy(y), (4, 4), first(density_proxy(y)))
    minus_p = FastflowMap((4, 4))([y])
    torch.testing.assert_close(anomaly_map, minus_p - minus_p.amin(dim=(-2, -1), keepdim=True))
    assert anomaly_map.amin(dim=(-2, -1)).eq(0).all()


@pytest.mark.parametrize("kind", MAPS)
def test_upsampling_comes_before_the_exponential(kind: str) -> None:
    log_density = -torch.rand(1, 1, 3, 3) * 4
    up = torch.nn.functional.interpolate(log_density, size=(9, 12), mode="bilinear")
    expected = -up if kind == "absolute" else up.exp().max() - up.exp()
    torch.testing.assert_close(AnomalyMapGenerator(kind)(log_density, (9, 12), first(log_density))[0], expected)


@pytest.mark.parametrize("kind", MAPS)
def test_smoothing_against_torchvision(kind: str) -> None:
    log_density = -torch.rand(2, 1, 5, 6) * 4
    plain, _ = AnomalyMapGenerator(kind)(log_density, (40, 48), first(log_density))
    generator = AnomalyMapGenerator(kind, sigma=2.0)
    smooth, score = generator(log_density, (40, 48), first(log_density))
    expected = gaussian_blur(plain, [17, 17], [2.0, 2.0])
    torch.testing.assert_close(smooth, expected)
    torch.testing.assert_close(score, generator.score(expected, first(expected)))


def test_smoothing_needs_room() -> None:
    with pytest.raises(
        ValueError, match=r"Images of 32x64 pixels are too small to smooth with sigma=8.0, .* 32 pixels"
    ):
        AnomalyMapGenerator(sigma=8.0)(torch.zeros(1, 1, 2, 4), (32, 64), ONE)
    assert AnomalyMapGenerator(sigma=8.0)(torch.zeros(1, 1, 3, 4), (33, 64), ONE)[0].shape == (1, 1, 33, 64)


def test_a_broken_pixel_breaks_the_score() -> None:
    pixels = torch.rand(3, 1, 8, 8)
    pixels[1, 0, 2, 2] = float("nan")
    assert AnomalyMapGenerator().score(pixels, first(pixels)).isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("image_score", ["map", "features"])
def test_no_more_than_the_limit_is_taken_off(image_score: str) -> None:
    """A foreign image keeps what it has above the limit; a good one is as without a limit.

    The limit lies above the highest level of the training images by twice its distance from their mean level.
    """
    generator = AnomalyMapGenerator(image_score=image_score, background_slope=0.5, top_fraction=0.01)
    training = -torch.rand(8, 1, 4, 4) - torch.linspace(0, 0.5, 8).view(8, 1, 1, 1)
    generator.fit(training, (16, 16), first(training))
    anomaly_map = generator.map(training, (16, 16))
    levels = lower_quartile(anomaly_map if image_score == "map" else window_means(-training[:, 0]))
    limit = 3 * levels.max() - 2 * levels.mean()
    torch.testing.assert_close(generator.limit, limit[None])
    assert levels.max() + 0.1 < limit < 4
    for level in (0.2, 1.5, 4.0):
        _, score = generator(torch.full((1, 1, 4, 4), -level), (16, 16), ONE)
        torch.testing.assert_close(score, torch.tensor([level - 0.5 * min(level, float(limit))]))
    assert generator.slope == 0.5


SIZE = (6, 8)


def good_images(slope: float, spread: float = 0.02, count: int = 12) -> torch.Tensor:
    """Log densities whose tops follow ``slope`` times their levels, about the ``spread`` off, in float64."""
    levels = torch.linspace(0.3, 0.9, count, dtype=torch.float64)
    tops = 1 + slope * levels + spread * torch.randn(count, dtype=torch.float64)
    values = levels[:, None] + 0.01 * torch.rand(count, 48, dtype=torch.float64)
    values[:, 20:22] = tops[:, None]
    return -values[:, torch.randperm(48)].view(count, 1, *SIZE)


def tops_and_levels(log_density: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Of maps of 48 pixels: the mean of the two largest, and the value of rank 12 from below, in NumPy."""
    ascending = np.sort(-log_density.flatten(1).numpy(), axis=1)
    return ascending[:, -2:].mean(1), ascending[:, 12]


def adaptive(**kwargs: object) -> AnomalyMapGenerator:
    return AnomalyMapGenerator(background_slope=None, **kwargs).double()


@pytest.mark.parametrize(
    ("slope", "end"), [(1.0, None), (0.85, None), (1.15, None), (0.5, 0.75), (-1.0, 0.75), (2.0, 1.25)]
)
def test_slope_of_good_images(slope: float, end: float | None) -> None:
    """The regression line's, kept in [0.75, 1.25]."""
    log_density, generator = good_images(slope), adaptive()
    generator.fit(log_density, SIZE, first(log_density))
    tops, levels = tops_and_levels(log_density)
    fitted = np.polyfit(levels, tops, 1)[0]
    covariance = np.cov(tops, levels, bias=True)
    assert fitted == pytest.approx(covariance[0, 1] / covariance[1, 1])
    assert (0.75 < fitted < 1.25) == (end is None)
    assert float(generator.slope) == pytest.approx(fitted if end is None else end, rel=1e-9)
    assert float(generator.limit) == pytest.approx(levels.max() + 2 * (levels.max() - levels.mean()), rel=1e-12)
    _, score = generator(log_density, SIZE, first(log_density))
    offset = max(float(generator.slope) - 1, 0) * float(generator.limit)
    np.testing.assert_allclose(score.numpy(), tops - float(generator.slope) * levels + offset)


def test_scores_are_never_negative() -> None:
    """Which the normalisation around a threshold needs; also where the slope is above 1 and an image is flat."""
    log_density, generator = good_images(2.0), adaptive()
    generator.fit(log_density, SIZE, first(log_density))
    assert generator.slope == 1.25
    flat = -torch.linspace(0, 3, 7, dtype=torch.float64).view(-1, 1, 1, 1).expand(-1, 1, *SIZE)
    for images in (log_density, flat):
        assert (generator(images, SIZE, first(images))[1] >= 0).all()


def test_a_slope_that_images_do_not_tell_is_one() -> None:
    """One image, and images that are all alike, or as good as; before any, too."""
    log_density = good_images(1.0)
    alike = log_density[:1].repeat(5, 1, 1, 1)
    almost = alike * torch.linspace(1, 1 + 1e-6, 5, dtype=torch.float64).view(5, 1, 1, 1)
    for images in (log_density[:1], alike, almost):
        generator = adaptive()
        assert generator.slope == 1
        generator.slope.fill_(1.2)
        generator.fit(images, SIZE, first(images))
        assert generator.slope == 1
        _, levels = tops_and_levels(images)
        assert float(generator.limit) == pytest.approx(3 * levels.max() - 2 * levels.mean(), rel=1e-12)
    apart = alike * torch.linspace(1, 1 + 1e-3, 5, dtype=torch.float64).view(5, 1, 1, 1)
    generator.fit(apart, SIZE, first(apart))
    assert generator.slope == 1.25  # tops and levels in proportion, and the tops far larger


def test_more_of_a_fault_never_scores_less_beyond_the_limit() -> None:
    """Foreign all over at 1.25 against a good image, at the limit, with a few positions at 1.3."""
    generator = AnomalyMapGenerator(image_score="map", background_slope=0.5)
    good = torch.full((1, 1, 16, 16), -0.3)
    generator.fit(good, (16, 16), first(good))
    spot = good.clone()
    spot[..., 4:6, 4:8] = -1.3
    scores = [
        generator(image, (16, 16), first(image))[1].item() for image in (good, spot, torch.full_like(good, -1.25))
    ]
    assert scores == pytest.approx([0.15, 1.15, 1.1])  # without a limit the last would be 0.625
    spread = [
        generator(-(0.3 + 0.9 * (torch.rand(16 * 16).argsort() < count)).view(1, 1, 16, 16), (16, 16), ONE)[1].item()
        for count in (8, 64, 128, 256)
    ]
    assert spread == pytest.approx([1.05] * 4)


def test_score_window() -> None:
    """Means over 3 x 3 positions, fewer at the borders, before the largest are taken."""
    log_density = -torch.rand(2, 1, 5, 6)
    generator = AnomalyMapGenerator(image_score="features", top_fraction=0.1)
    _, score = generator(log_density, (20, 24), first(log_density))
    values = -log_density[:, 0].numpy()
    for image, got in zip(values, score.tolist(), strict=True):
        means = [image[max(i - 1, 0) : i + 2, max(j - 1, 0) : j + 2].mean() for i in range(5) for j in range(6)]
        assert got == pytest.approx(np.sort(means)[-3:].mean(), rel=1e-5)
