"""Matrix-free attribution for Vision Transformers: explanations at the price of fused attention."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import dataset as dataset
    from . import methods as methods
    from .errors import ExplanationError, InputError, UnknownNameError, UnsupportedModelError
    from .explainer import Explainer, explain
    from .explanation import Explanation
    from .models import Anatomy, BlockAnatomy, ResidualBranches
    from .targets import margin, similarity

    __version__: str

__all__ = [
    "Anatomy",
    "BlockAnatomy",
    "Explainer",
    "Explanation",
    "ExplanationError",
    "InputError",
    "ResidualBranches",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
    "dataset",
    "explain",
    "margin",
    "methods",
    "similarity",
]

# Where each name comes from; loaded at first use, so that importing this package does not load torch.
_HOMES = {
    "Anatomy": "models",
    "BlockAnatomy": "models",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "ExplanationError": "errors",
    "InputError": "errors",
    "ResidualBranches": "models",
    "UnknownNameError": "errors",
    "UnsupportedModelError": "errors",
    "explain": "explainer",
    "margin": "targets",
    "similarity": "targets",
}

_PACKAGES = {"dataset", "methods"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    elif name in _PACKAGES:
        value = import_module(f".{name}", __name__)
    elif name == "__version__":
        value = _version()
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("vitexplain")
    except PackageNotFoundError:  # imported from a source tree that was never installed
        return "0+unknown"
