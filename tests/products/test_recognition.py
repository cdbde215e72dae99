"""Which product an image shows, and what is kept for each: against brute force."""

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power
from scipy.spatial.distance import pdist
from torch import nn

from anomalib_wtflow import WTFlowModel
from anomalib_wtflow.fit import fit_model
from anomalib_wtflow.flow.rows import allocate, class_embeddings
from anomalib_wtflow.products.recognition import DISTANCE_MARGIN, RIDGE, UNKNOWN, ProductRecognizer, Recognition
from anomalib_wtflow.settings import get_settings

CHANNELS = 5
COUNTS = (7, 4, 9)


def drawn(counts: tuple[int, ...] = COUNTS, apart: float = 4.0, channels: int = CHANNELS) -> tuple[torch.Tensor, ...]:
    """Features of images of products whose means lie apart, and the index of each one's product, shuffled."""
    generator = torch.Generator().manual_seed(3)
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    index = index[torch.randperm(len(index), generator=generator)]
    means = apart * torch.randn(len(counts), channels, 1, 1, generator=generator)
    return means[index] + torch.randn(len(index), channels, 3, 4, generator=generator), index


def fitted(features: torch.Tensor, index: torch.Tensor, count: int = 3) -> ProductRecognizer:
    recognizer = ProductRecognizer(CHANNELS)
    allocate(recognizer, count)
    recognizer.fit(zip(features.split(6), index.split(6), strict=True))
    return recognizer


def by_hand(features: torch.Tensor, index: torch.Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The centroids before whitening, the whitening matrix, and the rows of pooled features."""
    rows, which = features.mean((2, 3)).double().numpy(), index.numpy()
    kinds = range(which.max() + 1)
    means = np.stack([rows[which == k].mean(0) for k in kinds])
    within = sum(np.cov(rows[which == k].T, bias=True) for k in kinds) / len(kinds)
    ridged = within + RIDGE * np.trace(within) / CHANNELS * np.eye(CHANNELS)
    return means, fractional_matrix_power(ridged, -0.5).real, rows


@pytest.mark.parametrize(("apart", "half_way"), [(0.5, False), (40.0, True)])
def test_recognition_against_brute_force(apart: float, half_way: bool) -> None:
    """Products that lie far apart leave room for defects; those that are close, for what training images spread."""
    features, index = drawn(apart=apart)
    recognizer = fitted(features, index)
    means, matrix, rows = by_hand(features, index)
    np.testing.assert_allclose(recognizer.weight.numpy(), matrix, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(recognizer.centroids.numpy(), means @ matrix.T, rtol=1e-4, atol=1e-4)
    distance = (((rows[:, None] - means) @ matrix.T) ** 2).mean(2)
    nearest = distance.min(1)
    between = pdist(means @ matrix.T).min() ** 2 / CHANNELS
    spread = nearest.max() + DISTANCE_MARGIN * (nearest.max() - nearest.mean())
    assert (between / 4 > spread) == half_way
    limit = max(spread, between / 4)
    assert float(recognizer.limit) == pytest.approx(limit, rel=1e-4)
    found = recognizer(features)
    assert found.index.tolist() == distance.argmin(1).tolist()
    np.testing.assert_allclose(found.distance.numpy(), nearest / limit, rtol=1e-2, atol=1e-5)
    assert not found.unknown.any()


def test_names() -> None:
    recognition = Recognition(torch.tensor([1, 0, 1]), torch.tensor([0.2, 1.0, 1.1]))
    assert recognition.names(["a", "b"]) == ["b", "a", UNKNOWN]


def test_one_product_is_never_unknown() -> None:
    features, index = drawn((9,))
    recognizer = fitted(features, index, count=1)
    found = recognizer(1e6 * torch.randn(4, CHANNELS, 2, 2))
    assert found.index.tolist() == [0] * 4
    assert found.distance.tolist() == [0.0] * 4


def test_a_product_of_one_image() -> None:
    """Has a centroid; where each has one only, distances are Euclidean."""
    features, index = drawn((1, 1, 1))
    recognizer = fitted(features, index)
    assert torch.equal(recognizer.weight, torch.eye(CHANNELS))
    assert recognizer(features).index.tolist() == index.tolist()


def test_what_is_known_stays_when_a_product_is_added() -> None:
    """Metric and first centroids, however the images of known products have changed since; the limit is of all."""
    features, index = drawn()
    recognizer = fitted(features[index < 2], index[index < 2], count=2)
    before = {name: tensor.clone() for name, tensor in recognizer.state_dict().items()}
    allocate(recognizer, 3)
    recognizer.fitted_rows[2:] = False
    assert not recognizer.fitted
    changed = features + 0.1 * (index == 0).view(-1, 1, 1, 1)
    recognizer.fit([(changed, index)])
    assert recognizer.fitted
    assert torch.equal(recognizer.centroids[:2], before["centroids"])
    assert torch.equal(recognizer.weight, before["weight"])
    expected = features[index == 2].mean((0, 2, 3)) @ before["weight"].T
    torch.testing.assert_close(recognizer.centroids[2], expected, rtol=1e-4, atol=1e-4)
    assert recognizer(features).index.tolist() == index.tolist()
    assert (recognizer(changed).distance <= 1).all()
    assert recognizer(features + 1e3).unknown.all()


def test_recognition_is_in_full_precision() -> None:
    """Whatever precision the rest of the model has, and in an exported graph."""
    features, index = drawn()
    recognizer = fitted(features, index)
    exact = recognizer(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = recognizer(features)
    assert torch.equal(mixed.distance, exact.distance)
    exported = torch.export.export(recognizer, (features,)).module()(features)
    assert torch.equal(exported[0], exact.index)
    torch.testing.assert_close(exported[1], exact.distance)


# Rows -----------------------------------------------------------------------------------------------------------------


def test_room_is_made_in_all_parts_and_rows_are_kept() -> None:
    """New rows repeat the first and are their own memory; the last go when there are too many."""

    class Holder(nn.Module):
        per_product = ("kept",)

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.tensor([[1.0, 2.0]]))
            self.register_buffer("other", torch.tensor([7.0]))
            self.part = ProductRecognizer(3)

    holder = Holder()
    allocate(holder, 2)
    holder.kept[1] = torch.tensor([3.0, 4.0])
    allocate(holder, 4)
    holder.kept[2, 0] = 9
    assert holder.kept.tolist() == [[1, 2], [3, 4], [9, 2], [1, 2]]
    assert holder.part.centroids.shape == (4, 3)
    assert holder.other.tolist() == [7]
    allocate(holder, 2)
    assert holder.kept.tolist() == [[1, 2], [3, 4]]


def model_of(count: int, **settings: object) -> tuple[WTFlowModel, torch.Tensor, torch.Tensor]:
    """A model of so many products, and features of their images."""
    overrides = {"width": 8, "pre_trained": False, "max_epochs": 2, "plateau": 0.0, **settings}
    model = WTFlowModel(get_settings(**overrides))
    model.set_products(count)
    features, index = drawn((6,) * count, channels=176)
    if overrides.get("network") == "unet":
        features = torch.nn.functional.interpolate(features, size=(8, 8))
    fit_model(model, list(features.clone()), index, (64, 64))
    with torch.no_grad():
        for field in model.field.fields:
            field.class_map.normal_()
    return model, features, index


@pytest.mark.parametrize("network", ["pointwise", "unet"])
def test_an_image_is_scored_as_its_products_rows_say(network: str) -> None:
    """Whatever other products there are in the batch."""
    model, features, index = model_of(3, network=network)
    with torch.no_grad():
        together = model.predict(features, (64, 64))
        for k in range(3):
            own = index == k
            alone = model.predict(features[own], (64, 64))
            torch.testing.assert_close(together.pred_score[own], alone.pred_score, rtol=1e-4, atol=1e-5)
            x0 = model.normalization(features[own], index[own])
            velocities = [
                model.field(model.start_scale * x0, torch.tensor([0.35]), class_embeddings(3)[other][None])
                for other in (k, (k + 1) % 3)
            ]
            y = model.flow(x0, index[own])
            torch.testing.assert_close(y, x0 + velocities[0], rtol=1e-4, atol=1e-5)
            assert not torch.allclose(y, x0 + velocities[1], rtol=1e-3)
            generator = model.anomaly_map_generator
            log_density = model.log_density(y)
            top, level = generator.top_and_level(generator.values(log_density, generator.map(log_density, (64, 64))))
            slope, limit, offset = (rows[k] for rows in (generator.slope, generator.limit, generator.offset))
            torch.testing.assert_close(alone.pred_score, top - slope * level.minimum(limit) + offset)


def test_the_state_brings_the_number_of_products() -> None:
    model, features, _ = model_of(3)
    fresh = WTFlowModel(get_settings(width=8, pre_trained=False))
    fresh.load_state_dict(model.state_dict())
    given, expected = fresh.predict(features, (64, 64)), model.predict(features, (64, 64))
    assert torch.equal(given.pred_score, expected.pred_score)
    assert torch.equal(given.recognition.index, expected.recognition.index)
    fresh.load_state_dict(WTFlowModel(get_settings(width=8, pre_trained=False)).state_dict())
    assert len(fresh.class_embeddings) == 1


def test_a_product_costs_less_than_4_kilobytes() -> None:
    sizes = [
        sum(tensor.numel() * tensor.element_size() for tensor in model_of(count)[0].state_dict().values())
        for count in (2, 5)
    ]
    assert 0 < (sizes[1] - sizes[0]) / 3 < 4000
