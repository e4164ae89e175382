"""A forward whose backward carries relevance: the model runs under the rules of ``rules``, its attention in tiles."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedModelError
from .interception import SdpaMode
from .kernels import relevance_backward
from .models import Anatomy, BlockAnatomy
from .rules import RuleMode, divide
from .tap import BlockTrace, Request, Running, Tap, run_attention
from .value_checks import unseen


@dataclass
class AttentionRelevance:
    """One attention on the way back.

    Attributes:
        block: as it ran; query, key and value are float32 or float64.
        ratio: (B, H, m, dv), R_O ⊘ O of the first m query rows, outside which no relevance arrives.
        wanted: whether relevance of query, key and value is wanted.
        relevances: of query (first m rows), key and value, where a listener made them on its way.
    """

    block: BlockTrace
    ratio: Tensor
    wanted: bool
    relevances: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def num_rows(self) -> int:
        """m."""
        return self.ratio.shape[2]

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first positional arguments of the relevance operations."""
        block, m = self.block, self.num_rows
        return block.query[:, :, :m], block.key, block.value, self.ratio, block.logsumexp[:, :, :m]

    def keywords(self) -> dict[str, Any]:
        """Their other arguments."""
        return {"scale": self.block.scale, "mask": self.block.mask_of_rows(self.num_rows), "backend": self.block.backend}


class RelevanceListener(Protocol):
    """Told of relevance while it flows back, from the last block to the first."""

    def attention_relevance(self, attention: AttentionRelevance) -> None: ...


class RelevantAttention(torch.autograd.Function):
    """Fused attention whose backward takes relevance of its output to query, key and value, and reports it."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        anchor: Tensor | None,  # noqa: ARG004
        tap: RelevanceTap,
        block: BlockTrace,
    ) -> Tensor:
        out, _ = run_attention(query, key, value, block)
        ctx.save_for_backward(out)
        ctx.tap, ctx.block = tap, block
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        (out,) = ctx.saved_tensors
        tap, block = ctx.tap, ctx.block
        rows = tap.rows_read_of(block)
        attention = AttentionRelevance(block, divide(relevance, out)[:, :, :rows], any(ctx.needs_input_grad[:3]))
        if tap.relevance_listener is not None and block.index < len(tap.blocks):
            tap.relevance_listener.attention_relevance(attention)
        grad_anchor = torch.zeros_like(tap.anchor) if ctx.needs_input_grad[3] else None
        if not attention.wanted:
            return None, None, None, grad_anchor, None, None
        if attention.relevances is None:
            of_query, of_key, of_value, _ = relevance_backward(*attention.arguments(), **attention.keywords())
            attention.relevances = of_query, of_key, of_value
        of_query, of_key, of_value = attention.relevances
        if of_query.shape != block.query.shape:
            of_query = F.pad(of_query, (0, 0, 0, block.query.shape[2] - of_query.shape[2]))
        return of_query, of_key, of_value, grad_anchor, None, None


class RelevanceTap(Tap):
    """A model prepared for one relevance pass; use as a context manager.

    Args:
        anatomy: of the model.
        rules: a table of ``rules.TABLES``.
        first_block: relevance stops below this block's attention.
        to_inputs: relevance goes on below block 0: to the images' pixels, or, for conservative rules, to its input tokens.
        backend: for kernels.
        dtype: float32 or float64, of the whole pass.
        checkpoint: blocks keep their input alone, and are run again when relevance reaches them.
    """

    def __init__(
        self,
        anatomy: Anatomy,
        rules: str,
        *,
        first_block: int = 0,
        to_inputs: bool = False,
        backend: str = "auto",
        dtype: torch.dtype = torch.float32,
        checkpoint: bool = False,
    ) -> None:
        self.rules, self.backend = rules, backend
        model_dtype = next(anatomy.model.parameters()).dtype
        self.dtype = torch.float64 if torch.float64 in (dtype, model_dtype) else dtype
        self.conservative = rules == "conservative"
        super().__init__(
            anatomy,
            Request(first_block=first_block, gradient=True, input_gradient=to_inputs and self.conservative, head_rows=True),
            backend,
            Running(checkpoint=checkpoint),
        )
        self.mode = RuleMode(rules, self._attention, self.dtype)
        self.to_pixels = to_inputs and not self.conservative
        self.relevance_listener: RelevanceListener | None = None

    def __enter__(self) -> RelevanceTap:
        device = next(self.anatomy.model.parameters()).device.type
        self._stack.enter_context(torch.autocast(device, enabled=False))  # for the way back, too
        super().__enter__()
        return self

    def forward(self, inputs: Any) -> Tensor:
        """Run the model; the gradient of the result is relevance. Narrower inputs are widened."""
        given = inputs
        if isinstance(inputs, Tensor):
            inputs = inputs.detach().to(self.dtype)
        if self.to_pixels:
            inputs = inputs.clone().requires_grad_()
        output = super().forward(inputs)
        if self.mode.changed_in_place:
            self._expect_the_same(output, lambda: self.anatomy.run(given))
        if self.to_pixels:
            self.leaves = [inputs]
        return output

    def _check_again(self, run: Callable[[torch.dtype], Any], out: Tensor) -> None:
        if self.mode.changed_in_place:
            self._expect_the_same(out, lambda: run(next(self.anatomy.model.parameters()).dtype))

    def _expect_the_same(self, output: Tensor, run: Callable[[], Any]) -> None:
        """Rules compute a new tensor for ``x += y``; a model that says ``x.add_(y)`` and goes on with x would lose y."""
        if unseen(output.device):
            return
        with torch.no_grad():
            plain = run()
        plain = plain[0] if isinstance(plain, tuple) else plain
        if float((output.detach() - plain).abs().max()) > 0.02 * float(plain.abs().max()):
            raise UnsupportedModelError(
                "layer-wise relevance propagation: expected a model that computes new tensors, received one that changes one "
                "in place and goes on with it"
            )

    def _mode(self) -> SdpaMode:
        convolved = self.mode.convolved  # by the forward, where this is a block that is run again
        self.mode = RuleMode(self.rules, self._attention, self.dtype)
        self.mode.convolved = convolved
        return self.mode

    def _pool(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor | None:
        super()._pool(query, key, value, scale)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        if self.conservative:
            return F.scaled_dot_product_attention(query.detach(), key.detach(), value, scale=scale)
        module = self.anatomy.attention_pool
        assert module is not None, "only its call comes here"
        pool = BlockTrace(len(self.blocks), BlockAnatomy(module, module), False, self.backend)
        pool.scale = scale
        return RelevantAttention.apply(query, key, value, self.anchor, self, pool)

    def _tapped(self, query: Tensor, key: Tensor, value: Tensor, block: BlockTrace) -> Tensor:
        if self.conservative:  # the map is a constant: a gradient reaches values alone
            return super()._tapped(query.detach(), key.detach(), value, block)
        return RelevantAttention.apply(query, key, value, self.anchor, self, block)
