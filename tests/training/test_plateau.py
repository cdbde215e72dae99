"""When the training stops: its rule on given losses, and the loss that it measures."""

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Callback

from anomalib_wtflow import SyntheticParts, WTFlow, WTFlowModel
from anomalib_wtflow.settings import get_settings
from anomalib_wtflow.torch_model import NormalisedFeatures
from anomalib_wtflow.training.plateau import Plateau, matching_loss_of
from anomalib_wtflow.training.seeding import PLATEAU, generator_for
from conftest import as_mvtec, callback_of, quiet_engine

SMALL = {"image_size": 64, "false_alarm_rate": 0.3}
CHANNELS = 24 + 40 + 112


def stops_after(losses: list[float], tolerance: float, monkeypatch: pytest.MonkeyPatch) -> tuple[int | None, Plateau]:
    """After how many epochs with given losses the training is told to stop; None if it never is."""
    plateau, trainer = Plateau(SimpleNamespace(), tolerance), SimpleNamespace(should_stop=False)
    given = iter(losses)
    monkeypatch.setattr(plateau, "_loss", lambda *_: next(given))
    monkeypatch.setattr("anomalib_wtflow.training.plateau.FIRST", 2)
    for epoch in range(1, len(losses) + 1):
        plateau.on_train_epoch_end(trainer, None)
        if trainer.should_stop:
            return epoch, plateau
    return None, plateau


@pytest.mark.parametrize(
    ("losses", "tolerance", "epoch"),
    [
        ([1.0], 0.1, None),  # a single loss has nothing before it
        ([1.0, 0.95], 0.1, 2),
        (
            [1.0, 0.85, 0.8, 0.8],
            0.1,
            4,
        ),  # 0.8 in epoch 3 against 1.0 in epoch 1; 0.8 in epoch 4 against 0.85 in epoch 2
        ([1.0, 0.85, 0.8, 0.76], 0.1, None),
        ([1.0, 0.85, 0.91], 0.1, 3),
        ([1.0, 0.85, 0.5, 0.4, 0.76, 0.44], 0.1, None),  # epochs 5 and 6 against 2 and 3
        ([1.0, 0.85, 0.5, 0.4, 0.77, 0.4], 0.1, 5),
        ([1.0, 0.85, 0.5, 0.4, 0.5, 0.46], 0.1, 6),
        ([2.0, 1.0], 0.5, None),  # by just as much as asked for
        ([1.0, 1.5], 0.1, 2),
        ([float("nan")] * 4, 0.1, None),  # told of elsewhere
    ],
)
def test_rule(losses: list[float], tolerance: float, epoch: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """``L(e) > (1 - tolerance) L(e / 2)``, e / 2 rounded down."""
    assert stops_after(losses, tolerance, monkeypatch)[0] == epoch


def test_no_tolerance_measures_nothing() -> None:
    plateau, trainer = Plateau(SimpleNamespace(), 0.0), SimpleNamespace(should_stop=False)
    for _ in range(3):
        plateau.on_train_epoch_end(trainer, None)
    assert not trainer.should_stop
    assert plateau.state_dict() == {"losses": []}


def test_message(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """At the end of the training, and only where it was stopped."""
    caplog.set_level("INFO")
    epoch, plateau = stops_after([1.25, 1.0, 0.9, 0.975], 0.05, monkeypatch)
    assert epoch == 4
    assert not caplog.messages
    plateau.on_train_end(SimpleNamespace(), None)
    (message,) = caplog.messages
    assert message == (
        "Stopped after 4 epochs: since epoch 2 the matching loss changed by -2.5%, and --model.overrides.plateau asks "
        "for a fall of at least 5%."
    )
    caplog.clear()
    stops_after([1.25, 1.0], 0.05, monkeypatch)[1].on_train_end(SimpleNamespace(), None)
    assert not caplog.messages


def test_a_resumed_training_goes_on_from_the_losses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two losses of a checkpoint and two more stop where four do."""
    _, first = stops_after([1.0, 0.85], 0.1, monkeypatch)
    assert first.state_dict() == {"losses": [1.0, 0.85]}
    for losses, expected in (([0.8, 0.8], True), ([0.8, 0.76], False)):
        resumed, trainer, given = Plateau(SimpleNamespace(), 0.1), SimpleNamespace(should_stop=False), iter(losses)
        resumed.load_state_dict(first.state_dict())
        monkeypatch.setattr(resumed, "_loss", lambda *_, given=given: next(given))
        for _ in losses:
            resumed.on_train_epoch_end(trainer, None)
        assert trainer.should_stop == expected
        assert resumed.losses == [1.0, 0.85, *losses]
    assert first.losses == [1.0, 0.85]


# The loss ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> WTFlowModel:
    """Two fields: the averaged one is another than the one that is trained."""
    model = WTFlowModel(get_settings(width=8, coupling="worst_of_two", seed=3)).eval()
    model.average()
    with torch.no_grad():
        for parameter in model.field.parameters():
            parameter.mul_(2)
    return model


def by_hand(model: WTFlowModel, x0: torch.Tensor, rank: int = 0) -> float:
    """The mean of all squares, drawn as for training, of the averaged field's velocity."""
    generator = generator_for(3, PLATEAU, 0, rank)
    squares = []
    for part in x0.split(32):
        shown = model.sampling(part, generator)
        noise = torch.randn(shown.shape, generator=generator)
        times = torch.rand(len(part), generator=generator)
        noise = torch.where((shown * noise).sum(1, keepdim=True) > 0, -noise, noise)
        sample = model.path.sample(shown, noise, times)
        with torch.no_grad():
            squares.append((model.flow_field.points(sample.x_t, times) - sample.velocity).double().square())
    return torch.cat(squares).mean().item()


@pytest.mark.parametrize("count", [1, 32, 35])
def test_loss(model: WTFlowModel, count: int) -> None:
    """The same each time, whatever else draws; of the averaged field."""
    x0 = torch.randn(count, CHANNELS, 3, 4)
    state = torch.get_rng_state()
    loss = matching_loss_of(model, x0)
    assert torch.get_rng_state().equal(state)
    assert loss == pytest.approx(by_hand(model, x0), rel=1e-5)
    torch.manual_seed(5)
    assert matching_loss_of(model, x0) == loss
    assert matching_loss_of(model, x0, rank=1) == pytest.approx(by_hand(model, x0, rank=1), rel=1e-5) != loss


@pytest.mark.parametrize("split", [(4, 2), (6, 0)])
def test_processes_measure_one_loss(model: WTFlowModel, split: tuple[int, int]) -> None:
    """The mean over the images of all of them, also where one has none."""
    x0 = torch.randn(6, CHANNELS, 3, 4)
    parts = [part if len(part) else torch.empty(0) for part in x0.split(split)]
    module = SimpleNamespace(model=model, device=torch.device("cpu"), evaluating=nullcontext)

    def loss(rank: int, reduce: object) -> float:
        strategy = SimpleNamespace(reduce=reduce)
        trainer = SimpleNamespace(global_rank=rank, world_size=2, strategy=strategy)
        count = len(parts[rank])
        reference = NormalisedFeatures(parts[rank], torch.zeros(count, dtype=torch.int64), torch.zeros(count))
        return Plateau(SimpleNamespace(reference=reference), 0.1)._loss(trainer, module)

    told: list[torch.Tensor] = []

    def record(value: torch.Tensor, reduce_op: str) -> torch.Tensor:
        assert reduce_op == "sum"
        told.append(value)
        return value

    for rank in (0, 1):
        loss(rank, record)
    assert [float(count) for _, count in told] == list(map(float, split))
    expected = sum(len(part) * by_hand(model, part, rank) for rank, part in enumerate(parts) if len(part)) / 6
    for rank in (0, 1):
        assert loss(rank, lambda value, reduce_op: sum(told)) == pytest.approx(expected, rel=1e-5)


# In the engine -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tolerance", "epochs"), [(0.9, 2), (0.0, 4)])
def test_the_engine_stops(
    parts: SyntheticParts,
    tmp_path: Path,
    tolerance: float,
    epochs: int,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """After two epochs, since no loss falls by 90 % in one; else after all of them. With a loss for each epoch."""
    monkeypatch.setattr("anomalib_wtflow.training.plateau.FIRST", 2)
    caplog.set_level("INFO")
    model = WTFlow(max_epochs=4, overrides={"plateau": tolerance}, **SMALL)
    measured: list[float] = []

    class Measures(Callback):
        def on_train_epoch_end(self, trainer: object, pl_module: WTFlow) -> None:
            del trainer
            plateau = callback_of(pl_module, Plateau)
            assert len(plateau.caching.reference.x0) == 13
            with pl_module.evaluating():
                measured.append(matching_loss_of(pl_module.model, plateau.caching.reference.x0))

    engine = quiet_engine(tmp_path, callbacks=[Measures()])
    engine.fit(model, datamodule=as_mvtec(parts))
    assert model.trainer.current_epoch == epochs
    assert torch.load(engine.best_model_path, weights_only=False)["epoch"] == epochs - 1
    assert len(measured) == epochs
    assert callback_of(model, Plateau).losses == (measured if tolerance else [])
    stopped = [message for message in caplog.messages if message.startswith("Stopped after")]
    assert [message.split(":")[0] for message in stopped] == ["Stopped after 2 epochs"] * (tolerance > 0)
