"""Checkpoints that are none, broken, hostile, or another's: refused in one sentence, whatever reads them."""

import os
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from pickle import UnpicklingError
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.callbacks import ModelCheckpoint
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from anomalib.engine.plugins import AnomalibCheckpointIO
from anomalib.models import Padim
from anomalib.post_processing import PostProcessor
from lightning.pytorch import LightningModule, Trainer

from anomalib_wtflow import SyntheticParts, WTFlow, calibrate, diagnose
from anomalib_wtflow.cli import errors
from anomalib_wtflow.features.backbone import load_weights_file
from anomalib_wtflow.operation.data import data_sets
from anomalib_wtflow.training import checkpoint_rules, resuming
from anomalib_wtflow.training.checkpoint_reading import checked
from conftest import quiet_engine

POST = checkpoint_rules.POST
SMALL: dict[str, Any] = {"image_size": 128, "overrides": {"coupling": "worst_of_two", "plateau": 0.0}}
"""Settings of the ``trained`` model that a checkpoint compares."""


class Hostile:
    """Unpickled, it would make a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch {self.mark}",)


def fresh(model: LightningModule, path: Path) -> Path:
    """Write a checkpoint of a model that is not trained, as Lightning does."""
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    trainer.strategy.connect(model)
    trainer.save_checkpoint(path, weights_only=True)
    return path


@pytest.fixture(scope="module")
def bad(trained: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a checkpoint of each kind that is none."""
    folder = tmp_path_factory.mktemp("bad")
    whole = trained.checkpoint.read_bytes()
    (folder / "text.ckpt").write_text("not a checkpoint\n")
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "truncated.ckpt").write_bytes(whole[: len(whole) // 2])
    (folder / "folder.ckpt").mkdir()
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"state_dict": {}, "epoch": 0}, folder / "dict.ckpt")
    plain = torch.load(trained.checkpoint, weights_only=True)
    torch.save({**plain, "epoch": Hostile(folder / "executed")}, folder / "hostile.ckpt")
    torch.save({**plain, "state_dict": [1]}, folder / "no_state.ckpt")
    said = plain["wtflow"]
    torch.save({name: each for name, each in plain.items() if name != "wtflow"}, folder / "first.ckpt")
    torch.save({**plain, "wtflow": {**said, "version": "0.0.9", "settings": {}}}, folder / "older.ckpt")
    settings = {**said["settings"], "depth_of_tomorrow": 3}
    torch.save({**plain, "wtflow": {**said, "version": "9.0", "settings": settings}}, folder / "newer.ckpt")
    fresh(Padim(pre_trained=False, layers=["layer1"], n_features=4), folder / "padim.ckpt")
    return folder


@pytest.fixture(scope="module")
def untrained() -> WTFlow:
    return WTFlow(**SMALL)


NONE = "' is not a checkpoint of a WTFlow model: give the model.ckpt of its run, or train the model again if the file"
KINDS = {
    "missing": "': give the model.ckpt that 'anomalib train --model WTFlow' wrote.",
    "folder": "': give the model.ckpt that 'anomalib train --model WTFlow' wrote.",
    **dict.fromkeys(("text", "empty", "truncated", "list", "dict", "hostile", "no_state"), NONE),
    "padim": "' holds another model than WTFlow: give the model.ckpt of a WTFlow run.",
    "first": "' has no settings, so another version of WTFlow (unknown) wrote it: train the model again.",
    "older": "' has no backbone, so another version of WTFlow (0.0.9) wrote it: train the model again.",
    "newer": "' has a setting depth_of_tomorrow, so another version of WTFlow (9.0) wrote it: train the model again.",
}


def check(error: BaseException, path: Path, sentence: str) -> None:
    """One line that names the file and the way out, nothing of torch's behind it, and nothing executed."""
    assert f"{path}{sentence}" in str(error)
    assert "\n" not in str(error)
    assert not isinstance(error.__cause__ or error.__context__, UnpicklingError)
    assert "Weights only load failed" not in "".join(traceback.format_exception(error))
    assert not (path.parent / "executed").exists()


@pytest.mark.parametrize(("kind", "sentence"), KINDS.items())
def test_a_file_that_is_no_checkpoint_is_refused_in_a_sentence(bad: Path, kind: str, sentence: str) -> None:
    path = bad / f"{kind}.ckpt"
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        checkpoint_rules.read(path)
    check(error.value, path, sentence)
    assert isinstance(error.value, FileNotFoundError) == (kind in ("missing", "folder"))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied"),
        (OSError(5, "Input/output error"), "Input/output error"),
        (MemoryError(), "out of memory"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "out of memory"),
    ],
)
def test_a_file_that_may_not_be_read_is_named_with_the_reason(
    trained: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(torch, "load", refuse)
    with pytest.raises(ValueError, match=rf"'{trained.checkpoint}' cannot be read \({reason}\), which says") as said:
        checkpoint_rules.read(trained.checkpoint)
    assert said.value.__cause__ is error


def test_what_cannot_be_read_keeps_its_cause(bad: Path) -> None:
    """But for pickle's error, in which torch advises to run the file (:func:`check`)."""
    with pytest.raises(ValueError, match="is not a checkpoint") as said:
        checkpoint_rules.read(bad / "truncated.ckpt")
    assert "PytorchStreamReader" in str(said.value.__cause__)


WAYS: dict[str, Callable[[Engine, Any, Path], Any]] = {
    "train": lambda engine, parts, path: engine.train(WTFlow(**SMALL), datamodule=parts, ckpt_path=path),
    "fit": lambda engine, parts, path: engine.fit(WTFlow(**SMALL), datamodule=parts, ckpt_path=path),
    "validate": lambda engine, parts, path: engine.validate(WTFlow(**SMALL), datamodule=parts, ckpt_path=path),
    "test": lambda engine, parts, path: engine.test(WTFlow(**SMALL), datamodule=parts, ckpt_path=path),
    "predict": lambda engine, parts, path: engine.predict(WTFlow(**SMALL), datamodule=parts, ckpt_path=path),
    "export": lambda engine, parts, path: engine.export(WTFlow(**SMALL), "torch", ckpt_path=path),
    "load_from_checkpoint": lambda engine, parts, path: WTFlow.load_from_checkpoint(path),
    "start_from": lambda engine, parts, path: WTFlow(start_from=path, **SMALL),
    "diagnose": lambda engine, parts, path: diagnose(path, parts, path.parent / "page", progress=False),
    "calibrate": lambda engine, parts, path: calibrate(path, path.parent),
}


@pytest.mark.parametrize("way", WAYS)
def test_whatever_reads_a_checkpoint_refuses_alike(
    bad: Path, trained: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Also where the environment tells torch to run what is in files."""
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    for kind in ("hostile", "missing", "padim"):
        path = (bad / f"{kind}.ckpt").resolve()
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            WAYS[way](quiet_engine(tmp_path), trained.parts, path)
        check(error.value, path, KINDS[kind])


def without(checkpoint: dict[str, Any], name: str) -> None:
    del checkpoint[name]


def reshape(checkpoint: dict[str, Any], name: str, *shape: int) -> None:
    state = checkpoint["state_dict"]
    state[name] = torch.ones(shape, dtype=state[name].dtype)


FORMS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "hyper_parameters": (lambda each: each.update(hyper_parameters="text"), "hyper_parameters is no dict"),
    "no_hyper_parameters": (lambda each: without(each, "hyper_parameters"), "hyper_parameters is no dict"),
    "callbacks": (lambda each: each.update(callbacks=[1]), "callbacks is no dict"),
    "epoch": (lambda each: each.update(epoch="last"), "epoch is no int"),
    "version": (
        lambda each: each.update({"pytorch-lightning_version": "new"}),
        "pytorch-lightning_version is no version",
    ),
    "products": (lambda each: each["wtflow"].update(products=["a", "b"]), "its products are not those of its weights"),
    "codes": (lambda each: reshape(each, "model.codes"), "its products are not those of its weights"),
    "scores": (
        lambda each: reshape(each, checkpoint_rules.SCORES, 2, 2),
        "post_processor.calibration_scores has another shape than its products",
    ),
    "threshold": (lambda each: reshape(each, f"{POST}_image_threshold", 3), f"{POST}_image_threshold"),
    "no_threshold": (lambda each: without(each["state_dict"], f"{POST}_pixel_threshold"), f"{POST}_pixel_threshold"),
    "centroids": (lambda each: reshape(each, "model.recognition.centroids", 1, 2), "model.recognition.centroids"),
}


@pytest.fixture(scope="module")
def forms(trained: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with checkpoints whose parts are of other types or shapes."""
    folder = tmp_path_factory.mktemp("forms")
    for name, (spoil, _) in FORMS.items():
        checkpoint = torch.load(trained.checkpoint, weights_only=True)
        for each in (checkpoint["wtflow"]["settings"], checkpoint["hyper_parameters"]):
            each["false_alarm_rate"] = 0.05
        spoil(checkpoint)
        torch.save(checkpoint, folder / f"{name}.ckpt")
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_another_type_or_shape_is_refused_alike(
    forms: Path, trained: SimpleNamespace, tmp_path: Path, way: str
) -> None:
    for kind in ("no_hyper_parameters", "centroids" if way == "start_from" else "threshold"):
        with pytest.raises(ValueError) as error:  # noqa: PT011
            WAYS[way](quiet_engine(tmp_path), trained.parts, (forms / f"{kind}.ckpt").resolve())
        assert FORMS[kind][1].removeprefix("model.") in str(error.value)
        assert "\n" not in str(error.value)
        assert errors.raised_here(error.value.__traceback__)


@pytest.mark.parametrize("kind", FORMS)
def test_a_part_of_another_type_or_shape_is_named(forms: Path, kind: str) -> None:
    what = FORMS[kind][1]
    sentence = f"is broken, {what}: give another" if " " in what else f"names or shapes than the model ({what}), so"
    with pytest.raises(ValueError, match=re.escape(sentence)) as error:
        WTFlow.load_from_checkpoint(forms / f"{kind}.ckpt")
    assert errors.raised_here(error.value.__traceback__)


@pytest.mark.parametrize("given", [False, PostProcessor()])
def test_another_post_processor_is_no_other_version(trained: SimpleNamespace, given: Any) -> None:
    words = (
        r" has tensors of another post-processor than the model's \(post_processor\.\S+\): give the model the one that"
    )
    with pytest.raises(ValueError, match=words):
        WTFlow.load_from_checkpoint(trained.checkpoint, post_processor=given)


def test_no_pre_processor_where_there_was_one_is_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    """Images as they are would get the scores of others; anomalib's own models go on without a word."""
    words = rf"^'{trained.checkpoint}' was trained with a pre-processor, and this model has none: leave out pre_proc"
    with pytest.raises(ValueError, match=words):
        quiet_engine(tmp_path).validate(
            WTFlow(**SMALL, pre_processor=False), datamodule=trained.parts, ckpt_path=trained.checkpoint
        )


def test_a_side_is_that_of_a_square(trained: SimpleNamespace) -> None:
    checkpoint = checkpoint_rules.read(trained.checkpoint)
    settings = WTFlow(**{**SMALL, "image_size": (128, 128)}).settings
    checkpoint_rules.raise_for_other(checkpoint, settings, resuming=False)
    with pytest.raises(ValueError, match=r"was trained with image_size=128 \(here \[128, 64\]\): give"):
        checkpoint_rules.raise_for_other(checkpoint, replace(settings, image_size=(128, 64)), resuming=False)


@pytest.mark.parametrize("post_processor", [True, PostProcessor()])
def test_anomalibs_threshold_without_masks_is_read_again(
    trained: SimpleNamespace, tmp_path: Path, post_processor: Any
) -> None:
    """anomalib then sets the range of the maps, and no threshold for them."""
    data = Folder("parts", "train/good", trained.parts.root, "test/scratch", "test/good", num_workers=0, seed=0)
    model = WTFlow(**SMALL, max_epochs=1, false_alarm_rate=None, post_processor=post_processor)
    engine = quiet_engine(tmp_path)
    engine.fit(model, datamodule=data)
    state = torch.load(engine.best_model_path, weights_only=True)["state_dict"]
    assert state["post_processor._pixel_threshold"].isnan()
    assert state["post_processor.pixel_max"].isfinite()
    loaded = WTFlow.load_from_checkpoint(engine.best_model_path)
    for name in ("_image_threshold", "image_min", "pixel_max"):
        assert getattr(loaded.post_processor, name) == state[f"post_processor.{name}"]
    (metrics,) = engine.test(
        WTFlow(**SMALL, false_alarm_rate=None), datamodule=data, ckpt_path=engine.best_model_path, verbose=False
    )
    assert 0 <= metrics["image_AUROC"] <= 1


def test_numpys_numbers_among_the_settings_are_read_alike(trained: SimpleNamespace, tmp_path: Path) -> None:
    """As anomalib reads them: a rate that was computed with numpy is in the checkpoint as numpy's."""
    path = tmp_path / "numpy.ckpt"
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    for each in (checkpoint["hyper_parameters"], checkpoint["wtflow"]["settings"]):
        each["false_alarm_rate"] = np.float64(0.1)
    torch.save(checkpoint, path)
    with pytest.raises(UnpicklingError):
        torch.load(path, weights_only=True)
    data = {"datamodule": trained.parts, "ckpt_path": path}
    quiet_engine(tmp_path).validate(WTFlow(**SMALL, false_alarm_rate=0.1), **data, verbose=False)
    assert WTFlow.load_from_checkpoint(path).settings.false_alarm_rate == 0.1
    assert quiet_engine(tmp_path).export(WTFlow(**SMALL), "torch", ckpt_path=path).is_file()


def test_weights_run_nothing(tmp_path: Path) -> None:
    torch.save({"a": Hostile(tmp_path / "executed")}, tmp_path / "hostile.pth")
    with pytest.raises(ValueError, match=r"hostile.pth' cannot be read: it must be a .safetensors file, or a state"):
        load_weights_file(tmp_path / "hostile.pth")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"", "' holds no data config: give 'class_path' and 'init_args'"),
        (b"just text", "' holds no data config: give 'class_path' and 'init_args'"),
        (b"- a\n- list", "' holds no data config: give 'class_path' and 'init_args'"),
        (b"cut: [", "' holds no data config: give 'class_path' and 'init_args'"),
        (b"\xff\xfe\x00", "' holds no data config: give 'class_path' and 'init_args'"),
        (b"!!python/object/apply:os.system ['touch EXECUTED']", "' holds no data config: give 'class_path'"),
        (
            b"class_path: os.system\ninit_args: {command: touch EXECUTED}",
            "' names 'os.system', which is no data module",
        ),
    ],
)
def test_a_data_config_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: bytes, sentence: str
) -> None:
    """The YAML file that ``diagnose --data`` takes."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_bytes(text)
    with pytest.raises(ValueError) as error:  # noqa: PT011
        data_sets(tmp_path / "data.yaml")
    assert str(error.value).startswith(f"'{tmp_path / 'data.yaml'}{sentence}")
    assert not (tmp_path / "EXECUTED").exists()


# Values that are not finite ------------------------------------------------------------------------------------------


VALUES = {
    "weight": "model.field.fields.0.stem.weight",
    "average": "model.averaged.module.fields.0.stem.weight",
    "backbone": "model.feature_extractor",
    "matrix": "model.normalization.weight",
    "mean": "model.normalization.mean",
    "centroid": "model.recognition.centroids",
    "slope": "model.anomaly_map_generator.slope",
    "threshold": "post_processor._image_threshold",
    "pixels": "post_processor._pixel_threshold",
    "rate": "post_processor.effective_false_alarm_rate",
}


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("kind", VALUES)
def test_a_value_that_is_not_finite_is_refused(
    trained: SimpleNamespace, untrained: WTFlow, kind: str, value: float
) -> None:
    checkpoint = torch.load(trained.checkpoint, weights_only=True)
    state = checkpoint["state_dict"]
    name = next(name for name in state if name.startswith(VALUES[kind]) and state[name].is_floating_point())
    state[name][(-1,) * state[name].ndim] = value
    message = f"The checkpoint is broken, {name} is NaN or infinite: give another checkpoint, or train the model again."
    with pytest.raises(ValueError) as error:  # noqa: PT011
        checkpoint_rules.raise_for_content(checkpoint)
    assert str(error.value) == message
    with pytest.raises(ValueError) as error:  # noqa: PT011
        untrained.on_load_checkpoint(checkpoint)
    assert str(error.value) == message


def test_nan_where_infinity_has_a_meaning(trained: SimpleNamespace) -> None:
    """One product has no limit, and a calibration image that is like no product scores infinity: NaN is neither."""
    for name in ("model.recognition.limit", "post_processor.calibration_scores"):
        checkpoint = torch.load(trained.checkpoint, weights_only=True)
        checkpoint["state_dict"][name].view(-1)[0] = torch.inf
        checkpoint_rules.raise_for_content(checkpoint)
        checkpoint["state_dict"][name].view(-1)[0] = torch.nan
        with pytest.raises(ValueError, match=f"is broken, {name} is NaN"):
            checkpoint_rules.raise_for_content(checkpoint)


def test_thresholds_that_were_never_set_are_not_broken(tmp_path: Path) -> None:
    """As in a checkpoint that is written within an epoch: a training goes on from it, and nothing is labelled."""
    model = WTFlow(**SMALL)
    checkpoint = checkpoint_rules.read(fresh(model, tmp_path / "fresh.ckpt"))
    state = checkpoint["state_dict"]
    assert state["post_processor._image_threshold"].isnan().all()
    # Set in part, or with the scores that they came from: broken.
    state["post_processor._pixel_threshold"].fill_(1.0)
    assert checkpoint_rules.broken_values(checkpoint) == [VALUES["threshold"], VALUES["rate"]]
    state["post_processor._pixel_threshold"].fill_(torch.nan)
    state["post_processor.calibration_scores"] = torch.ones(3)
    assert set(checkpoint_rules.broken_values(checkpoint)) == {VALUES[name] for name in ("threshold", "pixels", "rate")}


@pytest.mark.parametrize(
    ("post_processor", "given", "broken"),
    [
        (True, {"_image_threshold": 1.0, "image_min": 0.0, "image_max": 2.0}, []),  # no masks
        (True, {"_image_threshold": 1.0, "image_min": 0.0, "image_max": 2.0, "pixel_min": 0.0, "pixel_max": 1.0}, []),
        (True, {"_image_threshold": 1.0, "image_min": 0.0, "image_max": 2.0, "pixel_min": 0.0}, ["pixel_max"]),
        (True, {}, []),  # not validated yet
        (True, {"_image_threshold": 1.0, "image_max": 2.0}, ["image_min"]),  # scores would stay as they are
        (True, {"image_min": 0.0, "image_max": 2.0}, ["_image_threshold"]),  # the pixels' would label images
        (True, {"_pixel_threshold": 1.0, "pixel_min": 0.0, "pixel_max": 2.0}, ["_image_threshold", "image_min"]),
        (True, {"_image_threshold": torch.inf, "image_min": 0.0, "image_max": 2.0}, ["_image_threshold"]),
        (PostProcessor(enable_normalization=False), {"_image_threshold": 1.0}, []),
        (PostProcessor(enable_thresholding=False), {"image_min": 0.0, "image_max": 1.0}, []),
        (PostProcessor(enable_normalization=False), {"_image_threshold": -torch.inf}, ["_image_threshold"]),
    ],
)
def test_values_of_anomalibs_post_processing(
    tmp_path: Path, post_processor: Any, given: dict[str, float], broken: list[str]
) -> None:
    model = WTFlow(false_alarm_rate=None, post_processor=post_processor, **SMALL)
    for name, value in given.items():
        model.post_processor.get_buffer(name).fill_(value)
    fresh(model, tmp_path / "model.ckpt")
    found = checkpoint_rules.broken_values(torch.load(tmp_path / "model.ckpt", weights_only=True))
    assert set(broken) <= {name.removeprefix("post_processor.") for name in found}
    assert bool(broken) == bool(found)


def test_no_threshold_takes_the_place_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    """anomalib labels images by the pixels' threshold where theirs is NaN: on another scale, which passes defects."""
    model = WTFlow(**SMALL)
    post = model.post_processor
    post._pixel_threshold.fill_(1e6)
    predictions = SimpleNamespace(pred_score=torch.tensor([3.0]), anomaly_map=torch.ones(1, 1, 4, 4))
    assert post.image_threshold.isnan().all()
    with pytest.raises(ValueError, match="There is no threshold: train the model, or load"):
        post(predictions)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # as in an exported graph
    assert post(predictions).pred_label.tolist() == [True]


# Reading is Lightning's again ----------------------------------------------------------------------------------------


def test_the_trainers_reading_is_given_back(bad: Path, trained: SimpleNamespace, tmp_path: Path) -> None:
    """Another model in the same engine reads its own checkpoints."""
    engine = quiet_engine(tmp_path)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        engine.validate(WTFlow(**SMALL), datamodule=trained.parts, ckpt_path=bad / "text.ckpt")
    before = engine.trainer.strategy.checkpoint_io
    assert vars(before) == {"extra_safe_globals": []}
    engine.validate(WTFlow(**SMALL), datamodule=trained.parts, ckpt_path=trained.checkpoint)
    assert engine.trainer.strategy.checkpoint_io is before
    assert vars(before) == {"extra_safe_globals": []}


class Own(AnomalibCheckpointIO):
    """A user's, which writes as Lightning does, and knows what it was asked."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def load_checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        self.asked.append("load")
        return super().load_checkpoint(*args, **kwargs)

    def remove_checkpoint(self, path: Any) -> None:
        self.asked.append("remove")
        super().remove_checkpoint(path)

    def teardown(self) -> None:
        self.asked.append("teardown")


class Failing(WTFlow):
    """Fails in the middle of its second epoch."""

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        if self.trainer.global_step == 3:
            raise ZeroDivisionError
        return super().training_step(*args, **kwargs)


@pytest.mark.parametrize("kind", [WTFlow, Failing])
def test_a_users_own_plugin_stays_in_force(
    parts: SyntheticParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[WTFlow]
) -> None:
    """While WTFlow reads by its rules and writes whole files; and it is as it was after the run, failed or not."""
    own, written = Own(), []
    saving = ModelCheckpoint(tmp_path / "own", "{step}", save_on_exception=True)
    engine = quiet_engine(tmp_path, plugins=[own], callbacks=[saving])
    write = resuming.write_whole
    monkeypatch.setattr(resuming, "write_whole", lambda path, *of: written.append(path.name) or write(path, *of))
    parts.train_batch_size = 8
    with pytest.raises(ZeroDivisionError) if kind is Failing else nullcontext():
        engine.fit(kind(max_epochs=2, false_alarm_rate=0.1, **SMALL), datamodule=parts)
    assert written == ["step=2.ckpt", "step=3.ckpt" if kind is Failing else "step=4.ckpt"]
    assert own.asked == [*(["remove"] if kind is WTFlow else []), "teardown"]
    assert engine.trainer.strategy.checkpoint_io is own
    assert set(vars(own)) == {"extra_safe_globals", "asked"}
    engine.validate(WTFlow(**SMALL), datamodule=parts, ckpt_path=saving.best_model_path, verbose=False)
    assert own.asked[-2:] == ["load", "teardown"]
    assert set(vars(own)) == {"extra_safe_globals", "asked"}


def test_what_is_no_file_of_this_machine_is_left_to_lightning() -> None:
    """A URL that a user names is read by what reads it otherwise, as plain values all the same."""
    asked = []
    read = checked(lambda path, **options: asked.append((path, options)) or {})
    assert read("https://host/model.ckpt", weights_only=None) == {}
    assert asked == [("https://host/model.ckpt", {"weights_only": True})]


# The exported torch model --------------------------------------------------------------------------------------------


def test_the_torch_export_needs_no_gradient(trained: SimpleNamespace, tmp_path: Path) -> None:
    """``TorchInferencer`` calls it without ``no_grad``; the model itself can be trained on."""
    wanted = {name: each.requires_grad for name, each in trained.model.named_parameters()}
    path = trained.model.to_torch(tmp_path)
    assert {name: each.requires_grad for name, each in trained.model.named_parameters()} == wanted
    assert any(wanted.values())
    exported = torch.load(path, weights_only=False)["model"].eval()
    result = exported(torch.rand(1, 3, 100, 100))
    assert not any(value.requires_grad for value in result)
    (tmp_path / "file").write_text("")
    with pytest.raises(RuntimeError, match=r"cannot be written to .*file \(Not a directory\)"):
        trained.model.to_torch(tmp_path / "file")
    assert {name: each.requires_grad for name, each in trained.model.named_parameters()} == wanted


# The command line ----------------------------------------------------------------------------------------------------


def caught(action: Callable[[], Any]) -> BaseException:
    try:
        action()
    except Exception as error:
        return error
    raise AssertionError


def test_the_command_shows_our_errors_without_a_traceback(
    bad: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error of ours in a sentence; any other, one of torch's in a line of ours too, as before."""
    shown: list[BaseException] = []
    monkeypatch.setattr(sys, "excepthook", lambda kind, error, trace: shown.append(error))
    errors.plain_errors()
    ours = caught(lambda: checkpoint_rules.read(bad / "text.ckpt"))
    assert not isinstance(sys.excepthook, errors._Plain)  # a program of its own
    monkeypatch.setattr(sys, "argv", ["/usr/bin/anomalib", "test"])
    errors.plain_errors()
    errors.plain_errors()
    sys.excepthook(type(ours), ours, ours.__traceback__)
    assert capsys.readouterr().err == f"error: {ours}\n"
    assert shown == []
    anomalibs = caught(lambda: PredictDataset(bad / "nowhere"))  # of a path, before it asks the model
    sys.excepthook(type(anomalibs), anomalibs, anomalibs.__traceback__)
    assert capsys.readouterr().err == f"error: Path does not exist: {bad / 'nowhere'}\n"
    assert shown == []
    (bad / "empty").touch()
    systems = caught(lambda: (bad / "empty" / "below").touch())  # of a place, whoever asked
    sys.excepthook(type(systems), systems, systems.__traceback__)
    sentence = f"'{bad / 'empty' / 'below'}' cannot be used (Not a directory): see to that, or give another place."
    assert capsys.readouterr().err == f"error: {sentence}\n"
    assert shown == []
    others = [
        caught(lambda: (bad / "nowhere").read_text()),
        caught(lambda: checkpoint_rules.load(bad / "text.ckpt")),
        caught(lambda: WTFlow(**SMALL).model.field.load_state_dict({})),
        caught(lambda: [][1]),
        KeyError("never raised"),
    ]
    for error in others:
        sys.excepthook(type(error), error, error.__traceback__)
    assert shown == others
    assert capsys.readouterr().err == ""
    torchs = caught(lambda: checkpoint_rules.broken_values({"state_dict": {"model.x": 1}}))
    assert not errors.raised_here(torchs.__traceback__)


COMMANDS = """
import sys
from anomalib.cli.cli import main
for arguments in {commands}:
    sys.argv = ["anomalib", *arguments]
    print("COMMAND", arguments[0], flush=True)
    try:
        main()
    except Exception:
        sys.excepthook(*sys.exc_info())
    sys.stdout.flush()
"""


@pytest.mark.slow
def test_each_command_ends_with_the_sentence_alone(bad: Path, trained: SimpleNamespace, tmp_path: Path) -> None:
    """Lines that a user sees before it, of which there were 130 to 360: at most what anomalib says as it begins."""
    trained.parts.prepare_data()
    good = Path(trained.parts.root) / "test" / "good"
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "1.png").write_bytes((good / "001.png").read_bytes())
    (tmp_path / "images" / "2.png").write_bytes((good / "002.png").read_bytes()[:300])
    model = ["--model", "WTFlow", "--model.image_size", "128"]
    data = ["--data", "Folder", "--data.name", "parts", "--data.root", str(trained.parts.root)]
    data += ["--data.normal_dir", "train/good", "--data.num_workers", "0"]
    (tmp_path / "empty").mkdir()
    nowhere = tmp_path / "nowhere"
    other = ["--data", "Folder", "--data.name", "x", "--data.root", str(nowhere), "--data.normal_dir", "good"]
    predict = ["predict", *model, "--ckpt_path", str(trained.checkpoint), "--data"]
    commands = [
        (["train", *model, *data, "--ckpt_path", str(bad / "text.ckpt")], f"'{bad / 'text.ckpt'}{NONE}"),
        (["train", *model, *other], f"There is nothing at '{nowhere}/good', where the data module looks for images:"),
        (["test", *model, *data, "--ckpt_path", str(bad / "hostile.ckpt")], f"'{bad / 'hostile.ckpt'}{NONE}"),
        (
            [*predict, str(tmp_path / "images")],
            f"The image '{tmp_path / 'images' / '2.png'}' cannot be read: remove it or replace it by a whole file",
        ),
        ([*predict, str(nowhere)], f"Path does not exist: {nowhere}"),
        ([*predict, str(tmp_path / "empty")], f"Found 0 images in {tmp_path / 'empty'}"),
        (
            ["export", *model, "--export_type", "torch", "--ckpt_path", str(bad / "padim.ckpt")],
            f"'{bad / 'padim.ckpt'}' holds another model than WTFlow: give the model.ckpt of a WTFlow run.",
        ),
    ]
    code = COMMANDS.format(commands=[arguments for arguments, _ in commands])
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=True,
    )
    output = result.stdout
    assert "Traceback" not in output
    for block, (arguments, sentence) in zip(output.split("COMMAND ")[1:], commands, strict=True):
        lines = [line for line in block.splitlines() if line.strip()]
        assert lines[0] == arguments[0]
        assert lines[-1].startswith(f"error: {sentence}"), block
        assert len(lines) <= 12, block
    assert not (bad / "executed").exists()
