"""Make docs/images/predictions.png and products.png: train as the quickstart and configs/products.yaml do, and draw.

Usage: python docs/predictions.py
"""

import tempfile
from pathlib import Path

import matplotlib as mpl
import torch
from anomalib.engine import Engine
from omegaconf import OmegaConf
from PIL import Image

from anomalib_wtflow import Products, SyntheticParts, WTFlow

mpl.use("Agg")
import matplotlib.pyplot as plt

FOLDER = Path(__file__).parent
ROWS = ("image", "ground truth", "anomaly map", "prediction")


def main() -> None:
    """Draw both."""
    one_product()
    several_products()


def several_products() -> None:
    """Train one model on the drawn products, and draw a defective part of each and a good one that it was not shown."""
    config = OmegaConf.to_container(OmegaConf.load(FOLDER.parent / "configs" / "products.yaml"))
    with tempfile.TemporaryDirectory() as folder:
        members = config["data"]["init_args"]["members"]
        for member in members.values():
            member["init_args"]["root"] = folder
        data, model = Products(members=members), WTFlow(**config["model"]["init_args"])
        engine = Engine(default_root_dir=folder, logger=False)
        engine.fit(model, datamodule=data)
        stranger = {"class_path": "SyntheticParts", "init_args": {"root": folder, "product": 3}}
        shown = Products(members={**members, "octagon": stranger})
        columns = []
        for batch in engine.predict(model, datamodule=shown) or []:
            columns += zip(model.recognised(batch.recognition), batch.product, batch, strict=True)
        chosen = []
        for name in [*members, "octagon"]:
            kind = "good" if name == "octagon" else "scratch"
            own = [each for each in columns if each[1] == name and Path(each[2].image_path).parent.name == kind]
            chosen.append(sorted(own, key=lambda each: float(each[2].pred_score))[len(own) // 2])
        draw([(f"{true} ({found})", item) for found, true, item in chosen], FOLDER / "images" / "products.png")


def one_product() -> None:
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
        columns = [(kind, kinds[kind][len(kinds[kind]) // 2]) for kind in ("good", "scratch", "stain", "missing")]
        draw(columns, FOLDER / "images" / "predictions.png")


def draw(columns: list[tuple[str, object]], target: Path) -> None:
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
            framed = torch.nn.functional.pad(item.pred_mask.squeeze().float(), (1, 1, 1, 1))
            places = range(-1, framed.shape[-1] - 1)
            axes[3, column].contour(places, places, framed, [0.5], colors="#ff8c00", linewidths=1.5)
            axes[3, column].set(xlim=(-1, framed.shape[-1] - 2), ylim=(framed.shape[-1] - 2, -1))
        for row, name in enumerate(ROWS):
            axes[row, column].set(xticks=[], yticks=[])
            if column == 0:
                axes[row, column].set_ylabel(name)
    figure.colorbar(heat, ax=axes[2, :], label="score (0.5 = threshold)")
    target.parent.mkdir(exist_ok=True)
    figure.savefig(target, dpi=80)


if __name__ == "__main__":
    main()
