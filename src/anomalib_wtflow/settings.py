"""All settings: declared, documented and checked here only.

The names that a setting may take stand in the tables of the parts that they name (``flow.path.PATHS`` and so on), so
this module knows the parts and none of them knows it.
"""

import textwrap
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from functools import cache
from inspect import cleandoc, signature
from pathlib import Path
from typing import Any, TypeVar

from anomalib_wtflow.anomaly_map import DENSITIES, IMAGE_SCORES, MAPS
from anomalib_wtflow.errors import WTFlowError
from anomalib_wtflow.features.backbone import DEFAULT_BACKBONE
from anomalib_wtflow.flow.coupling import COUPLINGS
from anomalib_wtflow.flow.field import FIELDS
from anomalib_wtflow.flow.normalization import NORMALIZATIONS
from anomalib_wtflow.flow.path import PATHS
from anomalib_wtflow.flow.registry import lookup
from anomalib_wtflow.flow.schedule import SCHEDULERS
from anomalib_wtflow.flow.solver import SOLVERS
from anomalib_wtflow.rules import FILE, RATIO, SWITCH, TEXT, Rule, is_names, is_size, number, one_of, optional, whole

_Class = TypeVar("_Class", bound=type)


def setting(default: Any, rule: Rule, meaning: str, *, scores: bool = True) -> Any:
    """Declare a setting.

    Args:
        default: Its default.
        rule: What it must be.
        meaning: What it is, in a sentence.
        scores: Whether it changes what a trained model computes, so that a checkpoint must have the same.
    """
    return field(default=default, metadata={"rule": rule, "meaning": meaning, "scores": scores})


@dataclass(frozen=True)
class Settings:
    """All settings of a WTFlow model, as plain values; ``get_settings`` starts from a recipe.

    Each field's ``metadata`` holds its meaning and its rule; ``anomalib-wtflow settings`` prints them.

    Raises:
        WTFlowError: If a value is not what its setting's rule says; one sentence names it and says what to choose.
    """

    backbone: str = setting(
        DEFAULT_BACKBONE,
        TEXT,
        "Name of a timm model, a CNN or a transformer (docs/backbones.md); the default brings its weights along and "
        "needs no network.",
    )
    layers: tuple[str, ...] | None = setting(
        None,
        Rule(is_names, "a list of layer names, finest first"),
        "Feature layers, finest first, as timm names them; null for those at strides 4, 8 and 16, or the last if there "
        "are none, and for three blocks spread over the middle of a plain transformer.",
    )
    pre_trained: bool = setting(True, SWITCH, "Whether the backbone gets trained weights.", scores=False)
    weights: str | None = setting(
        None,
        FILE,
        "Local .safetensors or .pth file with the backbone's weights; null for the packaged ones or timm's hub.",
        scores=False,
    )
    image_size: int | tuple[int, int] | None = setting(
        None,
        Rule(is_size, "a side, or a height and a width, in pixels"),
        "Side, or height and width, that images are resized to; null for the backbone's own. A transformer takes "
        "multiples of its patch.",
    )
    pool_size: int = setting(
        3, whole(1, 2, "an odd number"), "Side of the window that the features are averaged over; 1 for none."
    )
    pool_stride: int = setting(1, whole(1), "Stride of that window.")
    normalization: str = setting(
        "channel",
        one_of(NORMALIZATIONS),
        "What brings the features to the noise's scale; layer_norm is the paper's.",
    )

    # Flow
    network: str = setting("pointwise", one_of(FIELDS), "Vector field, one for each layer; unet is the paper's.")
    width: int | None = setting(
        None,
        optional(whole(2, 2, "an even number")),
        "Its width; null for its own: 32 times the root of the layer's channels, from 64 to 384, or 48 for unet.",
    )
    depth: int | None = setting(None, optional(whole(1)), "Its depth; null for the network's own: 1, or 2 for unet.")
    path: str = setting("variance_preserving", one_of(PATHS), "Probability path; the first two are the paper's.")
    s_min: float = setting(0.01, number("a noise level", "[0, 1)"), "Noise level of the path at t = 0.")
    coupling: str = setting("worst", one_of(COUPLINGS), "Which noise goes with which features.", scores=False)
    solver: str = setting(
        "euler",
        one_of(SOLVERS),
        "ODE solver.",
    )
    steps: int = setting(1, whole(1), "Steps of the solver.")
    start_time: float = setting(
        0.35, number("a time", "[0, 1)"), "Time at which inference enters the flow; 0 is the paper's."
    )

    # Score
    density: str = setting("student", one_of(DENSITIES), "Density of where the flow ends; gaussian is the paper's.")
    anomaly_map: str = setting("absolute", one_of(MAPS), "Whether the map is relative to each image, as the authors'.")
    sigma: float = setting(
        4.0,
        number("a standard deviation in pixels", "[0, inf)"),
        "Standard deviation of the Gaussian that smooths the map, in pixels; 0 for none.",
    )
    image_score: str = setting(
        "features",
        one_of(IMAGE_SCORES),
        "Whether the image score comes from the map (the authors') or from the features' positions.",
    )
    top_fraction: float = setting(
        0.03, number("a share of the values", "(0, 1]"), "Share of the values that makes the image score."
    )
    background_slope: float | None = setting(
        None,
        optional(number("a slope", "[0, 1]")),
        "How much of the image's level (its lower quartile) the image score leaves out; null for the slope in "
        "[0.75, 1.25] at which good images' scores spread least.",
    )

    # Threshold
    false_alarm_rate: float | None = setting(
        0.05,
        optional(RATIO),
        "Share of good parts that may be called anomalous; null for anomalib's adaptive F1 threshold. The threshold is "
        "the split-conformal quantile of normal images that the field was not trained on.",
        scores=False,
    )
    calibration_ratio: float = setting(
        0.2,
        RATIO,
        "Share of the training images that is held out for the threshold where the validation set cannot serve.",
        scores=False,
    )

    # Training
    max_epochs: int = setting(80, whole(1), "Most epochs of the fit.", scores=False)
    batch_size: int = setting(32, whole(1), "Images in a training step of the fit.", scores=False)
    plateau: float = setting(
        0.01,
        number("a share", "[0, 1)"),
        "Training stops when the loss of the averaged weights fell by less than this share in the last half of the "
        "epochs; 0 to train for all of them.",
        scores=False,
    )
    averaging: float = setting(
        0.2,
        number("a share", "[0, 1)"),
        "Share of the training steps, the last ones, over which the weights are averaged; 0 for the last weights.",
        scores=False,
    )
    importance: float = setting(
        1.0,
        number("an exponent", "[0, inf)"),
        "How much more often a pointwise network is trained on rare positions, as a power of their whitened square; 0 "
        "for all alike.",
        scores=False,
    )
    learning_rate: float = setting(3e-3, number("a rate", "(0, inf)"), "Peak learning rate of AdamW.", scores=False)
    weight_decay: float = setting(1e-2, number("a decay", "[0, inf)"), "Weight decay of AdamW.", scores=False)
    scheduler: str = setting(
        "constant",
        one_of(SCHEDULERS),
        "Learning rate over the whole training; step is the paper's. Those that fall want plateau 0.",
        scores=False,
    )
    start_from: str | None = setting(
        None,
        FILE,
        "Checkpoint of a trained model, from whose field, with its products, the training goes on; null to start anew.",
        scores=False,
    )
    feature_memory: float = setting(
        4.0,
        number("GiB of memory", "(0, inf)"),
        "GiB of memory for the features of the training images. Of more images, a uniform sample of each product is "
        "kept; 4 GiB hold 23,000 images of the default backbone.",
        scores=False,
    )
    seed: int = setting(
        0,
        Rule(lambda value: whole(0).holds(value) and value < 2**64, "a whole number from 0 to below 2^64"),
        "Seed of the field's first weights, the order of the batches, times and noise, whatever else draws at random.",
        scores=False,
    )

    def __post_init__(self) -> None:
        """Check each value; lists become tuples, and paths text."""
        for name, value in vars(self).items():
            check(name, value)
            plain = tuple(value) if isinstance(value, list) else str(value) if isinstance(value, Path) else value
            object.__setattr__(self, name, plain)

    def plain(self) -> dict[str, Any]:
        """Return the settings as data that JSON and ``weights_only`` know."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


PAPER = {
    "backbone": "wide_resnet50_2",
    "layers": ("layer3",),
    "image_size": 256,
    "pool_stride": 2,
    "normalization": "layer_norm",
    "network": "unet",
    "width": 768,
    "path": "linear",
    "start_time": 0.0,
    "density": "gaussian",
    "anomaly_map": "relative",
    "sigma": 0.0,
    "image_score": "map",
    "background_slope": 0.0,
    "max_epochs": 100,
    "plateau": 0.0,
    "averaging": 0.0,
    "importance": 0.0,
    "batch_size": 8,
    "learning_rate": 1e-4,
    "scheduler": "step",
}
"""The authors' recipe, as far as it is public; learning rate and coupling are not."""
RECIPES: dict[str, dict[str, Any]] = {"default": {}, "paper": PAPER}
ARGUMENTS = (
    "backbone",
    "layers",
    "pre_trained",
    "weights",
    "image_size",
    "false_alarm_rate",
    "max_epochs",
    "learning_rate",
    "start_from",
    "seed",
)
"""Settings that are arguments of ``WTFlow``; the others are given as its ``overrides``."""


@cache
def declared() -> dict[str, Field]:
    """Return the settings' declarations by name."""
    return {each.name: each for each in fields(Settings)}


def check(name: str, value: Any) -> None:
    """Check the value of one setting.

    Raises:
        WTFlowError: If it is not what the setting's rule says.
    """
    rule: Rule = declared()[name].metadata["rule"]
    if rule.holds(value):
        return
    if rule.names:
        lookup(dict.fromkeys(rule.names), name.replace("_", " "), str(value))
    msg = f"{name} is {value!r}: choose {rule.advice}."
    raise WTFlowError(msg)


def get_settings(recipe: str = "default", overrides: Mapping[str, Any] | None = None, **changes: Any) -> Settings:
    """Return the settings of a recipe, with overrides, which name no arguments, and changes.

    Raises:
        WTFlowError: If the recipe or a setting is unknown, or a value is not valid.
    """
    base, overrides = lookup(RECIPES, "recipe", recipe), overrides or {}
    for name in overrides:
        if name in ARGUMENTS:
            msg = f"'{name}' is an argument of WTFlow, not one of its overrides: give it as {option(name)}."
            raise WTFlowError(msg)
    for name in {**overrides, **changes}:
        lookup(declared(), "setting", name)
    return Settings(**{**base, **overrides, **changes})


def option(name: str) -> str:
    """Return a setting's option: ``--model.seed``, ``--model.overrides.coupling``."""
    return f"--model.{name}" if name in ARGUMENTS else f"--model.overrides.{name}"


def documented(cls: _Class) -> _Class:
    """Add the meaning of settings to a constructor's ``Args`` (class decorator)."""
    lines = []
    for name in signature(cls).parameters:
        if name in declared():
            text = f"{name}: {declared()[name].metadata['meaning']}"
            lines.append(textwrap.fill(text, 120, initial_indent=" " * 4, subsequent_indent=" " * 8))
    # Python 3.13 takes off the indentation of docstrings by itself.
    cls.__doc__ = cleandoc(cls.__doc__ or "").replace("Args:\n", "Args:\n" + "\n".join(lines) + "\n", 1)
    return cls
