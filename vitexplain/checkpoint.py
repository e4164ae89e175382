"""Activation checkpointing: a block keeps its input alone, and is run again when the gradient reaches it.

``torch.utils.checkpoint`` would run the block again out of the tap's sight: its hooks are gone by then, and on a GPU the backward
works in another thread, where neither the interception of attention nor autocast is in place.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class Call(Protocol):
    """One call of a block, which can be made again."""

    def first(self, tokens: Tensor) -> Tensor:
        """The block's output (B, n, d) for tokens (B, n, d)."""

    def again(self, tokens: Tensor) -> Tensor:
        """The same once more."""

    def release(self) -> None:
        """Its gradient has been taken."""


class Checkpointed(torch.autograd.Function):
    """A block without a graph; its gradient by running it again with one.

    ``anchor`` is a scalar that requires a gradient, so that the backward runs, too, where the tokens require none.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, anchor: Tensor, call: Call) -> Tensor:
        ctx.save_for_backward(tokens)
        ctx.anchor, ctx.call = anchor, call
        return call.first(tokens)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (tokens,) = ctx.saved_tensors
        with torch.enable_grad():
            tokens = tokens.detach().requires_grad_(ctx.needs_input_grad[0])
            out = ctx.call.again(tokens)
            leaves = [ctx.anchor, tokens] if tokens.requires_grad else [ctx.anchor]
            grad_anchor, *grad_tokens = torch.autograd.grad(out, leaves, grad_out)
        ctx.call.release()
        return grad_tokens[0] if grad_tokens else None, grad_anchor, None
