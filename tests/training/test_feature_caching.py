"""The feature cache: what it keeps, where, when it may be used, and that nothing opens an image once it is filled."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from anomalib.data import Batch
from torchvision.transforms import v2

from anomalib_wtflow import SyntheticParts, WTFlow
from anomalib_wtflow.features.cache import FeatureBatch, FeatureDataset, FeatureStore, Share, is_deterministic
from anomalib_wtflow.training.feature_caching import FeatureCaching, text_of
from conftest import as_mvtec, callback_of, quiet_engine


@pytest.mark.parametrize("budget", [1e9, 0])
def test_store_gives_back_what_it_was_given(budget: float) -> None:
    parts = [torch.randn(n, 3, 2, 4) for n in (3, 1, 2)]
    store = FeatureStore(7, budget)
    for part in parts:
        store.append(part)
    assert torch.equal(store.features, torch.cat(parts))
    assert store.in_memory == (budget > 0)
    for wrong in (torch.randn(2, 3, 2, 4), torch.randn(1, 3, 4, 4)):
        with pytest.raises(ValueError, match="do not fit behind 6 of 7 of size"):
            store.append(wrong)


@pytest.mark.parametrize(("count", "size"), [(7, 3), (2, 4), (8, 2), (1, 1)])
def test_processes_share_a_store(count: int, size: int, tmp_path: Path) -> None:
    """Each fills a part of its own, all see all; a process without a part opens the file by its shape."""
    stores = [FeatureStore(count, 1e9, Share(tmp_path, rank, size)) for rank in range(size)]
    features = torch.randn(count, 3, 2, 2)
    assert sorted(index for store in stores for index in store.part) == list(range(count))
    for store in stores:
        if len(store.part):
            store.append(features[list(store.part)])
        else:
            store.open(features.shape)
    for store in stores:
        assert torch.equal(store.rows, features)
    assert [file.stat().st_size for file in tmp_path.iterdir()] == [4 * features.numel()]


def test_data_set_of_features(parts: SyntheticParts) -> None:
    """Batches with the truth of the images; everything else is answered by the images' data set."""
    parts.setup()
    images = parts.test_data
    data = FeatureDataset(images, truth=True)
    with pytest.raises(RuntimeError, match="There are no features yet"):
        data[0]
    data.store, data.masks = FeatureStore(len(images), 1e9), FeatureStore(len(images), 1e9, dtype=torch.bool)
    features, masks = torch.randn(len(images), 3, 2, 2), torch.rand(len(images), 8, 8) > 0.5
    data.store.append(features)
    data.masks.append(masks)
    data.recognised = FeatureStore(len(images), 1e9)
    data.recognised.append(torch.tensor([[index % 3, index / 10] for index in range(len(images))]))
    chosen = [5, 0, 11]
    (batch,) = torch.utils.data.DataLoader(data, sampler=chosen, batch_size=3, collate_fn=data.collate_fn)
    items = [images[index] for index in chosen]
    assert len(data) == len(images)
    assert isinstance(batch, FeatureBatch)
    assert batch.batch_size == 3
    assert batch.image is None
    assert torch.equal(batch.features, features[chosen])
    assert torch.equal(batch.gt_mask, masks[chosen])
    assert batch.product.tolist() == [2, 0, 2]
    torch.testing.assert_close(batch.strangeness, torch.tensor([0.5, 0.0, 1.1]))
    assert batch.gt_label.tolist() == [int(item.gt_label) for item in items]
    assert batch.image_path == [item.image_path for item in items]
    assert data.samples is images.samples
    batch.update(pred_score=torch.ones(3))
    assert batch.pred_score.tolist() == [1, 1, 1]


def test_what_is_known_to_be_deterministic() -> None:
    for transform in (None, v2.Resize(8), v2.Compose([v2.Resize(8), v2.Normalize([0.5], [0.5])])):
        assert is_deterministic(transform)
    for transform in (v2.RandomHorizontalFlip(), v2.Compose([v2.Resize(8), v2.ColorJitter(0.1)]), lambda image: image):
        assert not is_deterministic(transform)


ALL_EPOCHS = {"coupling": "worst_of_two", "plateau": 0.0}
SMALL = {"image_size": 64, "overrides": ALL_EPOCHS, "false_alarm_rate": 0.3, "max_epochs": 3}


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
    assert not isinstance(module.train_data, FeatureDataset)
    assert len(module.train_data) == 16
    return counts


def test_no_image_passes_the_backbone_twice(parts: SyntheticParts, tmp_path: Path) -> None:
    """13 training images before the first epoch, 3 for the threshold at its end."""
    for budget in (1.0, 1e-9):
        assert backbone_images(parts, tmp_path, overrides={**ALL_EPOCHS, "feature_cache": budget}) == {
            "before": 13,
            "epochs": 3,
        }
    assert backbone_images(parts, tmp_path, overrides={**ALL_EPOCHS, "feature_cache": 0}) == {
        "before": 13,
        "epochs": 3 * 13 + 3,
    }


@pytest.mark.parametrize(
    ("budget", "normalization"), [(1.0, "channel"), (1e-9, "whitening"), (1.0, "layer_norm"), (0.0, "channel")]
)
def test_each_epoch_regresses_on_every_images_normalised_features(
    parts: SyntheticParts, tmp_path: Path, budget: float, normalization: str
) -> None:
    module = as_mvtec(parts)
    model = WTFlow(**{**SMALL, "max_epochs": 2, "overrides": {"normalization": normalization, "feature_cache": budget}})
    regress = model.model.regress
    shown: list[torch.Tensor] = []

    def recorded(
        x0: torch.Tensor, generator: torch.Generator, product: torch.Tensor | None = None, averaged: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not averaged:  # which the end of the training is told from
            shown.extend(x0)
        return regress(x0, generator, product=product, averaged=averaged)

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
    """In three epochs, with the scores, labels, masks and paths that a pass through the backbone would give."""
    module = as_mvtec(parts)
    model = WTFlow(**{**SMALL, "overrides": {**ALL_EPOCHS, "feature_cache": budget}})
    extract, step = model.model.extract, model.validation_step
    seen: list[int] = []
    checked: list[str] = []

    def counted(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return extract(images)

    def compared(batch: Batch, batch_idx: int) -> object:
        result = step(batch, batch_idx)
        for k, path in enumerate(batch.image_path):
            item = next(item for item in module.test_data if item.image_path == path)
            image, mask = model.pre_processor.transform(item.image[None], item.gt_mask[None])
            expected = model.model.predict(extract(image), (64, 64))
            torch.testing.assert_close(result.pred_score[k], expected.pred_score[0], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(result.anomaly_map[k], expected.anomaly_map[0, 0], rtol=1e-4, atol=1e-5)
            assert bool(batch.gt_label[k]) == bool(item.gt_label)
            assert torch.equal(batch.gt_mask[k].bool(), mask[0].bool().squeeze())
            checked.append(path)
        return result

    model.model.extract, model.validation_step = counted, compared
    quiet_engine(tmp_path).fit(model, datamodule=module)
    trained, held_out_for_the_threshold = 13, 3
    assert sum(seen) - trained * (1 if budget else 4) == passes * len(module.val_data) + held_out_for_the_threshold
    assert len(checked) == 3 * len(module.val_data)
    assert not isinstance(module.val_data, FeatureDataset)


@pytest.mark.parametrize("workers", [0, 8])
def test_epochs_open_no_image_and_start_no_process(
    parts: SyntheticParts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Whatever number of workers was asked for: after the first pass all is in the cache."""
    import multiprocessing.process

    from anomalib.data import AnomalibDataset

    events: list[str] = []
    start, get = multiprocessing.process.BaseProcess.start, AnomalibDataset.__getitem__
    monkeypatch.setattr(
        multiprocessing.process.BaseProcess, "start", lambda self: (events.append("process"), start(self))[1]
    )
    monkeypatch.setattr(
        AnomalibDataset, "__getitem__", lambda self, index: (events.append("image"), get(self, index))[1]
    )
    module = as_mvtec(parts, num_workers=workers)
    model = WTFlow(**SMALL)
    step = model.training_step
    at_steps: list[int] = []

    def counted(batch: Batch, *args: object) -> object:
        at_steps.append(len(events))
        return step(batch, *args)

    model.training_step = counted
    quiet_engine(tmp_path).fit(model, datamodule=module)
    assert len(at_steps) == 6
    after_the_first_epoch = events[at_steps[2] :]  # the held-out images are opened at its end
    assert after_the_first_epoch == []
    assert module.num_workers == workers


def test_a_list_of_validation_loaders_is_not_cached(parts: SyntheticParts, tmp_path: Path) -> None:
    module = as_mvtec(parts)
    module.setup()
    model = WTFlow(**{**SMALL, "max_epochs": 1, "false_alarm_rate": None})
    quiet_engine(tmp_path).fit(
        model, train_dataloaders=module.train_dataloader(), val_dataloaders=[module.val_dataloader()]
    )
    assert model.trainer.global_step == 2


def test_a_training_that_was_cut_short_leaves_the_images(parts: SyntheticParts, tmp_path: Path) -> None:
    """The data module is as it was, and the next training has the features of its own images."""
    model, module = WTFlow(**SMALL), as_mvtec(parts)
    step = model.validation_step

    def cut(batch: Batch, batch_idx: int) -> None:
        step(batch, batch_idx)
        raise ZeroDivisionError

    model.validation_step = cut
    with pytest.raises(ZeroDivisionError):
        quiet_engine(tmp_path).fit(model, datamodule=module)
    for data, count in ((module.train_data, 16), (module.val_data, 24)):
        assert not isinstance(data, FeatureDataset)
        assert len(data) == count

    def checked(batch: Batch, batch_idx: int) -> object:
        result = step(batch, batch_idx)
        for k, path in enumerate(batch.image_path):
            item = next(item for item in other.test_data if item.image_path == path)
            expected = model.model(model.pre_processor.transform(item.image[None]))
            torch.testing.assert_close(result.pred_score[k], expected.pred_score[0], rtol=1e-4, atol=1e-5)
        return result

    model.validation_step = checked
    other = as_mvtec(parts)
    other.setup()
    other.val_data = other.val_data.subsample(list(range(8, len(other.val_data))))
    other.setup = lambda stage=None: None  # a second one would put the first images back
    kept = other.val_data.samples["image_path"].tolist()
    quiet_engine(tmp_path).fit(model, datamodule=other)
    assert other.val_data.samples["image_path"].tolist() == kept


def test_users_collating_function_is_respected(parts: SyntheticParts, tmp_path: Path) -> None:
    """It may change the images, so they are not replaced."""
    module = as_mvtec(parts)
    seen = []

    def collate(items: list) -> object:
        seen.append(len(items))
        return type(module.train_data).collate_fn.fget(module.train_data)(items)

    module.external_collate_fn = collate
    quiet_engine(tmp_path, limit_val_batches=0).fit(WTFlow(**SMALL), datamodule=module)
    assert sum(seen) >= 3 * 13


def test_files_of_shared_features_are_removed(tmp_path: Path) -> None:
    caching = FeatureCaching(1.0)
    caching._share = Share(tmp_path / "shared", 0, 2)
    caching._share.folder.mkdir()
    caching.on_exception(SimpleNamespace(local_rank=0, datamodule=None), None, ValueError())
    assert not (tmp_path / "shared").exists()


def test_no_cache_where_images_change(parts: SyntheticParts, tmp_path: Path) -> None:
    assert backbone_images(parts, tmp_path, augment=True)["epochs"] == 3 * 13 + 3


@pytest.mark.parametrize("kept", [None, 0.5])
def test_contrast_of_the_training_images(parts: SyntheticParts, tmp_path: Path, kept: float | None) -> None:
    """Slope and limit of the training images' tops and levels, for the last averaged weights, in the checkpoint."""
    parts.setup()
    model, engine = WTFlow(**{**SMALL, "overrides": {**ALL_EPOCHS, "contrast": kept}}), quiet_engine(tmp_path)
    engine.fit(model, datamodule=parts)
    torch_model, transform = model.eval().model, model.pre_processor.transform
    tops, levels = [], []
    with torch.no_grad():
        for item in parts.train_data:
            features = torch_model.extract(transform(item.image[None]))
            log_density = torch_model.log_density(torch_model.flow(torch_model.normalization(features)))
            weights = torch.tensor([24, 40, 112.0]).sqrt().view(1, 3, 1, 1)
            weighted = -(weights / weights.sum() * log_density).sum(1)
            values = torch.nn.functional.avg_pool2d(weighted, 3, 1, 1, count_include_pad=False).flatten().sort().values
            assert len(values) == 4 * 4
            tops.append(values[-1])
            levels.append(values[4])
    tops, levels = torch.stack(tops).double(), torch.stack(levels).double()
    generator = torch_model.anomaly_map_generator
    limit = 3 * levels.max() - 2 * levels.mean()
    torch.testing.assert_close(generator.limit[0].double(), limit, rtol=1e-5, atol=1e-5)
    covariance = torch.cov(torch.stack([tops, levels]))
    slope = (covariance[0, 1] / covariance[1, 1]).clamp(0.75, 1.25) if kept is None else torch.tensor(kept).double()
    torch.testing.assert_close(generator.slope[0].double(), slope, rtol=1e-3, atol=1e-3)
    saved = torch.load(engine.best_model_path, weights_only=False)["state_dict"]
    assert saved["model.anomaly_map_generator.limit"] == generator.limit
    assert saved["model.anomaly_map_generator.slope"] == generator.slope


@pytest.mark.parametrize("normalization", ["channel", "whitening"])
def test_mixed_precision_trains_on_cached_features(parts: SyntheticParts, tmp_path: Path, normalization: str) -> None:
    """Features are kept in float32, whatever the backbone computes in; thresholds are near those of float32."""
    thresholds = []
    for each in ("bf16-mixed", "32-true"):
        overrides = {"normalization": normalization, "contrast": 0.5}
        model = WTFlow(max_epochs=1, image_size=64, false_alarm_rate=0.3, overrides=overrides)
        quiet_engine(tmp_path, precision=each).fit(model, datamodule=as_mvtec(parts))
        thresholds.append(float(model.post_processor.image_threshold))
    assert thresholds[0] == pytest.approx(thresholds[1], rel=0.05)


def test_a_loaders_own_sampler_decides_what_the_statistics_see(parts: SyntheticParts, tmp_path: Path) -> None:
    """Images that it leaves out change neither the normalisation nor the contrast's limit."""
    parts.setup()
    chosen = [0, 2, 3, 5, 8, 13]
    data = parts.train_data
    means = []
    for dataset, sampler in ((data, torch.utils.data.SubsetRandomSampler(chosen)), (data.subsample(chosen), None)):
        loader = torch.utils.data.DataLoader(dataset, 3, sampler=sampler, collate_fn=data.collate_fn)
        model = WTFlow(**{**SMALL, "max_epochs": 1})
        quiet_engine(tmp_path).fit(model, loader, parts.val_dataloader())
        means.append(model.model.normalization.mean)
        assert len(callback_of(model, FeatureCaching).reference.x0) == 6
    torch.testing.assert_close(*means)


def test_features_are_let_go_of(parts: SyntheticParts, tmp_path: Path) -> None:
    """Lightning keeps its loaders after a fit; what they held is gone."""
    model = WTFlow(**{**SMALL, "max_epochs": 1})
    quiet_engine(tmp_path).fit(model, datamodule=as_mvtec(parts))
    assert isinstance(model.trainer.train_dataloader.dataset, FeatureDataset)
    assert model.trainer.train_dataloader.dataset.store is None


@pytest.mark.parametrize(("gibibytes", "place"), [(4.0, "of memory"), (1e-5, "in temporary files in ")])
def test_the_caches_size_is_said_before_it_is_filled(
    parts: SyntheticParts,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    gibibytes: float,
    place: str,
) -> None:
    caplog.set_level("INFO")
    said, append = [], FeatureStore.append

    def spy(store: FeatureStore, features: torch.Tensor) -> None:
        said.append([message for message in caplog.messages if message.startswith("The feature cache takes")])
        append(store, features)

    monkeypatch.setattr(FeatureStore, "append", spy)
    model = WTFlow(**{**SMALL, "max_epochs": 1, "overrides": {"feature_cache": gibibytes}})
    quiet_engine(tmp_path).fit(model, datamodule=as_mvtec(parts))
    # 13 training images (3 are held out), and 20 + 4 for validation; 176 x 4 x 4 numbers of 4 bytes.
    (message,) = said[0]
    assert said[-1] == [message]
    assert message.startswith(f"The feature cache takes 416.8 kB {place}")
    assert message.endswith(": 37 training and validation images, 176 x 4 x 4 numbers (11.3 kB) each.")


def test_bytes_in_words() -> None:
    assert [text_of(size) for size in (12, 999_999, 1e6, 180_224 * 209, 2.5e9)] == [
        "0.0 kB",
        "1000.0 kB",
        "1.0 MB",
        "37.7 MB",
        "2.5 GB",
    ]


def test_a_file_that_the_disk_has_no_room_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where no room can be reserved, writing to it would end the process; another process may have made the file."""

    def unsupported(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    monkeypatch.setattr("anomalib_wtflow.features.cache.disk_usage", lambda folder: SimpleNamespace(free=1000))
    FeatureStore(2, 0).open((2, 5, 5, 5))
    with pytest.raises(
        ValueError, match=r"needs 1.2e-06 GB in .* \(No space left on device\): set TMPDIR .*feature_cac"
    ):
        FeatureStore(2, 0).open((2, 5, 5, 6))
    share = Share(tmp_path, 0, 2)
    FeatureStore(2, 0, share).open((2, 5, 5, 5))
    monkeypatch.setattr("anomalib_wtflow.features.cache.disk_usage", lambda folder: SimpleNamespace(free=0))
    FeatureStore(2, 0, share).open((2, 5, 5, 5))
