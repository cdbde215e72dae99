"""The store of features: a uniform sample by its statistics, and processes against one."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from threading import Barrier
from typing import Any

import torch

from anomalib_wtflow.features.store import FeatureStore, Row

ROW = 2 * 3 * 3 * 4
"""Bytes of the features of an image here."""


def features_of(path: str) -> torch.Tensor:
    return torch.full((2, 3, 3), float(path))


def filled(images: list[tuple[str, str]], budget: float, seed: int = 0, batch: int = 4) -> FeatureStore:
    """A store that was given the images, files and products, in their order."""
    store = FeatureStore(budget, seed)
    for start in range(0, len(images), batch):
        paths, products = zip(*images[start : start + batch], strict=True)
        store.add(torch.stack([features_of(path) for path in paths]), paths, products)
    return store


def content(rows: list[Row]) -> list[tuple[str, str, float]]:
    return [(row.path, row.product, float(row.features.mean())) for row in rows]


def test_beyond_the_budget_each_product_keeps_a_uniform_sample() -> None:
    """20 images of one product and 3 of another, in ten rows: each 7 of the 20 are as likely, and the 3 stay."""
    large, small = [f"{k:02d}" for k in range(20)], ["05.5", "12.5", "19.5"]
    images = sorted([(path, "large") for path in large] + [(path, "small") for path in small])
    singles, pairs, trials = Counter(), Counter(), 2000
    for seed in range(trials):
        rows = filled(images, 10 * ROW, seed).rows()
        assert [row.path for row in rows if row.product == "small"] == small
        kept = [row.path for row in rows if row.product == "large"]
        assert len(kept) == 7
        singles.update(kept)
        pairs.update(combinations(kept, 2))
    for counts, size, share in ((singles, 20, 7 / 20), (pairs, 190, 7 * 6 / (20 * 19))):
        assert len(counts) == size
        deviation = (trials * share * (1 - share)) ** 0.5
        assert max(abs(count - trials * share) for count in counts.values()) < 4.5 * deviation


def test_within_the_budget_all_stay_whatever_the_order() -> None:
    images = [(str(k), "a" if k % 3 else "b") for k in range(11)]
    stores = [filled(images, 11 * ROW), filled(images[::-1], 11 * ROW, seed=5, batch=3)]
    assert content(stores[0].rows()) == content(stores[1].rows())
    assert content(stores[0].rows()) == [(path, product, float(path)) for path, product in sorted(images)]


def gathered(stores: list[FeatureStore]) -> list[FeatureStore]:
    """What each process has after the exchange; threads stand for the processes."""
    barrier, shared = Barrier(len(stores)), {}

    def run(rank: int) -> FeatureStore:
        def broadcast(value: Any, source: int) -> Any:
            if rank == source:
                shared["value"] = value
            barrier.wait()
            result = shared["value"]
            barrier.wait()
            return result

        return stores[rank].gathered(broadcast, len(stores), rank)

    with ThreadPoolExecutor(len(stores)) as pool:
        return list(pool.map(run, range(len(stores))))


def test_processes_have_what_one_would_have() -> None:
    """Each takes every other image; the sampler repeats the first one, so that both have as many."""
    images = [(f"{k:03d}", "a" if k % 3 else "b") for k in range(601)]
    shares = [(images + images[:1])[rank::2] for rank in range(2)]
    alone = content(filled(images, 601 * ROW).rows())
    for store in gathered([filled(share, 301 * ROW, seed) for seed, share in enumerate(shares)]):
        assert content(store.rows()) == alone
    sampled = [store.rows() for store in gathered([filled(share, 50 * ROW, seed) for seed, share in enumerate(shares)])]
    assert content(sampled[0]) == content(sampled[1])
    files = [row.path for row in sampled[0]]
    assert 50 <= len(files) == len(set(files)) <= 100
