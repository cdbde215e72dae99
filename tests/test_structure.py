"""The house: which room may import which, and the sizes that keep it readable."""

import ast
import inspect
from pathlib import Path

import anomalib_wtflow
from anomalib_wtflow import WTFlow

SOURCE = Path(anomalib_wtflow.__file__).parent
ROOT = Path(__file__).parents[1]

METHOD = {"flow", "features", "anomaly_map"}
MODEL = {*METHOD, "settings", "torch_model"}
TRAINED = {
    *MODEL,
    "products",
    "loss",
    "post_processor",
    "writing",
    "callers",
    "reporting",
    "training",
    "deploy",
    "_registration",
    "cli.errors",
    "cli.quiet",
    "lightning_model",
    "",
}
MAY_IMPORT: dict[str, set[str]] = {
    "flow": set(),
    "features": set(),
    "anomaly_map": {"flow"},
    "products": {"flow"},
    "loss": {"flow"},
    "settings": METHOD,
    "torch_model": {*METHOD, "settings", "products"},
    "post_processor": {"flow", "settings"},
    "reporting": {"flow", "products", "writing", "callers"},
    "training": {
        "",
        "flow",
        "features",
        "settings",
        "products",
        "torch_model",
        "post_processor",
        "reporting",
        "writing",
        "callers",
        "cli.errors",
    },
    "deploy": {"", "flow", "settings", "post_processor", "training", "writing"},
    "lightning_model": TRAINED - {"lightning_model"},
    "theory": {"flow", "anomaly_map"},
    "data": {"_registration", "cli.errors"},
    "operation": {*TRAINED, "data"},
    "diagnosis": {*TRAINED, "operation", "data", "theory"},
    "cli": {"", "settings", "operation", "diagnosis", "cli.errors", "cli.quiet"},
    "cli.errors": {"cli.quiet"},
    "cli.quiet": set(),
    "writing": set(),
    "callers": set(),
    "_registration": set(),
    "_hook": {"lightning_model", "data", "cli.quiet"},
    "": set(),
}
"""By room: the other rooms of the package that its modules may import; the package itself is ``""``."""


def room_of(module: str) -> str:
    """The room that a module is in; what the model needs of the command line's is in rooms of its own."""
    inside = module.removeprefix("anomalib_wtflow").removeprefix(".")
    return inside if inside in ("cli.errors", "cli.quiet") else inside.split(".")[0]


def imports(file: Path) -> set[str]:
    """The package's own modules that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {m if (SOURCE.parent / (m.replace(".", "/") + ".py")).is_file() else node.module for m in modules}
    return {name for name in names if name.split(".")[0] == "anomalib_wtflow"}


def test_rooms_import_one_way() -> None:
    wrong, used = [], {room: set() for room in MAY_IMPORT}
    for file in SOURCE.rglob("*.py"):
        module = ".".join(("anomalib_wtflow", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(
            ".__init__"
        )
        room = room_of(module)
        if module == "anomalib_wtflow":  # loads its public names lazily, by name
            continue
        others = {room_of(name) for name in imports(file)} - {room}
        used[room] |= others
        wrong += [f"{module} imports {other}" for other in others - MAY_IMPORT[room]]
    assert not wrong
    assert used["flow"] == used["features"] == set()
    assert used["torch_model"] >= {"flow", "features", "anomaly_map", "settings"}


def test_the_method_knows_nothing_of_lightning_and_only_the_registration_of_anomalibs_internals() -> None:
    for room, words in {
        "flow": ("lightning", "anomalib.", "timm"),
        "theory": ("lightning", "anomalib."),
        "features/backbone": ("lightning", "anomalib."),
        "features/folding": ("lightning", "anomalib."),
        "anomaly_map": ("lightning", "anomalib."),
        "settings": ("lightning", "anomalib."),
        "torch_model": ("lightning",),
    }.items():
        files = [SOURCE / f"{room}.py"] if (SOURCE / f"{room}.py").is_file() else list((SOURCE / room).rglob("*.py"))
        for file in files:
            found = [line for line in file.read_text().splitlines() if line.startswith(("import ", "from "))]
            assert not [line for line in found for word in words if f" {word}" in line], file
    internals = [file.name for file in SOURCE.rglob("*.py") if "ALLOWED_MODULES" in file.read_text()]
    assert internals == ["_registration.py"]


def code_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    length = (node.end_lineno or 0) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        length -= (first.end_lineno or 0) - first.lineno + 1
    return length


def test_sizes() -> None:
    assert len((SOURCE / "lightning_model.py").read_text().splitlines()) <= 250
    lengths = {
        f"{file.relative_to(SOURCE)}: {node.name}": code_lines(node)
        for file in SOURCE.rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: length for name, length in lengths.items() if length > 40}
    for room in ("diagnosis", "theory"):
        assert max(len(file.read_text().splitlines()) for file in (SOURCE / room).glob("*.py")) <= 300
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    assert len(inspect.signature(WTFlow).parameters) <= 16
