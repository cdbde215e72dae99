"""Registration: by name through unmodified anomalib, at no cost, and harmless when broken."""

import subprocess
import sys
from importlib.metadata import files
from pathlib import Path

import pytest

PTH = Path(__file__).parents[1] / "src" / "anomalib_wtflow.pth"


def run(code: str, *options: str) -> str:
    """Run code in a new interpreter; returns what it printed, on both streams."""
    command = [sys.executable, "-W", "ignore::FutureWarning", "-W", "ignore::DeprecationWarning", *options, "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def test_the_hook_imports_nothing() -> None:
    """In a bare interpreter the .pth line loads our two modules, which were not there, and no other."""
    source = str(PTH.parent)
    code = f"""import sys
sys.path.insert(0, {source!r})
before = set(sys.modules)
exec(open({str(PTH)!r}).read())
print(sorted(set(sys.modules) - before))"""
    assert run(code, "-S", "-E").strip() == "['__future__', 'anomalib_wtflow', 'anomalib_wtflow._hook']"


def test_nothing_heavy_at_start() -> None:
    loaded = run(
        "import sys; print('anomalib_wtflow._hook' in sys.modules, 'torch' in sys.modules, 'anomalib' in sys.modules)"
    )
    assert loaded.split() == ["True", "False", "False"]
    code = (
        "import sys, anomalib_wtflow; print(anomalib_wtflow.__version__, 'torch' in sys.modules, dir(anomalib_wtflow))"
    )
    assert "False" in run(code)
    assert "WTFlowModel" in run(code)


@pytest.mark.slow
@pytest.mark.parametrize(
    "first",
    [
        "",
        "import anomalib_wtflow",
        "import importlib.util; importlib.util.find_spec('anomalib.models')",
        "import anomalib_wtflow._hook as h, importlib; importlib.reload(h)",
    ],
)
def test_every_name_in_every_order(first: str) -> None:
    code = f"""{first}
from anomalib.models import WTFlow, get_model, list_models
from anomalib.data import get_datamodule
import anomalib.models, anomalib_wtflow
assert WTFlow is anomalib_wtflow.WTFlow
for name in ("WTFlow", "wt_flow", "wtflow", {{"class_path": "WTFlow"}}, {{"class_path": "anomalib_wtflow.WTFlow"}}):
    assert type(get_model(name)) is WTFlow
assert get_model({{"class_path": "WTFlow", "init_args": {{"max_epochs": 3}}}}).settings.max_epochs == 3
assert "w_t_flow" in list_models()
assert sorted(n for n in anomalib.models.ALLOWED_MODULES if not n.startswith("anomalib.")) == [
    "anomalib_wtflow", "anomalib_wtflow.lightning_model"
]
data = get_datamodule({{"class_path": "SyntheticParts", "init_args": {{"train_images": 5}}}})
assert data.train_images == 5
print("done")
"""
    assert run(code).strip().splitlines()[-1] == "done"


@pytest.mark.parametrize(
    "break_it", ["sys.modules['anomalib_wtflow'] = None", "sys.modules['anomalib_wtflow._hook'] = None"]
)
def test_a_leftover_file_is_silent(break_it: str) -> None:
    """What the .pth file does when the package is gone, or half gone: nothing, and it prints nothing."""
    assert run(f"import sys; {break_it}; exec(open({str(PTH)!r}).read()); print('ok')", "-S").strip() == "ok"


@pytest.mark.slow
def test_a_broken_plugin_leaves_anomalib_usable() -> None:
    code = """
import sys
sys.modules["anomalib_wtflow.torch_model"] = None
import warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import anomalib.models
print([str(w.message) for w in caught if "anomalib-wtflow" in str(w.message)])
anomalib.models.get_model("padim", pre_trained=False)
"""
    assert "anomalib-wtflow is installed but could not be loaded (ModuleNotFoundError" in run(code)


def test_plugins_with_this_hook_live_side_by_side(tmp_path: Path) -> None:
    """Another plugin's copy of the hook and ours ask each other for anomalib's spec, and both are loaded, once."""
    other = tmp_path / "other_plugin"
    other.mkdir()
    (other / "__init__.py").touch()
    (other / "model.py").write_text("print('other')")
    hook = (PTH.parent / "anomalib_wtflow" / "_hook.py").read_text()
    lines = [line for line in hook.splitlines() if not line.strip().startswith("import anomalib_wtflow.data")]
    hook = "\n".join(lines).replace("anomalib_wtflow.lightning_model", "other_plugin.model")
    (other / "_hook.py").write_text(hook.replace('TARGET = "anomalib.models"', 'TARGET = "target"'))
    (tmp_path / "target.py").write_text("print('target')")
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
import other_plugin._hook, anomalib_wtflow._hook
anomalib_wtflow._hook.TARGET, anomalib_wtflow._hook.load_plugin = "target", lambda: print("ours")
import target
"""
    printed = run(code).split()
    assert printed[0] == "target"
    assert sorted(printed[1:]) == ["other", "ours"]


def test_uninstalling_removes_the_file() -> None:
    """pip removes what the wheel's RECORD lists."""
    assert "anomalib_wtflow.pth" in {str(path) for path in files("anomalib-wtflow") or []}
