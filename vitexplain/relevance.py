"""The relevance pass: methods walk over the blocks from the last to the first, beside a backward or without one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from .kernels import (
    attention_backward,
    contribution_map,
    head_norms,
    relevance_backward,
    relevance_rows,
    row_propagation,
    row_propagation_by_head,
)
from .kernels.attention_backward.choose import one_pass_is_faster
from .kernels.dispatch import accumulation_dtype
from .models import Anatomy
from .relevance_tap import AttentionRelevance, RelevanceTap
from .rules import RuleMode
from .tap import BlockTrace, Tap
from .targets import Target


@dataclass(frozen=True)
class Trace:
    """One forward as methods see it.

    Attributes:
        anatomy: of the model.
        blocks: what each block left behind, first to last.
        start_rows: (B, R, n), the rows of the product that are followed: the head's pooling weights (R = 1), or the
            identity (R = n) where all rows were asked for.
        support: number of leading tokens outside which ``start_rows`` is zero.
    """

    anatomy: Anatomy
    blocks: Sequence[BlockTrace]
    start_rows: Tensor
    support: int

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the model."""
        return len(self.blocks)


@dataclass(frozen=True)
class Rows:
    """Running rows r of a chain of update maps: ``values`` (B, R, n), zero beyond the first ``support`` tokens."""

    values: Tensor
    support: int

    def dense(self, values: Tensor) -> Rows:
        """New values, any of which may be non-zero."""
        return Rows(values, values.shape[-1])

    def scaled(self, factors: Tensor) -> Rows:
        """Token j times ``factors`` (B, n) [j]."""
        return Rows(self.values * factors.unsqueeze(1), self.support)


@dataclass(frozen=True)
class Update:
    """One block's update map

        U = diag(row_factors) · (residual · I + factor · Σ_h w_h φ(P_h, G_h) diag(c_h))

    Attributes:
        phi: φ, a name that ``kernels.row_propagation`` knows.
        factor, residual: weights of the head average and of the identity.
        norm: w_h ∝ the ``"l1"`` or ``"l2"`` norm of G_h, with Σ_h w_h = 1; the plain mean where None.
        token_weights: c, (B, H, n).
        row_factors: (B, n), what the block's MLP does to the rows of the map.
    """

    phi: str = "p"
    factor: float = 1.0
    residual: float = 1.0
    norm: str | None = None
    token_weights: Tensor | None = None
    row_factors: Tensor | None = None


def uniform_rows(block: BlockTrace) -> Rows:
    """The row that takes the mean over a block's tokens, padding left out."""
    batch, _, n, _ = block.key.shape
    dtype, device = accumulation_dtype(block.key.dtype), block.key.device
    if block.valid_tokens is None:
        return Rows(torch.full((batch, 1, n), 1 / n, dtype=dtype, device=device), n)
    valid = block.valid_tokens.to(dtype)
    return Rows((valid / valid.sum(-1, keepdim=True)).unsqueeze(1), n)


def propagate(
    rows: Rows,
    block: BlockTrace,
    *,
    phi: str = "p",
    factor: float = 1.0,
    residual: float = 0.0,
    grad_out: Tensor | None = None,
    head_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
) -> Tensor:
    """residual · r + factor · Σ_h w_h c_h ⊙ Σ_i r_i φ(P_h, G_h)[i, ·] of one block; only rows that carry weight are computed.

    Args:
        rows: the running rows, (B, R, n).
        block: a traced block.
        phi: φ, a name that ``kernels.row_propagation`` knows.
        factor, residual: weights of the head average and of the rows themselves.
        grad_out: (B, H, n, dv) or at least its first ``rows.support`` rows; needed where φ reads G.
        head_weights: (B, H), the plain mean where None.
        token_weights: (B, H, n).

    Returns:
        (B, R, n).
    """
    if grad_out is not None and _one_pass(rows, block):
        moved, _ = _row_beside_backward(rows, block, grad_out, phi, norms=False)
        return residual * rows.values + factor * _head_average(moved, head_weights, token_weights)
    m = rows.support
    return row_propagation(
        block.query[:, :, :m],
        block.key,
        block.logsumexp[:, :, :m],
        rows.values[:, :, :m],
        phi=phi,
        scale=block.scale,
        value=block.value if grad_out is not None else None,
        grad_out=grad_out[:, :, :m] if grad_out is not None else None,
        head_weights=head_weights,
        token_weights=token_weights,
        mask=block.mask_of_rows(m),
        factor=factor,
        residual=residual,
        backend=block.backend,
    )


def follow(rows: Rows, block: BlockTrace, update: Update, grad_out: Tensor | None) -> Rows:
    """r U: the running rows one block further down."""
    if update.row_factors is not None:
        rows = rows.scaled(update.row_factors)
    if update.norm == "l1" and rows.values.shape[1] == 1:
        moved, norms = _rows_and_norms(rows, block, update.phi, _needed(grad_out))
        average = _head_average(moved, _shares(norms), update.token_weights)
        return rows.dense(update.residual * rows.values + update.factor * average)
    values = propagate(
        rows,
        block,
        phi=update.phi,
        factor=update.factor,
        residual=update.residual,
        grad_out=None if update.phi == "p" else grad_out,
        head_weights=_norm_weights(block, update, grad_out, rows.support),
        token_weights=update.token_weights,
    )
    return rows.dense(values)


def compose(contribution: Tensor, block: BlockTrace, update: Update, grad_out: Tensor | None) -> Tensor:
    """U C: the whole contribution map (B, n, n) one block further up, in one launch."""
    needs_gradient = update.phi != "p"
    return contribution_map(
        block.query,
        block.key,
        block.logsumexp,
        contribution,
        phi=update.phi,
        scale=block.scale,
        value=block.value if needs_gradient else None,
        grad_out=grad_out if needs_gradient else None,
        head_weights=_norm_weights(block, update, grad_out, contribution.shape[1]),
        token_weights=update.token_weights,
        row_factors=update.row_factors,
        mask=block.mask,
        factor=update.factor,
        residual=update.residual,
        backend=block.backend,
    )


def _norm_weights(block: BlockTrace, update: Update, grad_out: Tensor | None, support: int) -> Tensor | None:
    if update.norm is None:
        return None
    assert grad_out is not None, "norms are of the gradient"
    return _shares(head_norms(block.value, _needed(grad_out)[:, :, :support], norm=update.norm, backend=block.backend))


def _needed(grad_out: Tensor | None) -> Tensor:
    assert grad_out is not None, "methods that weigh by its norm use the gradient"
    return grad_out


def _shares(norms: Tensor) -> Tensor:
    """(B, H), each image's divided by their sum."""
    return norms / norms.sum(-1, keepdim=True).clamp_min(torch.finfo(norms.dtype).tiny)


def _head_average(moved: Tensor, head_weights: Tensor | None, token_weights: Tensor | None) -> Tensor:
    """Every head's row (B, H, n) to their weighted average (B, 1, n)."""
    if token_weights is not None:
        moved = moved * token_weights
    if head_weights is None:
        return moved.mean(1, keepdim=True)
    return head_weights.to(moved.dtype).unsqueeze(1) @ moved


def _rows_and_norms(rows: Rows, block: BlockTrace, phi: str, grad_out: Tensor) -> tuple[Tensor, Tensor]:
    """Every head's row and the L1 norm of its gradient, in one pass."""
    if _one_pass(rows, block):
        return _row_beside_backward(rows, block, grad_out, phi, norms=True)
    m = rows.support
    return row_propagation_by_head(
        block.query[:, :, :m],
        block.key,
        block.logsumexp[:, :, :m],
        rows.values[:, 0, :m],
        phi=phi,
        scale=block.scale,
        value=block.value,
        grad_out=grad_out[:, :, :m],
        mask=block.mask_of_rows(m),
        norms=True,
        backend=block.backend,
    )


def _one_pass(rows: Rows, block: BlockTrace) -> bool:
    """Whether this row step is to be made together with the attention's backward, which is still to come."""
    if not block.wants_gradients or block.gradients is not None:
        return False
    num_tokens = rows.values.shape[-1]
    whole = rows.values.shape[1] == 1 and rows.support == num_tokens
    return whole and one_pass_is_faster(block.query, num_tokens)


def _row_beside_backward(rows: Rows, block: BlockTrace, grad_out: Tensor, phi: str, *, norms: bool) -> tuple[Tensor, Tensor]:
    """Every head's row and L1 norm, with the attention's gradients left in ``block.gradients``."""
    assert block.out is not None, "there while the gradient of the attention's inputs is to come"
    *gradients, moved, sums = attention_backward(
        block.query,
        block.key,
        block.value,
        block.out,
        grad_out,
        block.logsumexp,
        rows.values[:, 0],
        phi=phi,
        scale=block.scale,
        mask=block.mask,
        norms=norms,
        backend=block.backend,
    )
    block.gradients = tuple(gradients)
    return moved, sums


class WalkingMethod(Protocol):
    """What the pass asks of a method: a state, stepped from the last block to the first, and what values the last one gives."""

    name: ClassVar[str]

    def start(self, trace: Trace, target: Target) -> Any:
        """State before the last block."""

    def step(self, state: Any, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Any:
        """State after a block's attention; ``grad_out`` (B, H, n, dv), None in a walk without gradient."""

    def input_step(self, state: Any, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> Any:
        """State after the gradient of a block's input is known, both (B, n, d)."""

    def attention_input_step(self, state: Any, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> Any:
        """State after the gradient of what the last block's attention is called with is known, both (B, n, d)."""

    def finish(self, state: Any, trace: Trace) -> Tensor:
        """(B, R, n) values of all tokens."""
        ...

    def first_block(self, num_blocks: int) -> int:
        """The earliest block whose attention is looked at."""
        ...


M = TypeVar("M", bound=WalkingMethod)


class WalkingChain(WalkingMethod, Protocol):
    """A method whose map is a row of a product of update maps."""

    def update(self, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Update:
        """The block's update map; ``grad_out`` as of ``step``."""
        ...


class _Walk(Generic[M]):
    """States of methods on their way from the last block to the first.

    ``by_block``: what each method's map would be is kept as the walk leaves a block.
    """

    def __init__(self, trace: Trace, methods: Sequence[M], target: Target, *, by_block: bool = False) -> None:
        self.trace, self.methods, self.by_block = trace, methods, by_block
        self.states = [method.start(trace, target) for method in methods]
        self.first = [method.first_block(trace.num_blocks) for method in methods]
        self._left: list[list[Tensor]] = []  # last block first

    def reach(self, block: BlockTrace) -> None:
        """Called before anything else happens in a block: only now is the one above it done, its input's gradient included."""
        if self.by_block and not block.is_last:
            # copies: a method may give its state itself, and change that in place in the blocks to come
            self._left.append([values.clone() for values in self._finished()])

    def values(self) -> list[Tensor]:
        """(B, R, n) values for each method; by block (B, L, n), entry l those of the blocks l to L − 1."""
        if not self.by_block:
            return self._finished()
        left = [*self._left, self._finished()]
        below = [left[-1]] * (self.trace.num_blocks - len(left))  # blocks that no method looks at
        return [torch.cat(values, 1) for values in zip(*reversed([*left, *below]), strict=True)]

    def _finished(self) -> list[Tensor]:
        return [method.finish(state, self.trace) for method, state in zip(self.methods, self.states, strict=True)]


class _BackwardWalk(_Walk[WalkingMethod]):
    """Listens to one backward and steps every method."""

    def __init__(
        self,
        trace: Trace,
        methods: Sequence[WalkingMethod],
        target: Target,
        recorded: dict[int, Tensor] | None,
        *,
        by_block: bool,
    ) -> None:
        super().__init__(trace, methods, target, by_block=by_block)
        self.recorded = recorded

    def attention_gradient(self, block: BlockTrace, grad_out: Tensor) -> None:
        self.reach(block)
        if self.recorded is not None:
            self.recorded[block.index] = grad_out
        for i, method in enumerate(self.methods):
            if block.index >= self.first[i]:
                self.states[i] = method.step(self.states[i], self.trace, block, grad_out)

    def input_gradient(self, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> None:
        for i, method in enumerate(self.methods):
            if block.index >= self.first[i]:
                self.states[i] = method.input_step(self.states[i], block, tokens, grad_tokens)

    def attention_input_gradient(self, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> None:
        for i, method in enumerate(self.methods):
            self.states[i] = method.attention_input_step(self.states[i], block, tokens, grad_tokens)


def walk_with_gradient(
    tap: Tap,
    trace: Trace,
    methods: Sequence[WalkingMethod],
    scalars: Tensor,
    target: Target,
    *,
    last: bool,
    recorded: dict[int, Tensor] | None = None,
    by_block: bool = False,
) -> list[Tensor]:
    """One backward over the model, beside which every method walks from the last block to the first.

    Args:
        tap: of the model whose forward ``trace`` is; its leaves end the backward.
        trace: that forward.
        methods: those that walk.
        scalars: (B,), what is explained of each image.
        target: of which ``scalars`` are the values.
        last: no further backward over this forward will follow, so that its graph can go.
        recorded: takes the gradient (B, H, n, dv) of every tapped block's attention output, by the block's index: linear in the
            number of tokens.
        by_block: keep the values at every block.

    Returns:
        (B, R, n) for each method; by block (B, L, n), entry l as they stand when block l has been walked.
    """
    listener = _BackwardWalk(trace, methods, target, recorded, by_block=by_block)
    tap.listener = listener
    try:
        torch.autograd.grad(scalars.sum(), tap.leaves, retain_graph=not last)
    finally:
        tap.listener = None
    return listener.values()


def walk_without_gradient(trace: Trace, method: WalkingMethod, target: Target, *, by_block: bool = False) -> Tensor:
    """The same walk for a method that needs no backward over the model."""
    walk = _Walk(trace, [method], target, by_block=by_block)
    for block in reversed(trace.blocks[walk.first[0] :]):
        walk.reach(block)
        walk.states[0] = method.step(walk.states[0], trace, block, None)
    return walk.values()[0]


def relevant_rows(rows: Rows, attention: AttentionRelevance, grad_out: Tensor | None) -> Tensor:
    """mean_h Σ_i r_i relu(G_h ⊙ R_h)[i, ·], R_h the relevance of the map; relu(R_h) where there is no gradient.

    The relevance of query, key and value, where it is still to come, is made in the same pass.

    Args:
        rows: one running row an image, (B, 1, n).
        attention: the attention that relevance has reached.
        grad_out: (B, H, n, dv) or at least its first rows.

    Returns:
        (B, 1, n).
    """
    m = attention.num_rows
    row = rows.values[:, 0, :m]
    grad_out = None if grad_out is None else grad_out[:, :, :m]
    if attention.wanted and attention.relevances is None:
        of_query, of_key, of_value, moved = relevance_backward(
            *attention.arguments(), rows=row, grad_out=grad_out, **attention.keywords()
        )
        attention.relevances = of_query, of_key, of_value
    else:
        moved = relevance_rows(*attention.arguments(), row, grad_out=grad_out, **attention.keywords())
    return moved.mean(1, keepdim=True)


def shares_of_score(outputs: Tensor, target: Target) -> Tensor:
    """One unit of relevance an image, shared among outputs (B, C) by what each adds to the scalar: gradient × output.

    A class's logit takes all of it. A margin's two logits take shares of opposite sign that add up to one: a start with their
    gradient, 1 and −1, would add up to nothing, and rules that keep the sum would hand nothing on.
    """
    gradient = _gradient_of_score(outputs, target)
    shares = gradient * outputs.detach()
    total = shares.sum(1, keepdim=True)
    return torch.where(total == 0, gradient, shares / total)


def _gradient_of_score(outputs: Tensor, target: Target) -> Tensor:
    """Of the scalar with respect to outputs (B, C), an embedding's norm taken for a constant as a layer's is."""
    with torch.enable_grad(), RuleMode("conservative", lambda *_, **__: None):
        leaf = outputs.detach().requires_grad_()
        (gradient,) = torch.autograd.grad(target.value(leaf).sum(), leaf)
    return gradient


class RelevanceMethod(WalkingMethod, Protocol):
    """A method that reads relevance on its way back through a model."""

    to_inputs: ClassVar[bool]

    def relevance_step(self, state: Any, trace: Trace, attention: AttentionRelevance, grad_out: Tensor | None) -> Any:
        """State after relevance has reached a block's attention; ``grad_out`` as of ``step``."""

    def finish_at_inputs(self, inputs: Tensor, relevance: Tensor) -> Tensor:
        """Values (B, 1, h, w) or (B, 1, n), where ``to_inputs``, of what arrives at pixels (B, c, h, w) or tokens."""
        ...


class _RelevanceWalk(_Walk[RelevanceMethod]):
    """Listens to one relevance pass and steps every method."""

    def __init__(
        self,
        trace: Trace,
        methods: Sequence[RelevanceMethod],
        target: Target,
        grad_out: dict[int, Tensor],
        *,
        by_block: bool,
    ) -> None:
        super().__init__(trace, methods, target, by_block=by_block)
        self.grad_out = grad_out

    def attention_relevance(self, attention: AttentionRelevance) -> None:
        self.reach(attention.block)
        index = attention.block.index
        for i, method in enumerate(self.methods):
            if index >= self.first[i]:
                self.states[i] = method.relevance_step(self.states[i], self.trace, attention, self.grad_out.get(index))


def walk_with_relevance(
    tap: RelevanceTap,
    trace: Trace,
    methods: Sequence[RelevanceMethod],
    outputs: Tensor,
    target: Target,
    grad_out: dict[int, Tensor],
    *,
    last: bool,
    by_block: bool = False,
) -> list[Tensor]:
    """One relevance pass over the model, beside which every method walks from the last block to the first.

    Args:
        tap: of the model whose forward, under its rules, ``trace`` is; its leaves end the pass.
        trace: that forward.
        methods: those that walk.
        outputs: (B, C), of that forward, where relevance starts.
        target: what is explained of the outputs.
        grad_out: gradients (B, H, n, dv) of attention outputs by the block's index, for the methods that need them.
        last: as of ``walk_with_gradient``.
        by_block: as of ``walk_with_gradient``.

    Returns:
        As of ``walk_with_gradient``; for a method that sends relevance to the inputs what it makes of what arrives there.
    """
    listener = _RelevanceWalk(trace, methods, target, grad_out, by_block=by_block)
    tap.relevance_listener = listener
    try:
        start = _gradient_of_score(outputs, target) if tap.conservative else shares_of_score(outputs, target)
        *_, relevance = torch.autograd.grad(outputs, tap.leaves, start, retain_graph=not last)
    finally:
        tap.relevance_listener = None
    return [
        method.finish_at_inputs(tap.leaves[-1].detach(), relevance) if method.to_inputs else values
        for method, values in zip(methods, listener.values(), strict=True)
    ]


def contribution_of_all_rows(trace: Trace, method: WalkingChain, grad_out: dict[int, Tensor]) -> Tensor:
    """The whole product C = U_L … U_1 C_0, (B, n, n): from the first block up, one launch a block."""
    contribution = trace.start_rows
    for block in trace.blocks[method.first_block(trace.num_blocks) :]:
        gradient = grad_out.get(block.index)
        contribution = compose(contribution, block, method.update(trace, block, gradient), gradient)
    return method.finish(Rows(contribution, contribution.shape[-1]), trace)


def start_rows(tap: Tap, num_tokens: int, batch: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    """The head's pooling weights as rows (B, 1, n), and the number of leading tokens that carry weight."""
    dtype = accumulation_dtype(dtype)
    anatomy = tap.anatomy
    if tap.pooling_attention is not None:
        weights = tap.pooling_attention.to(dtype)
        weights = torch.nn.functional.pad(weights, (anatomy.pooled_prefix, 0))
        return weights.unsqueeze(1), num_tokens
    weights = _on_device(tuple(anatomy.pooling(num_tokens)), dtype, device)
    return weights.expand(batch, 1, -1), anatomy.num_read_tokens or num_tokens


@cache  # kept for good: a captured graph reads it where it lies
def _on_device(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Copied from the host once: a copy would stop the device, and cannot be captured in a CUDA graph."""
    return torch.tensor(values, dtype=dtype, device=device)
