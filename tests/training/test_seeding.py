"""Random numbers by seed and place, and the same command twice."""

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from lightning import seed_everything

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.training.plateau import Plateau
from anomalib_wtflow.training.seeding import NOISE, ORDER, PLATEAU, generator_for
from conftest import as_mvtec, callback_of, quiet_engine

SMALL = {"image_size": 64, "false_alarm_rate": 0.3, "overrides": {"plateau": 0.0}}


def test_each_place_has_numbers_of_its_own() -> None:
    places = [
        (seed, purpose, k, rank)
        for seed in (0, 1)
        for purpose in (ORDER, NOISE, PLATEAU)
        for k in range(5)
        for rank in (0, 1)
    ]
    drawn = {place: torch.randn(4, generator=generator_for(*place)) for place in places}
    assert len({tuple(values.tolist()) for values in drawn.values()}) == len(places)
    for place, values in drawn.items():
        assert torch.equal(values, torch.randn(4, generator=generator_for(*place)))


def train(
    root: Path, parts: SyntheticParts, elsewhere: int, epochs: int = 3, cache: float = 1.0, **kwargs: object
) -> WTFlow:
    seed_everything(elsewhere)
    settings = {**SMALL, **kwargs}
    model = WTFlow(max_epochs=epochs, **{**settings, "overrides": {**settings["overrides"], "feature_cache": cache}})
    quiet_engine(root, limit_val_batches=0).fit(model, datamodule=as_mvtec(parts))
    return model


@pytest.mark.parametrize("cache", [1.0, 0])
def test_whatever_else_draws(parts: SyntheticParts, tmp_path: Path, cache: float) -> None:
    """The global generator's state before the model is built changes nothing; the seed does."""
    first, second = (train(tmp_path, parts, k, cache=cache).state_dict() for k in (1, 2))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, equal_nan=True)
    other = train(tmp_path, parts, 1, cache=cache, seed=1).state_dict()
    assert not torch.equal(other["model.field.fields.0.head.weight"], first["model.field.fields.0.head.weight"])


def test_a_resumed_training_draws_what_an_uninterrupted_one_would(parts: SyntheticParts, tmp_path: Path) -> None:
    """Stopped after two of four epochs; the averaged weights and the losses that tell the end go on, too."""
    overrides = {"plateau": 1e-9}

    class Stops(WTFlow):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = self.current_epoch == 1

    whole = train(tmp_path, parts, 1, epochs=4, overrides=overrides)
    seed_everything(7)
    engine = quiet_engine(tmp_path / "half", limit_val_batches=0)
    engine.fit(Stops(max_epochs=4, **{**SMALL, "overrides": overrides}), datamodule=as_mvtec(parts))
    assert torch.load(engine.best_model_path, weights_only=False)["epoch"] == 1
    resumed = WTFlow(max_epochs=4, **{**SMALL, "overrides": overrides})
    again = quiet_engine(tmp_path / "rest", limit_val_batches=0)
    again.fit(resumed, datamodule=as_mvtec(parts), ckpt_path=engine.best_model_path)
    assert again.trainer.current_epoch == 4
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    losses = [callback_of(model, Plateau).losses for model in (whole, resumed)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == len(set(losses[0])) == 4


def test_accumulated_batches_draw_each_for_itself(parts: SyntheticParts, tmp_path: Path) -> None:
    """Two batches a step, two steps an epoch: four draws in two epochs, all different."""
    drawn: list[float] = []
    model = WTFlow(max_epochs=2, **SMALL)
    regress = model.model.regress

    def recorded(
        x0: torch.Tensor, generator: torch.Generator, product: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert product.tolist() == [0] * len(x0)
        drawn.append(torch.rand(1, generator=generator.clone_state()).item())
        return regress(x0, generator, product=product)

    model.model.regress = recorded
    engine = quiet_engine(tmp_path, limit_val_batches=0, accumulate_grad_batches=2)
    engine.fit(model, datamodule=as_mvtec(parts))
    assert model.trainer.global_step == 2
    assert len(set(drawn)) == 4


def test_the_order_changes_from_epoch_to_epoch(parts: SyntheticParts, tmp_path: Path) -> None:
    """Each epoch shows every image once, in an order of its own."""
    seen: list[tuple[float, ...]] = []

    class Spy(WTFlow):
        def training_step(self, batch: object, *args: object) -> object:
            seen.append(tuple(batch.features[:, 0, 0, 0].tolist()))
            return super().training_step(batch, *args)

    quiet_engine(tmp_path, limit_val_batches=0).fit(Spy(max_epochs=3, **SMALL), datamodule=as_mvtec(parts))
    epochs = [sum(seen[2 * k : 2 * k + 2], ()) for k in range(3)]
    assert len(set(epochs)) == 3
    assert len({frozenset(Counter(epoch).items()) for epoch in epochs}) == 1


@pytest.mark.slow
def test_the_same_command_twice(tmp_path: Path) -> None:
    """In two processes, bit by bit: thresholds and weights in the checkpoint, and every score of the test."""
    saved = []
    for name in ("first", "second"):
        program = Path(sys.executable).with_name("anomalib")
        command = [program, "train", "--model", "WTFlow", "--model.image_size", "64", "--model.max_epochs", "3"]
        command += ["--data", "SyntheticParts", "--data.root", tmp_path / "data", "--data.side", "64"]
        command += ["--data.train_images", "16", "--data.test_images", "8", "--data.defect_images", "4"]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        (tmp_path / name).mkdir()
        subprocess.run(list(map(str, command)), cwd=tmp_path / name, check=True, capture_output=True, env=environment)
        (checkpoint,) = (tmp_path / name).rglob("model.ckpt")
        model = WTFlow.load_from_checkpoint(checkpoint).eval()
        data = SyntheticParts(tmp_path / "data", 16, 8, 4, 64)
        data.setup()
        scores = torch.cat([model(item.image[None]).pred_score for item in data.test_data])
        saved.append({**torch.load(checkpoint, weights_only=False)["state_dict"], "scores": scores})
    assert saved[0]["post_processor._image_threshold"] > 0
    for key, tensor in saved[0].items():
        torch.testing.assert_close(saved[1][key], tensor, rtol=0, atol=0, equal_nan=True)
