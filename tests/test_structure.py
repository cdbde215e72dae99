"""The rooms: which may import which, the sizes that keep them readable, and what no room does."""

import ast
import inspect
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import anomalib_wtflow
from anomalib_wtflow import WTFlow

SOURCE = Path(anomalib_wtflow.__file__).parent
ROOT = Path(__file__).parents[1]

METHOD = {"errors", "flow"}
SCORED = {*METHOD, "features", "anomaly_map", "products.recognition"}
MODEL = {*SCORED, "settings", "rules", "torch_model"}
TRAINED = {*MODEL, "fit", "conformal", "post_processor", "images", "checkpoint", "deploy", "lightning_model", ""}
DATA = {"data", "products.datamodule"}
MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "rules": set(),
    "flow": METHOD,
    "features": {"errors"},
    "anomaly_map": METHOD,
    "products.recognition": METHOD,
    "settings": {*METHOD, "features", "anomaly_map", "rules"},
    "torch_model": {*SCORED, "settings"},
    "fit": MODEL,
    "conformal": {*METHOD, "products.recognition"},
    "post_processor": {*METHOD, "conformal", "settings"},
    "images": {*METHOD, "conformal"},
    "checkpoint": {*MODEL},
    "deploy": {*MODEL, "conformal", "images", "checkpoint", "post_processor", ""},
    "lightning_model": {*TRAINED, "_registration"},
    "data": {"errors", "_registration"},
    "products.datamodule": {"errors", "data", "_registration"},
    "products.report": {"products.recognition", "_registration"},
    "reporting": {"products.recognition", "products.report", "_registration"},
    "baselines": set(),
    "operation": {*TRAINED, *DATA},
    "diagnosis": {*TRAINED, *DATA, "operation"},
    "cli": {"", "settings", "operation", "diagnosis"},
    "_registration": set(),
    "_hook": {"lightning_model", "reporting", *DATA},
    "": {"reporting"},
}
"""By room: the other rooms of the package that its modules may import; the package itself is ``""``."""

CORE = ("lightning_model", "torch_model", "anomaly_map", "post_processor", "conformal", "fit", "flow")
"""What anomalib would take into ``models/image/wtflow``."""
BANNED = ("_getframe", "excepthook", "import dis", "f_locals", "inspect.stack", "removeHandler", "addFilter")
PRIVATE = {
    "_is_fitted": "MemoryBankMixin's flag, which a second fit resets",
    "_checkpoint_config_keys": "anomalib's hook for what a post-processor adds to a checkpoint",
    "_image_threshold": "anomalib's buffer of the threshold, which is a row for each product here",
    "_pixel_threshold": "the same for pixels",
    "_is_setup": "anomalib's flag of a data module that is set up",
    "_setup": "anomalib's hook of a data module",
    "_update_augmentations": "anomalib's step of a data module's set-up",
}
"""Attributes of other libraries with a leading underscore that are touched, with the reason."""


def files() -> Iterator[Path]:
    yield from sorted(SOURCE.rglob("*.py"))


def module_of(file: Path) -> str:
    return ".".join(("anomalib_wtflow", *file.relative_to(SOURCE).with_suffix("").parts)).removesuffix(".__init__")


def room_of(module: str) -> str:
    inside = module.removeprefix("anomalib_wtflow").removeprefix(".")
    return inside if inside in MAY_IMPORT else inside.split(".")[0]


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
    wrong = []
    for file in files():
        module = module_of(file)
        if module in ("anomalib_wtflow", "anomalib_wtflow.products"):  # loads its public names lazily; empty
            continue
        others = {room_of(name) for name in imports(file)} - {room_of(module)}
        wrong += [f"{module} imports {other or 'the package'}" for other in others - MAY_IMPORT[room_of(module)]]
    assert not wrong


def test_rooms_have_no_cycle() -> None:
    order: list[str] = []
    while len(order) < len(MAY_IMPORT):
        free = [room for room, others in MAY_IMPORT.items() if room not in order and others - {room, ""} <= set(order)]
        assert free, set(MAY_IMPORT) - set(order)
        order += free


def test_the_method_knows_neither_lightning_nor_anomalib() -> None:
    for room in ("flow", "anomaly_map", "settings", "torch_model", "fit", "conformal", "products.recognition"):
        path = SOURCE / room.replace(".", "/")
        for file in path.glob("*.py") if path.is_dir() else [path.with_suffix(".py")]:
            lines = [line for line in file.read_text().splitlines() if re.match(r"\s*(import|from) ", line)]
            assert not [line for line in lines if re.search(r" (lightning|anomalib)\b(?!_)", line)], file
    assert [file.name for file in files() if "ALLOWED_MODULES" in file.read_text()] == ["_registration.py"]


def test_no_tricks() -> None:
    assert not [(file.name, word) for file in files() for word in BANNED if word in file.read_text()]


def test_each_private_attribute_of_others_has_a_reason() -> None:
    ours: set[str] = set()
    used: set[str] = set()
    for file in files():
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
                (ours if isinstance(node.ctx, ast.Store) else used).add(node.attr)
    assert used - ours - {"_asdict", "_replace"} <= set(PRIVATE)  # public, of named tuples
    base = {name for name in ours if name in PRIVATE}
    assert set(PRIVATE) <= used | base


def test_no_name_is_defined_twice() -> None:
    defined = Counter(
        node.name
        for file in files()
        for node in ast.parse(file.read_text()).body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    )
    assert not {name for name, count in defined.items() if count > 1}


def lines_of(*paths: Path) -> int:
    return sum(
        len(file.read_text().splitlines())
        for path in paths
        for file in ([path] if path.is_file() else path.rglob("*.py"))
    )


def code_lines(node: ast.FunctionDef) -> int:
    """Lines of a function without its docstring."""
    length = (node.end_lineno or 0) - node.lineno + 1
    first = node.body[0]
    if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str):
        length -= (first.end_lineno or 0) - first.lineno + 1
    return length


def test_sizes() -> None:
    assert lines_of(SOURCE) <= 7000
    assert lines_of(*(SOURCE / f"{room}.py" if room != "flow" else SOURCE / room for room in CORE)) <= 2200
    page = [file for file in (SOURCE / "diagnosis").rglob("*") if file.suffix in (".html", ".css", ".js")]
    assert lines_of(SOURCE / "diagnosis", *page) <= 1400
    assert lines_of(ROOT / "tests") <= 9000
    assert not {file.name: lines_of(file) for file in files() if lines_of(file) > 300}
    functions = {
        f"{file.relative_to(SOURCE)}: {node.name}": code_lines(node)
        for file in files()
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    assert not {name: length for name, length in functions.items() if length > 40}
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
    assert len(inspect.signature(WTFlow).parameters) <= 16
