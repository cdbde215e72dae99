"""The record of settings: what it takes and refuses, its recipes, and who says what each setting means."""

import inspect
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from anomalib_wtflow import WTFlow
from anomalib_wtflow.anomaly_map import DENSITIES, IMAGE_SCORES, MAPS
from anomalib_wtflow.flow.coupling import COUPLINGS
from anomalib_wtflow.flow.field import FIELDS
from anomalib_wtflow.flow.normalization import NORMALIZATIONS
from anomalib_wtflow.flow.path import PATHS
from anomalib_wtflow.flow.schedule import SCHEDULERS
from anomalib_wtflow.flow.solver import SOLVERS
from anomalib_wtflow.settings import ARGUMENTS, RECIPES, Settings, declared, get_settings

NAMES: dict[str, Any] = {
    "normalization": NORMALIZATIONS,
    "network": FIELDS,
    "path": PATHS,
    "coupling": COUPLINGS,
    "solver": SOLVERS,
    "density": DENSITIES,
    "anomaly_map": MAPS,
    "image_score": IMAGE_SCORES,
    "scheduler": SCHEDULERS,
}
"""Settings that are names, and the tables of the parts that they name."""
NUMBERS: dict[str, tuple[float, float, Callable[[float], bool], str]] = {
    "s_min": (0, 1, lambda x: 0 <= x < 1, "a noise level in [0, 1)"),
    "start_time": (0, 1, lambda x: 0 <= x < 1, "a time in [0, 1)"),
    "sigma": (0, math.inf, lambda x: 0 <= x < math.inf, "a standard deviation in pixels in [0, inf)"),
    "top_fraction": (0, 1, lambda x: 0 < x <= 1, "a share of the values in (0, 1]"),
    "background_slope": (0, 1, lambda x: 0 <= x <= 1, "a slope in [0, 1]"),
    "plateau": (0, 1, lambda x: 0 <= x < 1, "a share in [0, 1)"),
    "averaging": (0, 1, lambda x: 0 <= x < 1, "a share in [0, 1)"),
    "importance": (0, math.inf, lambda x: 0 <= x < math.inf, "an exponent in [0, inf)"),
    "false_alarm_rate": (0, 1, lambda x: 0 < x < 1, "a share between 0 and 1, such as 0.05"),
    "calibration_ratio": (0, 1, lambda x: 0 < x < 1, "a share between 0 and 1, such as 0.05"),
    "learning_rate": (0, math.inf, lambda x: 0 < x < math.inf, "a rate in (0, inf)"),
    "weight_decay": (0, math.inf, lambda x: 0 <= x < math.inf, "a decay in [0, inf)"),
    "feature_memory": (0, math.inf, lambda x: 0 < x < math.inf, "GiB of memory in (0, inf)"),
}
"""Settings that are numbers: the ends of their intervals, what lies inside, and the advice of the error."""
WHOLE: dict[str, tuple[Callable[[int], bool], str]] = {
    "pool_size": (lambda k: k >= 1 and k % 2 == 1, "an odd number of at least 1"),
    "pool_stride": (lambda k: k >= 1, "a whole number of at least 1"),
    "width": (lambda k: k >= 2 and k % 2 == 0, "an even number of at least 2"),
    "depth": (lambda k: k >= 1, "a whole number of at least 1"),
    "steps": (lambda k: k >= 1, "a whole number of at least 1"),
    "max_epochs": (lambda k: k >= 1, "a whole number of at least 1"),
    "batch_size": (lambda k: k >= 1, "a whole number of at least 1"),
    "seed": (lambda k: k >= 0, "a whole number from 0 to below 2^64"),
}
OTHER = {"backbone", "layers", "pre_trained", "weights", "image_size", "start_from"}
SIZE = "choose a side, or a height and a width, in pixels."


def refused(name: str, value: object, message: str) -> None:
    """The whole message, which is one sentence."""
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        get_settings(**{name: value})


# Values --------------------------------------------------------------------------------------------------------------


def test_each_setting_is_of_one_kind() -> None:
    kinds = [*NAMES, *NUMBERS, *WHOLE, *OTHER]
    assert len(kinds) == len(set(kinds))
    assert set(kinds) == set(declared())
    assert {name for name, each in declared().items() if each.metadata["rule"].names} == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_names_are_those_of_the_part(name: str) -> None:
    assert declared()[name].metadata["rule"].names == tuple(NAMES[name])
    for value in NAMES[name]:
        assert getattr(get_settings(**{name: value}), name) == value
    kind = name.replace("_", " ")
    refused(name, "#", f"Unknown {kind} '#': choose one of {', '.join(NAMES[name])}.")


@pytest.mark.parametrize("name", NUMBERS)
def test_the_ends_of_intervals(name: str) -> None:
    low, high, inside, advice = NUMBERS[name]
    for end in {low, high}:
        for value in (end, math.nextafter(end, -math.inf), math.nextafter(end, math.inf)):
            if inside(value):
                assert getattr(get_settings(**{name: value}), name) == value
            else:
                refused(name, value, f"{name} is {value!r}: choose {advice}.")
    for value in (math.nan, math.inf, -math.inf, True, "0.5", [0.5]):
        refused(name, value, f"{name} is {value!r}: choose {advice}.")


@given(name=st.sampled_from(sorted(WHOLE)), value=st.integers(-9, 9) | st.integers(-(2**31), 2**31 - 1))
@settings(deadline=None)
def test_whole_numbers(name: str, value: int) -> None:
    inside, advice = WHOLE[name]
    if inside(value):
        assert getattr(get_settings(**{name: value}), name) == value
    else:
        refused(name, value, f"{name} is {value!r}: choose {advice}.")


def test_a_seed_that_torch_does_not_take() -> None:
    assert get_settings(seed=2**64 - 1).seed == 2**64 - 1
    with pytest.raises(ValueError, match=r"^seed is 18446744073709551616: choose .*\.$"):
        get_settings(seed=2**64)


def test_what_may_be_left_out() -> None:
    empty = {"layers", "weights", "start_from", "image_size", "width", "depth", "background_slope", "false_alarm_rate"}
    for name in declared():
        if name in empty:
            assert getattr(get_settings(**{name: None}), name) is None
        else:
            with pytest.raises(ValueError, match=f"^({name} is None|Unknown {name.replace('_', ' ')} 'None'): "):
                get_settings(**{name: None})


@pytest.mark.parametrize(
    ("value", "kept"), [(64, 64), ([64, 80], (64, 80)), ((64, 80), (64, 80)), ([1, 1], (1, 1)), (None, None)]
)
def test_image_sizes(value: Any, kept: object) -> None:
    assert Settings(image_size=value).image_size == kept


@pytest.mark.parametrize("value", [0, -1, 64.0, "64", True, [64], [64, 80, 3], [64, 0], [64, True], [64, 80.0], []])
def test_bad_image_sizes(value: object) -> None:
    refused("image_size", value, f"image_size is {value!r}: {SIZE}")


def test_other_values() -> None:
    assert Settings(layers=["a", "b"]).layers == Settings(layers=("a", "b")).layers == ("a", "b")
    for value in ("layer3", [], [3], 3):
        refused("layers", value, f"layers is {value!r}: choose a list of layer names, finest first.")
    assert Settings(weights=Path("some") / "file.pth").weights == str(Path("some") / "file.pth")
    assert Settings(weights="file.pth").weights == "file.pth"
    refused("backbone", 3, "backbone is 3: choose a name.")
    for value in (1, "yes"):
        refused("pre_trained", value, f"pre_trained is {value!r}: choose true or false.")


# The record ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_plain_data(recipe: str, tmp_path: Path) -> None:
    """What a checkpoint keeps: known to JSON and to torch.load without code, and enough to build the record again."""
    record = get_settings(recipe, image_size=(64, 80), weights=tmp_path / "w.pth")
    plain = record.plain()
    assert list(plain) == list(declared())
    assert json.loads(json.dumps(plain)) == plain
    torch.save(plain, tmp_path / "plain.pt")
    assert torch.load(tmp_path / "plain.pt", weights_only=True) == plain
    assert Settings(**plain) == record


# Recipes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_are_valid(recipe: str) -> None:
    """And leave alone what the model's arguments set by themselves, which would win over them."""
    record = get_settings(recipe)
    for name, value in RECIPES[recipe].items():
        assert getattr(record, name) == value
    parameters = inspect.signature(WTFlow).parameters
    assert not [name for name in RECIPES[recipe] if name in ARGUMENTS and parameters[name].default is not None]


def test_the_paper_recipe_is_the_authors() -> None:
    """method.md, "The authors' recipe": 256 px, layer3 pooled 3 x 3 with stride 2, U-Net of b = 768, one Euler step."""
    paper = get_settings("paper")
    authors = {
        "backbone": "wide_resnet50_2",
        "layers": ("layer3",),
        "pre_trained": True,
        "image_size": 256,
        "pool_size": 3,
        "pool_stride": 2,
        "normalization": "layer_norm",
        "network": "unet",
        "width": 768,
        "path": "linear",
        "coupling": "worst",
        "solver": "euler",
        "steps": 1,
        "start_time": 0.0,
        "density": "gaussian",
        "anomaly_map": "relative",
        "sigma": 0.0,
        "image_score": "map",
        "top_fraction": 0.03,
        "background_slope": 0.0,
        "max_epochs": 100,
        "plateau": 0.0,
        "averaging": 0.0,
        "batch_size": 8,
        "scheduler": "step",
    }
    assert {name: getattr(paper, name) for name in authors} == authors
    assert paper.depth in (None, inspect.signature(FIELDS["unet"]).parameters["depth"].default)
    assert inspect.signature(FIELDS["unet"]).parameters["depth"].default == 2


# The model's arguments -----------------------------------------------------------------------------------------------


def test_arguments_are_the_settings_that_the_model_takes() -> None:
    parameters = inspect.signature(WTFlow).parameters
    assert tuple(name for name in parameters if name in declared()) == ARGUMENTS
    for name in ARGUMENTS:
        assert parameters[name].default in (None, getattr(Settings(), name))


def test_each_setting_says_what_it_means() -> None:
    for name, each in declared().items():
        meaning = each.metadata["meaning"]
        assert meaning.strip() == meaning != "", name
        assert meaning.endswith("."), name
        rule = each.metadata["rule"]
        assert rule.holds(each.default), name


def test_the_docstring_has_each_meaning_once() -> None:
    words = " ".join((WTFlow.__doc__ or "").split())
    for name, each in declared().items():
        meaning = " ".join(each.metadata["meaning"].split())
        assert words.count(f" {name}: {meaning}") == (name in ARGUMENTS), name
        assert words.count(meaning) == (name in ARGUMENTS), name
    assert max(map(len, (WTFlow.__doc__ or "").splitlines())) <= 120
    arguments = (WTFlow.__doc__ or "").partition("Args:\n")[2].partition("Raises:")[0]
    assert set(re.findall(r"^ {4}(\w+): ", arguments, re.MULTILINE)) == set(inspect.signature(WTFlow).parameters)


def test_what_the_model_is_told_becomes_its_settings() -> None:
    model = WTFlow(
        pre_trained=False,
        layers=["blocks.2"],
        image_size=[64, 80],
        false_alarm_rate=None,
        max_epochs=3,
        learning_rate=0.1,
        overrides={"coupling": "independent", "width": 8},
    )
    assert model.settings == get_settings(
        pre_trained=False,
        layers=("blocks.2",),
        image_size=(64, 80),
        false_alarm_rate=None,
        max_epochs=3,
        learning_rate=0.1,
        coupling="independent",
        width=8,
    )
    assert model.model.settings is model.settings
    assert WTFlow(pre_trained=False).settings == get_settings(pre_trained=False)


def test_unknown_overrides() -> None:
    everything = ", ".join(declared())
    for name, hint in (("couplng", "did you mean 'coupling'? "), ("zzz", ""), ("merge", ""), ("thinning", "")):
        message = f"Unknown setting '{name}': {hint}choose one of {everything}."
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            WTFlow(overrides={name: 1})
    with pytest.raises(ValueError, match="'seed' is an argument of WTFlow, not one of its overrides: give it as"):
        WTFlow(overrides={"seed": 1})
    with pytest.raises(ValueError, match=r"^Unknown coupling 'wurst': did you mean 'worst'\? choose one of"):
        WTFlow(overrides={"coupling": "wurst"})
    with pytest.raises(ValueError, match=r"^max_epochs is 0: choose a whole number of at least 1\.$"):
        WTFlow(max_epochs=0)
