"""The accuracy benchmark's own arithmetic."""

from benchmarks import accuracy


def runs(metrics=accuracy.METRICS, values=(0.90, 0.92)):
    return [
        {
            "model": "WTFlow", "data": "d", "seed": seed, "settings": {}, "train_images": 1, "test_images": 2,
            "metrics": dict.fromkeys(metrics, value), "parameters": 1_500_000, "fit_seconds": 10 + seed,
        }
        for seed, value in enumerate(values)
    ]  # fmt: skip


def test_table_shows_mean_and_spread_and_no_pixels_without_masks():
    assert "| WTFlow | 2 | 0.9100 ± 0.0141 |" in accuracy.render(runs())
    text = accuracy.render(runs([name for name in accuracy.METRICS if name.startswith("image")], (0.9,)))
    assert "| WTFlow | 1 | 0.9000 | 0.9000 | 0.9000 |  |  |  |  | 1.50 M | 10 s |" in text


def test_a_quick_run_is_compared_with_the_published_one(monkeypatch):
    monkeypatch.setattr(accuracy, "read", lambda _: runs(values=(0.9,)))
    assert all(kept for kept, _ in accuracy.compare(runs(values=(0.9049,))))
    verdicts = accuracy.compare(runs(values=(0.9051,)))
    assert not any(kept for kept, _ in verdicts)
    assert "0.9051   published 0.9000   NOT reproduced" in verdicts[0][1]
    assert "published none" in accuracy.compare([{**runs(values=(0.9,))[0], "seed": 1}])[0][1]
