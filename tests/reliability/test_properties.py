"""What holds of every model, image and batch, and not only of those that other tests name: drawn by Hypothesis."""

from contextlib import nullcontext
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from anomalib_wtflow import WTFlowModel, WTFlowPostProcessor
from anomalib_wtflow.anomaly_map import DENSITIES, MAPS, AnomalyMapGenerator, density_proxy
from anomalib_wtflow.fit import fit_model
from anomalib_wtflow.flow.coupling import BATCH_COUPLINGS, COUPLINGS
from anomalib_wtflow.flow.normalization import NORMALIZATIONS
from anomalib_wtflow.flow.path import PATHS
from anomalib_wtflow.flow.solver import SOLVERS
from anomalib_wtflow.products.recognition import Recognition
from anomalib_wtflow.settings import get_settings
from anomalib_wtflow.torch_model import Predictions

settings.register_profile("stable", deadline=None, derandomize=True, database=None, max_examples=40)
stable = settings.get_profile("stable")
PRECISIONS = {
    torch.float32: (1e-4, 1e-5),
    torch.bfloat16: (0.05, 0.05),
    torch.float16: (0.01, 0.01),
}
"""By the precision of autocast, how far scores of one image in different batches may be apart: relative, absolute.

Kernels add up in another order for another batch size, by about as much as the precision rounds."""
SETTINGS: dict[str, Any] = {
    "layers": st.sampled_from([("blocks.4",), ("blocks.1", "blocks.2"), ("blocks.0", "blocks.2", "blocks.4")]),
    "network": st.sampled_from(["pointwise", "unet"]),
    "normalization": st.sampled_from(list(NORMALIZATIONS)),
    "coupling": st.sampled_from(list(COUPLINGS)),
    "path": st.sampled_from(list(PATHS)),
    "solver": st.sampled_from(list(SOLVERS)),
    "steps": st.integers(1, 3),
    "pool_size": st.sampled_from([1, 3]),
    "density": st.sampled_from(list(DENSITIES)),
    "anomaly_map": st.sampled_from(list(MAPS)),
    "image_score": st.sampled_from(["map", "features"]),
    "background_slope": st.sampled_from([None, 0.0, 1.0]),
    "sigma": st.sampled_from([0.0, 4.0]),
}
sides = st.integers(33, 97)


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def fitted(products: int, size: tuple[int, int], **chosen: Any) -> WTFlowModel:
    """A model fitted for an epoch to noise of another brightness for each product."""
    model = WTFlowModel(get_settings(width=8, max_epochs=1, plateau=0.0, **chosen))
    model.set_products(products)
    index = torch.arange(products).repeat_interleave(4)
    with torch.no_grad():
        features = model.extract(randn(4 * products, 3, *size, seed=1) + 3 * index[:, None, None, None])
    fit_model(model, list(features), index, size)
    return model


@given(
    chosen=st.fixed_dictionaries(SETTINGS),
    height=sides,
    width=sides,
    batch=st.integers(2, 5),
    products=st.integers(1, 3),
    precision=st.sampled_from(list(PRECISIONS)),
)
@settings(stable, max_examples=20)
def test_any_model_scores_any_image(
    chosen: dict[str, Any], height: int, width: int, batch: int, products: int, precision: torch.dtype
) -> None:
    """As :func:`check` says."""
    least = {"unet": 8, "pointwise": 1}[chosen["network"]] * (16 if "blocks.4" in chosen["layers"] else 8)
    height, width = max(height, least), max(width, least)
    check(chosen, (height, width), batch, products, precision, *PRECISIONS[precision])


def check(
    chosen: dict[str, Any],
    size: tuple[int, int],
    batch: int,
    products: int,
    precision: torch.dtype,
    rtol: float,
    atol: float,
) -> None:
    """Shapes, finite and no less than 0, the same bit by bit when asked again, and whatever the image's companions."""
    height, width = size
    model = fitted(products, size, **chosen)
    images = randn(batch, 3, height, width, seed=2) + torch.arange(batch)[:, None, None, None]

    @torch.no_grad()
    def scored(images: Tensor) -> Any:
        reduced = precision != torch.float32
        with torch.autocast("cpu", dtype=precision) if reduced else nullcontext():
            return model(images)

    result, again = scored(images), scored(images)
    assert result.anomaly_map.shape == (batch, 1, height, width)
    assert result.pred_score.shape == result.recognition.index.shape == (batch,)
    for name in ("pred_score", "anomaly_map"):
        assert torch.equal(getattr(result, name), getattr(again, name)), name
    assert result.pred_score.isfinite().all()
    assert result.anomaly_map.isfinite().all()
    assert (result.pred_score >= -atol).all()
    assert (result.anomaly_map >= -atol).all()
    strange = torch.cat([images[:1], 20 * randn(2, 3, height, width, seed=3)])  # far from all that was fitted to
    for companions, k in ((images[:1], 0), (images.flip(0), batch - 1), (strange, 0)):
        other = scored(companions)
        for name in ("pred_score", "anomaly_map"):
            given, expected = (getattr(each, name).float() for each in (other, result))
            torch.testing.assert_close(given[k], expected[0], rtol=rtol, atol=atol, msg=name)
        assert other.recognition.index[k] == result.recognition.index[0]


# Post-processing ------------------------------------------------------------------------------------------------------


@given(
    scores=st.lists(st.floats(0, 2.0**99, width=32), min_size=2, max_size=20),
    threshold=st.floats(2.0**-99, 2.0**99, width=32),
    sensitivity=st.floats(0.01, 0.99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
@settings(stable, max_examples=150)
def test_normalised_scores_keep_the_order_and_the_verdict(
    scores: list[float], threshold: float, sensitivity: float, dtype: torch.dtype
) -> None:
    """A higher raw score is never a lower normalised one; the threshold is 0.5; anomalous is what is above it."""
    raw = torch.tensor([*scores, threshold], dtype=dtype).sort().values
    limit = torch.tensor(threshold, dtype=dtype)
    post = WTFlowPostProcessor().to(dtype)
    post._image_threshold.fill_(limit)
    post._pixel_threshold.fill_(limit)
    shown = Recognition(torch.zeros(len(raw), dtype=torch.int64), torch.zeros(len(raw), dtype=dtype))
    predictions = Predictions(raw, raw[:, None, None, None], shown)
    result = post(predictions)
    normalised, label = result.pred_score, result.pred_label
    assert (normalised.diff() >= 0).all()
    assert ((normalised >= 0) & (normalised <= 1)).all()
    assert (normalised[raw == limit] == 0.5).all()
    assert torch.equal(label, raw > limit)
    assert (normalised[label] >= 0.5).all()
    assert (normalised[~label] <= 0.5).all()
    assert torch.equal(result.anomaly_map.flatten(), normalised)
    assert torch.equal(result.pred_mask.flatten(), label)
    post.image_sensitivity = sensitivity
    asked = post(predictions).pred_label
    assert (asked.int().diff() >= 0).all()
    assert (asked >= label).all() if sensitivity >= 0.5 else (asked <= label).all()


# Map and score --------------------------------------------------------------------------------------------------------


@given(
    size=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    image=st.tuples(sides, sides),
    layers=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    kind=st.sampled_from(list(DENSITIES)),
    image_score=st.sampled_from(["map", "features"]),
    sigma=st.sampled_from([0.0, 2.5]),
    factor=st.floats(1.0, 50.0),
    seed=st.integers(0, 1000),
)
@settings(stable)
def test_what_lies_farther_out_is_nowhere_less_anomalous(
    size: tuple[int, int],
    image: tuple[int, int],
    layers: list[int],
    kind: str,
    image_score: str,
    sigma: float,
    factor: float,
    seed: int,
) -> None:
    """End points of the flow times a factor at one position: no pixel of the map, and no score, becomes less."""
    generator = AnomalyMapGenerator("absolute", sigma=sigma, image_score=image_score, channels=layers)
    y = randn(1, sum(layers), *size, seed=seed, dtype=torch.float64)
    farther, index = y.clone(), torch.zeros(1, dtype=torch.int64)
    farther[..., seed % size[0], seed % size[1]] *= factor
    (before, score), (after, higher) = (
        generator(density_proxy(each, layers, kind), image, index) for each in (y, farther)
    )
    assert (after >= before - 1e-9).all()
    assert (higher >= score - 1e-9).all()
    assert before.shape == (1, 1, *image)


# Couplings and paths --------------------------------------------------------------------------------------------------

shapes = st.tuples(st.integers(1, 6), st.integers(1, 5), st.integers(1, 4), st.integers(1, 4))
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16])


@given(shape=shapes, dtype=dtypes, seed=st.integers(0, 1000), shift=st.floats(-3, 3))
@settings(stable)
def test_couplings(shape: tuple[int, ...], dtype: torch.dtype, seed: int, shift: float) -> None:
    """What each makes of the noise, in any precision, whatever the order of the images and where the data lies."""
    x0, noise = randn(*shape, seed=seed, dtype=dtype) + shift, randn(*shape, seed=seed + 1, dtype=dtype)
    order = torch.randperm(shape[0], generator=torch.Generator().manual_seed(seed))
    costs = {}
    for name, coupling in COUPLINGS.items():
        coupled = coupling(x0, noise)
        assert coupled.shape == noise.shape
        assert coupled.dtype == dtype
        assert torch.equal(coupled, coupling(x0, noise))
        costs[name] = (x0.double() - coupled.double()).square().sum().item()
        if name in BATCH_COUPLINGS:  # a permutation of the images' noise
            rows, drawn = (sorted(map(tuple, each.flatten(1).tolist())) for each in (coupled, noise))
            assert rows == drawn
        elif name != "independent":  # each image by itself
            assert torch.equal(coupling(x0[order], noise[order]), coupled[order])
        if name == "worst_of_two":
            assert torch.equal(coupled.abs(), noise.abs())
    slack = 1e-9 + torch.finfo(dtype).eps * 10 * max(costs.values())
    assert costs["optimal"] - slack <= costs["independent"] <= costs["worst"] + slack
    assert costs["independent"] <= costs["worst_of_two"] + slack
