"""Registration with anomalib 2.7: the only module that knows anomalib's internals."""

from importlib import import_module
from typing import Any, TypeVar

_Registered = TypeVar("_Registered", bound=type)

REPORTS: list[type[Any]] = []
"""Callbacks that report on tests and predictions. A model adds them to its own, and knows no report."""


def register_report(cls: _Registered) -> _Registered:
    """Add a callback of this class to each model (class decorator)."""
    REPORTS.append(cls)
    return cls


def register_model(cls: _Registered) -> _Registered:
    """Make a model available by name in ``anomalib.models`` (class decorator).

    ``get_model({"class_path": "WTFlow"})`` looks the name up in ``anomalib.models``, and a dotted class path must come
    from a module on anomalib's whitelist, to which this adds the plugin's own names and nothing else.
    """
    # `import anomalib.models` would fail while that module is still loading, which is when the hook calls this.
    models = import_module("anomalib.models")
    models.ALLOWED_MODULES.update({"anomalib_wtflow", cls.__module__})
    setattr(models, cls.__name__, cls)
    return cls


def register_datamodule(cls: _Registered) -> _Registered:
    """Make a data module available by name in ``anomalib.data`` (class decorator)."""
    setattr(import_module("anomalib.data"), cls.__name__, cls)
    return cls
