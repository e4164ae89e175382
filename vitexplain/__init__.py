"""Matrix-free attribution for Vision Transformers: explanations at the price of fused attention."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from . import methods
from .errors import ExplanationError, InputError, UnknownNameError, UnsupportedModelError
from .explainer import Explainer, explain
from .explanation import Explanation

try:
    __version__ = version("vitexplain")
except PackageNotFoundError:  # imported from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = [
    "Explainer",
    "Explanation",
    "ExplanationError",
    "InputError",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
    "explain",
    "methods",
]
