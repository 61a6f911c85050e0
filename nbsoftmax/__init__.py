"""softmax, log_softmax and logsumexp: SciPy's functions on all cores, exact to the last bits."""

from ._api import log_softmax, logsumexp, softmax

__version__ = "0.1.0"
__all__ = ["log_softmax", "logsumexp", "softmax"]
