"""The .pth file and the hook, in small environments with other anomalibs: Python starts, and nothing is harmed.

Each environment has our own .pth file, hook and registration. What stands in for the rest of the plugin, and for
anomalib, does what they do with each other and imports nothing heavy, so a process takes 20 ms.
"""

import subprocess
import venv
import zipapp
from collections.abc import Callable, Mapping
from pathlib import Path
from shutil import copy, rmtree

import pytest

SOURCE = Path(__file__).parents[2] / "src"
ANOMALIB = {
    "__init__.py": "",
    "data.py": "",
    "metrics.py": "",
    "models.py": """
import anomalib.metrics
ALLOWED_MODULES = {"anomalib.models"}
class AnomalibModule: pass
def get_model(name): return {each.__name__: each for each in AnomalibModule.__subclasses__()}[name]
""",
}
PLUGIN = """
from anomalib.models import AnomalibModule
from anomalib_wtflow._registration import register_model
@register_model
class WTFlow(AnomalibModule): pass
"""
FOUND = "import anomalib.models as m; assert m.get_model('WTFlow') is m.WTFlow; print('found')"
NOT_FOUND = "import anomalib.models as m; assert m.AnomalibModule.__subclasses__() == []; print('alone')"
WARNING = "anomalib-wtflow is installed but could not be loaded"


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


def install_plugin(folder: Path) -> Path:
    """Put into a folder what the wheel has: the .pth file beside the package, with a model that stands in for ours."""
    package = folder / "anomalib_wtflow"
    empty = ("data/__init__", "data/synthetic", "products/__init__", "products/datamodule", "reporting/__init__")
    stand_ins = {"lightning_model.py": PLUGIN, **{f"{name}.py": "" for name in empty}}
    write(package, stand_ins)
    for name in ("__init__.py", "_hook.py", "_registration.py"):
        copy(SOURCE / "anomalib_wtflow" / name, package)
    copy(SOURCE / "anomalib_wtflow.pth", folder)
    return folder


class Environment:
    """A virtual environment."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.python = folder / "bin" / "python"
        (self.site,) = folder.glob("lib/python*/site-packages")

    def run(self, *arguments: str, path: Path | None = None) -> tuple[str, str]:
        """Run its interpreter; return what came on the two streams. PYTHONPATH is ``path`` and nothing else."""
        environment = {} if path is None else {"PYTHONPATH": str(path)}
        command = [str(self.python), *arguments]
        result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        assert result.returncode == 0, result.stderr
        return result.stdout.strip(), result.stderr


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory) -> Environment:
    return Environment(tmp_path_factory.mktemp("environment"))


@pytest.fixture
def environment(empty: Environment) -> Environment:
    """With the plugin, and nothing else."""
    rmtree(empty.site)
    empty.site.mkdir()
    install_plugin(empty.site)
    return empty


@pytest.fixture
def complete(environment: Environment) -> Environment:
    """With an anomalib as the plugin knows it."""
    write(environment.site / "anomalib", ANOMALIB)
    return environment


# Starting ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"__init__.py": "raise RuntimeError('half written')"},
        {"__init__.py": "", "_hook.py": "def broken("},
        {"__init__.py": "", "_hook.py": "import a_module_that_is_gone"},
        {"__init__.py": "", "_hook.py": "\0"},
    ],
    ids=["gone", "broken package", "syntax error", "missing module", "null bytes"],
)
def test_a_hook_that_cannot_be_loaded_is_silent(
    environment: Environment, files: dict[str, str], tmp_path: Path
) -> None:
    """The package uninstalled by hand or half written, and the .pth file left behind: nothing on either stream."""
    (environment.site / "anomalib_wtflow").rename(tmp_path / "away")
    write(environment.site / "anomalib_wtflow", files)
    write(environment.site / "anomalib", ANOMALIB)
    assert environment.run("-c", NOT_FOUND) == ("alone", "")


# anomalib ------------------------------------------------------------------------------------------------------------


def test_anomalib_absent(environment: Environment) -> None:
    """Its absence is what an import of it says, and what an import of the plugin says."""
    code = """
import anomalib_wtflow
for name in ("anomalib", "anomalib.models", "anomalib_wtflow.lightning_model"):
    try:
        __import__(name)
    except ModuleNotFoundError as error:
        print(error)
"""
    printed, errors = environment.run("-c", code)
    assert set(printed.splitlines()) == {"No module named 'anomalib'"}
    assert errors == ""


@pytest.mark.parametrize("broken", ["__init__.py", "models.py", "metrics.py"])
def test_anomalib_broken(complete: Environment, broken: str) -> None:
    """Its own error, once for each import, and no word of ours; mended, the next import finds the plugin."""
    where = complete.site / "anomalib" / broken
    where.write_text("raise OSError('libgomp.so.1 is missing')")
    code = f"""
for _ in range(2):
    try:
        import anomalib.models
    except OSError as error:
        print(error)
import importlib, pathlib, sys
pathlib.Path({str(where)!r}).write_text({ANOMALIB[broken]!r})
importlib.invalidate_caches()
{FOUND}
"""
    printed, errors = complete.run("-B", "-c", code)
    assert printed.splitlines() == ["libgomp.so.1 is missing"] * 2 + ["found"]
    assert errors == ""


@pytest.mark.parametrize(
    ("models", "reason"),
    [
        ("class AnomalibModule: pass", "has no attribute 'ALLOWED_MODULES'"),
        ("ALLOWED_MODULES = frozenset()\nclass AnomalibModule: pass", "'frozenset' object has no attribute 'update'"),
        ("ALLOWED_MODULES = set()\nclass AnomalyModule: pass", "ImportError: cannot import name 'AnomalibModule'"),
    ],
    ids=["older", "newer", "renamed"],
)
def test_another_version_of_anomalib_works_without_the_plugin(
    environment: Environment, models: str, reason: str
) -> None:
    """One warning that says why and what to do; anomalib has its own names, and not half of ours."""
    write(environment.site / "anomalib", {**ANOMALIB, "models.py": models})
    code = "import anomalib.models, anomalib.data; print(hasattr(anomalib.models, 'WTFlow'))"
    printed, errors = environment.run("-c", code)
    assert printed == "False"
    assert errors.count(WARNING) == 1
    assert reason in errors
    assert "`pip check` to find packages of a wrong version" in errors


@pytest.mark.parametrize(
    "first",
    [
        "import anomalib.data",
        "import anomalib_wtflow.lightning_model",
        "import anomalib_wtflow._hook as hook, importlib; importlib.reload(hook)",
        "import importlib.util; importlib.util.find_spec('anomalib.models')",
        "import importlib, anomalib.models; importlib.reload(anomalib.models)",
    ],
)
def test_in_every_order(complete: Environment, first: str) -> None:
    """The name is there, also after a reload of anomalib.models, which makes its classes anew."""
    code = f"{first}\nimport anomalib.models\nprint(anomalib.models.WTFlow.__module__)"
    assert complete.run("-c", code) == ("anomalib_wtflow.lightning_model", "")


def test_anomalibs_module_keeps_its_own_loader(complete: Environment) -> None:
    """What reads source, resources or the loader's type finds what it would without the hook."""
    code = """
import importlib.util, inspect, pkgutil
spec = importlib.util.find_spec("anomalib.models")
assert spec.loader.get_filename("anomalib.models") == spec.origin
import anomalib.models as m
print(type(m.__loader__).__name__, type(m.__spec__.loader).__name__)
assert "ALLOWED_MODULES" in inspect.getsource(m) and b"ALLOWED" in pkgutil.get_data("anomalib", "models.py")
"""
    assert complete.run("-c", code) == ("SourceFileLoader SourceFileLoader", "")


# Other ways to run ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_in_child_processes(complete: Environment, tmp_path: Path, method: str) -> None:
    """A new interpreter has the hook and no anomalib yet; there, too, the model is found by name."""
    script = """
import multiprocessing, sys
def child(queue):
    queue.put(["anomalib_wtflow._hook" in sys.modules, "anomalib" in sys.modules])
    import anomalib.models
    queue.put(anomalib.models.get_model("WTFlow").__name__)
if __name__ == "__main__":
    context = multiprocessing.get_context(sys.argv[1])
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    print(queue.get(timeout=60), queue.get(timeout=60))
    process.join()
"""
    path = write(tmp_path, {"script.py": script}) / "script.py"
    assert complete.run(str(path), method) == ("[True, False] WTFlow", "")


def make_zipapp(folder: Path, code: str, add: Callable[[Path], object]) -> str:
    write(folder / "app" / "anomalib", ANOMALIB)
    write(folder / "app", {"__main__.py": code})
    add(folder / "app")
    zipapp.create_archive(folder / "app", folder / "app.pyz")
    return str(folder / "app.pyz")


def test_a_zipapp_with_anomalib_in_an_environment_with_the_plugin(environment: Environment, tmp_path: Path) -> None:
    """A zip file's loader serves all modules in it: the plugin must wait for anomalib.models, not for the first."""
    app = make_zipapp(tmp_path, f"import anomalib.data; {FOUND}", lambda folder: None)
    assert environment.run(app) == ("found", "")
