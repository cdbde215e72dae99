"""Which products a model knows by name, and a training that goes on from another model's field."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib_wtflow.products import UNKNOWN
from anomalib_wtflow.reporting.product_pictures import ProductVisualizer
from anomalib_wtflow.settings import Settings
from anomalib_wtflow.training import checkpoint_rules


class ProductSet:
    """Mixin: the names of a model's products, in the order of their rows.

    A training sets them from its data. One that starts from another model keeps that model's products, with their
    centroids and normalisation, and adds those that it does not know.
    """

    model: Any
    settings: Settings
    product_names: Sequence[str] = ("",)
    started_from: Sequence[str] = ()
    """Products of the model that the training started from."""

    def set_products(self, names: Sequence[str]) -> None:
        """Take the products of a training.

        Raises:
            ValueError: If a product of the model that the training started from has no images.
        """
        missing = [name for name in self.started_from if name not in names]
        if missing:
            msg = (
                f"The model that start_from names knows the product '{missing[0]}', which has no training images here: "
                f"give the data of all its products ({', '.join(self.started_from)}), since their thresholds are set "
                "anew."
            )
            raise ValueError(msg)
        self.product_names = [*self.started_from, *sorted(set(names) - set(self.started_from))]
        self.model.set_products(len(self.product_names), len(self.started_from))

    @classmethod
    def configure_visualizer(cls) -> ProductVisualizer:
        """Build the visualizer, which keeps the pictures of products apart."""
        return ProductVisualizer()

    def start_from(self, path: str | Path) -> None:
        """Take field, normalisation and products of a trained model; the averaged field is the one to go on with.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it holds no WTFlow model of these settings.
        """
        checkpoint = checkpoint_rules.read(path)
        checkpoint_rules.raise_for_other(checkpoint, self.settings, resuming=True, file=f"'{path}'")
        state = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if k.startswith("model.")}
        version = checkpoint[checkpoint_rules.KEY].get("version")
        checkpoint_rules.load_state(self.model, state, version, f"'{path}'")
        self.model.field.load_state_dict(self.model.flow_field.state_dict())
        self.started_from = self.product_names = list(checkpoint[checkpoint_rules.KEY]["products"])

    def recognised(self, predictions: Any) -> list[str]:
        """Name the product of each image, or ``unknown product``, by what has its ``product`` and ``strangeness``."""
        pairs = zip(predictions.product.tolist(), predictions.strangeness.tolist(), strict=True)
        return [UNKNOWN if strange > 1 else self.product_names[place] for place, strange in pairs]
