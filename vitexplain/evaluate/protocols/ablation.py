"""Ablation of TokenTM: its parts switched on one after the other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...methods import TokenTM
from .perturbation import Perturbation

WHOLE = "+ NECC (tokentm)"
VARIANTS: dict[str, TokenTM] = {
    "last block alone": TokenTM(aggregate=False, length=False, necc=False),
    "+ aggregate": TokenTM(length=False, necc=False),
    "+ length": TokenTM(necc=False),
    WHOLE: TokenTM(),
    "+ NECC × n": TokenTM(necc_scale="n"),
}


@dataclass(frozen=True, kw_only=True)
class Ablation(Perturbation):
    """The perturbation protocol on variants of ``tokentm``: the gradient-weighted map of the last block alone, then products over
    all blocks, norm ratios and the NECC; the last row is this library's extension, the NECC with a mean of 1."""

    name: ClassVar[str] = "ablation"
    title: ClassVar[str] = "perturbation of tokentm, its parts switched on one after the other"
    source: ClassVar[str] = "VTranM, Table 4"
