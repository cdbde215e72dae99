"""Random numbers that depend on the model's seed and the place in the training, and on nothing else (ours).

Each training batch and each epoch has a generator of its own, so that a training that was killed and resumed draws what
an uninterrupted one would have drawn, and nothing that others draw from torch's global generator matters. (Where images
are not cached and loader processes bring them, the first epoch's order comes from torch's generator, seeded before.)
"""

from collections.abc import Iterator
from itertools import islice
from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Generator
from torch.utils.data import DistributedSampler, RandomSampler, Sampler, WeightedRandomSampler

ORDER, NOISE, PLATEAU = 0, 1, 2
"""What the numbers are for."""


def generator_for(seed: int, purpose: int, place: int, rank: int = 0, device: torch.device | str = "cpu") -> Generator:
    """Return a generator for one purpose at one place (step or epoch) of one process's training."""
    (state,) = np.random.SeedSequence([seed, purpose, place, rank]).generate_state(1, np.uint64)
    return Generator(device).manual_seed(int(state) >> 1)


class Rest(Sampler[int]):
    """What a sampler gives after some images.

    Args:
        sampler: The sampler.
        shown: How many images were shown.
    """

    def __init__(self, sampler: Sampler[int], shown: int) -> None:
        self.sampler, self.shown = sampler, shown

    def __iter__(self) -> Iterator[int]:
        """Leave out those that were shown."""
        return islice(iter(self.sampler), self.shown, None)

    def __len__(self) -> int:
        """How many are left."""
        return max(0, len(self.sampler) - self.shown)  # type: ignore[arg-type]


class SeededOrder(Callback):
    """Order of the training batches, by seed and epoch.

    Args:
        seed: The model's seed.
    """

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Go on with the rest of an epoch that a checkpoint was written in: Lightning would show its first batches."""
        progress = trainer.fit_loop.epoch_loop.batch_progress
        batches: Any = getattr(trainer.train_dataloader, "batch_sampler", None)
        if trainer.ckpt_path is None or not progress.current.ready:
            return
        self.on_train_epoch_start(trainer, pl_module)  # which Lightning does not call for that epoch
        if not progress.is_last_batch and getattr(batches, "batch_size", None):
            batches.sampler = Rest(batches.sampler, progress.current.ready * batches.batch_size)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show all images again."""
        del pl_module
        batches: Any = getattr(trainer.train_dataloader, "batch_sampler", None)
        if isinstance(getattr(batches, "sampler", None), Rest):
            batches.sampler = batches.sampler.sampler

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the sampler its generator; a distributed one has its own, by seed and epoch."""
        del pl_module
        sampler = getattr(trainer.train_dataloader, "sampler", None)
        if isinstance(sampler, RandomSampler | WeightedRandomSampler):
            sampler.generator = generator_for(self.seed, ORDER, trainer.current_epoch)
        elif isinstance(sampler, DistributedSampler):
            sampler.seed = self.seed
