"""Training through anomalib's Engine: limits, seeds, thresholds, failures."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import Folder
from anomalib.post_processing import PostProcessor
from lightning import seed_everything
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.trainer.states import TrainerFn

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.post_processor import conformal_threshold
from anomalib_wtflow.torch_model import NormalisedFeatures
from anomalib_wtflow.training.calibration import Calibration
from anomalib_wtflow.training.contrast import Contrast
from conftest import as_mvtec, callback_of, quiet_engine

SMALL = {"image_size": 64, "false_alarm_rate": 0.3}  # a rate that three calibration images support
UNET = {
    "layers": ["blocks.1", "blocks.2"],
    "overrides": {"coupling": "worst_of_two", "network": "unet", "width": 8},
}
ALL_EPOCHS = {"overrides": {"plateau": 0.0}}


@pytest.mark.parametrize(
    ("trainer", "expected"),
    [({}, 4), ({"max_epochs": 7}, 7), ({"max_epochs": 1000}, 1000), ({"max_epochs": -1}, -1), ({"max_steps": 9}, None)],
)
def test_the_users_limit_wins(trainer: dict[str, int], expected: int | None, tmp_path: Path) -> None:
    """None: left to Lightning, which then stops after max_steps."""
    model = WTFlow(max_epochs=4, **SMALL)
    engine = quiet_engine(tmp_path, **trainer)
    engine._setup_trainer(model)
    engine.trainer.state.fn = TrainerFn.FITTING
    model.trainer = engine.trainer
    assert engine.trainer.max_epochs == expected
    assert engine.trainer.max_steps == trainer.get("max_steps", -1)


def test_a_time_limit_wins(tmp_path: Path) -> None:
    model = WTFlow(**SMALL)
    engine = quiet_engine(tmp_path, callbacks=[Timer("00:00:01:00")])
    engine._setup_trainer(model)
    engine.trainer.state.fn = TrainerFn.FITTING
    model.trainer = engine.trainer
    assert engine.trainer.max_epochs is None


def test_default_epochs_are_run(trained: SimpleNamespace) -> None:
    assert torch.load(trained.checkpoint, weights_only=False)["epoch"] == 2  # the third of max_epochs=3


def test_the_backbone_is_untouched(trained: SimpleNamespace) -> None:
    fresh = WTFlow(**SMALL).model.feature_extractor.state_dict()
    for name, tensor in trained.model.model.feature_extractor.state_dict().items():
        assert torch.equal(tensor, fresh[name]), name


def test_pre_processing_belongs_to_the_backbone() -> None:
    for name, mean, side in (("tf_efficientnet_lite0", 0.5, 256), ("resnet18", 0.485, 235)):  # 224 / 0.95 = 235
        resize, normalize = WTFlow(backbone=name, pre_trained=False).pre_processor.transform.transforms
        assert list(resize.size) == [side, side]
        assert normalize.mean[0] == mean
    assert WTFlow(image_size=(96, 160)).input_size == (96, 160)
    assert WTFlow.configure_pre_processor((64, 80)).transform.transforms[0].size == [64, 80]


@pytest.mark.slow
def test_mixed_precision_trains_what_float_trains(parts: SyntheticParts, tmp_path: Path) -> None:
    """On a CPU: bfloat16 where torch's autocast has it, with weights in float32."""

    def train(precision: str) -> WTFlow:
        model = WTFlow(max_epochs=2, **SMALL)
        quiet_engine(tmp_path, precision=precision).fit(model, datamodule=as_mvtec(parts))
        return model.eval()

    whole, mixed = train("32-true"), train("bf16-mixed")
    assert {parameter.dtype for parameter in mixed.parameters()} == {torch.float32}
    image = torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)
    difference = (whole(image).anomaly_map - mixed(image).anomaly_map).abs().max()
    assert 0 < difference < 0.02


@pytest.mark.slow
def test_same_seed_same_scores(parts: SyntheticParts, tmp_path: Path) -> None:
    def train(seed: int, elsewhere: int) -> torch.Tensor:
        seed_everything(elsewhere)
        model = WTFlow(max_epochs=2, seed=seed, **SMALL)
        quiet_engine(tmp_path).fit(model, datamodule=as_mvtec(parts))
        return model.eval()(torch.linspace(0, 1, 3 * 64 * 64).view(1, 3, 64, 64)).anomaly_map

    first, second, other = train(1, elsewhere=3), train(1, elsewhere=4), train(2, elsewhere=3)
    assert torch.equal(first, second)
    assert not torch.allclose(first, other, rtol=1e-3)


def test_threshold_from_validation_normals(trained: SimpleNamespace) -> None:
    """Where validation and test are disjoint, the threshold is the conformal quantile of the validation normals."""
    parts, model = trained.parts, trained.model
    normals = [item for item in parts.val_data if item.gt_label == 0]
    results = [model.model(model.pre_processor.transform(item.image[None])) for item in normals]
    scores, peaks = torch.cat([r.pred_score for r in results]), torch.stack([r.anomaly_map.max() for r in results])
    assert len(normals) == 10
    post = model.post_processor
    for got, raw in ((post.image_threshold, scores), (post.pixel_threshold, peaks)):
        torch.testing.assert_close(got[0], conformal_threshold(raw, 0.1).threshold, rtol=1e-4, atol=1e-5)
    assert model.post_processor.effective_false_alarm_rate.item() == pytest.approx(1 / 11)
    assert len(parts.train_data) == 16


def test_threshold_from_a_slice_of_the_training_set(parts: SyntheticParts, tmp_path: Path) -> None:
    """Where validation is the test set: a seeded slice, kept out of training, given back afterwards."""
    seen: set[str] = set()

    class Spy(WTFlow):
        def training_step(self, batch, *args, **kwargs):
            seen.update(batch.image_path)
            return super().training_step(batch, *args, **kwargs)

    module = as_mvtec(parts)
    model = Spy(max_epochs=1, overrides={"calibration_ratio": 0.25, "feature_cache": 0}, **SMALL)
    quiet_engine(tmp_path).fit(model, datamodule=module)
    chosen = [list(callback_of(model, Calibration).data.samples.image_path)]
    everything = set(module.train_data.samples.image_path)
    assert len(everything) == 16
    assert len(chosen[0]) == 4
    assert set(chosen[0]) == everything - seen
    assert not set(chosen[0]) & set(module.test_data.samples.image_path)
    items = [item for item in module.train_data if item.image_path in chosen[0]]
    transform = model.pre_processor.transform
    raw = torch.cat([model.eval().model(transform(item.image[None])).pred_score for item in items])
    torch.testing.assert_close(model.post_processor.image_threshold[0], conformal_threshold(raw, 0.3).threshold)
    assert model.post_processor.effective_false_alarm_rate.item() == pytest.approx(0.2)


@pytest.mark.parametrize("limit", [1.0, 0])
def test_good_images_only(parts: SyntheticParts, tmp_path: Path, limit: float) -> None:
    """A folder of good images and nothing else, also without any validation: a threshold, and a checkpoint with it."""
    parts.prepare_data()
    module = Folder("good", "train/good", parts.root, num_workers=0, seed=0)
    model = WTFlow(max_epochs=1, **{**SMALL, "false_alarm_rate": 0.5})
    engine = quiet_engine(tmp_path, limit_val_batches=limit)
    engine.fit(model, datamodule=module)
    assert model.post_processor.image_threshold > 0
    saved = torch.load(engine.best_model_path, weights_only=False)["state_dict"]["post_processor._image_threshold"]
    assert saved == model.post_processor.image_threshold


def test_the_checkpoint_has_the_threshold_of_a_tiny_folder(parts: SyntheticParts, tmp_path: Path) -> None:
    """Six images: one goes to the test set and none to validation, whose loader is then empty."""
    parts.prepare_data()
    few = tmp_path / "few"
    few.mkdir()
    for index in range(6):
        (few / f"{index}.png").symlink_to(Path(parts.root) / f"train/good/00{index}.png")
    model, engine = WTFlow(max_epochs=2, **{**SMALL, "false_alarm_rate": 0.5}), quiet_engine(tmp_path)
    engine.fit(model, datamodule=Folder("few", few, num_workers=0))
    saved = torch.load(engine.best_model_path, weights_only=False)["state_dict"]
    assert saved["post_processor._image_threshold"] == model.post_processor.image_threshold > 0
    assert saved["post_processor._pixel_threshold"] == model.post_processor.pixel_threshold > 0


def test_the_threshold_is_of_the_last_weights(parts: SyntheticParts, tmp_path: Path) -> None:
    """Validation every second epoch of three: the weights in memory are younger than the last validation."""
    module = as_mvtec(parts)
    model = WTFlow(max_epochs=3, learning_rate=0.01, **ALL_EPOCHS, **SMALL)
    quiet_engine(tmp_path, check_val_every_n_epoch=2).fit(model, datamodule=module)
    assert callback_of(model, Calibration)._calibrated_at == 3 * 2  # 13 images in batches of 8
    assert model.trainer.global_step == 3 * 2


def test_the_checkpoint_has_the_threshold_when_steps_end_inside_an_epoch(parts: SyntheticParts, tmp_path: Path) -> None:
    """Lightning then skips the validation, and still writes the checkpoint."""
    model, engine = WTFlow(**ALL_EPOCHS, **SMALL), quiet_engine(tmp_path, max_steps=3)  # two steps an epoch
    engine.fit(model, datamodule=as_mvtec(parts))
    saved = torch.load(engine.best_model_path, weights_only=False)
    assert saved["global_step"] == 3
    assert saved["state_dict"]["post_processor._image_threshold"] == model.post_processor.image_threshold
    module = as_mvtec(parts)
    module.setup()
    fresh = WTFlow.load_from_checkpoint(engine.best_model_path).eval()
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()[:3]
    items = [module.train_data[index] for index in sorted(order)]
    raw = torch.cat([fresh.model(fresh.pre_processor.transform(item.image[None])).pred_score for item in items])
    torch.testing.assert_close(fresh.post_processor.image_threshold[0], conformal_threshold(raw, 0.3).threshold)


def test_resuming_with_another_rate_is_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    model = WTFlow(max_epochs=4, image_size=128, false_alarm_rate=0.2)
    with pytest.raises(ValueError, match=r"trained with false_alarm_rate=0.1 \(here 0.2\)"):
        quiet_engine(tmp_path).fit(model, datamodule=trained.parts, ckpt_path=trained.checkpoint)


def test_refitting_fits_the_normalisation_again(parts: SyntheticParts, tmp_path: Path) -> None:
    """The statistics are those of the second training set alone, also after an aborted first pass."""
    module = as_mvtec(parts)
    model, other = WTFlow(max_epochs=1, **SMALL), WTFlow(max_epochs=1, **SMALL)
    model.model.update(torch.randn(8, 176, 4, 4) + 5, torch.zeros(8, dtype=torch.int64))
    model.model.finalize()
    model.model.normalization.update(torch.randn(8, 176, 4, 4) - 5)
    for each in (model, other):
        quiet_engine(tmp_path).fit(each, datamodule=module)
    torch.testing.assert_close(model.model.normalization.mean, other.model.normalization.mean)


def test_subclasses_keep_their_hyper_parameters() -> None:
    class Sub(WTFlow):
        def __init__(self, extra: int = 3, **kwargs: object) -> None:
            super().__init__(**kwargs)

    assert Sub(extra=7, max_epochs=2).hparams["extra"] == 7
    assert Sub(extra=7, max_epochs=2).hparams["max_epochs"] == 2


def test_anomalibs_post_processor_reloads(parts: SyntheticParts, tmp_path: Path) -> None:
    model, engine = WTFlow(max_epochs=1, post_processor=PostProcessor(), **SMALL), quiet_engine(tmp_path)
    engine.fit(model, datamodule=as_mvtec(parts))
    loaded = WTFlow.load_from_checkpoint(engine.best_model_path)
    assert type(loaded.post_processor) is PostProcessor
    assert loaded.post_processor.image_threshold == model.post_processor.image_threshold


def test_plain_data_loaders(parts: SyntheticParts, tmp_path: Path) -> None:
    parts.setup()
    model = WTFlow(max_epochs=1, **SMALL)
    quiet_engine(tmp_path).fit(model, parts.train_dataloader(), parts.val_dataloader())
    assert model.post_processor.effective_false_alarm_rate.item() == pytest.approx(3 / 11)
    with pytest.raises(ValueError, match="There are no normal images for the threshold"):
        quiet_engine(tmp_path).fit(WTFlow(max_epochs=1, **SMALL), parts.train_dataloader())


def test_too_few_images_for_the_rate(parts: SyntheticParts, tmp_path: Path) -> None:
    model = WTFlow(max_epochs=1, **{**SMALL, "false_alarm_rate": 0.01})
    message = (
        r"false_alarm_rate=0.01 needs at least 99 normal images for the threshold and there are 3: .* 0.2500 instead"
    )
    with pytest.warns(UserWarning, match=message):
        quiet_engine(tmp_path).fit(model, datamodule=as_mvtec(parts))


def test_f1_when_asked(parts: SyntheticParts, tmp_path: Path) -> None:
    model = WTFlow(max_epochs=1, **{**SMALL, "false_alarm_rate": None})
    module = as_mvtec(parts)
    quiet_engine(tmp_path).fit(model, datamodule=module)
    assert len(module.train_data) == 16
    assert model.post_processor.image_threshold.isfinite()
    assert model.post_processor.effective_false_alarm_rate.isnan()


def test_a_later_validation_leaves_the_threshold(trained: SimpleNamespace, tmp_path: Path) -> None:
    model = WTFlow(image_size=128, false_alarm_rate=0.1)
    quiet_engine(tmp_path).validate(model, datamodule=trained.parts, ckpt_path=trained.checkpoint)
    assert torch.equal(model.post_processor.image_threshold, trained.model.post_processor.image_threshold)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_broken_loss_stops_and_keeps_the_checkpoint(parts: SyntheticParts, tmp_path: Path, value: float) -> None:
    class Breaks(WTFlow):
        def training_step(self, batch, *args, **kwargs):
            if self.current_epoch == 2:
                self.loss.forward = lambda prediction, velocity: prediction.sum() * value
            return super().training_step(batch, *args, **kwargs)

    model, engine = Breaks(max_epochs=5, **ALL_EPOCHS, **SMALL), quiet_engine(tmp_path)
    module = as_mvtec(parts)
    with pytest.raises(
        RuntimeError, match=r"The training loss became (nan|-?inf) in epoch 2: lower .* finite scores is .*ckpt"
    ):
        engine.fit(model, datamodule=module)
    good = torch.load(engine.best_model_path, weights_only=False)
    assert good["epoch"] == 1
    assert all(t.isfinite().all() for t in good["state_dict"].values() if t.is_floating_point() and t.numel() > 1)
    assert len(module.train_data) == 16  # the slice was given back


@pytest.mark.parametrize("averaging", [0.2, 0.0])
def test_broken_weights_do_not_reach_the_checkpoint(parts: SyntheticParts, tmp_path: Path, averaging: float) -> None:
    """The loss is still finite, but the last update was not."""

    class Breaks(WTFlow):
        def optimizer_step(self, *args, **kwargs):
            super().optimizer_step(*args, **kwargs)
            if self.current_epoch == 1:
                torch.nn.init.constant_(self.model.field.fields[0].head.weight, math.nan)

    engine, overrides = quiet_engine(tmp_path), {"plateau": 0.0, "averaging": averaging}
    with pytest.raises(RuntimeError, match=r"The (scores|training loss) became (NaN|nan).* in epoch 1"):
        engine.fit(Breaks(max_epochs=3, overrides=overrides, **SMALL), datamodule=as_mvtec(parts, train_batch_size=16))
    assert torch.load(engine.best_model_path, weights_only=False)["epoch"] == 0


def test_infinite_scores_do_not_reach_the_checkpoint(parts: SyntheticParts, tmp_path: Path) -> None:
    """A loss that was finite once, and weights that it sent far away."""
    engine = quiet_engine(tmp_path)
    with pytest.raises(
        RuntimeError, match=r"The scores became NaN or infinite in epoch 0: .*there is no checkpoint yet"
    ):
        engine.fit(WTFlow(max_epochs=2, learning_rate=1e30, **SMALL), datamodule=as_mvtec(parts, train_batch_size=16))
    assert not list(tmp_path.rglob("*.ckpt"))


def test_in_training_mode_it_judges_nothing(trained: SimpleNamespace) -> None:
    """As a model is after a training, and one that Lightning loads."""
    loaded = WTFlow.load_from_checkpoint(trained.checkpoint)
    with pytest.raises(RuntimeError, match=r"in training mode, in which it judges no images: call its eval\(\) before"):
        loaded(torch.rand(1, 3, 128, 128))
    assert loaded.eval()(torch.rand(1, 3, 128, 128)).pred_label.tolist() == [True]


def test_checkpoint_of_another_size_or_rate(trained: SimpleNamespace, tmp_path: Path) -> None:
    """Another size is refused; another rate keeps the threshold that there is, and says so."""
    with pytest.raises(
        ValueError, match=r"trained with image_size=128 \(here 256\): give the model the same, as --model"
    ):
        quiet_engine(tmp_path).test(
            WTFlow(image_size=256, false_alarm_rate=0.1), datamodule=trained.parts, ckpt_path=trained.checkpoint
        )
    with pytest.warns(UserWarning, match=r"threshold is for false_alarm_rate=0.1; 0.3, given here, changes nothing"):
        quiet_engine(tmp_path).test(
            WTFlow(image_size=128, false_alarm_rate=0.3), datamodule=trained.parts, ckpt_path=trained.checkpoint
        )


def test_f1_threshold_needs_defective_images(parts: SyntheticParts, tmp_path: Path) -> None:
    parts.prepare_data()
    module = Folder("good", "train/good", parts.root, num_workers=0)
    model = WTFlow(max_epochs=1, image_size=64, false_alarm_rate=None)
    with pytest.raises(
        ValueError, match="false_alarm_rate=None asks for anomalib's F1 threshold, which needs defective"
    ):
        quiet_engine(tmp_path).fit(model, datamodule=module)


def test_a_checkpoint_of_other_settings_is_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    """start_time and the rest would load without an error, and change the scores under the same threshold."""
    message = r"trained with network='pointwise' \(here 'unet'\), start_time=0.35 \(here 0.2\): give the model the same"
    with pytest.raises(ValueError, match=message):
        quiet_engine(tmp_path).test(
            WTFlow(image_size=128, overrides={"start_time": 0.2, "network": "unet"}),
            datamodule=trained.parts,
            ckpt_path=trained.checkpoint,
        )


def test_a_checkpoint_of_an_earlier_version_is_refused(trained: SimpleNamespace, tmp_path: Path) -> None:
    """What it does not say about its settings is not guessed."""
    old = torch.load(trained.checkpoint, weights_only=False)
    del old["wtflow"]["settings"]["density"]
    torch.save(old, tmp_path / "old.ckpt")
    with pytest.raises(
        ValueError, match=r"old.ckpt' has no density, so another version of WTFlow \(.*\) wrote it: train"
    ):
        quiet_engine(tmp_path).test(WTFlow(image_size=128), datamodule=trained.parts, ckpt_path=tmp_path / "old.ckpt")
    wide = torch.load(trained.checkpoint, weights_only=False)
    name = next(name for name in wide["state_dict"] if name.startswith("model.field.") and name.endswith("stem.weight"))
    wide["state_dict"][name] = torch.zeros(256, *wide["state_dict"][name].shape[1:])
    torch.save(wide, tmp_path / "wide.ckpt")
    with pytest.raises(
        ValueError,
        match=r"wide.ckpt' has tensors of other names or shapes than the model \(.*\), so another version of",
    ):
        quiet_engine(tmp_path).test(WTFlow(image_size=128), datamodule=trained.parts, ckpt_path=tmp_path / "wide.ckpt")
    del old["wtflow"]
    torch.save(old, tmp_path / "older.ckpt")
    with pytest.raises(
        ValueError, match=r"older.ckpt' has no settings, so another version of WTFlow \(unknown\) wrote it"
    ):
        quiet_engine(tmp_path).test(WTFlow(image_size=128), datamodule=trained.parts, ckpt_path=tmp_path / "older.ckpt")
    with pytest.raises(
        ValueError, match=r"older.ckpt' has no settings, so another version of WTFlow \(unknown\) wrote it"
    ):
        WTFlow.load_from_checkpoint(tmp_path / "older.ckpt")


def test_batch_of_one(parts: SyntheticParts, tmp_path: Path) -> None:
    module = as_mvtec(parts, train_batch_size=1)
    with pytest.raises(
        ValueError, match=r"coupling 'worst' rearranges noise .* batch size is 1: raise --data.train_batch_size"
    ):
        quiet_engine(tmp_path).fit(WTFlow(max_epochs=1, **SMALL), datamodule=module)
    model = WTFlow(max_epochs=1, **UNET, **SMALL)
    quiet_engine(tmp_path).fit(model, datamodule=module)
    assert model.post_processor.image_threshold.isfinite()


@pytest.mark.parametrize("averaging", [0.2, 0.0])
def test_scores_in_training_are_those_of_evaluation(parts: SyntheticParts, tmp_path: Path, averaging: float) -> None:
    """The U-Net's batch normalisations tell the two modes apart; an error leaves the field as it was."""
    overrides = {**UNET["overrides"], "plateau": 0.0, "averaging": averaging}
    model = WTFlow(max_epochs=2, **{**UNET, "overrides": overrides}, **SMALL)
    field = model.model.flow_field
    checked = []

    class Check(Callback):
        def on_train_batch_end(self, *_: object) -> None:
            features = NormalisedFeatures(*(values[:4] for values in callback_of(model, Contrast).caching.reference))
            given = model.score_features(features, (64, 64)).pred_score
            assert field.training
            field.eval()
            expected = model.model.score(features.x0, (64, 64)).pred_score
            field.train()
            torch.testing.assert_close(given, expected)
            assert not torch.allclose(given, model.model.score(features.x0, (64, 64)).pred_score, rtol=1e-3)
            with pytest.raises(RuntimeError, match="scores became NaN"):
                model.score_features(features._replace(x0=features.x0 * torch.nan), (64, 64))
            assert field.training
            checked.append(1)

    quiet_engine(tmp_path, callbacks=[Check()]).fit(model, datamodule=as_mvtec(parts))
    assert len(checked) == 4


@pytest.mark.parametrize(("precision", "fused"), [("32-true", True), ("bf16-mixed", None)])
def test_the_optimizer_is_fused_where_gradients_can_still_be_clipped(
    parts: SyntheticParts, tmp_path: Path, precision: str, fused: bool | None
) -> None:
    model = WTFlow(max_epochs=1, overrides={"coupling": "worst_of_two"}, **SMALL)
    quiet_engine(tmp_path, precision=precision, gradient_clip_val=1.0).fit(model, datamodule=as_mvtec(parts))
    assert model.optimizers().optimizer.defaults["fused"] is fused
    assert model.trainer.global_step == 2


def test_reload_needs_neither_hub_nor_file(parts: SyntheticParts, tmp_path: Path) -> None:
    """A backbone from a local file, which is gone when the checkpoint is loaded."""
    import timm

    weights = tmp_path / "backbone.pth"
    torch.save(timm.create_model("resnet10t", pretrained=False).state_dict(), weights)
    model = WTFlow(backbone="resnet10t", weights=str(weights), max_epochs=1, **SMALL)
    engine = quiet_engine(tmp_path)
    engine.fit(model, datamodule=as_mvtec(parts))
    weights.unlink()
    loaded = WTFlow.load_from_checkpoint(engine.best_model_path).eval()
    images = torch.rand(2, 3, 64, 64)
    for got, expected in zip(loaded(images), model.eval()(images), strict=True):
        assert torch.equal(got, expected)
    assert loaded.post_processor.false_alarm_rate == 0.3


@pytest.mark.parametrize("size", [(256, 256), (300, 517), (100, 64)])
def test_larger_images_score_the_same_in_training_and_export(trained: SimpleNamespace, size: tuple[int, int]) -> None:
    """What the data set resizes for the threshold and what an exported graph resizes by itself are the same."""
    model, images = trained.model, torch.rand(2, 3, *size)
    with torch.no_grad():
        ours = model.post_processor(model.model(model.pre_processor.transform(images)))
        exported = model(images)
    torch.testing.assert_close(exported.pred_score, ours.pred_score)
    torch.testing.assert_close(exported.anomaly_map, ours.anomaly_map)


def test_schedules(tmp_path: Path) -> None:
    from anomalib_wtflow.flow.schedule import SCHEDULERS

    factors = {name: [schedule(9)(k) for k in range(10)] for name, schedule in SCHEDULERS.items()}
    assert factors["constant"] == [1] * 10
    assert factors["step"] == pytest.approx([1] * 3 + [0.1] * 3 + [0.01] * 4)
    assert factors["cosine"] == pytest.approx([math.cos(math.pi * k / 18) ** 2 for k in range(10)])
    assert SCHEDULERS["cosine"](math.inf)(10**6) == SCHEDULERS["constant"](math.inf)(10**6) == 1


def test_bad_arguments() -> None:
    for kwargs, message in [
        ({"max_epochs": 0}, "max_epochs is 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1.0"),
        ({"overrides": {"scheduler": "linear"}}, "Unknown scheduler 'linear': .*choose one of constant, cosine, step"),
        ({"overrides": {"network": "resnet"}}, "Unknown network 'resnet': .*choose one of pointwise, unet"),
        ({"overrides": {"path": "cubic"}}, "Unknown path 'cubic'"),
        ({"overrides": {"seed": 1}}, "'seed' stands among the overrides: .* give it as --model.seed"),
        ({"overrides": {"couplign": "worst"}}, "Unknown setting 'couplign': did you mean 'coupling'"),
        ({"recipe": "papers"}, "Unknown recipe 'papers': did you mean 'paper'"),
        ({"backbone": "nonesuch"}, "Unknown backbone 'nonesuch'"),
        ({"false_alarm_rate": 1.0}, "false_alarm_rate is 1.0"),
        ({"image_size": 0}, "image_size is 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            WTFlow(**kwargs)
