"""The life of the model in anomalib's Engine: collect, fit, threshold, checkpoint."""

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import Folder
from anomalib.post_processing import PostProcessor
from lightning import seed_everything

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.conformal import conformal_threshold
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.flow.schedule import SCHEDULERS
from anomalib_wtflow.images import mark_of
from conftest import as_mvtec, quiet_engine

SMALL: dict[str, Any] = {"image_size": 64, "false_alarm_rate": 0.3}  # a rate that three calibration images support


def fitted(root: Path, data: Any, **kwargs: Any) -> SimpleNamespace:
    model, engine = WTFlow(**{"max_epochs": 1, **SMALL, **kwargs}), quiet_engine(root)
    engine.fit(model, datamodule=data)
    return SimpleNamespace(model=model.eval(), checkpoint=engine.best_model_path, engine=engine)


def raw_scores(model: WTFlow, items: list[Any]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([model.model(model.pre_processor.transform(item.image[None])).pred_score for item in items])


# Fit -----------------------------------------------------------------------------------------------------------------


def test_one_pass_collects_and_the_backbone_is_untouched(parts: SyntheticParts, tmp_path: Path) -> None:
    """Each image passes the backbone once in the training epoch, whatever epochs the trainer is given."""
    seen: list[str] = []

    class Spy(WTFlow):
        def training_step(self, batch: Any, *args: Any, **kwargs: Any) -> Any:
            seen.extend(batch.image_path)
            return super().training_step(batch, *args, **kwargs)

    module, model = as_mvtec(parts), Spy(max_epochs=2, **SMALL)
    fresh = {name: tensor.clone() for name, tensor in model.model.feature_extractor.state_dict().items()}
    engine = quiet_engine(tmp_path, max_epochs=5)
    engine.fit(model, datamodule=module)
    assert sorted(seen) == sorted(module.train_data.samples["image_path"])
    assert engine.trainer.current_epoch == 1
    for name, tensor in model.model.feature_extractor.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name
    assert len(model.store) == 0


@pytest.mark.slow
def test_same_seed_same_model(parts: SyntheticParts, tmp_path: Path) -> None:
    """Bit by bit, whatever the global seed and the size of the loader's batches."""

    def train(seed: int, elsewhere: int, **data: Any) -> dict[str, torch.Tensor]:
        seed_everything(elsewhere)
        return fitted(tmp_path, as_mvtec(parts, **data), max_epochs=2, seed=seed).model.state_dict()

    first, again, other = train(1, 3), train(1, 4), train(2, 3)
    for name, tensor in first.items():
        torch.testing.assert_close(again[name], tensor, rtol=0, atol=0, equal_nan=True, msg=name)
    name = "model.field.fields.0.head.weight"
    assert not torch.equal(first[name], other[name])
    whole = train(1, 3, train_batch_size=1000)
    torch.testing.assert_close(whole[name], first[name], rtol=1e-3, atol=1e-4)


def test_refitting_starts_anew(parts: SyntheticParts, tmp_path: Path) -> None:
    model = WTFlow(max_epochs=1, **SMALL)
    for _ in range(2):
        quiet_engine(tmp_path).fit(model, datamodule=as_mvtec(parts))
    once = fitted(tmp_path, as_mvtec(parts)).model.state_dict()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, once[name], rtol=0, atol=0, equal_nan=True, msg=name)


def test_a_sample_of_the_images_is_fitted_where_the_memory_is_short(parts: SyntheticParts, tmp_path: Path) -> None:
    """Ten images' features of 176 x 4 x 4 float32 numbers, of which a fifth sets the threshold."""
    memory = 10 * 176 * 16 * 4 / 2**30
    run = fitted(tmp_path, as_mvtec(parts), false_alarm_rate=0.4, overrides={"feature_memory": memory})
    assert [len(run.model.marks[kind]) for kind in ("training", "calibration")] == [8, 2]


@pytest.mark.slow
def test_mixed_precision_trains_what_float_trains(parts: SyntheticParts, tmp_path: Path) -> None:
    def train(precision: str) -> WTFlow:
        model = WTFlow(max_epochs=2, **SMALL)
        quiet_engine(tmp_path, precision=precision).fit(model, datamodule=as_mvtec(parts))
        return model.eval()

    whole, mixed = train("32-true"), train("bf16-mixed")
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}
    image = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    assert (whole(image).anomaly_map - mixed(image).anomaly_map).abs().max() < 0.05


def test_the_training_loss_is_logged(parts: SyntheticParts, tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    model, logger = WTFlow(max_epochs=3, **SMALL), CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    quiet_engine(tmp_path, logger=logger).fit(model, datamodule=as_mvtec(parts))
    rows = next(tmp_path.rglob("metrics.csv")).read_text().splitlines()
    assert "train_loss" in rows[0]
    assert len(rows) >= 4


def test_failures_leave_no_checkpoint(parts: SyntheticParts, tmp_path: Path) -> None:
    with pytest.raises(WTFlowError, match=r"The training loss became \w+ in epoch \d: lower learning_rate"):
        fitted(tmp_path, as_mvtec(parts), learning_rate=1e30, max_epochs=9)
    with pytest.raises(WTFlowError, match=r"coupling 'worst' rearranges noise .* raise batch_size"):
        fitted(tmp_path, as_mvtec(parts), overrides={"batch_size": 1})
    assert not list(tmp_path.rglob("*.ckpt"))


def test_plain_data_loaders(parts: SyntheticParts, tmp_path: Path) -> None:
    """Without validation, too, where training images are held out."""
    parts.setup()
    for loaders, rate in (
        ((parts.train_dataloader(), parts.val_dataloader()), 3 / 11),
        ((parts.train_dataloader(),), 1 / 4),
    ):
        model = WTFlow(max_epochs=1, **SMALL)
        quiet_engine(tmp_path).fit(model, *loaders)
        assert float(model.post_processor.effective_false_alarm_rate) == pytest.approx(rate)


def test_a_training_goes_on_from_a_model(parts: SyntheticParts, tmp_path: Path) -> None:
    """From its field, with its statistics."""
    first = fitted(tmp_path, as_mvtec(parts))
    second = fitted(tmp_path, as_mvtec(parts), start_from=first.checkpoint, learning_rate=1e-9)
    for name, tensor in first.model.model.state_dict().items():
        if name.startswith(("field", "normalization", "recognizer")):
            torch.testing.assert_close(second.model.model.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)


# Threshold -----------------------------------------------------------------------------------------------------------


def test_threshold_from_validation_normals(trained: SimpleNamespace) -> None:
    """Where validation and test are disjoint, the threshold is the conformal quantile of the validation normals."""
    parts, model = trained.parts, trained.model
    normals = [item for item in parts.val_data if item.gt_label == 0]
    assert len(normals) == 10
    expected = conformal_threshold(raw_scores(model, normals), 0.1)
    torch.testing.assert_close(model.post_processor.image_threshold[0], expected.threshold, rtol=1e-4, atol=1e-5)
    maps = [model.model(model.pre_processor.transform(item.image[None])).anomaly_map.max() for item in normals]
    pixel = conformal_threshold(torch.stack(maps), 0.1).threshold
    torch.testing.assert_close(model.post_processor.pixel_threshold[0], pixel, rtol=1e-4, atol=1e-5)
    assert float(model.post_processor.effective_false_alarm_rate) == pytest.approx(1 / 11)
    assert len(model.marks["training"]) == 16


def test_threshold_from_a_slice_of_the_training_set(parts: SyntheticParts, tmp_path: Path) -> None:
    """Where validation is the test set: a slice that the field was not trained on, the same for each seed."""
    module = as_mvtec(parts)
    model = fitted(tmp_path, module, overrides={"calibration_ratio": 0.25}).model
    held, used = (set(model.marks[kind].tolist()) for kind in ("calibration", "training"))
    everything = {mark_of(path) for path in module.train_data.samples.image_path}
    assert (len(held), held | used, held & used) == (4, everything, set())
    items = [item for item in module.train_data if mark_of(item.image_path) in held]
    expected = conformal_threshold(raw_scores(model, items), 0.3)
    torch.testing.assert_close(model.post_processor.image_threshold[0], expected.threshold, rtol=1e-4, atol=1e-5)
    assert float(model.post_processor.effective_false_alarm_rate) == pytest.approx(0.2)
    other = fitted(tmp_path, as_mvtec(parts), seed=5, overrides={"calibration_ratio": 0.25}).model
    assert set(other.marks["calibration"].tolist()) == held


def test_both_where_validation_images_are_too_few(parts: SyntheticParts, tmp_path: Path) -> None:
    """Ten good ones for a rate of 5 %, which needs 19: the slice of three is taken, too."""
    with pytest.warns(UserWarning, match=r"false_alarm_rate=0.05 needs at least 19 good images .* 13 guarantee 0.0714"):
        run = fitted(tmp_path, parts, false_alarm_rate=0.05)
    assert run.model.post_processor.calibration_images.tolist() == [13]


@pytest.mark.parametrize("count", [6, 16])
def test_good_images_only(parts: SyntheticParts, tmp_path: Path, count: int) -> None:
    """A folder of good images and nothing else; of six, none goes to the validation, whose loader is then empty."""
    parts.prepare_data()
    folder = tmp_path / "good"
    folder.mkdir()
    for k in range(count):
        (folder / f"{k}.png").symlink_to(Path(parts.root) / f"train/good/{k:03d}.png")
    run = fitted(tmp_path, Folder("good", folder, num_workers=0, seed=0), false_alarm_rate=0.5)
    state = torch.load(run.checkpoint, weights_only=True)["state_dict"]
    for name in ("image_threshold", "pixel_threshold"):
        assert state[f"post_processor._{name}"] == getattr(run.model.post_processor, name) > 0


def test_f1_when_asked(parts: SyntheticParts, tmp_path: Path) -> None:
    model = fitted(tmp_path, as_mvtec(parts), false_alarm_rate=None).model
    assert len(model.marks["training"]) == 16
    assert model.post_processor.image_threshold.isfinite()
    assert model.post_processor.effective_false_alarm_rate.isnan()


def test_a_later_validation_leaves_the_threshold(trained: SimpleNamespace, tmp_path: Path) -> None:
    model = WTFlow(image_size=128, false_alarm_rate=0.1)
    quiet_engine(tmp_path).validate(model, datamodule=trained.parts, ckpt_path=trained.checkpoint)
    assert torch.equal(model.post_processor.image_threshold, trained.model.post_processor.image_threshold)


# Checkpoints ---------------------------------------------------------------------------------------------------------


def test_anomalibs_post_processor_reloads(parts: SyntheticParts, tmp_path: Path) -> None:
    """Where it is given again, as to anomalib's own models."""
    run = fitted(tmp_path, as_mvtec(parts), post_processor=PostProcessor())
    loaded = WTFlow.load_from_checkpoint(run.checkpoint, post_processor=PostProcessor())
    assert loaded.post_processor.image_threshold == run.model.post_processor.image_threshold


def test_reload_needs_neither_hub_nor_file(parts: SyntheticParts, tmp_path: Path) -> None:
    """A backbone from a local file, which is gone when the checkpoint is loaded."""
    import timm

    weights = tmp_path / "backbone.pth"
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), weights)
    run = fitted(tmp_path, as_mvtec(parts), backbone="resnet10t", weights=str(weights))
    weights.unlink()
    loaded = WTFlow.load_from_checkpoint(run.checkpoint).eval()
    images = torch.rand(2, 3, 64, 64)
    for got, expected in zip(loaded(images), run.model(images), strict=True):
        assert torch.equal(got, expected)
    assert loaded.post_processor.false_alarm_rate == 0.3


def test_another_rate_keeps_the_threshold_and_says_so(trained: SimpleNamespace, tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"threshold is for false_alarm_rate=0.1. 0.3 is ignored here"):
        quiet_engine(tmp_path).test(
            WTFlow(image_size=128, false_alarm_rate=0.3), datamodule=trained.parts, ckpt_path=trained.checkpoint
        )
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        WTFlow.load_from_checkpoint(trained.checkpoint)


# Components ----------------------------------------------------------------------------------------------------------


def test_pre_processing_belongs_to_the_backbone() -> None:
    for name, mean, side in (("tf_efficientnet_lite0", 0.5, 256), ("resnet18", 0.485, 235)):  # 224 / 0.95 = 235
        resize, normalize = WTFlow(backbone=name, pre_trained=False).pre_processor.transform.transforms
        assert list(resize.size) == [side, side]
        assert normalize.mean[0] == mean
    assert WTFlow(image_size=(96, 160)).input_size == (96, 160)


@pytest.mark.parametrize("size", [(300, 517), (100, 64)])
def test_larger_images_score_the_same_in_training_and_export(trained: SimpleNamespace, size: tuple[int, int]) -> None:
    """What the data set resizes for the threshold and what an exported graph resizes by itself are the same."""
    model, images = trained.model, torch.rand(2, 3, *size)
    with torch.no_grad():
        ours = model.post_processor(model.model(model.pre_processor.transform(images)))
        exported = model(images)
    torch.testing.assert_close(exported.pred_score, ours.pred_score)
    torch.testing.assert_close(exported.anomaly_map, ours.anomaly_map)


def test_subclasses_keep_their_hyper_parameters() -> None:
    class Sub(WTFlow):
        def __init__(self, extra: int = 3, **kwargs: object) -> None:
            super().__init__(**kwargs)

    hparams = Sub(extra=7, max_epochs=2).hparams
    assert (hparams["extra"], hparams["max_epochs"]) == (7, 2)


def test_schedules() -> None:
    factors = {name: [schedule(9)(k) for k in range(10)] for name, schedule in SCHEDULERS.items()}
    assert factors["constant"] == [1] * 10
    assert factors["step"] == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 4)
    cosine = [0.5 + 0.5 * torch.tensor(k * torch.pi / 9).cos().item() for k in range(10)]
    assert factors["cosine"] == pytest.approx(cosine, abs=1e-6)
