"""The paper's claims, measured: what reproduces, with its tolerance, and what does not."""

from pathlib import Path

import pytest
import torch
from scipy.stats import norm

from anomalib_wtflow.diagnosis.measures import centripetal_component
from anomalib_wtflow.flow.coupling import COUPLINGS
from anomalib_wtflow.flow.path import ProbabilityPath
from benchmarks.claims import CLAIMS, render
from benchmarks.theory.centripetal import centripetal_components
from benchmarks.theory.oracle import EmpiricalField
from benchmarks.theory.singularity import lipschitz_growth
from benchmarks.theory.trivial_field import trivial_field
from benchmarks.theory.well import trajectories, well_and_escape

pytestmark = pytest.mark.method
LINEAR = ProbabilityPath("linear")


@pytest.fixture(scope="module")
def lipschitz() -> dict:
    return lipschitz_growth()


@pytest.mark.parametrize(
    ("case", "exponent"),
    [
        ("finite data, independent", -1),
        ("Gaussian data in a plane, independent", -1),
        ("Gaussian data of full rank, independent", 0),
        ("finite data, worst_of_two", -1),
        ("antipodal", 0),
    ],
)
def test_exponent_of_the_initial_singularity(lipschitz: dict, case: str, exponent: float) -> None:
    """1/t where the data have no width in some direction, none where they do.

    Worst transport tames it only where it is a map (antipodal): worst_of_two leaves the noise free across the data, and
    the exponent where it was.
    """
    assert lipschitz[case]["exponent"] == pytest.approx(exponent, abs=0.05)


def test_antipodal_moves_the_singularity_to_the_crossing(lipschitz: dict) -> None:
    """u(x) = -(1 + c) x / (1 - (1 + c) t) with c = 1: Lipschitz constant 2 at t = 0, unbounded at t = 1/2."""
    case = lipschitz["antipodal"]
    for t, constant in zip(case["t"], case["lipschitz"], strict=True):
        assert constant == pytest.approx(2 / abs(1 - 2 * t), rel=1e-6)


def test_between_two_points_the_field_is_worse_than_one_over_t() -> None:
    """Half way between a_t x1 and a_t x2 at distance d the constant is d^2 (1 - t) / (4 t^3) - 1/t: exponent -3.

    No path is likely to come by; but the global Lipschitz constant of a finite data set is this one, not 1/t.
    """
    points = torch.tensor([[1.0, 0.0], [-1.0, 0.0]], dtype=torch.float64)
    field = EmpiricalField(points, LINEAR)
    for t in (0.003, 0.01, 0.03):
        jacobian = field.jacobian(torch.zeros(1, 2, dtype=torch.float64), torch.tensor([t], dtype=torch.float64))
        constant = float(torch.linalg.matrix_norm(jacobian, ord=2))
        assert constant == pytest.approx((1 - t) / t**3 - 1 / t, rel=1e-9)


def test_trivial_field_inside_the_shell_only() -> None:
    """Two data sets of fixed radius: the fields differ as D^-1/2.

    On the shell, where normalised features are, they do not become alike at all: the ratio stays above 1.
    """
    result = trivial_field()
    assert result["inside"]["exponent"] == pytest.approx(-0.5, abs=0.05)
    assert result["inside"]["ratio"][-1] < 0.03
    assert abs(result["shell"]["exponent"]) < 0.1
    assert min(result["shell"]["ratio"][1:]) > 1


@pytest.fixture(scope="module")
def components() -> dict:
    return centripetal_components()


@pytest.mark.parametrize("coupling", ["independent", "worst_of_two", "antipodal"])
def test_centripetal_component_at_the_start(components: dict, coupling: str) -> None:
    """-(1 + c) with c = 0, sqrt(2 / pi) / sqrt(D) and 1, within four standard errors in each of six dimensions."""
    row = components[coupling]
    for mean, error, predicted in zip(row["mean"], row["standard_error"], row["predicted"], strict=True):
        assert abs(mean - predicted) <= 4 * error + 1e-6


def test_centripetal_component_of_the_minibatch_couplings(components: dict) -> None:
    """Worst: c > 0, optimal: c < 0, both within the bound E max(Z_1 … Z_N) / sqrt(D), and near it in high D.

    So the mini-batch optimal coupling does not point outwards: at D = 2048 it still heads for the centre at 0.95.
    """
    for index, bound in enumerate(components["bound"]):
        worst, optimal = (components[name]["mean"][index] for name in ("worst", "optimal"))
        assert 0 < -1 - worst < bound
        assert 0 < 1 + optimal < bound
    assert -1 - components["worst"]["mean"][-1] > 2 / 3 * components["bound"][-1]
    assert -0.96 < components["optimal"]["mean"][-1] < -0.94


@pytest.mark.parametrize("width", [0.5, 1.0])
def test_optimal_transport_of_a_narrow_gaussian_points_outwards(width: float) -> None:
    """From N(0, w^2) to N(0, 1) on the line the maps are x / w (optimal) and -x / w (worst).

    So <u, x> / x^2 is 1 / w - 1 >= 0 and -(1 + 1 / w); independent -1. Assignments over 512 quantiles are exact.
    """
    quantiles = torch.from_numpy(norm.ppf((torch.arange(512).double() + 0.5).numpy() / 512))[:, None, None, None]
    x0, noise = width * quantiles, quantiles[torch.randperm(512)]
    for name, expected in (("optimal", 1 / width - 1), ("worst", -1 - 1 / width)):
        components = centripetal_component(COUPLINGS[name](x0, noise) - x0, x0)
        torch.testing.assert_close(components, torch.full_like(components, expected))


def test_antipodal_paths_meet_at_the_centre() -> None:
    """x_t = 0 at t = 1 / (1 + c), c = sqrt(C) / ||x0||, whatever the norm."""
    x0 = torch.randn(64, 16, 1, 1, dtype=torch.float64) * torch.logspace(-1, 1, 64).double().view(-1, 1, 1, 1)
    c = 4 / x0.flatten(1).norm(dim=1)
    sample = LINEAR.sample(x0, COUPLINGS["antipodal"](x0, x0), 1 / (1 + c))
    torch.testing.assert_close(sample.x_t, torch.zeros_like(x0), rtol=0, atol=1e-12)
    torch.testing.assert_close(centripetal_component(sample.velocity, x0).flatten(), -(1 + c))


@pytest.fixture(scope="module")
def escape() -> dict:
    return well_and_escape(seeds=(0,))


@pytest.mark.slow
@pytest.mark.parametrize("data", ["arc", "subspace"])
@pytest.mark.parametrize("coupling", ["independent", "optimal", "worst", "worst_of_two"])
def test_normal_points_fall_and_anomalous_ones_escape(escape: dict, data: str, coupling: str) -> None:
    """From radius 1 the normal end inside, the anomalous farther out; AUROC above 0.95 (arc), 0.88 (subspace)."""
    row = escape[data][coupling]
    assert row["normal_radius"][0] < 0.9
    assert row["anomalous_radius"][0] > 1.2 * row["normal_radius"][0]
    assert row["auroc"][0] > {"arc": 0.95, "subspace": 0.88}[data]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["arc", "subspace"])
def test_without_the_flow_they_cannot_be_told_apart(escape: dict, data: str) -> None:
    assert escape[data]["control"][0] == pytest.approx(0.5, abs=0.03)


@pytest.mark.slow
def test_worst_transport_does_not_beat_plain_rfm_here(escape: dict) -> None:
    """A negative result: worst_of_two is within 0.01 of independent coupling, the mini-batch worst is below it."""
    row = escape["subspace"]
    plain = row["independent"]["auroc"][0]
    assert abs(row["worst_of_two"]["auroc"][0] - plain) < 0.01
    assert row["worst"]["auroc"][0] < plain


@pytest.mark.slow
def test_whitening_alone_does_as_well(escape: dict) -> None:
    """A negative result: the Mahalanobis distance, without a flow, is within 0.02 of plain rFM on the subspace."""
    row = escape["subspace"]
    assert abs(row["control_whitened"][0] - row["independent"]["auroc"][0]) < 0.02


@pytest.mark.slow
def test_antipodal_carries_normal_points_through_the_centre(escape: dict) -> None:
    """One step along -(1 + c) x0 with c = 1 ends opposite, at radius 1: the density proxy sees no well."""
    row = escape["subspace"]["antipodal"]
    assert row["normal_radius"][0] > 0.95
    assert row["auroc"][0] < 0.6


@pytest.mark.slow
def test_claims_are_drawn_and_in_tables(lipschitz: dict, components: dict, escape: dict, tmp_path: Path) -> None:
    """All that ``python -m benchmarks claims`` writes, of small measurements."""
    numbers = {"lipschitz": lipschitz, "centripetal": components, "well_and_escape": escape}
    numbers |= {"trajectories": trajectories(("independent", "worst")), "trivial_field": trivial_field((2, 128, 256))}
    for name, claim in CLAIMS.items():
        claim.plot(numbers[name]).savefig(tmp_path / f"{name}.png")
    text = render([{"claim": name, "numbers": values} for name, values in numbers.items()])
    assert "| finite data, independent | -1.00 |" in text
    assert f"| subspace | independent | {escape['subspace']['independent']['normal_radius'][0]:.4f} |" in text
    for row in numbers["trajectories"].values():
        assert row["auroc_log_density"] > 0.95
