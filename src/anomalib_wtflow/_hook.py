"""Import hook: once ``anomalib.models`` has been imported, import the plugin.

``anomalib_wtflow.pth`` imports this module when Python starts, so it needs nothing but :mod:`sys`. anomalib resolves
``--model WTFlow`` among the loaded subclasses of ``AnomalibModule`` and reads no entry points; this hook is what loads
ours. It stays quiet until somebody imports ``anomalib.models``.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing `typing` here would cost every interpreter 15 ms

if TYPE_CHECKING:
    from typing import Any

TARGET = "anomalib.models"


class PluginLoader:
    """Loader of ``anomalib.models`` that imports the plugin afterwards.

    It stands in front of the other loader, which may serve other modules too (a zip file's does) or take no attributes.
    """

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def __getattr__(self, name: str) -> Any:
        """Answer as the other loader does."""
        if name == "loader":  # while an instance is being copied, there is none yet
            raise AttributeError(name)
        return getattr(self.loader, name)

    def exec_module(self, module: Any) -> None:
        """Load ``anomalib.models``, then the plugin; the module keeps the other loader."""
        module.__spec__.loader = module.__loader__ = self.loader
        self.loader.exec_module(module)
        load_plugin()


class PluginFinder:
    """Meta-path finder that imports the plugin right after ``anomalib.models``."""

    asking = False
    """Whether it is asking the other finders; one that is another plugin's copy of it asks back."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Find ``anomalib.models``, and wrap its loader in :class:`PluginLoader`.

        Args:
            fullname: Name of the module that is being imported.
            path: ``__path__`` of its parent package.
            target: Module object being reloaded, if any.

        Returns:
            The other finders' spec with its loader extended, or None for any other module.
        """
        if fullname != TARGET or self.asking:
            return None
        self.asking = True
        try:
            finders = [finder for finder in sys.meta_path if hasattr(finder, "find_spec")]
            specs: Any = (finder.find_spec(fullname, path, target) for finder in finders)
            spec: Any = next((spec for spec in specs if spec is not None and spec.loader is not None), None)
        finally:
            self.asking = False
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader = PluginLoader(spec.loader)
        return spec


def is_ours(finder: Any) -> bool:
    """Return whether a finder is a :class:`PluginFinder`, even one from before a reload."""
    return type(finder).__module__ == __name__


def load_plugin() -> None:
    """Import the modules that register themselves with anomalib; warn if that fails."""
    try:
        import anomalib_wtflow.data.synthetic
        import anomalib_wtflow.lightning_model
        import anomalib_wtflow.products.datamodule
        import anomalib_wtflow.reporting  # noqa: F401
    except Exception as error:
        import warnings

        warnings.warn(
            f"anomalib-wtflow is installed but could not be loaded ({type(error).__name__}: {error}); anomalib works "
            "without it. Run `pip check` to find packages of a wrong version, or reinstall it with "
            "`pip install --force-reinstall --no-deps anomalib-wtflow`.",
            stacklevel=2,
        )


def install() -> None:
    """Put the finder first on ``sys.meta_path``, once."""
    if not any(map(is_ours, sys.meta_path)):
        sys.meta_path.insert(0, PluginFinder())


install()
