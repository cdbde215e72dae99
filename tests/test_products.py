"""Several products in one model: recognition, rows, codes, against brute force."""

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power
from scipy.spatial.distance import pdist

from anomalib_wtflow import WTFlowModel
from anomalib_wtflow.flow.normalization import ChannelNormalization, Whitening
from anomalib_wtflow.flow.rows import CODE_CHANNELS, allocate, codes, own
from anomalib_wtflow.products import MARGIN, RIDGE, ProductRecognition, places
from anomalib_wtflow.settings import get_settings

CHANNELS = 5
COUNTS = (7, 4, 9)


def drawn(counts: tuple[int, ...] = COUNTS, apart: float = 4.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of images of products whose means lie apart, and which product each shows, shuffled."""
    generator = torch.Generator().manual_seed(3)
    product = torch.cat([torch.full((count,), place) for place, count in enumerate(counts)])
    product = product[torch.randperm(len(product), generator=generator)]
    means = apart * torch.randn(len(counts), CHANNELS, 1, 1, generator=generator)
    return means[product] + torch.randn(len(product), CHANNELS, 3, 4, generator=generator), product


def fitted(features: torch.Tensor, product: torch.Tensor, count: int = 3) -> ProductRecognition:
    recognition = ProductRecognition(CHANNELS)
    allocate(recognition, count)
    recognition._fitted.fill_(False)
    for some, which in zip(features.split(6), product.split(6), strict=True):
        recognition.update(some, which)
    recognition.finalize()
    return recognition


def by_hand(features: torch.Tensor, product: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centroids before whitening, the whitening matrix, and the rows of pooled features."""
    rows, which = features.mean((2, 3)).double().numpy(), product.numpy()
    means = np.stack([rows[which == place].mean(0) for place in range(which.max() + 1)])
    within = sum(np.cov(rows[which == place].T, bias=True) for place in range(which.max() + 1)) / (which.max() + 1)
    ridged = within + RIDGE * np.trace(within) / CHANNELS * np.eye(CHANNELS)
    return means, fractional_matrix_power(ridged, -0.5).real, rows


def test_recognition_against_brute_force() -> None:
    features, product = drawn()
    recognition = fitted(features, product)
    means, matrix, rows = by_hand(features, product)
    np.testing.assert_allclose(recognition.weight.numpy(), matrix, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(recognition.centroids.numpy(), means @ matrix.T, rtol=1e-4, atol=1e-4)
    distance = (((rows[:, None] - means) @ matrix.T) ** 2).mean(2)
    nearest = distance.min(1)
    between = pdist(means @ matrix.T).min() ** 2 / CHANNELS
    limit = max(nearest.max() + MARGIN * (nearest.max() - nearest.mean()), between / 4)
    assert float(recognition.limit) == pytest.approx(limit, rel=1e-4)
    found, strangeness = recognition(features)
    assert found.tolist() == distance.argmin(1).tolist() == product.tolist()
    np.testing.assert_allclose(strangeness.numpy(), nearest / limit, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(("apart", "half_way"), [(0.5, False), (40.0, True)])
def test_the_limit_is_the_larger_of_two(apart: float, half_way: bool) -> None:
    """Products that lie far apart leave room for defects; those that are close, for what training images spread."""
    features, product = drawn(apart=apart)
    means, matrix, _ = by_hand(features, product)
    between = pdist(means @ matrix.T).min() ** 2 / CHANNELS
    limit = float(fitted(features, product).limit)
    assert bool(limit == pytest.approx(between / 4, rel=1e-3)) == half_way
    assert limit >= between / 4 * 0.999


def test_one_product_is_never_unknown() -> None:
    features, _ = drawn((9,))
    recognition = fitted(features, torch.zeros(9, dtype=torch.int64), count=1)
    found, strangeness = recognition(1e6 * torch.randn(4, CHANNELS, 2, 2))
    assert found.tolist() == [0] * 4
    assert strangeness.tolist() == [0.0] * 4


def test_a_product_of_one_image() -> None:
    """Has a centroid; where each has one only, distances are Euclidean."""
    features, product = drawn((1, 1, 1))
    recognition = fitted(features, product)
    assert torch.equal(recognition.weight, torch.eye(CHANNELS))
    assert recognition(features).product.tolist() == product.tolist()
    assert fitted(*drawn((1, 5, 6)))(drawn((1, 5, 6))[0]).product.tolist() == drawn((1, 5, 6))[1].tolist()


def test_what_is_known_stays_when_a_product_is_added() -> None:
    features, product = drawn()
    first = fitted(features[product < 2], product[product < 2], count=2)
    before = {name: tensor.clone() for name, tensor in first.state_dict().items()}
    allocate(first, 3)
    first._fitted[2:] = False
    assert not first.fitted
    first.update(features, product)
    first.finalize()
    assert first.fitted
    assert torch.equal(first.centroids[:2], before["centroids"])
    assert torch.equal(first.weight, before["weight"])
    expected = features[product == 2].mean((2, 3)).mean(0) @ before["weight"].T
    torch.testing.assert_close(first.centroids[2], expected, rtol=1e-4, atol=1e-4)
    assert first(features).product.tolist() == product.tolist()


@pytest.mark.parametrize("kind", [Whitening, ChannelNormalization])
def test_processes_fit_what_one_would(kind: type[Whitening]) -> None:
    """Sums and maxima of two processes' images make the same centroids, matrix, limit and statistics."""
    features, product = drawn()
    whole, told = fitted(features, product), [[], []]
    parts = [(features[:8], product[:8]), (features[8:], product[8:])]

    def fit(part: tuple[torch.Tensor, torch.Tensor], reduce: object) -> tuple[ProductRecognition, Whitening]:
        recognition, normalization = ProductRecognition(CHANNELS), kind(CHANNELS)
        for module in (recognition, normalization):
            allocate(module, 3)
            module._fitted.fill_(False)
            module.reset()
            module.update(*part)
        recognition.finalize(reduce)
        normalization.finalize(lambda value: reduce(value, "sum"))
        return recognition, normalization

    # Later values depend on what earlier ones were reduced to, so each round gets one value further.
    for _ in range(9):
        values: list[list[torch.Tensor]] = [[], []]
        for part, new in zip(parts, values, strict=True):
            given = iter(zip(*told, strict=True))

            def reduce(value: torch.Tensor, how: str, given=given, new=new) -> torch.Tensor:
                new.append(value.clone())
                pair = next(given, None)
                if pair is None:
                    return value.clamp(min=1e-3) if how == "sum" else value
                return pair[0] + pair[1] if how == "sum" else torch.maximum(*pair)

            fit(part, reduce)
        told = values
    for part in parts:
        given = iter(zip(*told, strict=True))
        recognition, normalization = fit(
            part, lambda _, how, given=given: sum(next(given)) if how == "sum" else torch.maximum(*next(given))
        )
        torch.testing.assert_close(recognition.centroids, whole.centroids)
        torch.testing.assert_close(recognition.weight, whole.weight)
        torch.testing.assert_close(recognition.limit, whole.limit)
        alone = kind(CHANNELS)
        alone.update(features[product == 1])
        alone.finalize()
        torch.testing.assert_close(normalization.mean[1], alone.mean[0])
        torch.testing.assert_close(normalization.weight[1], alone.weight[0])


@pytest.mark.parametrize("kind", [Whitening, ChannelNormalization])
def test_each_product_is_normalised_by_itself(kind: type[Whitening]) -> None:
    """And the covariance that is left is the mean over all positions of those within the products."""
    features, product = drawn()
    normalization = kind(CHANNELS)
    allocate(normalization, 3)
    normalization._fitted.fill_(False)
    normalization.reset()
    normalization.update(features, product)
    left = normalization.finalize()
    outer = torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64)
    for place in range(3):
        alone = kind(CHANNELS)
        alone.update(features[product == place])
        alone.finalize()
        normal = alone(features[product == place])
        torch.testing.assert_close(normalization(features, product)[product == place], normal)
        rows = normal.movedim(1, -1).flatten(0, -2).double()
        outer += rows.T @ rows
    torch.testing.assert_close(left, outer / (len(features) * 12), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="The model has 3 products: say which each image shows"):
        normalization(features)


def test_codes_depend_on_the_place_alone() -> None:
    assert codes(1).tolist() == [[0.0] * CODE_CHANNELS]
    assert torch.equal(codes(5)[:3], codes(3))
    assert torch.pdist(codes(33)).min() > 1


def test_own_rows() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert own(rows, torch.tensor([2, 0, 2])).tolist() == [[4, 5], [0, 1], [4, 5]]
    assert own(rows[:1], None).tolist() == [[0, 1]]
    with pytest.raises(ValueError, match="has 3 products"):
        own(rows, None)


def test_places() -> None:
    assert places(["b", "a", "b"], ["a", "b"]).tolist() == [1, 0, 1]
    with pytest.raises(ValueError, match=r"^The product 'c' is none of the model's \(a, b\): "):
        places(["a", "c"], ["a", "b"])


def model_of(count: int, **settings: object) -> tuple[WTFlowModel, torch.Tensor, torch.Tensor]:
    """A random model that knows so many products, and features of their images."""
    model = WTFlowModel(get_settings(width=8, pre_trained=False, **settings)).eval()
    model.set_products(count, 0)
    generator = torch.Generator().manual_seed(1)
    product = torch.arange(count).repeat(6)
    means = 3 * torch.randn(count, 176, 1, 1, generator=generator)
    features = means[product] + torch.randn(6 * count, 176, 4, 4, generator=generator)
    model.update(features, product)
    model.finalize()
    with torch.no_grad():
        for field in model.flow_field.fields:
            field.condition.normal_()
    x0, found, _ = model.normalise(features)
    assert found.tolist() == product.tolist()
    model.observe(x0, (64, 64), product)
    return model, features, product


@pytest.mark.parametrize("network", ["pointwise", "unet"])
def test_an_image_is_scored_as_its_products_rows_say(network: str) -> None:
    """Whatever other products there are in the batch."""
    model, features, product = model_of(3, network=network, layers=("blocks.1", "blocks.2", "blocks.4"))
    if network == "unet":
        features = torch.nn.functional.interpolate(features, size=(8, 8))
    together = model.predict(features, (64, 64))
    for place in range(3):
        alone = model.predict(features[product == place], (64, 64))
        torch.testing.assert_close(together.pred_score[product == place], alone.pred_score, rtol=1e-4, atol=1e-5)
        x0 = model.normalization(features[product == place], product[product == place])
        t = torch.tensor([0.35])
        told = codes(3)[place : place + 1]
        y = x0 + model.flow_field(model.start_scale * x0, t, told)
        torch.testing.assert_close(model.flow(x0, product[product == place]), y, rtol=1e-4, atol=1e-5)
        generator = model.anomaly_map_generator
        log_density = model.log_density(y)
        top, level = generator.top_and_level(generator.values(log_density, generator.map(log_density, (64, 64))))
        slope, limit, offset = (rows[place] for rows in (generator.slope, generator.limit, generator.offset))
        torch.testing.assert_close(alone.pred_score, top - slope * level.minimum(limit) + offset)
        other = model.flow_field(model.start_scale * x0, t, codes(3)[(place + 1) % 3][None])
        assert not torch.allclose(y, x0 + other, rtol=1e-3)


def test_slope_and_limit_of_each_product() -> None:
    """Are those that the product's images alone give; a product without images keeps its own."""
    model, features, product = model_of(3)
    x0 = model.normalization(features, product)
    generator = model.anomaly_map_generator
    kept = generator.limit.clone()
    for place in range(3):
        alone = generator.without_limit()
        allocate(alone, 1)
        own_x0, own_product = x0[product == place], product[product == place]
        alone.observe(model.log_density(model.flow(own_x0, own_product)), (64, 64))
        for name in ("slope", "limit", "offset"):
            torch.testing.assert_close(alone.get_buffer(name)[0], generator.get_buffer(name)[place])
    model.observe(2 * x0[product == 1], (64, 64), product[product == 1])
    assert (generator.limit == kept).tolist() == [True, False, True]


def test_the_state_brings_the_number_of_products() -> None:
    model, features, _ = model_of(3)
    fresh = WTFlowModel(get_settings(width=8, pre_trained=False)).eval()
    fresh.load_state_dict(model.state_dict())
    given, expected = fresh.predict(features, (64, 64)), model.predict(features, (64, 64))
    assert torch.equal(given.pred_score, expected.pred_score)
    assert torch.equal(given.product, expected.product)
    again = WTFlowModel(get_settings(width=8, pre_trained=False)).eval()
    fresh.load_state_dict(again.state_dict())
    assert len(fresh.codes) == 1


def test_one_product_need_not_be_named() -> None:
    """And is told nothing: its code is 0, so the field's condition has no gradient and changes nothing."""
    model, features, product = model_of(1)
    x0 = model.normalization(features)
    for named in (product, None):
        torch.testing.assert_close(model.score(x0, (64, 64), named).pred_score, model.predict(features, (64, 64))[0])
    model.train()
    prediction, velocity = model.regress(x0, product=product)
    (prediction - velocity).square().mean().backward()
    for field in model.field.fields:
        assert field.condition.grad.abs().max() == 0


def test_a_product_costs_less_than_4_kilobytes() -> None:
    sizes = [
        sum(tensor.numel() * tensor.element_size() for tensor in model_of(count)[0].state_dict().values())
        for count in (2, 5)
    ]
    assert 0 < (sizes[1] - sizes[0]) / 3 < 4000
