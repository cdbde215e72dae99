"""The error that this package raises."""


class WTFlowError(ValueError):
    """Wrong input or state: the message is one sentence that names the value and the way out."""
