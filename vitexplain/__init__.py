"""Matrix-free attribution for Vision Transformers: explanations at the price of fused attention."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from . import dataset as dataset
    from . import errors as errors
    from . import evaluate as evaluate
    from . import kernels as kernels
    from . import loading as loading
    from . import models as models
    from . import sources as sources
    from . import testing as testing
    from . import visualize as visualize
    from .errors import ExplanationError, InputError, UnknownNameError, UnsupportedModelError
    from .explainer import Explainer, explain
    from .explanation import Explanation
    from .loading import LoadedModel, load_model
    from .methods import _CallableModule
    from .models import Anatomy, BlockAnatomy, ResidualBranches
    from .photos import load_photo
    from .sources import open_source
    from .targets import margin, similarity

    # both a package and a function; what it holds has types where it is imported from vitexplain.methods
    methods: _CallableModule
    __version__: str

__all__ = [
    "Anatomy",
    "BlockAnatomy",
    "Explainer",
    "Explanation",
    "ExplanationError",
    "InputError",
    "LoadedModel",
    "ResidualBranches",
    "UnknownNameError",
    "UnsupportedModelError",
    "__version__",
    "dataset",
    "errors",
    "evaluate",
    "explain",
    "kernels",
    "load_model",
    "load_photo",
    "loading",
    "margin",
    "methods",
    "models",
    "open_source",
    "similarity",
    "sources",
    "testing",
    "visualize",
]

# Where each name comes from; loaded at first use, so that importing this package does not load torch.
_HOMES = {
    "Anatomy": "models",
    "BlockAnatomy": "models",
    "Explainer": "explainer",
    "Explanation": "explanation",
    "ExplanationError": "errors",
    "InputError": "errors",
    "LoadedModel": "loading",
    "ResidualBranches": "models",
    "UnknownNameError": "errors",
    "UnsupportedModelError": "errors",
    "explain": "explainer",
    "load_model": "loading",
    "load_photo": "photos",
    "margin": "targets",
    "open_source": "sources",
    "similarity": "targets",
}

_PACKAGES = {
    "dataset",
    "errors",
    "evaluate",
    "kernels",
    "loading",
    "methods",
    "models",
    "sources",
    "testing",
    "visualize",
}


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
