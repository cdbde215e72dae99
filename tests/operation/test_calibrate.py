"""The moved threshold, against the conformal formula and scipy."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from PIL import Image
from scipy.stats import binom, mannwhitneyu

from anomalib_wtflow import SyntheticParts, WTFlow, WTFlowPostProcessor, calibrate
from anomalib_wtflow.checkpoint import KEY, read_checkpoint
from anomalib_wtflow.conformal import Scores
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.images import marks_of
from anomalib_wtflow.operation.calibrate import ALPHA, Change, change_of, enough_images
from conftest import quiet_engine

BRIGHTER = 1.4
"""Light of the night shift, to that of the training images."""


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Good parts of the trained model's kind that it has not seen, and others in another light."""
    root = tmp_path_factory.mktemp("shift")
    parts = SyntheticParts(root=root, train_images=150, test_images=20, defect_images=4, side=128, seed=5)
    parts.prepare_data()
    day, night = Path(parts.root) / "train" / "good", root / "night"
    night.mkdir()
    for path in sorted(day.glob("*.png")):
        pixels = np.asarray(Image.open(path).convert("RGB"), dtype=np.float32)
        Image.fromarray((BRIGHTER * pixels).clip(max=255).astype(np.uint8)).save(night / path.name)
    return SimpleNamespace(day=day, night=night)


def scores(model: WTFlow, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Raw scores and largest pixels, image by image."""
    values = []
    with torch.no_grad():
        for item in PredictDataset(folder):
            raw = model.model(model.pre_processor.transform(item.image)[None])
            values.append((raw.pred_score.item(), raw.anomaly_map.max().item()))
    image, pixel = torch.tensor(values).T
    return image, pixel


@pytest.mark.slow
def test_the_threshold_is_the_conformal_quantile_of_the_new_images(
    tmp_path: Path, trained: SimpleNamespace, good: SimpleNamespace
) -> None:
    done = calibrate(trained.checkpoint, good.night, tmp_path / "night.ckpt", false_alarm_rate=0.02)
    model, before = (WTFlow.load_from_checkpoint(path).eval() for path in (done.path, trained.checkpoint))
    image, pixel = scores(before, good.night)
    k = 151 - math.floor(0.02 * 151)
    for values, got in ((image, model.post_processor.image_threshold), (pixel, model.post_processor.pixel_threshold)):
        assert float(got) == pytest.approx(float(values.sort().values[k - 1]), rel=1e-4)
    (one,) = done.products
    assert (one.images, one.promised) == (150, pytest.approx((151 - k) / 151, rel=1e-6))
    assert one.after == float(model.post_processor.image_threshold)
    assert one.before == float(before.post_processor.image_threshold)
    expected = mannwhitneyu(image.numpy(), before.post_processor.calibration_scores.numpy()).pvalue
    assert one.p_value == pytest.approx(expected, rel=1e-3)
    for name, tensor in model.model.state_dict().items():
        torch.testing.assert_close(tensor, before.model.state_dict()[name], rtol=0, atol=0, msg=name)
    old, new = (read_checkpoint(path)[KEY]["marks"] for path in (trained.checkpoint, done.path))
    assert torch.equal(new["training"], old["training"])
    assert torch.equal(new["calibration"], marks_of([str(path) for path in good.night.iterdir()]))


@pytest.mark.slow
def test_anomalibs_commands_take_the_new_threshold(
    tmp_path: Path, trained: SimpleNamespace, good: SimpleNamespace
) -> None:
    done = calibrate(trained.checkpoint, good.night, tmp_path / "night.ckpt", false_alarm_rate=0.02)
    model = WTFlow(image_size=128, false_alarm_rate=0.02, pre_trained=False)
    batches = quiet_engine(tmp_path / "run").predict(model, dataset=PredictDataset(good.night), ckpt_path=done.path)
    assert float(model.post_processor.image_threshold) == done.products[0].after
    called = torch.cat([batch.pred_score for batch in batches]) > 0.5 + 1e-5  # one is the threshold itself
    assert int(called.sum()) == round(done.products[0].promised * 151) - 1
    again = calibrate(done.path, good.night, tmp_path / "again.ckpt")
    assert again.false_alarm_rate == pytest.approx(0.02)
    assert again.products[0].after == done.products[0].after
    assert not again.products[0].moved
    assert again.products[0].p_value == pytest.approx(1.0)


@pytest.mark.slow
def test_the_rate_holds_in_another_light_and_the_sentence_appears_then_and_only_then(
    trained: SimpleNamespace, good: SimpleNamespace
) -> None:
    """100 draws of old images, new images and next parts: rates against what is promised, with its 99.9 % band."""
    model, draws, n, m = WTFlow.load_from_checkpoint(trained.checkpoint).eval(), 100, 39, 40
    day, night = (scores(model, folder)[0] for folder in (good.day, good.night))
    post = WTFlowPostProcessor(0.1)
    alarms, without, moved_by_day, moved_by_night = 0, 0, 0, 0
    for draw in range(draws):
        order = torch.randperm(len(day), generator=torch.Generator().manual_seed(draw))
        old, same, changed, following = order[:n], order[n : 2 * n], order[:n], order[2 * n : 2 * n + m]
        _, by_day = change(post, day[old], day[same])
        limit, by_night = change(post, day[old], night[changed])
        without += int((night[following] > limit).sum())
        alarms += int((night[following] > post.image_threshold).sum())
        moved_by_day += by_day.moved
        moved_by_night += by_night.moved
        assert by_night.higher == bool(night[changed].median() > day[old].median())
    promised = float(post.effective_false_alarm_rate)
    assert promised == pytest.approx(4 / 40)
    low, high = binom.interval(0.999, draws, promised)
    assert low <= alarms / m <= high
    assert without / m > 3 * high
    assert moved_by_day <= binom.ppf(0.999, draws, ALPHA)
    assert moved_by_night == draws


def change(post: WTFlowPostProcessor, old: torch.Tensor, new: torch.Tensor) -> tuple[float, Change]:
    """Calibrate with old scores, then with new ones; the old threshold, and the change."""
    first, second = (Scores(each, each, torch.zeros(len(each), dtype=torch.int64)) for each in (old, new))
    post.calibrate(first)
    before = post.image_threshold.tolist(), post.pixel_threshold.tolist()
    post.calibrate(second)
    model = SimpleNamespace(post_processor=post, products=["parts"])
    names = [str(k) for k in range(len(new))]
    return before[0][0], change_of(model, 0, before, second, first, names, ALPHA)  # type: ignore[arg-type]


def test_folders_with_defects_are_not_taken_for_good(tmp_path: Path, trained: SimpleNamespace) -> None:
    (tmp_path / "plant" / "bolt" / "test" / "scratch").mkdir(parents=True)
    (tmp_path / "plant" / "bolt" / "test" / "good").mkdir(parents=True)
    for data in (tmp_path / "plant", tmp_path / "plant" / "bolt" / "test", tmp_path / "none"):
        with pytest.raises(WTFlowError, match="is not a folder of good images only"):
            calibrate(trained.checkpoint, data, tmp_path / "x.ckpt")


def test_what_is_refused(tmp_path: Path, trained: SimpleNamespace) -> None:
    with pytest.raises(WTFlowError, match=r"model.ckpt', the checkpoint itself: give another path"):
        calibrate(trained.checkpoint, tmp_path, trained.checkpoint)
    with pytest.raises(WTFlowError, match=r"^false_alarm_rate is 2: choose "):
        calibrate(trained.checkpoint, tmp_path, tmp_path / "x.ckpt", false_alarm_rate=2)


def test_a_few_images_that_look_like_another_product_do_not_move_its_threshold() -> None:
    """Of two products with 30 old images each, one new image of the second at a rate that needs 9."""
    old = Scores(torch.rand(60), torch.rand(60), torch.arange(60) % 2)
    new = Scores(torch.rand(10), torch.rand(10), torch.tensor([0] * 9 + [1]))
    assert enough_images(new, old, 2, 9).tolist() == [True] * 9 + [False]
    two = Scores(torch.arange(2.0), torch.arange(2.0), torch.zeros(2, dtype=torch.int64))
    assert enough_images(two, old, 1, 9).tolist() == [True, True]  # of one product, the rate that holds is printed
    with pytest.raises(WTFlowError, match="The 2 good images are too few: the rate needs at least 9 of one product"):
        enough_images(two, old, 2, 9)


def test_images_that_the_model_was_trained_with_and_copies_are_left_out(
    tmp_path: Path, trained: SimpleNamespace, good: SimpleNamespace
) -> None:
    """Ten fresh ones set the threshold, as by themselves; moved ones are known again, also below another folder."""
    seen = sorted((Path(trained.parts.root) / "train" / "good").glob("*.png"))
    known = set(read_checkpoint(trained.checkpoint)[KEY]["marks"]["training"].tolist())
    fresh, seen = sorted(good.day.glob("*.png"))[:10], [path for path in seen if int(marks_of([str(path)])) in known]
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    for folder in (alone, mixed / "moved"):
        folder.mkdir(parents=True)
    for number, path in enumerate(fresh):
        for folder in (alone, mixed):
            shutil.copy(path, folder / f"fresh-{number:02d}.png")
    for path in seen:
        shutil.copy(path, mixed / "moved")
    shutil.copy(fresh[0], mixed / "other.png")
    wanted = calibrate(trained.checkpoint, alone, tmp_path / "alone.ckpt").products[0]
    done = calibrate(trained.checkpoint, mixed, tmp_path / "mixed.ckpt")
    trained_on, copies, others = done.unused.values()
    assert trained_on == [f"moved/{path.name}" for path in seen]
    assert (len(copies), others) == (1, [])
    assert (done.products[0].images, done.products[0].after) == (10, wanted.after)
    names = ", ".join(f"'{name}'" for name in trained_on[:5])
    text = f"Left out {len(seen)}, since the model was trained with them: {names} and {len(seen) - 5} more."
    assert str(done).splitlines()[0] == text
    with pytest.raises(WTFlowError, match=rf"^The model was trained with all {len(seen)} images: give good images"):
        calibrate(trained.checkpoint, mixed / "moved", tmp_path / "none.ckpt")
    assert not (tmp_path / "none.ckpt").exists()


# What it writes ------------------------------------------------------------------------------------------------------


def test_what_is_told_of_old_and_new_scores() -> None:
    post = WTFlowPostProcessor(0.05)
    old = torch.linspace(0, 1, 39)
    _, up = change(post, old, old + 0.7)
    assert up.moved
    assert up.describe(0.05)[1].startswith("These images score higher than those it was calibrated on (Mann-Whitney, p")
    assert up.describe(0.05)[1].endswith("): the process has moved.")
    _, down = change(post, old, old - 0.7)
    assert (down.moved, down.higher) == (True, False)
    assert len(down.describe(0.05)) == 2  # none is above the old threshold
    _, same = change(post, old, torch.linspace(0, 0.9, 39))
    assert not same.moved
    assert same.describe(0.05)[1].startswith("They score like those it was calibrated on (Mann-Whitney, p")
    _, few = change(post, old, torch.tensor([0.5]))
    assert few.describe(0.05)[0].endswith("at most 50.00%, not the 5.00% asked for: give more good images.")
    assert few.describe(0.05)[1].startswith("So few images cannot tell whether the process has moved (Mann-Whitney, p")


@pytest.mark.parametrize(("n", "m"), [(1, 20), (2, 20), (3, 4), (2, 199), (1, 198), (1, 199)])
def test_the_test_can_tell_where_its_least_p_is_below_alpha(n: int, m: int) -> None:
    _, one = change(WTFlowPostProcessor(0.1), torch.arange(m).float(), torch.full((n,), 0.5))
    least = mannwhitneyu(np.arange(n) + m, np.arange(m), method="exact").pvalue
    assert one.can_tell == (least < ALPHA)


@pytest.mark.parametrize(
    ("values", "text"),
    [
        # 20 images, of which the highest is the threshold, T = 1 before: one above it raises T
        ([0.5] * 19 + [3.0], "Of 20 images, 1 exceed the old threshold, '19' (3): leave out those that are defective"),
        ([0.5] * 18 + [2.0, 3.0], "Of 20 images, 2 exceed the old threshold, '19' (3), '18' (2): leave out "),
        ([0.5] * 20, None),
        # 40 images, of which the second highest is the threshold: one may be above it
        ([0.5] * 39 + [3.0], None),
        ([0.5] * 38 + [2.0, 3.0], "Of 40 images, 2 exceed the old threshold, '39' (3), '38' (2): leave out "),
        ([0.5] * 39 + [math.inf], "Of 40 images, 1 exceed the old threshold, '39' (inf): leave out "),
    ],
)
def test_images_that_raise_the_threshold_are_named(values: list[float], text: str | None) -> None:
    """Whatever else is written; as many as may be above the threshold by the rate are not."""
    limit, one = change(WTFlowPostProcessor(0.05), torch.linspace(0, 1, 20), torch.tensor(values))
    assert limit == 1
    assert one.anomalous == {str(k): value for k, value in enumerate(values) if value > 1}
    lines = [line for line in one.describe(0.05) if "exceed" in line]
    assert len(lines) == (text is not None)
    assert all(line.startswith(text or "") for line in lines)


def test_a_model_without_old_scores_gets_a_threshold() -> None:
    """As one that was trained for anomalib's F1 threshold."""
    post, new = WTFlowPostProcessor(0.1), Scores(torch.arange(9.0), torch.arange(9.0), torch.zeros(9).long())
    before, none = (
        (post.image_threshold.tolist(), post.pixel_threshold.tolist()),
        Scores(*(values[:0] for values in new)),
    )
    post.calibrate(new)
    model = SimpleNamespace(post_processor=post, products=["parts"])
    one = change_of(model, 0, before, new, none, list("abcdefghi"), ALPHA)  # type: ignore[arg-type]
    assert (one.after, one.moved, one.can_tell, one.anomalous) == (8, False, False, {})
