"""The moved threshold, against the conformal formula and scipy."""

import math
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from anomalib.data import PredictDataset
from PIL import Image
from scipy.stats import binom, mannwhitneyu

from anomalib_wtflow import SyntheticParts, WTFlow, WTFlowPostProcessor, calibrate
from anomalib_wtflow.cli.main import main
from anomalib_wtflow.operation.calibrate import ALPHA, by_score, enough, moved
from anomalib_wtflow.operation.fresh import fresh_ones
from anomalib_wtflow.training.calibration import Scores
from conftest import quiet_engine

CHANGED = 1.4
"""Light of the other shift, to that of the training images."""


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
        Image.fromarray((CHANGED * pixels).clip(max=255).astype(np.uint8)).save(night / path.name)
    return SimpleNamespace(day=day, night=night, mixed=parts.root)


def loaded(checkpoint: Path | str) -> WTFlow:
    return WTFlow.load_from_checkpoint(checkpoint).eval()


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
    model, before = loaded(done.path), loaded(trained.checkpoint)
    image, pixel = scores(before, good.night)
    n = len(image)
    assert n == 150
    k = n + 1 - math.floor(0.02 * (n + 1))
    for values, got in ((image, model.post_processor.image_threshold), (pixel, model.post_processor.pixel_threshold)):
        assert float(got) == pytest.approx(float(values.sort().values[k - 1]), rel=1e-4)
    (one,) = done.products
    assert one.images == n
    assert one.promised == pytest.approx((n + 1 - k) / (n + 1), rel=1e-6)
    assert one.after == float(model.post_processor.image_threshold)
    assert one.before == float(before.post_processor.image_threshold)
    expected = mannwhitneyu(image.numpy(), before.post_processor.calibration_scores.numpy()).pvalue
    assert one.p_value == pytest.approx(expected, rel=1e-3)
    assert done.unseen == []
    for name, tensor in model.model.state_dict().items():
        torch.testing.assert_close(tensor, before.model.state_dict()[name], rtol=0, atol=0, msg=name)


@pytest.mark.slow
def test_anomalibs_commands_take_the_new_threshold(
    tmp_path: Path, trained: SimpleNamespace, good: SimpleNamespace
) -> None:
    done = calibrate(trained.checkpoint, good.night, tmp_path / "night.ckpt", false_alarm_rate=0.02)
    model = WTFlow(image_size=128, false_alarm_rate=0.02, overrides={"coupling": "worst_of_two"}, pre_trained=False)
    engine = quiet_engine(tmp_path / "run")
    batches = engine.predict(model, dataset=PredictDataset(good.night), ckpt_path=done.path)
    assert float(model.post_processor.image_threshold) == done.products[0].after
    called = torch.cat([batch.pred_score for batch in batches]) > 0.5 + 1e-5  # one is the threshold itself
    assert int(called.sum()) == round(done.products[0].promised * 151) - 1
    assert model.post_processor.calibration_images.tolist() == [150]
    again = calibrate(done.path, good.night, tmp_path / "again.ckpt")
    assert again.false_alarm_rate == pytest.approx(0.02)
    assert again.products[0].after == done.products[0].after
    assert not again.products[0].moved
    assert again.products[0].p_value == pytest.approx(1.0)


@pytest.mark.slow
def test_a_checkpoint_holds_each_threshold_once(
    tmp_path: Path, trained: SimpleNamespace, good: SimpleNamespace
) -> None:
    done = calibrate(trained.checkpoint, good.night, tmp_path / "night.ckpt")
    for path in (trained.checkpoint, done.path):
        checkpoint = torch.load(path, weights_only=True)
        assert "post_processor._image_threshold" in checkpoint["state_dict"]
        assert not [key for key in checkpoint["callbacks"] if "PostProcessor" in key]


@pytest.mark.slow
def test_the_rate_holds_in_another_light_and_the_sentence_appears_then_and_only_then(
    trained: SimpleNamespace, good: SimpleNamespace
) -> None:
    """100 draws of old images, new images and next parts: rates against what is promised, with its 99.9 % band."""
    model, rate, draws, n, m = loaded(trained.checkpoint), 0.1, 100, 39, 40
    day, night = (scores(model, folder)[0] for folder in (good.day, good.night))
    post = WTFlowPostProcessor(rate)
    post.calibrate(night[:n], night[:n])
    zeros = torch.zeros(n, dtype=torch.int64)
    alarms, without, said_same, said_moved = 0, 0, 0, 0
    for draw in range(draws):
        order = torch.randperm(len(day), generator=torch.Generator().manual_seed(draw))
        old, same, changed, following = (order[k : k + n] for k in (0, n, n, 2 * n))
        following = order[2 * n : 2 * n + m]
        for values, new in ((day, same), (night, changed)):
            post.calibrate(day[old], day[old])
            if values is night:
                without += int((night[following] > post.image_threshold).sum())
            post.calibrate(values[new], values[new])
            before = post.image_threshold, post.pixel_threshold
            told = moved(
                post, "", 0, before, Scores(day[old], day[old], zeros), Scores(values[new], values[new], zeros), {}
            )
            if values is night:
                alarms += int((night[following] > post.image_threshold).sum())
                said_moved += told.moved
                assert told.higher == bool(night[changed].median() > day[old].median())
            else:
                said_same += told.moved
    promised = float(post.effective_false_alarm_rate)
    assert promised == pytest.approx(4 / 40)
    low, high = binom.interval(0.999, draws, promised)
    assert low <= alarms / m <= high
    assert without / m > 3 * high
    assert said_same <= binom.ppf(0.999, draws, ALPHA)
    assert said_moved == draws


@pytest.mark.slow
def test_the_command(
    tmp_path: Path, trained: SimpleNamespace, good: SimpleNamespace, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "night.ckpt"
    main(["calibrate", f"--ckpt_path={trained.checkpoint}", f"--data={good.night}", f"--output={target}"])
    lines = capsys.readouterr().out.splitlines()
    before = loaded(trained.checkpoint)
    above = [score for score in scores(before, good.night)[0] if score > before.post_processor.image_threshold]
    assert lines[0].startswith("Threshold ")
    assert "150 good images support a false-alarm rate of at most 9.93%." in lines[0]
    assert lines[1].startswith("These images score higher than those it was calibrated on (Mann-Whitney, p = ")
    assert lines[1].endswith("): the process has moved.")
    assert lines[2].split(": ")[0].startswith(f"{len(above)} of 150 images are anomalous at the old threshold, '")
    assert lines[3] == f"Wrote {target}"
    for arguments, sentence in (
        ({"ckpt_path": tmp_path / "none.ckpt"}, "error: There is no checkpoint at "),
        ({"data": tmp_path / "none"}, "error: There is no data at "),
        ({"data": tmp_path}, "error: There are no images in "),
        ({"false_alarm_rate": 2}, "error: false_alarm_rate is 2.0: choose a share between 0 and 1"),
        ({"output": trained.checkpoint}, "error: output is "),
    ):
        given = {"ckpt_path": trained.checkpoint, "data": good.night, "output": target, **arguments}
        with pytest.raises(SystemExit) as stop:
            main(["calibrate", *(f"--{name}={value}" for name, value in given.items())])
        assert str(stop.value).startswith(sentence)


def test_folders_with_defects_are_not_taken_for_good(tmp_path: Path, trained: SimpleNamespace) -> None:
    (tmp_path / "plant" / "bolt" / "test" / "scratch").mkdir(parents=True)
    (tmp_path / "plant" / "bolt" / "test" / "good").mkdir(parents=True)
    for data in (tmp_path / "plant", tmp_path / "plant" / "bolt" / "test"):
        with pytest.raises(ValueError, match="holds more than good images"):
            calibrate(trained.checkpoint, data, tmp_path / "x.ckpt")


def test_a_few_images_that_look_like_another_product_do_not_move_its_threshold() -> None:
    """Of two products with 30 old images each, one new image of the second at rate 0.1, which needs 9."""
    post = WTFlowPostProcessor(0.1)
    old = Scores(torch.rand(60), torch.rand(60), torch.arange(60) % 2)
    product = torch.tensor([0] * 9 + [1])
    kept = enough(Scores(torch.arange(10.0), torch.arange(10.0), product), old, 2, post)
    assert kept.scores.tolist() == list(range(9))
    one = Scores(torch.arange(2.0), torch.arange(2.0), torch.zeros(2, dtype=torch.int64))
    assert enough(one, old, 1, post).scores.tolist() == [0, 1]  # of one product the rate that holds is said
    with pytest.raises(ValueError, match="The 2 good images are too few of each product: the rate needs 9 of one"):
        enough(one, old, 2, post)


# Which images ---------------------------------------------------------------------------------------------------------


def test_images_that_the_model_was_trained_with_and_copies_are_left_out(
    tmp_path: Path, trained: SimpleNamespace, good: SimpleNamespace
) -> None:
    """Ten fresh ones set the threshold, as by themselves; moved ones are known again, also below another folder."""
    seen = sorted((Path(trained.parts.root) / "train" / "good").glob("*.png"))
    fresh = sorted(good.day.glob("*.png"))[:10]
    alone, mixed = tmp_path / "alone", tmp_path / "mixed"
    for folder in (alone, mixed / "moved"):
        folder.mkdir(parents=True)
    for place, path in enumerate(fresh):
        for folder in (alone, mixed):
            shutil.copy(path, folder / f"fresh-{place:02d}.png")
    for path in seen[:3]:
        shutil.copy(path, mixed / "moved")
    shutil.copy(fresh[0], mixed / "other.png")
    shutil.copy(fresh[0], mixed / "another.png")
    wanted = calibrate(trained.checkpoint, alone, tmp_path / "alone.ckpt").products[0]
    done = calibrate(trained.checkpoint, mixed, tmp_path / "mixed.ckpt")
    assert done.trained_on == [f"moved/{path.name}" for path in seen[:3]]
    assert len(done.copies) == 2
    assert set(done.copies) < {"fresh-00.png", "another.png", "other.png"}
    assert (done.products[0].images, done.products[0].after) == (10, wanted.after)
    lines = str(done).splitlines()
    names = ", ".join(repr(name) for name in done.trained_on)
    assert (
        lines[0] == f"Left out 3 that the model was trained with, whose scores promise nothing for new parts: {names}."
    )
    assert lines[1].startswith("Left out 2 that are copies of others, and tell nothing new: '")
    with pytest.raises(ValueError, match=rf"^All {len(seen)} images are among those that the model was trained with"):
        calibrate(trained.checkpoint, seen[0].parent, tmp_path / "none.ckpt")
    assert not (tmp_path / "none.ckpt").exists()


def test_what_is_not_known_of_the_training_leaves_nothing_out(trained: SimpleNamespace) -> None:
    seen = sorted((Path(trained.parts.root) / "train" / "good").glob("*.png"))
    places = fresh_ones([*seen, seen[1]], None)
    assert places.fresh == list(range(len(seen)))
    assert (places.trained_on, places.copies) == ([], [len(seen)])


# Words ---------------------------------------------------------------------------------------------------------------


def compared(old: torch.Tensor, new: torch.Tensor, anomalous: dict[str, float] | None = None) -> Any:
    post = WTFlowPostProcessor(0.05)
    post.calibrate(new, new)
    zeros = [torch.zeros(len(values), dtype=torch.int64) for values in (old, new)]
    before = torch.tensor([1.0]), torch.tensor([2.0])
    return moved(post, "bolt", 0, before, Scores(old, old, zeros[0]), Scores(new, new, zeros[1]), anomalous or {})


def test_words() -> None:
    up = compared(torch.arange(20.0), torch.arange(20.0) + 30)
    assert up.moved
    assert up.sentences(0.05, " of 'bolt'") == [
        "Threshold of 'bolt' 1 -> 49 (pixels 2 -> 49): 20 good images support a false-alarm rate of at most 4.76%.",
        "These images score higher than those it was calibrated on (Mann-Whitney, "
        f"p = {mannwhitneyu(np.arange(20), np.arange(20) + 30).pvalue:.2g}): the process has moved.",
    ]
    down = compared(torch.arange(20.0) + 30, torch.arange(20.0))
    assert down.moved
    assert "score lower" in down.sentences(0.05)[1]
    alike = compared(torch.arange(20.0), torch.arange(20.0) + 0.5)
    assert not alike.moved
    assert alike.sentences(0.05)[1].startswith("They score like those")
    few = compared(torch.empty(0), torch.arange(9.0))
    assert few.p_value is None
    assert not few.moved
    assert few.sentences(0.05)[0].endswith("at most 10.00%, not the 5.00% asked for: give more good images.")
    assert few.sentences(0.05)[1] == "The checkpoint does not hold the scores it was calibrated on: no comparison."


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        # 20 images, of which the highest is the threshold, T = 1 before: one above it raises T
        ([0.5] * 19 + [3.0], "1 of 20 images is anomalous at the old threshold, '19' (3): leave it out "),
        ([0.5] * 18 + [2.0, 3.0], "2 of 20 images are anomalous at the old threshold, '19' (3), '18' (2): leave "),
        ([0.5] * 20, None),
        # 40 images, of which the second highest is the threshold: one may be above it
        ([0.5] * 39 + [3.0], None),
        ([0.5] * 38 + [2.0, 3.0], "2 of 40 images are anomalous at the old threshold, '39' (3), '38' (2): leave "),
        ([0.5] * 39 + [math.inf], "1 of 40 images is anomalous at the old threshold, '39' (like no product): "),
        ([*range(2, 22)], "20 of 20 images are anomalous at the old threshold, '19' (21), '18' (20), '17' (19), '16' "
         "(18), '15' (17) and 15 more: leave those that are defective out and calibrate again."),
    ],
)  # fmt: skip
def test_images_that_raise_the_threshold_are_named(values: list[float], sentence: str | None) -> None:
    """Whatever else is said; as many as may be above the threshold by the rate are not."""
    new = torch.tensor(values)
    zeros = torch.zeros(len(new), dtype=torch.int64)
    above = by_score([str(k) for k in range(len(new))], Scores(new, new, zeros), new > 1)
    assert above == {str(k): value for k, value in enumerate(values) if value > 1}
    one = compared(torch.linspace(0, 1, 50), new, above)
    said = [line for line in one.sentences(0.05) if "anomalous" in line]
    assert one.suspicious == (sentence is not None)
    assert one.suspicious == (one.after > 1 or math.inf in values)
    assert len(said) == one.suspicious
    assert all(line.startswith(sentence) for line in said)


def test_a_product_without_images_keeps_its_threshold() -> None:
    post = WTFlowPostProcessor(0.1)
    post.calibrate(torch.arange(18.0), torch.arange(18.0) + 1, torch.arange(18) % 2, 2)
    first = post.image_threshold.clone(), post.pixel_threshold.clone()
    post.calibrate(torch.arange(9.0) + 100, torch.arange(9.0) + 200, torch.ones(9, dtype=torch.int64), 2, keep=True)
    assert post.image_threshold.tolist() == [first[0][0], 108.0]
    assert post.pixel_threshold.tolist() == [first[1][0], 208.0]
    assert post.calibration_images.tolist() == [9, 9]
    assert sorted(post.calibration_scores.tolist()) == [*range(0, 18, 2), *range(100, 109)]


def test_the_scores_come_along_in_a_state_dict() -> None:
    one, other = WTFlowPostProcessor(0.1), WTFlowPostProcessor(0.1)
    one.calibrate(torch.arange(9.0), torch.arange(9.0))
    other.load_state_dict(one.state_dict())
    assert other.calibration_scores.tolist() == list(range(9))
    old = {name: value for name, value in one.state_dict().items() if not name.startswith("calibration_")}
    other.load_state_dict(old)
    assert other.calibration_images.tolist() == [0]
    assert float(other.image_threshold) == 8
