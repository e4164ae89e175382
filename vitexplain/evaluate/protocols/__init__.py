"""The protocols, one short file each, and their table."""

from __future__ import annotations

from collections.abc import Iterable

from ...errors import InputError, unknown_name
from ...options import from_text
from .ablation import Ablation
from .average_drop import AverageDrop
from .base import CurveOf, Metric, Protocol
from .insertion_deletion import InsertionDeletion
from .localisation import Localisation
from .perturbation import Perturbation
from .quantus import Quantus
from .saco import SaCo

_TABLE: tuple[type[Protocol], ...] = (Perturbation, InsertionDeletion, AverageDrop, Localisation, SaCo, Ablation, Quantus)
PROTOCOLS: dict[str, type[Protocol]] = {protocol.name: protocol for protocol in _TABLE}

__all__ = [
    "PROTOCOLS",
    "Ablation",
    "AverageDrop",
    "CurveOf",
    "InsertionDeletion",
    "Localisation",
    "Metric",
    "Perturbation",
    "Protocol",
    "Quantus",
    "SaCo",
    "build_protocols",
]


def build_protocols(asked: Iterable[str | Protocol]) -> dict[str, Protocol]:
    """Protocols by label, from ``NAME``, ``NAME:OPTION=VALUE,…`` or instances; the label is that text, or the name.

    Raises:
        UnknownNameError: no protocol has that name or option.
        InputError: a value that does not fit, one asked for twice, or none.
    """
    found: dict[str, Protocol] = {}
    for item in asked:
        label = item.name if isinstance(item, Protocol) else str(item)
        if label in found:
            raise InputError(f"protocol: expected each protocol once, received {label!r} twice")
        found[label] = item if isinstance(item, Protocol) else from_text(item, _lookup)
    if not found:
        raise InputError(f"protocol: expected at least one of {', '.join(PROTOCOLS)}, received none")
    return found


def _lookup(name: str) -> type[Protocol]:
    if name not in PROTOCOLS:
        raise unknown_name("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]
