"""Reports after a test or a prediction; importing this registers them."""

from anomalib_wtflow.products import report
from anomalib_wtflow.reporting import metrics, verdicts

__all__ = ["metrics", "report", "verdicts"]
