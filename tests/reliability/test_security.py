"""Nothing is unpickled, fetched or run that the user did not name."""

import ast
import socket
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from anomalib.data import PredictDataset

from anomalib_wtflow import WTFlow
from anomalib_wtflow.errors import WTFlowError
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
    with pytest.raises(WTFlowError, match="could not be fetched from the hub"):
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
