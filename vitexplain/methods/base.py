"""What a method is: options as dataclass fields, what it taps, and its update rule."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..errors import InputError, UnsupportedModelError
from ..models import Anatomy
from ..options import HasOptions, option
from ..relevance import Rows, Trace, Update, follow
from ..relevance_tap import AttentionRelevance
from ..tap import BlockTrace
from ..targets import Target


def precision_option() -> Any:
    """The element type of a relevance pass whose rules divide by sums that can cancel."""
    return option(
        "auto",
        "of the relevance pass; auto is float64 on a CPU, float32 for the kernels on a GPU",
        choices=("auto", "float32", "float64"),
    )


@dataclass(frozen=True, kw_only=True)
class Method(HasOptions):
    """Base of all methods. Walks over blocks from the last to the first; the state is whatever ``start`` returns.

    Class attributes:
        name: how it is asked for.
        title, paper, cost: for listings.
        uses_gradient: needs a backward over the model.
        uses_target: the map depends on the class.
        uses_input_gradient: needs the gradient of each block's input.
        uses_attention_input_gradient: needs the gradient of what the last block's attention is called with.
        uses_reads: needs the rows that the head reads of each block.
        reads_head_rows: of the last block's attention it reads the rows alone that the head reads, so that others need not be.
        is_chain: the map is one row of a product of update maps, so that all rows can be asked for.
        rules: the table of ``rules.TABLES`` under which relevance is sent back; None for methods without a relevance pass.
        to_inputs: relevance is sent below block 0, and the map is what arrives there.
        resolution: ``"tokens"``, one value a token, or ``"pixels"``, one a pixel of the image.
    """

    title: ClassVar[str]
    paper: ClassVar[str]
    cost: ClassVar[str]
    uses_gradient: ClassVar[bool] = False
    uses_target: ClassVar[bool] = False
    uses_input_gradient: ClassVar[bool] = False
    uses_attention_input_gradient: ClassVar[bool] = False
    uses_reads: ClassVar[bool] = False
    reads_head_rows: ClassVar[bool] = False
    is_chain: ClassVar[bool] = False
    rules: ClassVar[str | None] = None
    to_inputs: ClassVar[bool] = False
    resolution: ClassVar[str] = "tokens"

    @property
    def uses_branches(self) -> bool:
        """Whether it observes y and f, so that residual branches must be readable apart."""
        return False

    @property
    def observes(self) -> bool:
        """Whether ``observe`` computes something while a block runs."""
        return False

    @property
    def explained_score(self) -> str:
        """The scalar whose gradient is taken: ``"logit"`` or ``"probability"``."""
        return getattr(self, "score", "logit")

    @property
    def needs_class(self) -> bool:
        """Whether a class's probability is read, which no other score has."""
        return self.explained_score == "probability"

    def relevance_dtype(self, backend: str) -> torch.dtype:
        """Of the relevance pass, where ``rules``; ``backend`` is the kernels', ``"triton"`` or ``"torch"``."""
        precision = getattr(self, "precision", "float32")
        if precision == "auto":
            precision = "float32" if backend == "triton" else "float64"
        return getattr(torch, precision)

    def check(self, anatomy: Anatomy) -> None:
        """Raise ``UnsupportedModelError`` where this method cannot explain the model."""
        if self.uses_branches:
            for index, block in enumerate(anatomy.blocks):
                if block.branches is None:
                    raise UnsupportedModelError(f"method {self.name!r} cannot explain block {index}: {block.inseparable}")
        if anatomy.is_text and self.resolution == "pixels":
            raise UnsupportedModelError(f"method {self.name!r} explains pixels: expected a model of images, received one of text")
        start = getattr(self, "start_block", 0)
        if start >= len(anatomy.blocks):
            raise InputError(
                f"option 'start_block' of {self.name}: expected less than {len(anatomy.blocks)} (blocks), received {start}"
            )

    def first_block(self, num_blocks: int) -> int:  # noqa: ARG002
        """The earliest block whose attention is looked at."""
        return getattr(self, "start_block", 0)

    def grows(self, num_blocks: int) -> bool:
        """Whether the map is built up block by block, so that there is one after each: not from the last block or input alone."""
        alone = self.first_block(num_blocks) == num_blocks - 1 and num_blocks > 1
        return self.resolution == "tokens" and not self.to_inputs and not alone

    def observe(self, block: BlockTrace) -> Any:  # noqa: ARG002
        """Computed while a block runs, without gradient; found again in ``block.observed[self]``."""
        return None

    def start(self, trace: Trace, target: Target) -> Any:  # noqa: ARG002
        """State before the last block, here the rows to follow."""
        return Rows(trace.start_rows, trace.support)

    def step(self, state: Any, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Any:  # noqa: ARG002
        """State after a block's attention; ``grad_out`` (B, H, n, dv) where ``uses_gradient``."""
        return state

    def input_step(self, state: Any, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> Any:  # noqa: ARG002
        """State after the gradient of a block's input is known, where ``uses_input_gradient``; both tensors (B, n, d)."""
        return state

    def attention_input_step(self, state: Any, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> Any:  # noqa: ARG002
        """The same of what the last block's attention is called with, where ``uses_attention_input_gradient``; (B, n, d)."""
        return state

    def relevance_step(self, state: Any, trace: Trace, attention: AttentionRelevance, grad_out: Tensor | None) -> Any:  # noqa: ARG002
        """State after relevance has reached a block's attention; ``grad_out`` (B, H, n, dv) where ``uses_gradient``."""
        return state

    def finish_at_inputs(self, inputs: Tensor, relevance: Tensor) -> Tensor:
        """Values (B, 1, h, w) or (B, 1, n), where ``to_inputs``, of what relevance arrives at: pixels (B, c, h, w) or tokens."""
        raise NotImplementedError(f"{self.name} sets to_inputs and must say what its values are")

    def finish(self, state: Any, trace: Trace) -> Tensor:  # noqa: ARG002
        """(B, R, n) values of all tokens: R rows for chain methods, one for the others."""
        return state.values


@dataclass(frozen=True, kw_only=True)
class ChainMethod(Method):
    """A method whose map is one row of a product of update maps: it says what the map of a block is."""

    is_chain: ClassVar[bool] = True
    reads_head_rows: ClassVar[bool] = True

    @abstractmethod
    def update(self, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Update:
        """The block's update map; ``grad_out`` (B, H, n, dv) where ``uses_gradient``."""

    def step(self, state: Rows, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Rows:
        return follow(state, block, self.update(trace, block, grad_out), grad_out)
