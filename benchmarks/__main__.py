"""The command: ``python -m benchmarks NAME [--quick] [--render]``, from the root of the repository."""

import ast
import os
import sys
import warnings
from pathlib import Path

NAMES = [
    "accuracy",
    "products",
    "ablation",
    "contribution",
    "claims",
    "latency",
    "precision",
    "training",
    "growth",
    "startup",
    "backbones",
    "gpu",
    "plots",
]
USAGE = """usage: python -m benchmarks NAME [--quick] [--render] [options of NAME]

Measures what is missing in benchmarks/results/NAME.json and shows all of it; the exit status is 1 if a promise is
missed. --render only shows, --quick is a small version that stores nothing, NAME --help tells the rest.
"""


def main(arguments: list[str]) -> int:
    """Run the benchmark that the first argument names, or list all, without importing what they need."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        for name in NAMES:
            text = ast.get_docstring(ast.parse(Path(__file__).with_name(f"{name}.py").read_text())) or ""
            print(f"  {name:13} {text.splitlines()[0]}")
        return 0
    name, *rest = arguments
    if name not in NAMES:
        print(f"There is no benchmark '{name}': choose one of {', '.join(NAMES)}.", file=sys.stderr)
        return 2
    os.environ.setdefault("TQDM_DISABLE", "1")
    warnings.filterwarnings("ignore")
    from benchmarks.common import run

    return run(name, rest)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
