"""Trainings, tests and predictions of several products where their data differ, or are only there in part."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from anomalib.data import PredictDataset
from sklearn.metrics import roc_auc_score

from anomalib_wtflow import Products, SyntheticParts, WTFlow
from anomalib_wtflow.post_processor import conformal_threshold
from anomalib_wtflow.products import UNKNOWN
from anomalib_wtflow.training.calibration import Calibration
from conftest import callback_of, quiet_engine

OVERRIDES = {"plateau": 0.0, "coupling": "worst_of_two"}
SMALL: dict[str, Any] = {"image_size": 96, "false_alarm_rate": 0.3, "overrides": OVERRIDES}
PRODUCTS = {"flange": 0, "pentagon": 1, "triangle": 4}
SIZES: dict[str, Any] = {"train_images": 15, "test_images": 6, "defect_images": 2, "side": 96}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("drawn")


def member(drawn: Path, name: str, validation: str = "same_as_test") -> SyntheticParts:
    return SyntheticParts(root=drawn, product=PRODUCTS[name], val_split_mode=validation, **SIZES)


def plant(root: Path, drawn: Path, *names: str, bare: str = "") -> Path:
    """Folders of products, with their masks but for one."""
    for name in names:
        parts = member(drawn, name)
        parts.prepare_data()
        shutil.copytree(str(parts.root), root / "plant" / name)
    if bare:
        shutil.rmtree(root / "plant" / bare / "ground_truth")
    return root / "plant"


def fitted(root: Path, data: Any, model: WTFlow | None = None, epochs: int = 1, **overrides: Any) -> SimpleNamespace:
    settings = {**SMALL, "overrides": {**OVERRIDES, **overrides}}
    model = model or WTFlow(max_epochs=epochs, **settings)
    engine = quiet_engine(root)
    engine.fit(model, datamodule=data)
    return SimpleNamespace(model=model.eval(), engine=engine, checkpoint=engine.best_model_path)


@pytest.fixture(scope="module")
def two(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """A model of two products that have masks both."""
    root = tmp_path_factory.mktemp("two")
    return fitted(root, Products(plant(root, drawn, "flange", "pentagon")))


@pytest.fixture(scope="module")
def uncached(drawn: Path, tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """The same, trained on images in each epoch."""
    root = tmp_path_factory.mktemp("uncached")
    return fitted(root, Products(plant(root, drawn, "flange", "pentagon")), feature_cache=0)


def loaded(run: SimpleNamespace, **kwargs: Any) -> WTFlow:
    """A model of one's own: anomalib's visualizer keeps the folder of the first run that a model is in."""
    return WTFlow.load_from_checkpoint(run.checkpoint, **kwargs).eval()


def alike(one: WTFlow, other: WTFlow) -> None:
    """The same model: fit, weights and thresholds."""
    expected = other.state_dict()
    for name, tensor in one.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True, msg=name)


# Masks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cache", [1.0, 0])
@pytest.mark.parametrize("bare", ["flange", "pentagon"])
def test_masks_of_some_products_change_nothing_in_training(
    two: SimpleNamespace, uncached: SimpleNamespace, drawn: Path, tmp_path: Path, bare: str, cache: float
) -> None:
    """Weights and thresholds come from good images, whichever product has no masks."""
    root = plant(tmp_path, drawn, "flange", "pentagon", bare=bare)
    reference = two.model if cache else uncached.model
    alike(fitted(tmp_path, Products(root), feature_cache=cache).model, reference)


@pytest.mark.parametrize("bare", ["flange", "pentagon"])
def test_a_test_where_some_products_have_masks(two: SimpleNamespace, drawn: Path, tmp_path: Path, bare: str) -> None:
    """Pixels are judged where masks are, images everywhere."""
    root = plant(tmp_path, drawn, "flange", "pentagon", bare=bare)
    data, engine, model = Products(root, eval_batch_size=5), quiet_engine(tmp_path), loaded(two)
    engine.test(model, datamodule=data)
    report = json.loads((Path(engine.trainer.default_root_dir) / "products.json").read_text())
    assert [("pixel_AUROC" in report["products"][name]) for name in ("flange", "pentagon")] == [
        bare == "pentagon",
        bare == "flange",
    ]
    data.setup()
    model.eval()
    for name, metrics in report["products"].items():
        items = [item for item in data.test_data if item.product == name]
        with torch.no_grad():
            results = [model(item.image[None]) for item in items]
        truth = [bool(item.gt_label) for item in items]
        scores = [float(result.pred_score) for result in results]
        assert metrics["image_AUROC"] == pytest.approx(roc_auc_score(truth, scores), abs=1e-6)
        if name != bare:
            maps = torch.cat([result.anomaly_map.flatten() for result in results])
            masks = torch.cat([item.gt_mask.flatten() for item in items])
            assert metrics["pixel_AUROC"] == pytest.approx(roc_auc_score(masks.numpy(), maps.numpy()), abs=2e-3)


@pytest.mark.parametrize("bare", ["", "flange", "pentagon"])
def test_predictions_of_all_products(two: SimpleNamespace, drawn: Path, tmp_path: Path, bare: str) -> None:
    """Are those of each image by itself, with or without masks of some."""
    data = Products(plant(tmp_path, drawn, "flange", "pentagon", bare=bare), eval_batch_size=5)
    predictions: Any = quiet_engine(tmp_path).predict(loaded(two), datamodule=data)
    data.setup()
    found = {
        path: (score, label, product)
        for batch in predictions
        for path, score, label, product in zip(
            batch.image_path, batch.pred_score.tolist(), batch.pred_label.tolist(), batch.product, strict=True
        )
    }
    assert len(found) == len(data.test_data) == 24
    two.model.eval()
    for item in data.test_data:
        with torch.no_grad():
            result = two.model(item.image[None])
        score, label, product = found[item.image_path]
        assert score == pytest.approx(float(result.pred_score), abs=1e-5)
        assert product == item.product
        if abs(score - 0.5) > 1e-5:
            assert label == bool(result.pred_label)


def test_a_validation_where_some_products_have_masks(two: SimpleNamespace, drawn: Path, tmp_path: Path) -> None:
    """Leaves the thresholds as they are, and does not stop."""
    root = plant(tmp_path, drawn, "flange", "pentagon", bare="pentagon")
    before = two.model.post_processor.image_threshold.clone()
    model = loaded(two)
    quiet_engine(tmp_path).validate(model, datamodule=Products(root))
    assert torch.equal(model.post_processor.image_threshold, before)


def test_predictions_of_a_plain_folder(two: SimpleNamespace, drawn: Path, tmp_path: Path) -> None:
    """Images that nobody says the product of, nor whether they are good; one product is unknown."""
    folder = tmp_path / "new"
    folder.mkdir()
    for name in PRODUCTS:
        parts = member(drawn, name)
        parts.prepare_data()
        shutil.copy(Path(str(parts.root)) / "test" / "good" / "001.png", folder / f"{name}.png")
    data: Any = PredictDataset(folder)
    model = loaded(two)
    predictions: Any = quiet_engine(tmp_path).predict(model, dataset=data)
    two.model.eval()
    names = {}
    for batch in predictions:
        for path, score, which in zip(
            batch.image_path, batch.pred_score, model.recognised(batch.recognition), strict=True
        ):
            names[Path(path).stem] = which
            item = next(data[index] for index in range(3) if data[index].image_path == path)
            with torch.no_grad():
                assert float(score) == pytest.approx(float(two.model(item.image[None]).pred_score), abs=1e-5)
    assert names == {"flange": "flange", "pentagon": "pentagon", "triangle": UNKNOWN}


# Which images the thresholds come from -------------------------------------------------------------------------------


def test_thresholds_from_validation_images_of_each_product(drawn: Path, tmp_path: Path) -> None:
    """Of the score and of the largest pixel, where each product has good images to validate on."""
    data = Products(members={name: member(drawn, name, "from_test") for name in ("flange", "pentagon")})
    run = fitted(tmp_path, data)
    normals = [item for item in data.val_data if item.gt_label == 0]
    for place, name in enumerate(("flange", "pentagon")):
        with torch.no_grad():
            raw = [
                run.model.model(run.model.pre_processor(item.image[None])) for item in normals if item.product == name
            ]
        assert len(raw) == 3
        assert all(run.model.recognised(each) == [name] for each in raw)
        post = run.model.post_processor
        for got, values in (
            (post.image_threshold, [each.pred_score for each in raw]),
            (post.pixel_threshold, [each.anomaly_map.max()[None] for each in raw]),
        ):
            expected = conformal_threshold(torch.cat(values), 0.3)
            torch.testing.assert_close(got[place], expected.threshold, rtol=1e-4, atol=1e-5)
        assert float(post.effective_false_alarm_rate[place]) == pytest.approx(expected.false_alarm_rate)
    assert len(data.train_data) == 30


def test_products_with_and_without_validation_images(drawn: Path, tmp_path: Path) -> None:
    """A folder has none, a drawn product does: both get a threshold, from at least three good images."""
    root = plant(tmp_path, drawn, "flange")
    data = Products(root, members={"pentagon": member(drawn, "pentagon", "from_test")})
    run = fitted(tmp_path, data)
    post = run.model.post_processor
    assert post.image_threshold.shape == (2,)
    assert post.image_threshold.isfinite().all()
    assert (post.effective_false_alarm_rate <= 0.3).all()


def test_adding_a_product_calibrates_with_images_that_were_never_trained_on(
    two: SimpleNamespace, drawn: Path, tmp_path: Path
) -> None:
    """The images of known products that were held out before: the first field was trained on none of them."""

    def held(run: SimpleNamespace) -> set[tuple[str, ...]]:
        samples = callback_of(run.model, Calibration).data.samples
        return {
            (name, *Path(path).parts[-3:]) for name, path in zip(samples["product"], samples["image_path"], strict=True)
        }

    first = fitted(tmp_path / "first", Products(plant(tmp_path / "first", drawn, "flange", "pentagon")))
    before = held(first)
    model = WTFlow(max_epochs=1, start_from=first.checkpoint, **SMALL)
    second = fitted(
        tmp_path / "second", Products(plant(tmp_path / "second", drawn, "flange", "pentagon", "triangle")), model
    )
    after = held(second)
    assert len(before) == 6
    assert {each for each in after if each[0] != "triangle"} == before
    assert len(after) == 9


def test_what_a_training_does_not_start_from_is_said_in_one_sentence(two: SimpleNamespace, tmp_path: Path) -> None:
    """Another recipe, a state without its settings: what is wrong and what to do, in a line."""
    state = torch.load(two.checkpoint, weights_only=False)
    del state["wtflow"]["products"]
    torch.save(state, tmp_path / "early.ckpt")
    for path, settings, message in [
        (tmp_path / "early.ckpt", SMALL, r"early.ckpt' has no products, so another version .* wrote it"),
        (two.checkpoint, {**SMALL, "image_size": 64}, r"trained with image_size=96 \(here 64\)"),
        (two.checkpoint, {**SMALL, "false_alarm_rate": 0.1}, r"trained with false_alarm_rate=0.3 \(here 0.1\)"),
    ]:
        with pytest.raises(ValueError, match=message) as error:
            WTFlow(start_from=path, **settings)
        assert "\n" not in str(error.value)


def test_resuming_without_a_product_is_refused(two: SimpleNamespace, drawn: Path, tmp_path: Path) -> None:
    data, model = Products(plant(tmp_path, drawn, "flange")), WTFlow(max_epochs=3, **SMALL)
    gone = pytest.warns(UserWarning, match=r"it had 30, here are 15, 0 of which it had not, and 15 of its own are gone")
    with gone, pytest.raises(ValueError, match="'pentagon'"):
        quiet_engine(tmp_path).fit(model, datamodule=data, ckpt_path=two.checkpoint)


# Order and cache -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("balance", [0.0, 1.0])
def test_a_resumed_training_of_several_products(drawn: Path, tmp_path: Path, balance: float) -> None:
    """Stopped after two of four epochs, it draws what an uninterrupted one would have drawn, balanced or not."""

    class Stops(WTFlow):
        def on_train_epoch_end(self) -> None:
            self.trainer.should_stop = self.current_epoch == 1

    def data() -> Products:
        products = {name: member(drawn, name) for name in ("flange", "pentagon")}
        return Products(members=products, balance=balance, train_batch_size=8)

    whole, engine = WTFlow(max_epochs=4, **SMALL), quiet_engine(tmp_path / "half", limit_val_batches=0)
    quiet_engine(tmp_path / "whole", limit_val_batches=0).fit(whole, datamodule=data())
    engine.fit(Stops(max_epochs=4, **SMALL), datamodule=data())
    resumed, again = WTFlow(max_epochs=4, **SMALL), quiet_engine(tmp_path / "rest", limit_val_batches=0)
    again.fit(resumed, datamodule=data(), ckpt_path=engine.best_model_path)
    assert again.trainer.current_epoch == 4
    alike(resumed, whole)


@pytest.mark.parametrize("cache", [1.0, 0])
def test_balance_changes_what_is_trained_on_and_no_statistics(drawn: Path, tmp_path: Path, cache: float) -> None:
    """All images are recognised and normalised by, however seldom they are shown."""

    def state(balance: float, cache: float) -> dict[str, torch.Tensor]:
        products = {name: member(drawn, name) for name in ("flange", "pentagon")}
        data = Products(members=products, balance=balance)
        return fitted(tmp_path, data, feature_cache=cache).model.state_dict()

    plain, balanced = state(0.0, 1.0), state(1.0, cache)
    for name, tensor in plain.items():
        if name.startswith(("model.recognition.", "model.normalization.", "model.codes")):
            torch.testing.assert_close(balanced[name], tensor, rtol=1e-4, atol=1e-5, msg=name)
    field = "model.field.fields.0.head.weight"
    assert not torch.equal(balanced[field], plain[field])


# Reports, exports ----------------------------------------------------------------------------------------------------


def test_there_is_no_report_where_products_are_not_told(two: SimpleNamespace, drawn: Path, tmp_path: Path) -> None:
    """A model of one product, and data that do not say which product they show."""
    run = fitted(tmp_path / "one", Products(members={"flange": member(drawn, "flange")}))
    for model, data, root in (
        (run.model, Products(members={"flange": member(drawn, "flange")}), tmp_path / "one"),
        (loaded(two), member(drawn, "flange"), tmp_path / "plain"),
    ):
        results = quiet_engine(root).test(model, datamodule=data)
        assert not list(root.rglob("products.json"))
        assert not [name for name in results[0] if name.startswith("products_")]


@pytest.mark.parametrize("visualizer", [True, False])
def test_the_report_needs_no_pictures(two: SimpleNamespace, drawn: Path, tmp_path: Path, visualizer: bool) -> None:
    """It makes its folder where nothing else has written anything."""
    engine, data = quiet_engine(tmp_path), Products(plant(tmp_path, drawn, "flange", "pentagon"))
    engine.test(loaded(two, visualizer=visualizer), datamodule=data)
    report = json.loads((Path(engine.trainer.default_root_dir) / "products.json").read_text())
    assert set(report["products"]) == {"flange", "pentagon"}


def test_a_model_can_be_tested_again_elsewhere(two: SimpleNamespace, drawn: Path, tmp_path: Path) -> None:
    """In another run's folder; each run has its own report."""
    model, root = loaded(two), plant(tmp_path, drawn, "flange", "pentagon")
    for name, products in (("first", ["flange"]), ("second", ["flange", "pentagon"])):
        engine = quiet_engine(tmp_path / name)
        engine.test(model, datamodule=Products(root, products=products))
        report = json.loads((Path(engine.trainer.default_root_dir) / "products.json").read_text())
        assert (tmp_path / name).resolve() in Path(engine.trainer.default_root_dir).resolve().parents
        assert list(report["products"]) == products


def test_anomalibs_threshold_is_one_for_all_products(drawn: Path, tmp_path: Path) -> None:
    """And goes with the checkpoint, as everything else does."""
    data = Products(members={name: member(drawn, name) for name in ("flange", "pentagon")})
    model = WTFlow(max_epochs=1, **{**SMALL, "false_alarm_rate": None})
    run = fitted(tmp_path, data, model)
    assert run.model.post_processor.image_threshold.numel() == 1
    assert run.model.post_processor.image_threshold.isfinite().all()
    assert list(run.model.product_names) == ["flange", "pentagon"]
    other = loaded(run)
    images = torch.stack([data.test_data[index].image for index in range(0, 24, 4)])
    with torch.no_grad():
        for got, expected in zip(other(images), run.model(images), strict=True):
            assert torch.equal(got, expected)


def test_the_pickled_module_judges_as_the_model(two: SimpleNamespace, drawn: Path, tmp_path: Path) -> None:
    """Images of each product, and those of none: noise, black, and a product that it does not know."""
    data = Products(members={name: member(drawn, name) for name in PRODUCTS})
    data.prepare_data()
    data.setup()
    shown = [item.image for item in data.test_data][::3]
    strange = [torch.rand(3, 96, 96), torch.zeros(3, 96, 96)]
    images = torch.stack([*shown, *strange])
    model = loaded(two)
    model.post_processor.image_sensitivity = 0.0  # no score is high enough, so the unknown are anomalous, and no other
    exported = torch.load(model.to_torch(tmp_path), weights_only=False)["model"].eval()
    with torch.no_grad():
        got, expected = exported(images), model(images)
        raw = model.model(model.pre_processor(images))
    for name in expected._fields:
        torch.testing.assert_close(getattr(got, name), getattr(expected, name), rtol=0, atol=1e-6)
    unknown = [name == UNKNOWN for name in model.recognised(raw)]
    names = [item.product for item in data.test_data][::3]
    assert unknown == [*(name == "triangle" for name in names), True, True]
    assert got.pred_label.tolist() == unknown
    assert (got.pred_score[torch.tensor(unknown)] > 0.5).all()


PROGRAM = """
import json, sys
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
import torch
from anomalib_wtflow.reporting.product_report import ProductReport

rank, root, names, alone = int(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4]
torch.distributed.init_process_group(
    "gloo", init_method=f"file://{root}/meeting", rank=rank, world_size=2, timeout=timedelta(seconds=20)
)
torch.manual_seed(0)
product = names * 8
masks, maps = torch.rand(len(product), 8, 8) < 0.3, torch.rand(len(product), 8, 8)
for index, name in enumerate(product):  # each product's maps tell something else
    maps[index] = (maps[index] + masks[index] * (1 + names.index(name)) / 8).clamp(max=2) / 2
own = [index for index, name in enumerate(product) if name != alone][rank::2]
own += [index for index, name in enumerate(product) if name == alone] if rank == 0 else []
report = ProductReport()
recognised = [product[index] for index in own]
model = SimpleNamespace(product_names=names, recognised=lambda _: recognised, log=lambda *_, **__: None)
trainer = SimpleNamespace(world_size=2, is_global_zero=rank == 0, default_root_dir=root)
report.on_test_start(trainer, model)
report.on_test_batch_end(trainer, model, SimpleNamespace(
    product=recognised, recognition=None, gt_label=torch.ones(len(own)),
    pred_score=torch.rand(len(own)), pred_label=torch.ones(len(own)), gt_mask=masks[own], anomaly_map=maps[own],
))
report.on_test_epoch_end(trainer, model)
if rank == 0:
    torch.save((product, masks, maps), root / "truth.pt")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seeds", "alone"), [(("1", "1"), ""), (("1", "2"), ""), (("1", "1"), "screw")], ids=["plain", "order", "missing"]
)
def test_two_processes_report_all_images(tmp_path: Path, seeds: tuple[str, str], alone: str) -> None:
    """Whatever order Python's sets have in each (``PYTHONHASHSEED``), and where one has no image of a product."""
    names = ["bolt", "nut", "pin", "washer", "screw"]
    (tmp_path / "program.py").write_text(PROGRAM)
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "program.py", str(rank), str(tmp_path), json.dumps(names), alone],
            cwd=tmp_path,
            env={**os.environ, "PYTHONHASHSEED": seed, "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, seed in enumerate(seeds)
    ]
    try:
        told = [process.communicate(timeout=90)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], told[0][-1500:] + told[1][-1500:]
    product, masks, maps = torch.load(tmp_path / "truth.pt")
    report = json.loads((tmp_path / "products.json").read_text())
    for name in names:
        which = torch.tensor([each == name for each in product])
        expected = roc_auc_score(masks[which].flatten().numpy(), maps[which].flatten().numpy())
        assert report["products"][name]["anomalous"] == 8
        assert report["products"][name]["pixel_AUROC"] == pytest.approx(expected, abs=2e-3), name
