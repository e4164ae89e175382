"""Attention rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..options import option
from ..relevance import Trace, Update
from ..tap import BlockTrace
from .base import ChainMethod


@dataclass(frozen=True, kw_only=True)
class Rollout(ChainMethod):
    """The class row of Π_l ½(mean_h P_h + I); the same for every class."""

    name: ClassVar[str] = "rollout"
    title: ClassVar[str] = "Attention rollout"
    paper: ClassVar[str] = "Quantifying Attention Flow in Transformers (ACL 2020)"
    cost: ClassVar[str] = "forward + half an attention forward per block"

    start_block: int = option(0, "first block of the product", minimum=0)

    def update(self, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Update:  # noqa: ARG002
        return Update(factor=0.5, residual=0.5)
