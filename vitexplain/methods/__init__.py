"""The methods, one short file each, and their table. ``vitexplain.methods()`` lists them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

from ..errors import InputError, unknown_name
from ..options import Option, from_text
from .attcat import AttCAT
from .base import ChainMethod, Method
from .captum_methods import CaptumMethod, InputXGradient, IntegratedGradients, SmoothGrad
from .cdam import CDAM
from .conservative_lrp import ConservativeLRP
from .gmar import GMAR
from .grad_cam import GradCAM
from .iba import IBA
from .legrad import LeGrad
from .lrp import LRP
from .partial_lrp import PartialLRP
from .raw_attention import RawAttention
from .rollout import Rollout
from .tokentm import TokenTM
from .transformer_attribution import TransformerAttribution
from .transformer_mm import TransformerMM

_TABLE: tuple[type[Method], ...] = (
    TokenTM,
    GMAR,
    IBA,
    TransformerMM,
    TransformerAttribution,
    AttCAT,
    LeGrad,
    CDAM,
    Rollout,
    RawAttention,
    GradCAM,
    LRP,
    PartialLRP,
    ConservativeLRP,
    InputXGradient,
    IntegratedGradients,
    SmoothGrad,
)
REGISTRY: dict[str, type[Method]] = {method.name: method for method in _TABLE}

__all__ = [
    "CDAM",
    "GMAR",
    "IBA",
    "LRP",
    "REGISTRY",
    "AttCAT",
    "CaptumMethod",
    "ChainMethod",
    "ConservativeLRP",
    "GradCAM",
    "InputXGradient",
    "IntegratedGradients",
    "LeGrad",
    "Method",
    "MethodChoice",
    "MethodInfo",
    "Option",
    "PartialLRP",
    "RawAttention",
    "Rollout",
    "SeveralMethods",
    "SmoothGrad",
    "TokenTM",
    "TransformerAttribution",
    "TransformerMM",
    "build_methods",
    "list_methods",
    "method_from_text",
    "methods_from_texts",
    "own_methods",
]


@dataclass(frozen=True)
class MethodInfo:
    """One row of the list of methods: name, title, paper, cost, options, whether all rows can be asked for, resolution."""

    name: str
    title: str
    paper: str
    cost: str
    options: tuple[Option, ...]
    class_specific: bool
    all_rows: bool
    resolution: str


def list_methods() -> tuple[MethodInfo, ...]:
    """What methods there are, with their paper, cost and options."""
    return tuple(
        MethodInfo(kind.name, kind.title, kind.paper, kind.cost, kind.options(), kind.uses_target, kind.is_chain, kind.resolution)
        for kind in REGISTRY.values()
    )


def own_methods() -> list[str]:
    """Names of the methods that this library computes itself: all but the adapters, which need an extra and many passes."""
    return [name for name, kind in REGISTRY.items() if not issubclass(kind, CaptumMethod)]


class _Collection(Protocol):
    """A list, tuple, set or view of names and methods; no text, though it has letters: only text can be asked for in one."""

    def __contains__(self, item: object, /) -> bool: ...
    def __iter__(self) -> Iterator[str | Method]: ...


SeveralMethods = _Collection | Iterator[str | Method] | Mapping[str, str | Method]
MethodChoice = str | Method | SeveralMethods


def build_methods(method: MethodChoice, options: Mapping[str, Any]) -> dict[str, Method]:
    """Methods by label, from names or instances; each option goes to every named method that has it.

    A label is the method's name, or the key in a mapping, which can hold one method several times with different options.

    Raises:
        UnknownNameError: no method, or no method asked for, has that name or option.
        InputError: an option's value does not fit, a method is asked for twice, or none is.
    """
    kinds = _labelled(method)
    taken = {kind.name: {o.name for o in kind.options()} for kind in kinds.values() if not isinstance(kind, Method)}
    for name in options:
        if not any(name in known for known in taken.values()):
            names = ", ".join(kind.name for kind in kinds.values())
            raise unknown_name(f"option of {names}", name, set().union(*taken.values()))
    return {
        label: kind
        if isinstance(kind, Method)
        else kind(**{name: value for name, value in options.items() if name in taken[kind.name]})
        for label, kind in kinds.items()
    }


def method_from_text(text: str) -> Method:
    """The method that ``NAME`` or ``NAME:OPTION=VALUE,…`` asks for, such as ``"gmar:norm=l2"``.

    Raises:
        UnknownNameError: no method has that name or option.
        InputError: another form, or a value that does not fit.
    """
    return from_text(text, _lookup)


def methods_from_texts(methods: MethodChoice) -> dict[str, Method]:
    """Methods by label like ``build_methods``, where a text can also be ``NAME:OPTION=VALUE,…``, which is then the label.

    Raises:
        UnknownNameError, InputError: as ``build_methods`` and ``method_from_text``.
    """
    if isinstance(methods, Mapping):
        pairs = list(methods.items())
    else:
        asked = [methods] if isinstance(methods, str | Method) else list(methods)
        pairs = [(item.name if isinstance(item, Method) else str(item).strip(), item) for item in asked]
    built = {label: method_from_text(item) if isinstance(item, str) else item for label, item in pairs}
    if len(built) < len(pairs):
        raise InputError(f"method: expected each method once, received {', '.join(str(label) for label, _ in pairs)}")
    return build_methods(built, {})


def _labelled(method: MethodChoice) -> dict[str, Method | type[Method]]:
    if isinstance(method, Mapping):
        odd = next((label for label in method if not isinstance(label, str)), None)
        if odd is not None:
            raise InputError(f"method: expected labels that are text, received {odd!r}")
        kinds = {label: item if isinstance(item, Method) else _lookup(item) for label, item in method.items()}
    else:
        asked = [method] if isinstance(method, str | Method) else list(method)
        listed = [item if isinstance(item, Method) else _lookup(item) for item in asked]
        names = [kind.name for kind in listed]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise InputError(
                f"method: expected each method once, received {', '.join(twice)} more than once; a mapping of labels to methods "
                "can hold one with several options"
            )
        kinds = dict(zip(names, listed, strict=True))
    if not kinds:
        raise InputError("method: expected at least one method, received none")
    return kinds


def _lookup(name: str) -> type[Method]:
    if not isinstance(name, str):
        raise InputError(f"method: expected a name or a Method, received {type(name).__name__}")
    if name not in REGISTRY:
        raise unknown_name("method", name, REGISTRY)
    return REGISTRY[name]


class _CallableModule(ModuleType):
    """Lets ``vitexplain.methods`` be both this package and the function that lists the methods."""

    def __call__(self) -> tuple[MethodInfo, ...]:
        return list_methods()


sys.modules[__name__].__class__ = _CallableModule
