"""Nothing is unpickled, fetched or run that the user did not name, and temporary files are private."""

import ast
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from anomalib.data import PredictDataset

from anomalib_wtflow import WTFlow
from anomalib_wtflow.training.feature_caching import FeatureCaching
from conftest import quiet_engine

ROOT = Path(__file__).parents[2]
UNPICKLERS = {"pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
NETWORK = {
    "aiohttp",
    "ftplib",
    "http",
    "httpx",
    "huggingface_hub",
    "requests",
    "smtplib",
    "socket",
    "urllib",
    "urllib3",
}
RUNNERS = {"asyncio", "ctypes", "multiprocessing", "os.system", "pty", "subprocess"}


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]


def modules(path: Path) -> Iterator[str]:
    """The modules that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def calls(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The calls in a file: what is called, as written, and its keyword arguments as far as they are constants."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield (
                ast.unparse(node.func),
                {
                    keyword.arg or "**": keyword.value.value if isinstance(keyword.value, ast.Constant) else ...
                    for keyword in node.keywords
                },
            )


# Pickles -------------------------------------------------------------------------------------------------------------


def test_every_file_of_tensors_is_read_without_its_code() -> None:
    """``torch.load`` has ``weights_only=True`` spelt out, wherever it stands; nothing else that unpickles is used."""
    loads = [
        (path.name, given.get("weights_only"))
        for path in files("src", "benchmarks", "docs", "examples")
        for name, given in calls(path)
        if name in ("torch.load", "np.load", "numpy.load") or name.endswith("read_pickle")
    ]
    assert len(loads) >= 2
    assert {weights_only for _, weights_only in loads} == {True}, loads
    used = {(path.name, module) for path in files("src", "benchmarks") for module in modules(path)}
    assert not {(name, module) for name, module in used if module.split(".")[0] in UNPICKLERS}
    assert not {(name, module) for name, module in used if module in ("torch.load", "numpy.load")}  # as `load`
    assert {module for _, module in used if module.startswith("yaml.")} <= {"yaml.YAMLError"}
    assert not {name for path in files("src", "benchmarks") for name, _ in calls(path) if name.startswith("yaml.")}


def test_no_call_allows_pickles() -> None:
    flags = ("allow_pickle", "weights_only", "trust_remote_code")
    given = [(path.name, flag, keywords[flag]) for path in files("src", "benchmarks") for _, keywords in calls(path)
             for flag in flags if flag in keywords]  # fmt: skip
    assert {(flag, value) for _, flag, value in given} == {("weights_only", True)}


# Network and programs ------------------------------------------------------------------------------------------------


def test_the_package_neither_opens_the_network_nor_starts_programs() -> None:
    """But for timm, which fetches the weights of a backbone that the user has named, in one place."""
    used = {(path.name, module) for path in files("src") for module in modules(path)}
    assert not {(name, module) for name, module in used if module.split(".")[0] in NETWORK | RUNNERS}
    called = {name for path in files("src") for name, _ in calls(path)}
    assert not {
        name for name in called if name.startswith(("os.system", "os.popen", "os.exec", "os.spawn", "torch.hub"))
    }
    assert not {"eval", "exec", "compile", "__import__"} & called
    creating = [(path, given) for path in files("src") for name, given in calls(path) if name == "timm.create_model"]
    fetching = [path.name for path, given in creating if given.get("pretrained", False) is not False]
    assert fetching == ["backbone.py"]


@pytest.fixture
def attempts(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every attempt to reach a network, which fails; also one whose error is caught is in the list."""
    seen: list[Any] = []

    def refuse(*arguments: Any, **kwargs: Any) -> None:
        seen.append(arguments)
        msg = "This test has no network."
        raise OSError(msg)

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "gethostbyname", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    return seen


def test_attempts_are_seen(attempts: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the tests below would prove nothing."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # between the hub's attempts
    with pytest.raises(RuntimeError, match="could not be fetched from the hub"):
        WTFlow(backbone="resnet10t", layers=["layer1"], image_size=32)
    assert attempts


def test_a_new_model_takes_its_weights_from_the_package(attempts: list[Any]) -> None:
    WTFlow(image_size=32)
    assert attempts == []


@pytest.fixture
def untrained() -> WTFlow:
    """A model whose backbone is random: whatever it knows, it has from a checkpoint."""
    return WTFlow(image_size=128, pre_trained=False, visualizer=False, overrides={"coupling": "worst_of_two"})


def test_test_and_predict_open_no_connection(
    trained: SimpleNamespace, untrained: WTFlow, attempts: list[Any], tmp_path: Path
) -> None:
    engine = quiet_engine(tmp_path, limit_test_batches=1)
    engine.test(untrained, datamodule=trained.parts, ckpt_path=trained.checkpoint)
    (image, *_) = sorted(Path(trained.parts.root).glob("test/good/*.png"))
    (batch,) = engine.predict(untrained, dataset=PredictDataset(image), ckpt_path=trained.checkpoint)
    assert batch.pred_score.isfinite().all()
    assert attempts == []


@pytest.mark.slow
def test_exports_open_no_connection(
    trained: SimpleNamespace, untrained: WTFlow, attempts: list[Any], tmp_path: Path
) -> None:
    """ONNX is a step on the way to OpenVINO."""
    for kind in ("torch", "openvino"):
        quiet_engine(tmp_path).export(untrained, kind, export_root=tmp_path, ckpt_path=trained.checkpoint)
    assert (tmp_path / "weights" / "torch" / "model.pt").is_file()
    assert (tmp_path / "weights" / "openvino" / "model.xml").is_file()
    assert attempts == []


@pytest.mark.parametrize("opted_out", [False, True])
def test_openvino_reports_its_use_unless_told_not_to(opted_out: bool, tmp_path: Path) -> None:
    """On import, which ``anomalib`` does for every model; the file is what ``opt_in_out --opt_out`` writes."""
    (tmp_path / "intel").mkdir()
    if opted_out:
        (tmp_path / "intel" / "openvino_telemetry").write_text("0")
    code = """
from openvino_telemetry.backend.backend_ga4 import GA4Backend
GA4Backend.send = lambda self, message: print(self.backend_url.partition("/mp/")[0], flush=True)
import openvino
"""
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    command = [sys.executable, "-W", "ignore", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert set(done.stdout.split()) == (set() if opted_out else {"https://www.google-analytics.com"})


# Temporary files -----------------------------------------------------------------------------------------------------


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder of temporary files, where whatever is made is everybody's, unless its maker sees to it."""
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    before = os.umask(0)
    yield tmp_path
    os.umask(before)


def test_a_feature_cache_of_several_processes_is_private(temporary: Path) -> None:
    strategy = SimpleNamespace(broadcast=lambda name: name)
    for rank in (0, 1):
        trainer: Any = SimpleNamespace(num_devices=2, strategy=strategy, node_rank=0, local_rank=rank)
        FeatureCaching(1.0).on_fit_start(trainer, None)
    assert [folder.stat().st_mode & 0o777 for folder in temporary.iterdir()] == [0o700, 0o700]


# CI's list of known vulnerabilities ----------------------------------------------------------------------------------

SAFE = {"name": "torch", "version": "2.14.1", "vulns": []}
SKIPPED = {"name": "timm", "skip_reason": "Dependency not found on PyPI"}
VULNERABLE = {
    "name": "pillow",
    "version": "10.1.0",
    "vulns": [{"id": "PYSEC-1", "fix_versions": ["10.2.0"]}, {"id": "PYSEC-2", "fix_versions": []}],
}


@pytest.mark.parametrize(
    ("packages", "said"),
    [
        (None, ["pip-audit: PyPI's list of vulnerabilities cannot be had here, so no package was looked up."]),
        ([SKIPPED], ["pip-audit: PyPI's list of vulnerabilities cannot be had here, so no package was looked up."]),
        ([SAFE, SKIPPED], ["pip-audit: 0 vulnerabilities known in 1 of 2 packages looked up."]),
        (
            [SAFE, VULNERABLE],
            [
                "pillow 10.1.0: PYSEC-1 (mended in 10.2.0)",
                "pillow 10.1.0: PYSEC-2 (mended in no release)",
                "pip-audit: 2 vulnerabilities known in 2 of 2 packages looked up.",
            ],
        ),
    ],
    ids=["offline", "mirror", "clean", "vulnerable"],
)
def test_known_vulnerabilities_are_said_and_fail_nothing(
    packages: list[dict[str, Any]] | None, said: list[str], tmp_path: Path
) -> None:
    """With an answer of pip-audit's, whose exit status is 1 where it found something, and where it reached nothing."""
    answer = "" if packages is None else json.dumps({"dependencies": packages, "fixes": []})
    (tmp_path / "pip_audit.py").write_text(f"print({answer!r}); raise SystemExit(1)")
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, str(ROOT / ".ci" / "audit")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == said
