"""What keeps the processes of a distributed run together."""

import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer
from torch.utils.data import DistributedSampler


class Processes(Callback):
    """One folder for all processes of a run, each test image once, and reductions in the same order in all of them.

    Does nothing where there is one process.
    """

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Agree on the folder, and have a test (or validation) repeat no image."""
        del pl_module
        if trainer.world_size == 1:
            return
        use_one_folder(trainer)
        if stage in ("test", "validate"):
            strategy: Any = trainer.strategy
            process = strategy.process_dataloader
            # Lightning has given the loader its sampler by then, and no worker has asked it for an image.
            strategy.process_dataloader = lambda loader: process(without_repeats(loader))

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Leave the strategy as it was."""
        del pl_module, stage
        vars(trainer.strategy).pop("process_dataloader", None)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Leave the strategy as it was, after a failure too."""
        del exception
        self.teardown(trainer, pl_module, "")

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        """Reduce the epoch's loss in all processes.

        The first one's progress bar asks for it about now, and would meet the others in another reduction.
        """
        del pl_module
        if trainer.world_size > 1:
            _ = trainer.callback_metrics


def use_one_folder(trainer: Trainer) -> None:
    """Have all processes write into the first one's folder, and ``latest`` lead there.

    anomalib makes a version of the folder in each process, the last of which becomes ``latest``: of the others' only
    those are left that have something in them. A run outside anomalib's versions has no ``latest``.
    """
    own = Path(trainer.default_root_dir)
    root = Path(trainer.strategy.broadcast(trainer.default_root_dir))
    # The property cannot be set, and callbacks that are not ours read it too.
    trainer._default_root_dir = str(root)  # type: ignore[attr-defined]
    if own != root:
        with suppress(OSError):
            own.rmdir()
    trainer.strategy.barrier("folder")
    latest = root.parent / "latest"
    versioned = re.fullmatch(r"v\d+", root.name) and latest.is_symlink()
    if trainer.is_global_zero and versioned and latest.resolve() != root.resolve():
        latest.unlink()
        latest.symlink_to(root, target_is_directory=True)


def without_repeats(loader: Any) -> Any:
    """Have the sampler of a loader show each image once over all processes.

    It repeats some so that all have the same number, which counts them twice. Fewer images than processes stay as they
    are, since each process needs one.
    """
    for sampler in (getattr(loader, "sampler", None), getattr(getattr(loader, "batch_sampler", None), "sampler", None)):
        if isinstance(sampler, DistributedSampler):
            count = len(sampler.dataset)  # type: ignore[arg-type]
            if count >= sampler.num_replicas:
                sampler.num_samples = len(range(sampler.rank, count, sampler.num_replicas))
                sampler.total_size = count
    return loader
