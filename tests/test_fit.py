"""The fit, a function of tensors: statistics, the field's training, the background level, against brute force."""

import math

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power

from anomalib_wtflow import WTFlowModel
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.fit import BACKGROUND_IMAGES, FEWEST, MOST, fit_background, fit_model
from anomalib_wtflow.flow.field import get_field
from anomalib_wtflow.flow.path import ProbabilityPath
from anomalib_wtflow.flow.regression import CHECK_EVERY, FieldTraining, TrainingPlan, fit_field, has_settled
from anomalib_wtflow.flow.rows import class_embeddings
from anomalib_wtflow.images import hold_out
from anomalib_wtflow.settings import get_settings

CHANNELS = 24 + 40 + 112
SIZE = (64, 64)


def drawn(*counts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of so many images of each product, shuffled, and the index of each one's product."""
    generator = torch.Generator().manual_seed(5)
    index = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    index = index[torch.randperm(len(index), generator=generator)]
    means = 3 * torch.randn(len(counts), CHANNELS, 1, 1, generator=generator)
    return means[index] + torch.randn(len(index), CHANNELS, 4, 4, generator=generator), index


def fitted(features: torch.Tensor, index: torch.Tensor, **kwargs: object) -> tuple[WTFlowModel, list[float]]:
    settings = {"width": 8, "pre_trained": False, "max_epochs": 3, "batch_size": 8, "plateau": 0.0, **kwargs}
    model = WTFlowModel(get_settings(**settings))
    model.set_products(int(index.max()) + 1)
    return model, fit_model(model, list(features.clone()), index, SIZE)


def test_the_same_twice_and_another_seed_differs() -> None:
    """Bit by bit, whatever torch's own generator is at."""
    features, index = drawn(12, 9)
    (one, losses), _ = fitted(features, index), torch.rand(7)
    again, same = fitted(features, index)
    other, _ = fitted(features, index, seed=1)
    assert losses == same
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    name = "field.fields.0.head.weight"
    assert not torch.equal(one.state_dict()[name], other.state_dict()[name])


def test_the_loss_falls() -> None:
    """On features of three degrees of freedom, of which the noise has many more."""
    features = torch.einsum("ck,nkhw->nchw", torch.randn(CHANNELS, 3), torch.randn(20, 3, 4, 4))
    _, losses = fitted(features, torch.zeros(20, dtype=torch.int64), max_epochs=15)
    assert len(losses) == 15
    assert losses[-1] < 0.8 * losses[0]


def test_statistics_against_brute_force() -> None:
    """Of three products; the rows are normalised in place."""
    features, index = drawn(6, 9, 7)
    model, _ = fitted(features, index, normalization="channel")
    rows = list(features.clone())
    fit_model(model, rows, index, SIZE)
    left = np.zeros((CHANNELS, CHANNELS))
    for k in range(3):
        points = features[index == k].movedim(1, -1).flatten(0, -2).double().numpy()
        scale = 1 / np.sqrt(points.var(0) + 0.01 * points.var(0).mean())
        np.testing.assert_allclose(model.normalization.mean[k].numpy(), points.mean(0), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(model.normalization.weight[k].numpy(), scale, rtol=1e-4)
        normalised = (points - points.mean(0)) * scale
        given = torch.stack(rows)[index == k].movedim(1, -1).flatten(0, -2).numpy()
        np.testing.assert_allclose(given, normalised, rtol=1e-3, atol=1e-3)
        left += normalised.T @ normalised / (len(features) * 16)
    block = left[:24, :24]
    ridged = block + 0.01 * np.trace(block) / 24 * np.eye(24)
    expected = fractional_matrix_power(ridged, -0.5)
    np.testing.assert_allclose(model.sampling.whitening[0].numpy(), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("image_score", ["map", "features"])
def test_background_level_of_each_product(image_score: str) -> None:
    """Slope and limit from the model's own scores of its training images."""
    features, index = drawn(20, 30)
    model, _ = fitted(features, index, image_score=image_score)
    generator = model.anomaly_map_generator
    with torch.no_grad():
        log_density = model.log_density(model.flow(*_normalised(model, features)))
    anomaly_map = generator.map(log_density, SIZE)
    tops, levels = (each.double() for each in generator.top_and_level(generator.values(log_density, anomaly_map)))
    for k in range(2):
        top, level = tops[index == k], levels[index == k]
        covariance = torch.cov(torch.stack([top, level]))
        slope = (covariance[0, 1] / covariance[1, 1]).clamp(0.75, 1.25).float()
        torch.testing.assert_close(generator.slope[k], slope, rtol=1e-4, atol=1e-4)
        limit = (3 * level.max() - 2 * level.mean()).float()
        torch.testing.assert_close(generator.limit[k], limit, rtol=1e-4, atol=1e-4)


def _normalised(model: WTFlowModel, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    x0, recognition = model.normalise(features)
    return x0, recognition.index


@pytest.mark.parametrize(("products", "each"), [(1, BACKGROUND_IMAGES), (16, MOST // 16), (64, FEWEST)])
def test_images_that_the_background_level_comes_from(products: int, each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As many of each product, so that the time is bounded."""
    model = WTFlowModel(get_settings(width=8, pre_trained=False))
    model.set_products(products)
    index, seen = torch.arange(products).repeat(120), []
    monkeypatch.setattr(model.anomaly_map_generator, "fit", lambda density, size, index: seen.append(index))
    fit_background(model, torch.zeros(1, CHANNELS, 1, 1).expand(len(index), -1, -1, -1), index, SIZE)
    assert torch.bincount(seen[0]).tolist() == [each] * products


def test_a_model_of_many_scores_as_models_of_one() -> None:
    """With the same field, whose class maps are 0: rows, maps and scores."""
    features, index = drawn(6, 9, 7)
    many, _ = fitted(features, index)
    with torch.no_grad():
        for field in many.field.fields:
            field.class_map.zero_()
        x0, shown = many.normalise(features)
        fit_background(many, x0, shown.index, SIZE)
        together = many.predict(features, SIZE)
    assert together.recognition.index.tolist() == index.tolist()
    for k in range(3):
        own = features[index == k]
        alone, _ = fitted(own, torch.zeros(len(own), dtype=torch.int64))
        alone.field.load_state_dict(many.field.state_dict())
        with torch.no_grad():
            x0, shown = alone.normalise(own)
            fit_background(alone, x0, shown.index, SIZE)
            expected = alone.predict(own, SIZE)
        torch.testing.assert_close(together.pred_score[index == k], expected.pred_score, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(together.anomaly_map[index == k], expected.anomaly_map, rtol=1e-3, atol=1e-3)


# The training loop ---------------------------------------------------------------------------------------------------


def training(**plan: object) -> FieldTraining:
    """Of a small field on noise."""
    torch.manual_seed(4)
    field = get_field("pointwise", [3], width=8)
    options = {"max_epochs": 4, "batch_size": 4, "plateau": 0.0, **plan}
    path, x0 = ProbabilityPath("linear"), torch.randn(10, 3, 4, 4)
    return FieldTraining(field, x0, path, "worst_of_two", TrainingPlan(**options))


def test_averaged_weights_are_the_running_average() -> None:
    """``m_n = m_{n-1} + (w_n - m_{n-1}) / (1 + averaging (n - 1))``, written out as a weighted sum of all w_n."""
    run, share, weights = training(averaging=0.3), 0.3, []
    run.optimizer.register_step_post_hook(
        lambda *_: weights.append([parameter.detach().double().clone() for parameter in run.field.parameters()])
    )
    fit_field(run)
    assert len(weights) == 4 * 3
    factors = [1 / (1 + share * n) for n in range(len(weights))]
    shares = [f * math.prod(1 - later for later in factors[n + 1 :]) for n, f in enumerate(factors)]
    assert sum(shares) == pytest.approx(1)
    for place, parameter in enumerate(run.field.parameters()):
        expected = sum(part * each[place] for part, each in zip(shares, weights, strict=True))
        torch.testing.assert_close(parameter.detach().double(), expected, rtol=1e-4, atol=1e-6)


def test_without_averaging_the_last_weights_are_kept() -> None:
    run = training(averaging=0.0)
    losses = [run.epoch() for _ in range(4)]
    other = training(averaging=0.0)
    assert fit_field(other) == losses
    for one, two in zip(run.field.parameters(), other.field.parameters(), strict=True):
        assert torch.equal(one, two)


def test_the_plateau_rule() -> None:
    """After epoch e, a multiple of 5 from 20 on: L(e) > (1 - p) L(e / 2)."""
    assert has_settled({10: 1.0, 20: 0.995}, 20, 0.01)
    assert not has_settled({10: 1.0, 20: 0.985}, 20, 0.01)
    assert not has_settled({5: 1.0, 10: 1.0}, 10, 0.01)
    assert not has_settled({10: 1.0, 25: 1.0}, 25, 0.01)


@pytest.mark.parametrize(("settles", "epochs"), [(lambda epoch: 1.0, 20), (lambda epoch: 1 / epoch, 60),
                                                 (lambda epoch: max(1 / epoch, 1 / 22), 50)])  # fmt: skip
def test_the_training_stops_where_the_loss_settles(settles: object, epochs: int) -> None:
    """The third falls until 22: at 40 it is 0.91 of that at 20, at 50 that of 25."""
    run = training(max_epochs=60, plateau=0.01, batch_size=10)
    looks = []
    run.reference_loss = lambda: looks.append(1) or settles(CHECK_EVERY * len(looks))
    seen = []
    assert len(fit_field(run, log=lambda epoch, loss: seen.append((epoch, loss)))) == epochs
    assert [epoch for epoch, _ in seen] == list(range(epochs))
    assert len(looks) == epochs // CHECK_EVERY


def test_the_reference_loss_draws_the_same_each_time() -> None:
    run = training(averaging=0.2)
    assert run.reference_loss() == run.reference_loss()
    before = run.reference_loss()
    for _ in range(5):
        run.epoch()
    assert run.reference_loss() != before


def test_the_class_embedding_reaches_the_field() -> None:
    """That of the first product is 0, so its map has no gradient; that of others depends on the index alone."""
    assert class_embeddings(1).eq(0).all()
    assert torch.equal(class_embeddings(5)[:3], class_embeddings(3))
    one, _ = fitted(*drawn(12))
    two, _ = fitted(*drawn(12, 12))
    assert all(field.class_map.eq(0).all() for field in one.field.fields)
    assert all(field.class_map.ne(0).any() for field in two.field.fields)


def test_what_cannot_be_fitted() -> None:
    with pytest.raises(WTFlowError, match=r"The training loss became (nan|inf) in epoch \d+: lower learning_rate"):
        fitted(*drawn(12), learning_rate=1e30, max_epochs=9)
    with pytest.raises(WTFlowError, match=r"coupling 'worst' rearranges noise .* batches have 1 image: give more"):
        fitted(*drawn(1))
    with pytest.raises(WTFlowError, match="The training features are empty, NaN or infinite"):
        fitted(drawn(4)[0] * torch.nan, drawn(4)[1])


# The images held out --------------------------------------------------------------------------------------------------


def test_the_share_held_out_is_that_of_each_product() -> None:
    products = ["b", "a", "a", "b", "a", "a", "b", "a", "c", "c"]
    held = hold_out(products, 0.4)
    assert [sum(held[k] for k, name in enumerate(products) if name == each) for each in "abc"] == [2, 1, 1]
    assert torch.equal(held, hold_out(products, 0.4))
    alone = hold_out(["a"] * 5, 0.4)
    assert alone.tolist() == [bool(held[k]) for k, name in enumerate(products) if name == "a"]
    assert not torch.equal(hold_out(["a"] * 50, 0.4, seed=1), hold_out(["a"] * 50, 0.4))
    with pytest.raises(WTFlowError, match="The product 'rare' has 1 normal training image: give at least 2"):
        hold_out([*products, "rare"], 0.4)
