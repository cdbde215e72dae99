"""The paper's claims (arXiv 2508.05461), measured on drawn data with exact fields and toy flows: docs/method.md.

    python -m benchmarks claims
    python -m benchmarks claims --quick                      one seed, and no figure is replaced

Each claim is a figure in docs/images/method and its numbers. They need no images and no trained model.
"""

import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.base import ROOT, Line
from benchmarks.common import Job, averages, table
from benchmarks.theory import figures
from benchmarks.theory.centripetal import centripetal_components
from benchmarks.theory.singularity import lipschitz_growth
from benchmarks.theory.trivial_field import trivial_field
from benchmarks.theory.well import trajectories, well_and_escape

FOLDER = ROOT / "docs" / "images" / "method"
KEY = ("claim",)
OPTIONS = {"seeds": (0, 1, 2)}
QUICK = {"seeds": (0,)}


class Claim(NamedTuple):
    """How a claim is measured, and how it is drawn."""

    measure: Callable[..., dict[str, Any]]
    plot: Callable[[dict[str, Any]], Figure]


CLAIMS = {
    "lipschitz": Claim(lipschitz_growth, figures.plot_lipschitz),
    "trivial_field": Claim(trivial_field, figures.plot_trivial_field),
    "centripetal": Claim(centripetal_components, figures.plot_centripetal),
    "trajectories": Claim(trajectories, figures.plot_trajectories),
    "well_and_escape": Claim(well_and_escape, figures.plot_well_and_escape),
}


def measure(name: str, seeds: tuple[int, ...], folder: Path) -> Line:
    """Measure a claim, and draw its figure into a folder."""
    claim = CLAIMS[name]
    numbers = claim.measure(seeds) if name == "well_and_escape" else claim.measure()
    numbers = json.loads(json.dumps(numbers), parse_float=lambda text: float(f"{float(text):.4g}"))
    claim.plot(numbers).savefig(folder / f"{name}.png", dpi=110, metadata={"Software": None})
    return {"numbers": numbers}


def jobs(given: Namespace) -> Iterator[Job]:
    """Plan the claims."""
    for name in CLAIMS:
        folder = given.output.parent if given.quick else FOLDER
        yield {"claim": name}, partial(measure, name, tuple(given.seeds), folder)


def wells(numbers: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a row for each data set and coupling, the controls without a flow first: means over the seeds."""
    for data, row in numbers.items():
        for name, values in row.items():
            columns = values if isinstance(values, dict) else {"auroc": values}
            seeds = [dict(zip(columns, each, strict=True)) for each in zip(*columns.values(), strict=True)]
            yield {"data": data, "coupling": name, **averages(seeds)}


def render(lines: list[Line]) -> str:
    """Render the exponents of the exact fields, the wells, and the density proxy beside the log-density."""
    numbers = {line["claim"]: line["numbers"] for line in lines}
    trivial = {f"trivial field, {name}": numbers["trivial_field"][name] for name in ("inside", "shell")}
    exact = [{"field": name, **row} for name, row in {**numbers["lipschitz"], **trivial}.items()]
    paths = [{"coupling": name, **row} for name, row in numbers["trajectories"].items()]
    columns = {
        "data": "{data}",
        "coupling": "{coupling}",
        "radius, normal": "{normal_radius}",
        "radius, anomalous": "{anomalous_radius}",
        "AUROC": "{auroc}",
        "from t_s = 0.3": "{late_auroc}",
    }
    tables = [
        *table({"exact field": "{field}", "exponent": "{exponent:.2f}"}, exact),
        *table(columns, wells(numbers["well_and_escape"])),
        *table({"arc": "{coupling}", "by proxy": "{auroc:.3f}", "by log-density": "{auroc_log_density:.3f}"}, paths),
    ]
    return "\n".join(tables)
