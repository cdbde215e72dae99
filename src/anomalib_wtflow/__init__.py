"""WT-Flow for anomalib: time-reversed flow matching with worst transport (arXiv 2508.05461).

The names below are loaded on first use, so that ``import anomalib_wtflow`` costs nothing before torch is needed.
"""

TYPE_CHECKING = False  # `typing` would cost every interpreter 15 ms, through the .pth file

if TYPE_CHECKING:
    from anomalib_wtflow.baselines import FastflowBaseline
    from anomalib_wtflow.data.synthetic import SyntheticParts
    from anomalib_wtflow.diagnosis.diagnose import diagnose
    from anomalib_wtflow.lightning_model import WTFlow
    from anomalib_wtflow.operation.calibrate import calibrate
    from anomalib_wtflow.post_processor import WTFlowPostProcessor
    from anomalib_wtflow.products.datamodule import Products
    from anomalib_wtflow.torch_model import WTFlowModel

__version__ = "0.2.0"
__all__ = [
    "FastflowBaseline",
    "Products",
    "SyntheticParts",
    "WTFlow",
    "WTFlowModel",
    "WTFlowPostProcessor",
    "calibrate",
    "diagnose",
]

_HOMES = {
    "FastflowBaseline": "baselines",
    "Products": "products.datamodule",
    "SyntheticParts": "data.synthetic",
    "WTFlow": "lightning_model",
    "WTFlowModel": "torch_model",
    "WTFlowPostProcessor": "post_processor",
    "calibrate": "operation.calibrate",
    "diagnose": "diagnosis.diagnose",
}


def __getattr__(name: str) -> object:
    """Load a public name from the module that defines it (PEP 562)."""
    if name not in _HOMES:
        msg = f"module 'anomalib_wtflow' has no attribute '{name}'"
        raise AttributeError(msg)
    from importlib import import_module

    import_module("anomalib_wtflow.reporting")
    return getattr(import_module(f"anomalib_wtflow.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    """List the public names, loaded or not."""
    return sorted({*globals(), *__all__})
