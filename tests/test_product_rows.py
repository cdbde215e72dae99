"""Rows of several products: room for them, the same under any precision and in any number of processes."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import fractional_matrix_power
from scipy.spatial.distance import pdist
from torch import nn

from anomalib_wtflow import WTFlowModel
from anomalib_wtflow.flow.normalization import Whitening
from anomalib_wtflow.flow.rows import allocate
from anomalib_wtflow.products import MARGIN, RIDGE, ProductRecognition
from anomalib_wtflow.settings import get_settings

CHANNELS = 6


def drawn(*counts: int, channels: int = CHANNELS, apart: float = 3.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of so many images of each product, shuffled, and which product each shows."""
    generator = torch.Generator().manual_seed(5)
    product = torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))
    product = product[torch.randperm(len(product), generator=generator)]
    means = apart * torch.randn(len(counts), channels, 1, 1, generator=generator)
    return means[product] + torch.randn(len(product), channels, 4, 4, generator=generator), product


def emptied(module: Any, count: int, known: int = 0) -> Any:
    """Room for so many products, of which the first are known."""
    allocate(module, count)
    module._fitted[known:] = False
    module.reset()
    return module


class Holder(nn.Module):
    """A module whose rows are in itself and in a part of it."""

    per_product = ("own",)
    own: torch.Tensor
    other: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("own", torch.tensor([[1.0, 2.0]]))
        self.register_buffer("other", torch.tensor([7.0]))
        self.part = Whitening(3)


def test_room_is_made_in_all_parts_and_rows_are_kept() -> None:
    """New rows repeat the first; the last go when there are too many; buffers that are not by product stay."""
    holder = Holder()
    allocate(holder, 2)
    holder.own[1] = torch.tensor([3.0, 4.0])
    holder.part.mean[:] = torch.arange(6.0).view(2, 3)
    allocate(holder, 4)
    assert holder.own.tolist() == [[1, 2], [3, 4], [1, 2], [1, 2]]
    assert holder.part.mean.tolist() == [[0, 1, 2], [3, 4, 5], [0, 1, 2], [0, 1, 2]]
    assert [len(holder.part.get_buffer(name)) for name in Whitening.per_product] == [4, 4, 4]
    assert holder.other.tolist() == [7]
    assert set(holder.state_dict()) == {"own", "other", "part.mean", "part.weight", "part._fitted"}
    holder.own[2, 0] = 9  # rows are their own memory
    assert holder.own.tolist() == [[1, 2], [3, 4], [9, 2], [1, 2]]
    before = holder.own
    allocate(holder, 4)
    assert holder.own is before
    allocate(holder, 2)
    assert holder.own.tolist() == [[1, 2], [3, 4]]
    assert holder.part.weight.shape == (2, 3, 3)


@pytest.mark.parametrize(("apart", "half_way"), [(0.3, False), (3.0, True)])
def test_the_limit_where_a_product_is_added(apart: float, half_way: bool) -> None:
    """In the first metric and from the first centroids, however the images of known products have changed since."""
    features, product = drawn(8, 6, 7, apart=apart)
    recognition = emptied(ProductRecognition(CHANNELS), 2)
    recognition.update(features[product < 2], product[product < 2])
    recognition.finalize()
    first = features[product < 2].mean((2, 3)).double().numpy()
    which = product[product < 2].numpy()
    means = np.stack([first[which == place].mean(0) for place in (0, 1)])
    within = sum(np.cov(first[which == place].T, bias=True) for place in (0, 1)) / 2
    matrix = fractional_matrix_power(within + RIDGE * np.trace(within) / CHANNELS * np.eye(CHANNELS), -0.5).real

    changed = features + 0.5 * (product == 0).view(-1, 1, 1, 1)
    emptied(recognition, 3, known=2)
    recognition.update(changed, product)
    recognition.finalize()
    rows = changed.mean((2, 3)).double().numpy()
    centroids = np.concatenate([means, rows[product.numpy() == 2].mean(0, keepdims=True)]) @ matrix.T
    np.testing.assert_allclose(recognition.centroids.numpy(), centroids, rtol=1e-4, atol=1e-4)
    nearest = (((rows @ matrix.T)[:, None] - centroids) ** 2).mean(2).min(1)
    between = pdist(centroids).min() ** 2 / CHANNELS
    spread = nearest.max() + MARGIN * (nearest.max() - nearest.mean())
    assert (between / 4 > spread) == half_way
    limit = max(spread, between / 4)
    assert float(recognition.limit) == pytest.approx(limit, rel=1e-4)


def test_a_second_product_ends_the_infinite_limit() -> None:
    features, product = drawn(8, 6)
    recognition = emptied(ProductRecognition(CHANNELS), 1)
    recognition.update(features[product == 0], product[product == 0])
    recognition.finalize()
    assert recognition.limit.isinf()
    emptied(recognition, 2, known=1)
    recognition.update(features, product)
    recognition.finalize()
    assert recognition.limit.isfinite()
    assert (recognition(features).strangeness <= 1).all()
    assert (recognition(features + 1e3).strangeness > 1).all()


def test_products_are_told_in_full_precision() -> None:
    """Whatever precision the rest of the model has, and in an exported graph."""
    features, product = drawn(5, 5, 5)
    recognition = emptied(ProductRecognition(CHANNELS), 3)
    recognition.update(features, product)
    recognition.finalize()
    exact = recognition(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = recognition(features)
        halved = recognition(features.bfloat16())
    assert torch.equal(mixed.product, exact.product)
    assert torch.equal(mixed.strangeness, exact.strangeness)
    assert torch.equal(halved.strangeness, recognition(features.bfloat16().float()).strangeness)
    exported = torch.export.export(recognition, (features,)).module()(features)
    assert torch.equal(exported[0], exact.product)
    torch.testing.assert_close(exported[1], exact.strangeness)


def in_two_processes(run: Callable[[int, Any], Any]) -> list[Any]:
    """Run two parts side by side; what each hands to ``reduce`` is reduced with what the other does."""
    slots: list[Any] = [None, None]
    results: list[Any] = [None, None]
    barrier = threading.Barrier(2, timeout=20)

    def reduce_of(rank: int) -> Any:
        def reduce(value: torch.Tensor, operation: str) -> torch.Tensor:
            slots[rank] = value.clone()
            barrier.wait()
            both = list(slots)
            barrier.wait()
            assert both[0].shape == both[1].shape
            assert both[0].dtype == both[1].dtype
            return both[0] + both[1] if operation == "sum" else torch.maximum(*both)

        return reduce

    def work(rank: int) -> None:
        try:
            results[rank] = run(rank, reduce_of(rank))
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not barrier.broken
    return results


def small(**settings: Any) -> WTFlowModel:
    """A model with random weights of its field, the same each time, that the product's code does not reach."""
    model = WTFlowModel(get_settings(width=8, pre_trained=False, **settings)).eval()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.flow_field.named_parameters():
            if not name.endswith("condition"):
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def fitted(model: WTFlowModel, features: torch.Tensor, product: torch.Tensor, count: int) -> WTFlowModel:
    model.set_products(count, 0)
    model.update(features, product)
    model.finalize()
    x0, found, _ = model.normalise(features)
    with torch.no_grad():
        model.observe(x0, (64, 64), found)
    return model


@pytest.mark.parametrize("normalization", ["channel", "whitening", "layer_norm"])
def test_a_model_of_many_scores_as_models_of_one(normalization: str) -> None:
    """Each fitted to one product's images alone, with the same field; rows, maps and scores."""
    features, product = drawn(6, 9, 7, channels=176)
    many = fitted(small(normalization=normalization), features, product, 3)
    with torch.no_grad():
        together = many.predict(features, (64, 64))
    assert together.product is not None
    assert together.product.tolist() == product.tolist()
    for place in range(3):
        own = features[product == place]
        one = fitted(small(normalization=normalization), own, torch.zeros(len(own), dtype=torch.int64), 1)
        for part in ("normalization", "anomaly_map_generator"):
            for name in getattr(getattr(one, part), "per_product", ()):
                rows, row = (getattr(model, part).get_buffer(name) for model in (many, one))
                torch.testing.assert_close(rows[place], row[0], rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            alone = one.predict(own, (64, 64))
        torch.testing.assert_close(together.pred_score[product == place], alone.pred_score, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(together.anomaly_map[product == place], alone.anomaly_map, rtol=1e-4, atol=1e-4)
    spread = torch.stack([together.pred_score[product == place].mean() for place in range(3)])
    assert spread.isfinite().all()
    assert together.pred_score.std() > 1e-3


@pytest.mark.parametrize("share", ["half", "one process has no image of a product", "one process has no image"])
def test_two_processes_fit_the_whole_model(share: str) -> None:
    """Recognition, normalisation, rare positions, slope and limit are those of one process, in both."""
    features, product = drawn(6, 8, 7, channels=176)
    first = {
        "half": torch.arange(len(product)) % 2 == 0,
        "one process has no image of a product": product != 1,
        "one process has no image": torch.ones(len(product), dtype=torch.bool),
    }[share]
    whole = fitted(small(), features, product, 3)
    parts = [(features[first], product[first]), (features[~first], product[~first])]

    def fit(rank: int, reduce: Any) -> WTFlowModel:
        model = models[rank]
        model.set_products(3, 0)
        own_features, own_product = parts[rank]
        if len(own_features):
            model.update(own_features, own_product)
        model.finalize(reduce)
        x0, found = torch.empty(0), torch.empty(0, dtype=torch.int64)
        with torch.no_grad():
            if len(own_features):
                x0, found, _ = model.normalise(own_features)
            model.observe(x0, (64, 64), found, reduce)
        return model

    models = [small(), small()]
    for model in in_two_processes(fit):
        assert model.fitted
        for name, tensor in whole.state_dict().items():
            if "feature_extractor" not in name and tensor.is_floating_point():
                torch.testing.assert_close(model.state_dict()[name], tensor, rtol=1e-3, atol=1e-4, msg=name)
    for name, tensor in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], tensor), name
