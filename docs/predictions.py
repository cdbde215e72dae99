"""Make docs/images/predictions.png: train as the quickstart does, and draw predictions.

Usage: python docs/predictions.py
"""

import tempfile
from pathlib import Path

import matplotlib as mpl
import torch
from anomalib.engine import Engine
from PIL import Image

from anomalib_wtflow import SyntheticParts, WTFlow

mpl.use("Agg")
import matplotlib.pyplot as plt

TARGET = Path(__file__).parent / "images" / "predictions.png"
ROWS = ("image", "ground truth", "anomaly map", "prediction")


def main() -> None:
    """Train, predict on the test set, and draw one image of each kind: the one with the middle score."""
    with tempfile.TemporaryDirectory() as folder:
        data, model = SyntheticParts(Path(folder) / "data"), WTFlow(max_epochs=30)
        engine = Engine(default_root_dir=folder, logger=False)
        engine.train(model, datamodule=data)
        batches = engine.predict(model, dataloaders=data.test_dataloader(), ckpt_path=engine.best_model_path)
        items = [item for batch in batches or [] for item in batch]
        kinds: dict[str, list] = {}
        for item in items:
            kinds.setdefault(Path(item.image_path).parent.name, []).append(item)
        for group in kinds.values():
            group.sort(key=lambda item: float(item.pred_score))
        draw([(kind, kinds[kind][len(kinds[kind]) // 2]) for kind in ("good", "scratch", "stain", "missing")])


def draw(columns: list[tuple[str, object]]) -> None:
    """Draw a column an image: the image, its truth, the map (0.5 is the threshold) and the predicted outline."""
    figure, axes = plt.subplots(len(ROWS), len(columns), figsize=(8.4, 7.6), layout="constrained")
    for column, (kind, item) in enumerate(columns):
        picture = Image.open(item.image_path)
        mask = torch.zeros(256, 256) if item.gt_mask is None else item.gt_mask.squeeze()
        verdict = "anomalous" if bool(item.pred_label) else "normal"
        axes[0, column].set_title(f"{kind}\n{verdict}, {float(item.pred_score):.2f}", fontsize=10)
        for row in (0, 3):
            axes[row, column].imshow(picture)
        axes[1, column].imshow(mask, cmap="gray", vmin=0, vmax=1)
        heat = axes[2, column].imshow(item.anomaly_map.squeeze(), cmap="cividis", vmin=0, vmax=1)
        if item.pred_mask.any():
            axes[3, column].contour(item.pred_mask.squeeze().float(), [0.5], colors="#ff8c00", linewidths=1.5)
        for row, name in enumerate(ROWS):
            axes[row, column].set(xticks=[], yticks=[])
            if column == 0:
                axes[row, column].set_ylabel(name)
    figure.colorbar(heat, ax=axes[2, :], label="score (0.5 = threshold)")
    TARGET.parent.mkdir(exist_ok=True)
    figure.savefig(TARGET, dpi=80)


if __name__ == "__main__":
    main()
