"""Features of training images in memory: all, or a uniform sample within a budget."""

import heapq
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor

CHUNK = 256
"""Rows that processes exchange at a time."""


class Row(NamedTuple):
    """Features of an image, ``(C, H, W)``, with file and product; ``key`` is -priority."""

    key: float
    number: int
    path: str
    product: str
    features: Tensor


class FeatureStore:
    """Memory of the features of a stream of images: all, or as many as the budget holds.

    Beyond the budget, each product keeps a uniform sample without replacement of its images, by bottom-k sampling: each
    image draws a priority in [0, 1), and the product with the most rows loses the row with the highest. A product
    keeps the images below the lowest priority that it lost, so small products stay whole. (Ours.)

    Args:
        budget: Bytes.
        seed: Seed of the priorities.
    """

    def __init__(self, budget: float, seed: int = 0) -> None:
        self.budget = budget
        self.generator = Generator().manual_seed(seed)
        self.size = 0
        self.number = 0
        self.heaps: defaultdict[str, list[Row]] = defaultdict(list)
        self.cutoffs: dict[str, float] = {}

    def __len__(self) -> int:
        """Return the number of rows."""
        return sum(map(len, self.heaps.values()))

    def add(self, features: Tensor, paths: Sequence[str], products: Sequence[str]) -> None:
        """Take a batch: features ``(N, C, H, W)``, and the file and product of each image."""
        draws = torch.rand(len(features), generator=self.generator, dtype=torch.float64).tolist()
        features = features.detach().float().cpu()
        for row, path, product, priority in zip(features, paths, products, draws, strict=True):
            self.number += 1
            if priority < self.cutoffs.get(product, 1.0):
                self.keep(Row(-priority, self.number, path, product, row.clone()))

    def keep(self, row: Row) -> None:
        """Add a row, and drop others beyond the budget."""
        heapq.heappush(self.heaps[row.product], row)
        self.size += row.features.nbytes
        while self.size > self.budget and len(self) > 1:
            largest = max(self.heaps, key=lambda product: len(self.heaps[product]))
            lost = heapq.heappop(self.heaps[largest])
            self.cutoffs[largest] = -lost.key
            self.size -= lost.features.nbytes

    def rows(self) -> list[Row]:
        """Return the rows, sorted by file, so that the order in which images came does not matter."""
        return sorted((row for heap in self.heaps.values() for row in heap), key=lambda row: (row.path, row.number))

    def gathered(self, broadcast: Callable[[Any, int], Any], processes: int, rank: int) -> "FeatureStore":
        """Return the rows of all processes, each file once: samplers repeat some files.

        Args:
            broadcast: Gives an object of the process with a rank to all.
            processes: Number of processes.
            rank: Rank of this one.
        """
        own, result = self.rows(), FeatureStore(self.budget * processes)
        for source in range(processes):
            for product, cutoff in broadcast(self.cutoffs, source).items():
                result.cutoffs[product] = min(result.cutoffs.get(product, 1.0), cutoff)
        files: set[str] = set()
        for source in range(processes):
            for start in range(0, broadcast(len(own), source), CHUNK):
                chunk: Iterable[Row] = broadcast(own[start : start + CHUNK] if source == rank else None, source)
                for row in chunk:
                    if row.path not in files and -row.key < result.cutoffs.get(row.product, 1.0):
                        files.add(row.path)
                        result.keep(row)
        return result
