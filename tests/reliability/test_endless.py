"""Ten thousand predictions and more in a row: the memory stays, and so do the answers."""

import numpy as np
import pytest

from benchmarks import endless
from benchmarks.base import call


@pytest.mark.slow
@pytest.mark.parametrize(("runtime", "predictions"), [("torch", 10_000), ("OpenVINO f32", 40_000)])
def test_four_threads(runtime: str, predictions: int) -> None:
    """In a process of its own; every answer is the first one to the same image, bit by bit, from each thread.

    OpenVINO's memory in use grows by some 4 MiB in the first 16 000 predictions of so small a model, and the slope is
    that of the second half.
    """
    line = call(endless.measure, runtime, True, predictions, 600)
    assert line["predictions"] == predictions
    assert line["differing"] == 0
    assert line["slope_KiB"] < endless.MOST_KIB


@pytest.mark.slow
def test_a_stream_of_images() -> None:
    """As ``anomalib predict --return_predictions false`` sees it: each verdict is in the file before the next image."""
    line = call(endless.measure_predict, True, 4000)
    assert line["predictions"] == 4000
    assert line["differing"] == line["late_rows"] == 0
    assert line["slope_KiB"] < endless.MOST_KIB


def test_a_leak_is_seen() -> None:
    """One map of 33 x 33 in float32 that is kept of each prediction is seventeen times the bound; noise is none."""
    rng = np.random.default_rng(0)
    leak = [(number, 10**9 + 33 * 33 * 4 * number + int(rng.integers(0, 2**16))) for number in range(0, 10_000, 100)]
    still = [(number, 10**9 + int(rng.integers(0, 2**16))) for number in range(0, 10_000, 100)]
    warming = [(number, 10**9 + min(number, 4000) * 1000) for number in range(0, 10_000, 100)]
    assert endless.slope(leak)["slope_KiB"] == pytest.approx(33 * 33 * 4 * 1000 / 1024, rel=0.01)
    assert abs(endless.slope(still)["slope_KiB"]) < endless.MOST_KIB / 10
    assert endless.slope(warming)["slope_KiB"] == pytest.approx(0, abs=1e-6)
