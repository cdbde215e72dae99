"""The feature cache: what it keeps, where, and when it may be used."""

from pathlib import Path

import pytest
import torch
from anomalib.data import Batch
from torchvision.transforms import v2

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.features.cache import FeatureLoader, FeatureStore, is_deterministic
from conftest import as_mvtec, quiet_engine


@pytest.mark.parametrize("budget", [1e9, 0])
def test_store_gives_back_what_it_was_given(budget: float) -> None:
    parts = [torch.randn(n, 3, 2, 4) for n in (3, 1, 2)]
    store = FeatureStore(7, budget)
    for part in parts:
        store.append(part)
    assert torch.equal(store.features, torch.cat(parts))
    assert (store.folder is None) == (budget > 0)
    if store.folder is not None:
        (file,) = Path(store.folder.name).iterdir()
        assert file.stat().st_size == 4 * 7 * 3 * 2 * 4
    for wrong in (torch.randn(2, 3, 2, 4), torch.randn(1, 3, 4, 4)):
        with pytest.raises(ValueError, match="do not fit behind 6 of 7 of size"):
            store.append(wrong)


@pytest.mark.parametrize("budget", [1e9, 0])
def test_store_applies_a_function_to_all_it_has(budget: float) -> None:
    features = torch.randn(35, 3, 2, 4)
    store = FeatureStore(40, budget)
    store.append(features)
    store.apply(lambda part: 2 * part)
    assert torch.equal(store.features, 2 * features)


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [4, 4, 3]), (True, [4, 4])])
def test_loader_shows_every_feature_once(drop_last: bool, sizes: list[int]) -> None:
    features = torch.arange(11.0).view(11, 1, 1, 1)
    loader = FeatureLoader(features, 4, drop_last=drop_last)
    epochs = [[batch.features.flatten().tolist() for batch in loader] for _ in range(3)]
    for epoch in epochs:
        assert [len(batch) for batch in epoch] == sizes
        assert len(loader) == len(sizes)
        shown = [value for batch in epoch for value in batch]
        assert len(set(shown)) == len(shown) <= 11
    assert epochs[0] != epochs[1]
    ordered = FeatureLoader(features, 4, shuffle=False)
    assert torch.equal(torch.cat([batch.features for batch in ordered]), features)


def test_what_is_known_to_be_deterministic() -> None:
    for transform in (None, v2.Resize(8), v2.Compose([v2.Resize(8), v2.Normalize([0.5], [0.5])])):
        assert is_deterministic(transform)
    for transform in (v2.RandomHorizontalFlip(), v2.Compose([v2.Resize(8), v2.ColorJitter(0.1)]), lambda image: image):
        assert not is_deterministic(transform)


SMALL = {"image_size": 64, "coupling": "worst_of_two", "false_alarm_rate": 0.3, "max_epochs": 3}


def backbone_images(parts: SyntheticParts, root: Path, augment: bool = False, **kwargs: object) -> dict[str, int]:
    """Train, and count the images that pass the backbone before and during the epochs, validation aside."""
    module = as_mvtec(parts, train_augmentations=v2.RandomHorizontalFlip() if augment else None)
    model = WTFlow(**{**SMALL, **kwargs})
    counts = {"before": 0, "epochs": 0}
    extract = model.model.extract

    def counted(images: torch.Tensor) -> torch.Tensor:
        counts["epochs" if model.trainer.fit_loop.epoch_progress.current.started else "before"] += len(images)
        return extract(images)

    model.model.extract = counted
    quiet_engine(root, limit_val_batches=0).fit(model, datamodule=module)
    assert model.trainer.global_step == 3 * 2  # 13 images in batches of 8
    assert model._store is None
    return counts


def test_no_image_passes_the_backbone_twice(parts: SyntheticParts, tmp_path: Path) -> None:
    """13 training images before the first epoch, 3 for the threshold at its end."""
    for budget in (1.0, 1e-9):
        assert backbone_images(parts, tmp_path, feature_cache=budget) == {"before": 13, "epochs": 3}
    assert backbone_images(parts, tmp_path, feature_cache=0) == {"before": 13, "epochs": 3 * 13 + 3}


@pytest.mark.parametrize(
    ("budget", "normalization"), [(1.0, "channel"), (1e-9, "whitening"), (1.0, "layer_norm"), (0.0, "channel")]
)
def test_each_epoch_regresses_on_every_images_normalised_features(
    parts: SyntheticParts, tmp_path: Path, budget: float, normalization: str
) -> None:
    module = as_mvtec(parts)
    model = WTFlow(**{**SMALL, "feature_cache": budget, "max_epochs": 2, "normalization": normalization})
    regress = model.model.regress
    shown: list[torch.Tensor] = []

    def recorded(x0: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shown.extend(x0)
        return regress(x0)

    model.model.regress = recorded
    quiet_engine(tmp_path, limit_val_batches=0).fit(model, datamodule=module)
    images = torch.stack([item.image for item in module.train_data])
    expected = model.model.normalization(model.model.extract(model.pre_processor(images))).flatten(1)
    distance, image = torch.cdist(
        torch.stack(shown).flatten(1), expected, compute_mode="donot_use_mm_for_euclid_dist"
    ).min(1)
    assert distance.max() < 1e-2 < torch.pdist(expected).min()
    first, second = image[:13].sort().values, image[13:].sort().values
    assert torch.equal(first, second)
    assert len(first.unique()) == 13


@pytest.mark.parametrize(("budget", "passes"), [(1.0, 1), (1e-9, 1), (0.0, 3)])
def test_validation_images_pass_the_backbone_once(
    parts: SyntheticParts, tmp_path: Path, budget: float, passes: int
) -> None:
    """In three epochs, with the scores that a pass through the backbone would give."""
    module = as_mvtec(parts)
    model = WTFlow(**{**SMALL, "feature_cache": budget})
    extract, step = model.model.extract, model.validation_step
    seen: list[int] = []

    def counted(images: torch.Tensor) -> torch.Tensor:
        if model.trainer.validating:
            seen.append(len(images))
        return extract(images)

    def checked(batch: Batch, batch_idx: int) -> object:
        expected = model.model.predict(extract(batch.image), batch.image.shape[-2:])
        result = step(batch, batch_idx)
        torch.testing.assert_close(result.pred_score, expected.pred_score)
        torch.testing.assert_close(result.anomaly_map, expected.anomaly_map.squeeze(1))
        return result

    model.model.extract, model.validation_step = counted, checked
    quiet_engine(tmp_path).fit(model, datamodule=module)
    held_out_for_the_threshold = 3
    assert sum(seen) == passes * len(module.val_data) + held_out_for_the_threshold
    assert model._validation is None


def test_a_list_of_validation_loaders_is_not_cached(parts: SyntheticParts, tmp_path: Path) -> None:
    module = as_mvtec(parts)
    module.setup()
    model = WTFlow(**{**SMALL, "max_epochs": 1, "false_alarm_rate": None})
    quiet_engine(tmp_path).fit(
        model, train_dataloaders=module.train_dataloader(), val_dataloaders=[module.val_dataloader()]
    )
    assert model.trainer.global_step == 2


def test_features_of_another_validation_set_are_forgotten(parts: SyntheticParts, tmp_path: Path) -> None:
    """After a training that was cut short, which leaves its features behind."""
    model = WTFlow(**SMALL)
    step = model.validation_step

    def cut(batch: Batch, batch_idx: int) -> None:
        step(batch, batch_idx)
        raise ZeroDivisionError

    model.validation_step = cut
    with pytest.raises(ZeroDivisionError):
        quiet_engine(tmp_path).fit(model, datamodule=as_mvtec(parts))
    assert model._validation is not None

    def checked(batch: Batch, batch_idx: int) -> object:
        expected = model.model.predict(model.model.extract(batch.image), batch.image.shape[-2:])
        result = step(batch, batch_idx)
        torch.testing.assert_close(result.pred_score, expected.pred_score)
        return result

    model.validation_step = checked
    other = as_mvtec(parts)
    other.setup()
    other.val_data = other.val_data.subsample(list(range(8, len(other.val_data))))
    other.setup = lambda stage=None: None  # a second one would put the first images back
    kept = other.val_data.samples["image_path"].tolist()
    quiet_engine(tmp_path).fit(model, datamodule=other)
    assert other.val_data.samples["image_path"].tolist() == kept


def test_no_cache_where_images_change(parts: SyntheticParts, tmp_path: Path) -> None:
    assert backbone_images(parts, tmp_path, augment=True)["epochs"] == 3 * 13 + 3


def test_limit_of_the_contrast(parts: SyntheticParts, tmp_path: Path) -> None:
    """The largest mean of the image's values among the training images, for the last weights, in the checkpoint."""
    parts.setup()
    model, engine = WTFlow(**SMALL), quiet_engine(tmp_path)
    engine.fit(model, datamodule=parts)
    torch_model, transform = model.eval().model, model.pre_processor.transform
    means = []
    with torch.no_grad():
        for item in parts.train_data:
            features = torch_model.extract(transform(item.image[None]))
            log_density = torch_model.log_density(torch_model.flow(torch_model.normalization(features)))
            weights = torch.tensor([24, 40, 112.0]).view(1, 3, 1, 1) / 176
            values = torch.nn.functional.avg_pool2d(-(weights * log_density).sum(1), 3, 1, 1, count_include_pad=False)
            means.append(values.mean())
    limit = torch_model.anomaly_map_generator.limit
    torch.testing.assert_close(limit, torch.stack(means).max())
    saved = torch.load(engine.best_model_path, weights_only=False)["state_dict"]
    assert saved["model.anomaly_map_generator.limit"] == limit
