"""What a machine, or a person, does to a training: killed, stopped, started twice."""

import csv
import os
import random
import shutil
import signal
import time
import warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.engine import Engine
from commands import Command, Fault, checkpoint, place, run, runs, state, training
from PIL import Image

from anomalib_wtflow import SyntheticParts, WTFlow, calibrate
from anomalib_wtflow.training import plateau
from anomalib_wtflow.training.plateau import Plateau
from anomalib_wtflow.training.resuming import Resuming, newest_checkpoint, written_by
from anomalib_wtflow.training.same_data import difference, marks_of
from conftest import callback_of, quiet_engine

OURS = "anomalib_wtflow."
STEP = f"{OURS}lightning_model:WTFlow.training_step"
FILES = ("--model.overrides.feature_cache", "1e-6")
"""Features in files, not in memory."""


def half_written(descriptor: int) -> None:
    """Leave half of a file, and end."""
    os.ftruncate(descriptor, os.fstat(descriptor).st_size // 2)
    os.kill(os.getpid(), signal.SIGKILL)


DICE = random.Random(23)
MOMENTS: dict[str, tuple[Any, int]] = {
    "before the first image": (Fault(f"{OURS}training.image_check:ImageCheck.setup"), 0),
    "while features are written": (Fault(f"{OURS}features.cache:FeatureStore.append", DICE.randrange(4)), 0),
    "while the file of features is mapped": (Fault("mmap:mmap", DICE.randrange(4)), 0),
    "in the first epoch": (Fault(STEP, DICE.randrange(4)), 0),
    "in a later epoch": (Fault(STEP, call := DICE.randrange(4, 12)), call // 4),
    "while weights are averaged": (
        Fault(f"{OURS}torch_model:WTFlowModel.average", call := DICE.randrange(4, 12)),
        call // 4,
    ),
    "while the threshold is set": (
        Fault(f"{OURS}post_processor:WTFlowPostProcessor.calibrate", call := DICE.randrange(1, 3)),
        call,
    ),
    "before a checkpoint is written": (Fault(f"{OURS}training.resuming:write_whole", call := DICE.randrange(3)), call),
    "in the middle of a checkpoint": (partial(place, "os:fsync", call := DICE.randrange(1, 3), half_written), call),
    "after the last epoch": (Fault(f"{OURS}training.calibration:Calibration.on_train_end"), 3),
    "in the test": (Fault(f"{OURS}reporting.verdicts:Verdicts._write"), 3),
}
"""What kills a training of three epochs of four steps, and how many checkpoints it has written by then."""


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="session")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A training that nothing happens to: its run, its scores, its weights, and how long it took."""
    folder = tmp_path_factory.mktemp("whole")
    run(folder, "--help")  # imports torch
    began = time.monotonic()
    done = run(folder, *training(data))
    assert done.status == 0, done.text
    (only,) = runs(folder)
    return SimpleNamespace(scores=scores(only), state=state(only), seconds=time.monotonic() - began)


def scores(run: Path) -> list[dict[str, str]]:
    """Every number of the test that ended a run."""
    with (run / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def same(run: Path, whole: SimpleNamespace) -> None:
    """Nothing differs, bit by bit: the scores that the user is shown, and the model that is saved."""
    assert len(whole.scores) == 10
    assert scores(run) == whole.scores
    saved = state(run)
    assert saved.keys() == whole.state.keys()
    for name, tensor in whole.state.items():
        torch.testing.assert_close(saved[name], tensor, rtol=0, atol=0, equal_nan=True)


def again(folder: Path, data: Path, *more: Any) -> Any:
    """Go on from the last checkpoint, as a user does, or from nothing if there is none."""
    last = checkpoint(folder / "results/WTFlow/SyntheticParts/latest")
    way = ("--ckpt_path", last) if last.is_file() else ()
    done = run(folder, *training(data, *more, *way))
    assert done.status == 0, done.text
    return done


@pytest.mark.slow
@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_resumed(moment: str, data: Path, whole: SimpleNamespace, tmp_path: Path) -> None:
    """Whenever it was killed, the last checkpoint is whole, and what goes on from it ends as if nothing had been."""
    fault, checkpoints = MOMENTS[moment]
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    files = FILES if "features" in moment else ()
    killed = run(tmp_path, *training(data, *files), faults=[fault], TMPDIR=str(temporary))
    assert killed.status == -signal.SIGKILL
    assert [path for path in temporary.rglob("*") if path.is_file() and path.stat().st_size > 0] == []
    (first,) = runs(tmp_path)
    assert checkpoint(first).is_file() == (checkpoints > 0)
    if checkpoints:
        saved = torch.load(checkpoint(first), weights_only=True)
        assert saved["epoch"] == checkpoints - 1
    again(tmp_path, data, *files)
    same(runs(tmp_path)[-1], whole)


@pytest.mark.slow
def test_killed_again_and_again_by_the_clock(data: Path, whole: SimpleNamespace, tmp_path: Path) -> None:
    """Four times after a random part of the time that the whole takes, whatever it was doing then."""
    dice = random.Random(5)
    for _ in range(4):
        last = checkpoint(tmp_path / "results/WTFlow/SyntheticParts/latest")
        way = ("--ckpt_path", last) if last.is_file() else ()
        command = Command(tmp_path, *training(data, *way))
        time.sleep(dice.uniform(0.2, 0.7) * whole.seconds)
        command.process.kill()
        command.process.join()
        for each in runs(tmp_path):
            if checkpoint(each).is_file():
                state(each)
    again(tmp_path, data)
    same(runs(tmp_path)[-1], whole)


def small(root: Path) -> SyntheticParts:
    return SyntheticParts(root, 16, 8, 4, 64, train_batch_size=4)


def test_a_training_that_had_settled_is_not_trained_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed after the epoch that the plateau made the last: Lightning alone would train one more."""
    monkeypatch.setattr(plateau, "FIRST", 3)
    settings: Any = {"image_size": 64, "max_epochs": 6, "false_alarm_rate": 0.3, "overrides": {"plateau": 0.9}}
    ended, engine = WTFlow(**settings), quiet_engine(tmp_path / "ended")
    engine.fit(ended, datamodule=small(data))
    assert ended.trainer.current_epoch == len(callback_of(ended, Plateau).losses) == 3
    resumed, other = WTFlow(**settings), quiet_engine(tmp_path / "resumed")
    other.fit(resumed, datamodule=small(data), ckpt_path=engine.best_model_path)
    assert resumed.trainer.global_step == ended.trainer.global_step == 12
    for name, tensor in ended.state_dict().items():
        torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert other.best_model_path != engine.best_model_path
    assert Path(other.best_model_path).read_bytes() == Path(engine.best_model_path).read_bytes()


def test_a_resumed_training_is_tested_with_what_became_of_it(data: Path, tmp_path: Path) -> None:
    """anomalib 2.7 alone would test the checkpoint that it went on from; a test of that one still does so."""

    def tested(engine: Engine) -> list[dict[str, str]]:
        return scores(Path(engine.trainer.default_root_dir))

    settings: Any = {"image_size": 64, "false_alarm_rate": 0.3, "overrides": {"plateau": 0.0}, "visualizer": False}
    first = quiet_engine(tmp_path / "first")
    first.train(WTFlow(max_epochs=1, **settings), datamodule=small(data))
    saved = first.best_model_path
    resumed, model = quiet_engine(tmp_path / "resumed"), WTFlow(max_epochs=2, **settings)
    resumed.train(model, datamodule=small(data), ckpt_path=saved)
    assert model.trainer.global_step == 8
    assert torch.load(resumed.best_model_path, weights_only=True)["global_step"] == 8
    of_the_resumed = tested(resumed)
    again = quiet_engine(tmp_path / "again")
    again.test(WTFlow(**settings), datamodule=small(data), ckpt_path=resumed.best_model_path)
    assert tested(again) == of_the_resumed
    resumed.test(model, datamodule=small(data), ckpt_path=saved)
    assert tested(resumed) == tested(first) != of_the_resumed


def test_the_newest_checkpoint_is_named(data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not the best one of a user's callback, nor one that cannot be gone on from, nor the template of its name."""
    settings: Any = {"image_size": 64, "max_epochs": 2, "false_alarm_rate": 0.3, "overrides": {"plateau": 0.0}}
    first = ModelCheckpoint(tmp_path / "first", "{epoch}", monitor="train_loss", mode="max", save_top_k=2)
    weights = ModelCheckpoint(tmp_path / "weights", save_weights_only=True)
    model = WTFlow(**settings)
    quiet_engine(tmp_path, callbacks=[first, weights]).fit(model, datamodule=small(data))
    assert Path(first.best_model_path).name == "epoch=0.ckpt"
    newest = tmp_path / "first" / "epoch=1.ckpt"

    def said(trainer: Any) -> str:
        caplog.clear()
        with caplog.at_level("INFO"):
            callback_of(trainer.lightning_module, Resuming).on_exception(trainer, model, KeyboardInterrupt())
        return caplog.messages[-1]

    assert f"give the same command --ckpt_path {newest} to go on." in said(model.trainer)
    os.utime(newest, (time.time() + 86400,) * 2)  # from a machine whose clock is ahead
    second = ModelCheckpoint(tmp_path / "second", "{epoch}-{step}")
    resumed = WTFlow(**settings)
    quiet_engine(tmp_path, callbacks=[second]).fit(resumed, datamodule=small(data), ckpt_path=newest)
    copied = tmp_path / "second" / "epoch=1.ckpt"
    assert [Path(second.best_model_path), *copied.parent.iterdir()] == [copied, copied]
    assert copied.read_bytes() == newest.read_bytes()
    assert f" --ckpt_path {copied} to go on." in said(resumed.trainer)
    copied.unlink()
    assert f" --ckpt_path {newest} to go on." in said(resumed.trainer)
    newest.unlink()
    assert said(resumed.trainer).endswith(": there is no checkpoint to go on from.")


def test_a_checkpoint_beyond_the_last_epoch_is_refused(data: Path, tmp_path: Path) -> None:
    """As Lightning refuses it; one of the last epoch, or of the one after it, has nothing left to train."""
    settings: Any = {"image_size": 64, "false_alarm_rate": 0.3, "overrides": {"plateau": 0.0}, "visualizer": False}
    first = quiet_engine(tmp_path / "first")
    first.fit(WTFlow(max_epochs=3, **settings), datamodule=small(data))
    saved = first.best_model_path
    for epochs in (2, 3):
        again = WTFlow(max_epochs=epochs, **settings)
        quiet_engine(tmp_path / str(epochs)).fit(again, datamodule=small(data), ckpt_path=saved)
        assert again.trainer.global_step == 12
    sentence = (
        rf"^'{saved}' is in epoch 2 \(of which the first is 0\), but max_epochs is 1: give 3 or more to go on, "
        r"or leave --ckpt_path out to train anew\.$"
    )
    trainers = quiet_engine(tmp_path / "trainers", max_epochs=1)
    for engine, model in (
        (quiet_engine(tmp_path / "own"), WTFlow(max_epochs=1, **settings)),
        (trainers, WTFlow(**settings)),
    ):
        with pytest.raises(ValueError, match=sentence):
            engine.fit(model, datamodule=small(data), ckpt_path=saved)
    trainers.test(WTFlow(**settings), datamodule=small(data), ckpt_path=saved, verbose=False)


def test_file_times_are_compared_among_a_trainings_own_checkpoints(tmp_path: Path) -> None:
    """Of the one that it began with, and of those that an earlier run wrote, they may be another clock's."""
    began, best, first, last = (tmp_path / f"{name}.ckpt" for name in ("began", "best", "first", "last"))
    for path, when in ((began, 9), (best, 8), (first, 2), (last, 1)):
        path.touch()
        os.utime(path, (when, when))
    writer, other = ModelCheckpoint(tmp_path), ModelCheckpoint(tmp_path)
    trainer: Any = SimpleNamespace(ckpt_path=str(began), checkpoint_callbacks=[writer, other])
    assert newest_checkpoint(trainer, written_by(trainer)) == str(began)
    writer.best_model_path = str(best)  # as the checkpoint that it began with says
    before = written_by(trainer)
    assert newest_checkpoint(trainer, before) == str(began)
    other.best_model_path = str(last)
    assert newest_checkpoint(trainer, before) == str(last)
    writer.last_model_path = str(first)
    assert newest_checkpoint(trainer, before) == str(first)
    os.utime(best, (7, 7))  # written once more
    assert newest_checkpoint(trainer, before) == str(best)
    other.best_model_path = "s3://bucket/remote.ckpt"
    assert newest_checkpoint(trainer, before) == str(best)
    for path in (best, first):
        path.unlink()
    assert newest_checkpoint(trainer, before) == "s3://bucket/remote.ckpt"
    trainer.ckpt_path, trainer.checkpoint_callbacks = None, []
    assert newest_checkpoint(trainer, before) is None


def fitted(root: Path, parts: Any, **kwargs: Any) -> tuple[Path, list[str]]:
    """Fit for an epoch more than there is; return the checkpoint and what is said of other images."""
    epochs = 2 if kwargs else 1
    model = WTFlow(max_epochs=epochs, image_size=64, false_alarm_rate=0.3, overrides={"plateau": 0.0})
    engine = quiet_engine(root)
    with warnings.catch_warnings(record=True) as given:
        warnings.simplefilter("always")
        engine.fit(model, datamodule=parts, **kwargs)
    said = [str(each.message) for each in given if "other images" in str(each.message)]
    return Path(engine.best_model_path), said


OTHERS = "The training goes on with other images than the checkpoint was trained on: it had 16, here are "


def test_resumed_with_other_images(data: Path, tmp_path: Path) -> None:
    """It says how many are others; not where the same ones lie elsewhere, or the checkpoint does not say."""
    saved, said = fitted(tmp_path / "first", small(data))
    assert said == []
    parts = small(tmp_path / "elsewhere")
    shutil.copytree(small(data).root, parts.root)
    later, said = fitted(tmp_path / "elsewhere", parts, ckpt_path=saved)
    assert said == []
    marks = [torch.load(path, weights_only=True)["wtflow"]["images"] for path in (saved, later)]
    assert len(marks[0]) == 16
    torch.testing.assert_close(*marks, rtol=0, atol=0)
    good = sorted((Path(parts.root) / "train" / "good").iterdir())
    for path in good[:3]:
        path.write_bytes(good[5].read_bytes())
    _, (said,) = fitted(tmp_path / "changed", parts, ckpt_path=saved)
    assert said.startswith(f"{OTHERS}16, 3 of which it had not, and 3 of its own are gone.")
    assert said.endswith("train anew without --ckpt_path, or add products with --model.start_from.")
    more, (said,) = fitted(tmp_path / "more", SyntheticParts(data, 20, 8, 4, 64, train_batch_size=4), ckpt_path=saved)
    assert said.startswith(f"{OTHERS}20, 4 of which it had not, and 0 of its own are gone.")
    assert len(torch.load(more, weights_only=True)["wtflow"]["images"]) == 20
    early = torch.load(saved, weights_only=True)
    del early["wtflow"]["images"]
    torch.save(early, tmp_path / "early.ckpt")
    assert fitted(tmp_path / "early", parts, ckpt_path=tmp_path / "early.ckpt")[1] == []


def test_a_calibrated_checkpoint_knows_its_training_images(data: Path, tmp_path: Path) -> None:
    saved, _ = fitted(tmp_path, small(data))
    done = calibrate(saved, Path(small(data).root) / "test" / "good", tmp_path / "moved.ckpt")
    torch.testing.assert_close(
        *[torch.load(path, weights_only=True)["wtflow"]["images"] for path in (saved, done.path)], rtol=0, atol=0
    )


def test_images_of_the_same_names_and_sizes_are_others(tmp_path: Path) -> None:
    """Those of a BMP are all of one size; folders do not count, and an image that is there twice is two."""
    folders = [tmp_path / name for name in ("a", "b", "c")]
    for shade, folder in zip((10, 10, 11), folders, strict=True):
        folder.mkdir()
        for name in ("0.bmp", "1.bmp"):
            Image.new("RGB", (64, 64), (shade, 0, 0)).save(folder / name)
    a, b, c = (marks_of(map(str, folder.iterdir())) for folder in folders)
    assert difference(a, b) is None
    assert "it had 2, here are 2, 2 of which it had not, and 2 of its own are gone." in str(difference(a, c))
    assert "it had 2, here are 4, 2 of which it had not, and 0 of its own are gone." in str(
        difference(a, torch.cat([a, b]))
    )


class Shown(WTFlow):
    """Knows which batches it was shown, in which epochs."""

    shown: list[tuple[int, float]]

    def training_step(self, batch: Any, *args: Any) -> Any:
        self.shown.append((self.current_epoch, float(batch.features.sum())))
        return super().training_step(batch, *args)


def test_resumed_in_the_middle_of_an_epoch(data: Path, tmp_path: Path) -> None:
    """From checkpoints that a user's callback wrote in two epochs of four steps: the rest of it, then the next."""

    def fit(name: str, **kwargs: Any) -> Shown:
        model = Shown(image_size=64, max_epochs=2, false_alarm_rate=0.3, overrides={"plateau": 0.0})
        model.shown = []
        callbacks = [ModelCheckpoint(tmp_path / name, "{step}", every_n_train_steps=1, save_top_k=-1)]
        quiet_engine(tmp_path / name, callbacks=callbacks).fit(model, datamodule=small(data), **kwargs)
        return model

    whole = fit("whole")
    assert len({value for _, value in whole.shown}) == 8
    for step in (1, 4, 6):
        resumed = fit(f"from-{step}", ckpt_path=tmp_path / "whole" / f"step={step}.ckpt")
        assert resumed.shown == whole.shown[step:]
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(resumed.state_dict()[name], tensor, rtol=0, atol=0, equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_stopped_by_a_person_or_a_machine(
    data: Path, whole: SimpleNamespace, tmp_path: Path, number: int, status: int
) -> None:
    """It ends soon, with a status that says so and a sentence that says how it goes on."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    stopped = run(tmp_path, *training(data, *FILES), faults=[Fault(STEP, 9, number)], TMPDIR=str(temporary))
    assert stopped.status == status
    (first,) = runs(tmp_path)
    assert f": give the same command --ckpt_path {checkpoint(first)} to go on." in stopped.text
    assert "Traceback" not in stopped.text
    assert list(temporary.iterdir()) == []
    again(tmp_path, data, *FILES)
    same(runs(tmp_path)[-1], whole)


@pytest.mark.slow
def test_stopped_before_there_is_a_checkpoint(data: Path, tmp_path: Path) -> None:
    fault = Fault(f"{OURS}features.cache:FeatureStore.append", 1, signal.SIGINT)
    stopped = run(tmp_path, *training(data), faults=[fault])
    assert stopped.status == 1
    assert "Stopped in epoch 0: there is no checkpoint to go on from." in stopped.text
    assert "Traceback" not in stopped.text


@pytest.mark.slow
def test_two_at_once(data: Path, whole: SimpleNamespace, tmp_path: Path) -> None:
    """The same command twice, in one folder of results and one for temporary files, drawing the same images."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    drawn = tmp_path / "drawn"
    commands = []
    for log in ("first.txt", "second.txt"):
        commands.append(Command(tmp_path, *training(drawn, *FILES), log=log, TMPDIR=str(temporary)))
        while len(runs(tmp_path)) < len(commands) and commands[-1].process.is_alive():
            time.sleep(0.01)  # anomalib counts the runs in a folder, and two that count at the same moment collide
    done = [command.end() for command in commands]
    assert [each.status for each in done] == [0, 0], done
    first, second = runs(tmp_path)
    for each in (first, second):
        assert [row["raw_score"] for row in scores(each)] == [row["raw_score"] for row in whole.scores]
        for name, tensor in whole.state.items():
            torch.testing.assert_close(state(each)[name], tensor, rtol=0, atol=0, equal_nan=True)
    assert list(temporary.iterdir()) == []


def hold(*args: Any, **kwargs: Any) -> None:
    """Say that it is here, in the folder that it runs in, and wait for the word."""
    Path("here").touch()
    while not Path("go").exists():
        time.sleep(0.01)


@pytest.mark.slow
def test_two_predictions_at_once(data: Path, tmp_path: Path) -> None:
    """They would write into one file: the second is told so before it judges anything, and the first's is whole."""
    done = run(tmp_path, *training(data, epochs=1))
    assert done.status == 0, done.text
    (only,) = runs(tmp_path)
    images = next(data.rglob("test"))
    words = ["predict", "--model", "WTFlow", "--model.image_size", 64, "--ckpt_path", checkpoint(only)]
    words += ["--data", images]
    first = Command(tmp_path, *words, faults=[partial(place, f"{OURS}reporting.verdicts:Verdicts._write", 0, hold)])
    while not (tmp_path / "here").exists() and first.process.is_alive():
        time.sleep(0.01)
    second = run(tmp_path, *words, log="second.txt")
    apart = run(tmp_path, *words, "--default_root_dir", "other", log="apart.txt")
    (tmp_path / "go").touch()
    assert first.end().status == 0
    assert second.status == 1
    table = tmp_path / "results" / "WTFlow" / "latest" / "scores.csv"
    assert f"error: Another run is writing its verdicts to {table}: wait" in second.text.splitlines()[-1]
    assert apart.status == 0, apart.text
    paths = sorted(map(str, images.rglob("*.png")))
    for each in (table, next((tmp_path / "other").rglob("scores.csv"))):
        with each.open() as file:
            assert sorted(row["image_path"] for row in csv.DictReader(file)) == paths
    assert run(tmp_path, *words, log="after.txt").status == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 1), (signal.SIGTERM, 143)])
def test_a_prediction_that_is_stopped_says_what_was_not_judged(
    data: Path, tmp_path: Path, number: int, status: int
) -> None:
    done = run(tmp_path, *training(data, epochs=1))
    assert done.status == 0, done.text
    words = ["predict", "--model", "WTFlow", "--model.image_size", 64, "--ckpt_path", checkpoint(runs(tmp_path)[0])]
    words += ["--data", next(data.rglob("test"))]
    stop = Fault(f"{OURS}reporting.verdicts:Verdicts._write", 3, number)
    stopped = run(tmp_path, *words, faults=[stop], log="stopped.txt")
    table = tmp_path / "results" / "WTFlow" / "latest" / "scores.csv"
    with table.open() as file:
        judged = len(list(csv.DictReader(file)))
    assert judged in (3, 4)
    said = f"Stopped after {judged} of 20 images: their verdicts are in {table}, the others were not judged."
    assert stopped.status == status
    assert said in stopped.text
    assert "Traceback" not in stopped.text
