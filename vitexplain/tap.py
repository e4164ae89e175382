"""Reading a running model: blocks are tapped, and nothing is left behind.

While a ``Tap`` is open, every call of ``F.scaled_dot_product_attention`` inside a block goes through ``TappedAttention``:
the library's fused forward and backward, with query, key, value, logsumexp and the output's gradient handed out.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .checkpoint import Checkpointed
from .compiled import compiling, forward_replaced, reported, reporting, run_compiled
from .errors import UnsupportedModelError
from .fused_attention import AttentionState, attention_backward, attention_forward, leading_rows_backward
from .interception import SdpaMode, as_autocast, broadcast_mask, causal_mask
from .models import Anatomy, BlockAnatomy, ResidualBranches
from .value_checks import unseen


@dataclass
class BlockTrace:
    """What one block left behind; all tensors are detached.

    Attributes:
        index: position in the model, 0 for the first block.
        anatomy: the block's modules.
        is_last: whether it is the model's last block.
        backend: for kernels that work on this block.
        called: whether its attention was called.
        query, key, value: (B, H, n, dh), as they reached the attention; there from its call until ``forget_attention``.
        logsumexp: (B, H, n), for as long.
        scale: factor of the scores.
        mask: broadcastable to (B, H, n, n), boolean or added to the scores, where the model uses one.
        valid_tokens: (B, n) bool, False for padding, where the inputs have any.
        read_tokens: (B, m, d), leading rows of the block's input, kept where an observer asked.
        read_out: (B, H, m, dv), the same rows of the attention's output.
        out: (B, H, n, dv), the attention's output, while the gradient of its inputs is still to come.
        wants_gradients: whether that gradient is wanted, for all rows.
        gradients: of query, key and value, where a listener made them on its way; else the library's backward does.
        observed: what observers computed while the block ran, by observer.
        tokens, mid_tokens, mlp_out: x, y and f, (B, n, d), present only while observers run.
    """

    index: int
    anatomy: BlockAnatomy
    is_last: bool
    backend: str
    called: bool = False
    query: Tensor = field(init=False, repr=False)
    key: Tensor = field(init=False, repr=False)
    value: Tensor = field(init=False, repr=False)
    logsumexp: Tensor = field(init=False, repr=False)
    scale: float = 0.0
    mask: Tensor | None = None
    valid_tokens: Tensor | None = None
    read_tokens: Tensor | None = None
    read_out: Tensor | None = None
    out: Tensor | None = None
    wants_gradients: bool = False
    gradients: tuple[Tensor, ...] | None = None
    observed: dict[Any, Any] = field(default_factory=dict)
    tokens: Tensor | None = None
    mid_tokens: Tensor | None = None
    mlp_out: Tensor | None = None

    @property
    def branches(self) -> ResidualBranches:
        """The residual branches, where they can be read apart."""
        assert self.anatomy.branches is not None, "methods that need branches refuse blocks without"
        return self.anatomy.branches

    def mask_of_rows(self, num_rows: int) -> Tensor | None:
        """The mask of the first query rows."""
        if self.mask is None or self.mask.shape[-2] == 1:
            return self.mask
        return self.mask[..., :num_rows, :]

    def forget_attention(self) -> None:
        """Let go of what the attention was called with."""
        for name in ("query", "key", "value", "logsumexp"):
            vars(self).pop(name, None)
        self.mask = None


class Observer(Protocol):
    """Computes something of a block while its tensors are alive."""

    def observe(self, block: BlockTrace) -> Any: ...


@dataclass(frozen=True)
class Request:
    """What an explanation wants of a forward.

    Attributes:
        first_block: attention is intercepted from this block on; gradients stop below its attention.
        gradient: a backward will follow.
        input_gradient: the gradient of each block's input is wanted too, down to ``first_block``'s.
        keep_reads: keep the rows that the head reads of each block's input and attention output.
        attention_input_gradient: the gradient of what the last block's attention module is called with is wanted.
        head_rows: of the last block's attention nothing is wanted but the rows that the head reads.
        branches: observers want y and f, so that the residual branches must be readable apart.
        observers: run after each block.
    """

    first_block: int = 0
    gradient: bool = False
    input_gradient: bool = False
    attention_input_gradient: bool = False
    keep_reads: bool = False
    head_rows: bool = False
    branches: bool = False
    observers: tuple[Observer, ...] = ()


@dataclass(frozen=True)
class Running:
    """How a model's blocks are run while they are explained.

    Attributes:
        compile_mode: of ``torch.compile``, or None.
        checkpoint: blocks keep their input alone, and are run again when the gradient reaches them.
        keep_attention: also with ``checkpoint``, query, key and value of every block are kept until the end.
    """

    compile_mode: str | None = None
    checkpoint: bool = False
    keep_attention: bool = False


class GradientListener(Protocol):
    """Told of gradients while a backward runs, from the last block to the first."""

    def attention_gradient(self, block: BlockTrace, grad_out: Tensor) -> None:
        """``grad_out`` (B, H, n, dv): gradient of the explained scalar with respect to the attention's output."""

    def input_gradient(self, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> None:
        """``tokens`` and ``grad_tokens`` (B, n, d): the block's input and its gradient."""

    def attention_input_gradient(self, block: BlockTrace, tokens: Tensor, grad_tokens: Tensor) -> None:
        """The same of what the last block's attention module is called with."""


def run_attention(query: Tensor, key: Tensor, value: Tensor, block: BlockTrace) -> tuple[Tensor, AttentionState]:
    """Fused attention of a block, whose inputs and logsumexp the block's trace keeps.

    Args:
        query: (B, H, m, dh).
        key: (B, H, n, dh).
        value: (B, H, n, dv).
        block: its ``scale`` and ``mask`` are set.

    Returns:
        The attention's output (B, H, m, dv), and what its backward needs.
    """
    out, state = attention_forward(query, key, value, block.scale, block.mask)
    block.query, block.key, block.value = query.detach(), key.detach(), value.detach()
    block.logsumexp = state.logsumexp
    return out, state


class TappedAttention(torch.autograd.Function):
    """Fused attention whose backward reports the gradient of its output.

    ``anchor`` is a scalar that requires a gradient, so that the backward runs in the first tapped block, too, whose query,
    key and value require none: there the fused backward is skipped.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        anchor: Tensor | None,  # noqa: ARG004
        tap: Tap,
        block: BlockTrace,
    ) -> Tensor:
        out, state = run_attention(query, key, value, block)
        ctx.save_for_backward(query, key, value, out)
        ctx.state, ctx.tap, ctx.block = state, tap, block
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out = ctx.saved_tensors
        tap, block = ctx.tap, ctx.block
        wanted = any(ctx.needs_input_grad[:3])
        rows = tap.rows_read_of(block)
        gradients = None
        if tap.listener is not None:
            block.out, block.wants_gradients = out, wanted and rows is None
            tap.listener.attention_gradient(block, grad_out)
            gradients = block.gradients
            block.out, block.wants_gradients, block.gradients = None, False, None
        grad_anchor = torch.zeros_like(tap.anchor) if ctx.needs_input_grad[3] else None
        if not wanted:
            return None, None, None, grad_anchor, None, None
        if gradients is None:
            arguments = (grad_out, query, key, value, out, ctx.state, block.scale)
            gradients = attention_backward(*arguments) if rows is None else leading_rows_backward(*arguments, rows)
        return *gradients, grad_anchor, None, None


class _BlockCall:
    """A call of a checkpointed block; see ``checkpoint.Call``."""

    def __init__(
        self, tap: Tap, block: BlockTrace, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.tap, self.block, self.run, self.args, self.kwargs = tap, block, run, args, kwargs
        self.device = first_input(args, kwargs).device.type
        self.autocast_dtype, self.autocasts = torch.get_autocast_dtype(self.device), torch.is_autocast_enabled(self.device)
        self.rest: tuple[Any, ...] | None = None
        self._expect_no_graph([*args[1:], *(list(kwargs.values())[0 if args else 1 :])], "is called with")

    def first(self, tokens: Tensor) -> Tensor:
        out = self._called(tokens, report=self.tap.request.branches)
        self.rest = out[1:] if isinstance(out, tuple) else None
        return out[0] if isinstance(out, tuple) else out

    def again(self, tokens: Tensor) -> Tensor:
        self.block.called = False
        with ExitStack() as stack:
            # of the forward; this may be another thread
            stack.enter_context(torch.autocast(self.device, dtype=self.autocast_dtype, enabled=self.autocasts))
            stack.enter_context(self.tap._mode())
            if not self.tap._compiles(self.block):
                self.tap._hook_inside(self.block, stack)
            out = self._called(tokens, report=False)
        out, *rest = out if isinstance(out, tuple) else (out,)
        self._expect_no_graph(rest, "returns")
        self.tap._check_again(self._plainly, out)
        return out

    def release(self) -> None:
        self.tap._release(self.block)

    def _expect_no_graph(self, values: Sequence[Any], what: str) -> None:
        """A gradient takes the way of the tokens alone."""
        if any(isinstance(value, Tensor) and value.requires_grad for value in tree_leaves(list(values))):
            name = type(self.block.anatomy.block).__name__
            raise UnsupportedModelError(
                f"checkpoint: expected blocks whose tokens alone carry a gradient; {name} {what} another tensor with one"
            )

    def _plainly(self, dtype: torch.dtype) -> Any:
        """As the model runs in its own element type."""
        args, kwargs = tree_map(
            lambda value: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value,
            (self.args, self.kwargs),
        )
        return self.run(*args, **kwargs)

    def _called(self, tokens: Tensor, *, report: bool) -> Any:
        args, kwargs = with_first_input(tokens, self.args, self.kwargs)
        if self.tap._compiles(self.block):
            return self.tap._run_compiled(self.block, self.run, args, kwargs, report=report)
        return self.run(*args, **kwargs)


class Tap:
    """A model prepared for one explanation; use as a context manager.

    While open, parameters are frozen and modules are in evaluation mode; hooks are in place during ``forward`` alone. On
    exit, also after an exception, every flag is as it was.
    """

    def __init__(self, anatomy: Anatomy, request: Request, backend: str = "auto", running: Running | None = None) -> None:
        self.anatomy = anatomy
        self.request = request
        self.running = running or Running()
        last = len(anatomy.blocks) - 1
        self.blocks = [BlockTrace(index, block, index == last, backend) for index, block in enumerate(anatomy.blocks)]
        self.listener: GradientListener | None = None
        self.anchor: Tensor | None = None
        self.leaves: list[Tensor] = []
        self.pooling_attention: Tensor | None = None
        self.valid_tokens: Tensor | None = None
        self._stack = ExitStack()
        self._tensor_hooks: list[torch.utils.hooks.RemovableHandle] = []
        self._current: BlockTrace | None = None
        self._in_pool = False
        self._narrowing = False

    def __enter__(self) -> Tap:
        self._stack.enter_context(frozen(self.anatomy))
        self._stack.enter_context(compiling(self.running.compile_mode))
        # a backward in this thread, on a GPU too: what is set for an explanation is set for it as well
        self._stack.enter_context(torch.autograd.set_multithreading_enabled(False))
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()
        for handle in self._tensor_hooks:
            handle.remove()
        # graph and tap know each other: let go of it here, not when a collector comes round
        self.leaves, self.blocks, self._tensor_hooks = [], [], []
        self.anchor = self.listener = self._current = None

    def forward(self, inputs: Any) -> Tensor:
        """Run the model on images (B, c, h, w) or a mapping of text inputs; returns its output (B, num_classes).

        The output has a graph where a backward will follow.
        """
        self.valid_tokens = self._valid_tokens(inputs)
        if self.request.gradient:
            device = next(self.anatomy.model.parameters()).device
            self.anchor = torch.zeros((), dtype=torch.float32, device=device, requires_grad=True)
            self.leaves = [self.anchor]
        with ExitStack() as stack:
            for block in self.blocks:
                self._hook_block(block, stack)
            if self.anatomy.attention_pool is not None:
                self._hook_pool(self.anatomy.attention_pool, stack)
            stack.enter_context(torch.set_grad_enabled(self.request.gradient))
            stack.enter_context(self._mode())
            output = self.anatomy.run(inputs)
        for block in self.blocks:
            self._expect_attention(block)
        if self.anatomy.attention_pool is not None and self.pooling_attention is None:
            name = type(self.anatomy.attention_pool).__name__
            raise UnsupportedModelError(
                f"attention pool: expected {name} to call F.scaled_dot_product_attention once, received no call"
            )
        return output

    def _mode(self) -> SdpaMode:
        return SdpaMode(self._attention)

    def _valid_tokens(self, inputs: Any) -> Tensor | None:
        if self.anatomy.token_mask is None:
            return None
        valid = self.anatomy.token_mask(inputs)
        return None if valid is None or (not unseen(valid.device) and bool(valid.all())) else valid

    def rows_read_of(self, block: BlockTrace) -> int | None:
        """Number of leading rows of this block's attention output that the explained scalar depends on; None for all."""
        return self.anatomy.num_read_tokens if block.is_last else None

    # -- interception ------------------------------------------------------------------------------------------------

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor | None:
        if self._in_pool:
            return self._pool(query, key, value, scale)
        block = self._current
        if block is None or block.index < self.request.first_block:
            return None
        where = f"block {block.index} ({type(block.anatomy.block).__name__})"
        if block.called:
            raise UnsupportedModelError(f"{where}: expected one attention call a block, received a second one")
        if dropout_p > 0:
            raise UnsupportedModelError(f"{where}: expected attention without dropout, received dropout_p={dropout_p}")
        if query.dim() != 4:
            raise UnsupportedModelError(f"{where}: expected query (B, H, n, dh), received shape {tuple(query.shape)}")
        if enable_gqa:  # every key head serves a group of query heads
            key, value = (tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1) for tensor in (key, value))
        block.called = True
        query, key, value = as_autocast(query, key, value)
        block.valid_tokens = self.valid_tokens
        if self.valid_tokens is not None:  # nobody attends to padding; without values it has no gradient of the map either
            value = value * self.valid_tokens[:, None, :, None].to(value.dtype)
        block.mask = causal_mask(query, key) if is_causal else broadcast_mask(attn_mask, key)
        block.scale = query.shape[-1] ** -0.5 if scale is None else scale
        rows = self.rows_read_of(block)
        if rows is None or self.request.branches or not self.request.head_rows:
            return self._tapped(query, key, value, block)
        block.mask = block.mask_of_rows(rows)
        out = self._tapped(query[:, :, :rows], key, value, block)
        return F.pad(out, (0, 0, 0, query.shape[2] - rows))  # nobody reads the other tokens

    def _tapped(self, query: Tensor, key: Tensor, value: Tensor, block: BlockTrace) -> Tensor:
        out = TappedAttention.apply(query, key, value, self.anchor, self, block)
        if self.request.keep_reads:
            rows = self.anatomy.num_read_tokens
            block.read_out = out.detach() if rows is None else out.detach()[:, :, :rows].clone()
        return out

    def _pool(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor | None:  # noqa: ARG002
        """An attention pool's weights are noted; it runs as it is."""
        with torch.no_grad():
            scale = query.shape[-1] ** -0.5 if scale is None else scale
            scores = query.float() @ key.float().transpose(-1, -2) * scale  # (B, H, latents, n): a row or so, not a map
            self.pooling_attention = scores.softmax(-1).mean((1, 2))
        return None

    # -- other ways to run a block -----------------------------------------------------------------------------------

    def _compiles(self, block: BlockTrace) -> bool:
        """Not where the last block is run on the rows alone that the head reads, or a gradient is asked for inside it."""
        special = self._narrows(block) or (block.is_last and self.request.attention_input_gradient)
        return self.running.compile_mode is not None and not special

    def _checkpoints(self, block: BlockTrace) -> bool:
        """Not the last block, whose gradient is wanted as soon as it has run."""
        wanted = self.running.checkpoint and self.request.gradient
        return wanted and block.index >= self.request.first_block and not block.is_last

    def _run(self, block: BlockTrace, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """In the place of the block's forward."""
        if not self._checkpoints(block):
            return self._run_compiled(block, run, args, kwargs, report=self.request.branches)
        call = _BlockCall(self, block, run, args, kwargs)
        out = Checkpointed.apply(first_input(args, kwargs), self.anchor, call)
        return out if call.rest is None else (out, *call.rest)

    def _run_compiled(
        self, block: BlockTrace, run: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], *, report: bool
    ) -> Any:
        mode = self.running.compile_mode
        assert mode is not None, "only where blocks are compiled"
        with ExitStack() as stack:
            if report:
                stack.enter_context(reporting(block.branches.mlp_input, block.branches.mlp_output))
            self._set_current(block)
            stack.callback(self._set_current, None)
            out = run_compiled(run, mode, args, kwargs)
            if report:
                block.mid_tokens, mlp_out = reported(block.branches.mlp_input), reported(block.branches.mlp_output)
                if mlp_out is not None:
                    self._leave_mlp(block, mlp_out)
        return out

    def _check_again(self, run: Callable[[torch.dtype], Any], out: Tensor) -> None:
        """Look at what a block returned when it was run again; ``run`` does so once more, without hooks."""

    def _release(self, block: BlockTrace) -> None:
        """Let go of what is made anew when the block is run again."""
        if not self.running.keep_attention:
            block.forget_attention()
        block.tokens = block.mid_tokens = block.mlp_out = None

    # -- hooks -------------------------------------------------------------------------------------------------------

    def _hook_block(self, block: BlockTrace, stack: ExitStack) -> None:
        anatomy = block.anatomy
        wants = bool(self.request.observers) or self.request.keep_reads or self.request.input_gradient
        if wants:
            enter = anatomy.block.register_forward_pre_hook(
                lambda _, args, kwargs: self._enter_block(block, args, kwargs), with_kwargs=True
            )
            _attach(stack, enter)
        if self._compiles(block) or self._checkpoints(block):
            run = anatomy.block.forward
            stack.enter_context(forward_replaced(anatomy.block, lambda *args, **kwargs: self._run(block, run, args, kwargs)))
        if not self._compiles(block):
            self._hook_inside(block, stack)
        if self.request.observers:
            _attach(stack, anatomy.block.register_forward_hook(lambda *_: self._observe(block)))
        if self._checkpoints(block):
            _attach(stack, anatomy.block.register_forward_hook(lambda *_: self._release(block)))

    def _hook_inside(self, block: BlockTrace, stack: ExitStack) -> None:
        anatomy = block.anatomy
        if block.index >= self.request.first_block:
            enter = anatomy.attention.register_forward_pre_hook(
                lambda _, args, kwargs: self._enter_attention(block, args, kwargs), with_kwargs=True
            )
            _attach(stack, enter)
            _attach(stack, anatomy.attention.register_forward_hook(lambda *_: self._set_current(None), always_call=True))
        if anatomy.branches is not None and (self.request.branches or self._narrows(block)):
            branches = anatomy.branches
            _attach(stack, branches.mlp_input.register_forward_pre_hook(lambda _, args: self._enter_mlp(block, args)))
            _attach(stack, branches.mlp_output.register_forward_hook(lambda _m, _i, out: self._leave_mlp(block, out)))

    def _hook_pool(self, pool: nn.Module, stack: ExitStack) -> None:
        def set_pool(active: bool) -> None:
            self._in_pool = active

        _attach(stack, pool.register_forward_pre_hook(lambda *_: set_pool(True)))
        _attach(stack, pool.register_forward_hook(lambda *_: set_pool(False), always_call=True))

    def _set_current(self, block: BlockTrace | None) -> None:
        self._current = block

    def _hook_tensor(self, tensor: Tensor, hook: Callable[[Tensor], None]) -> None:
        self._tensor_hooks.append(tensor.register_hook(hook))

    def _enter_attention(self, block: BlockTrace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._set_current(block)
        if not (self.request.attention_input_gradient and block.is_last):
            return None
        tokens = first_input(args, kwargs)
        given = tokens
        if tokens.requires_grad:
            tokens = tokens.view_as(tokens)  # of its own, without what reaches the residual connection of a post-norm block
        else:
            tokens = tokens.detach().requires_grad_()
            self.leaves.append(tokens)
        values = tokens.detach()
        self._hook_tensor(
            tokens,
            lambda gradient: self.listener.attention_input_gradient(block, values, gradient) if self.listener else None,
        )
        return with_every_input(given, tokens, args, kwargs)

    def _enter_block(self, block: BlockTrace, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = first_input(args, kwargs)
        if self.request.observers:
            block.tokens = tokens.detach()
        if self.request.keep_reads and block.index >= self.request.first_block:
            rows = self.anatomy.num_read_tokens
            block.read_tokens = tokens.detach() if rows is None else tokens.detach()[:, :rows].clone()
        if not self.request.input_gradient or block.index < self.request.first_block:
            return None
        if block.index == self.request.first_block:
            tokens = tokens.detach().requires_grad_()
            self.leaves.append(tokens)
        values = tokens.detach()
        self._hook_tensor(
            tokens, lambda gradient: self.listener.input_gradient(block, values, gradient) if self.listener else None
        )
        return with_first_input(tokens, args, kwargs)

    def _narrows(self, block: BlockTrace) -> bool:
        """The last MLP is run, or run with a graph, on the rows alone that the head reads; its other rows are never looked at."""
        return self.rows_read_of(block) is not None and (self.request.gradient or not self.request.branches)

    def _enter_mlp(self, block: BlockTrace, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self._narrowing:
            return None
        tokens = args[0]
        block.mid_tokens = tokens.detach()
        if not self._narrows(block):
            return None
        if self.request.branches:
            self._narrowing = True
            try:
                with torch.no_grad():
                    block.mlp_out = block.branches.mlp(block.mid_tokens)
            finally:
                self._narrowing = False
        return (tokens[:, : self.rows_read_of(block)], *args[1:])

    def _leave_mlp(self, block: BlockTrace, out: Tensor) -> Tensor | None:
        if self._narrowing:
            return None
        if not self._narrows(block):
            scale = block.branches.mlp_scale()
            block.mlp_out = out.detach() if scale is None else out.detach() * scale
            return None
        assert block.mid_tokens is not None, "the branch was entered"
        return F.pad(out, (0, 0, 0, block.mid_tokens.shape[1] - out.shape[1]))

    def _expect_attention(self, block: BlockTrace) -> None:
        if not block.called and block.index >= self.request.first_block:
            name = type(block.anatomy.attention).__name__
            raise UnsupportedModelError(
                f"block {block.index}: expected its attention ({name}) to call F.scaled_dot_product_attention once, "
                "received no call"
            )

    def _observe(self, block: BlockTrace) -> None:
        self._expect_attention(block)
        if self.request.branches and (block.mid_tokens is None or block.mlp_out is None):
            raise UnsupportedModelError(
                f"block {block.index} ({type(block.anatomy.block).__name__}): expected it to call the modules before and after "
                "its MLP branch, received no call"
            )
        with torch.no_grad():
            for observer in self.request.observers:
                block.observed[observer] = observer.observe(block)
        block.tokens = block.mid_tokens = block.mlp_out = None


def replay(block: BlockAnatomy, tokens: Tensor, attention_out: Tensor) -> Tensor:
    """A block's output where its attention returned ``attention_out``, whatever its queries and keys.

    As tokens meet in the attention alone, the output can be had for a few rows at the price of a few rows.

    Args:
        block: anatomy of the block.
        tokens: (B, m, d), rows of the block's input.
        attention_out: (B, H, m, dv), the same rows of the attention's output.

    Returns:
        (B, m, d), the same rows of the block's output.
    """
    absent = [(module, name, getattr(module, name)) for module, name in block.absent_in_replay]
    try:
        for module, name, _ in absent:
            setattr(module, name, None)
        with SdpaMode(lambda *_, **__: attention_out):
            out = block.block(tokens, *(None for _ in _required_inputs(type(block.block).forward)))
    finally:
        for module, name, value in absent:
            setattr(module, name, value)
    return out[0] if isinstance(out, tuple) else out


@lru_cache
def _required_inputs(forward: Callable[..., Any]) -> tuple[str, ...]:
    """What a block must be called with beside its tokens: masks and position embeddings, which act on scores alone."""
    parameters = list(inspect.signature(forward).parameters.values())[2:]
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return tuple(p.name for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty)


def first_input(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The tokens that a module is called with, by position or by name."""
    return args[0] if args else next(iter(kwargs.values()))


def with_first_input(tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other tokens."""
    if args:
        return (tokens, *args[1:]), kwargs
    return args, {**kwargs, next(iter(kwargs)): tokens}


def with_every_input(
    old: Tensor, tokens: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with other tokens wherever the old ones stand: ``nn.MultiheadAttention`` takes them three times."""
    return tuple(tokens if arg is old else arg for arg in args), {
        name: tokens if value is old else value for name, value in kwargs.items()
    }


def _attach(stack: ExitStack, handle: torch.utils.hooks.RemovableHandle) -> None:
    stack.callback(handle.remove)


@contextmanager
def frozen(anatomy: Anatomy) -> Iterator[None]:
    """Evaluation mode, no parameter gradients, nothing compiled, the anatomy's temporary attributes; all as before afterwards."""
    model = anatomy.model
    training = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    attributes = [(module, name, getattr(module, name)) for module, name, _ in anatomy.temporary]
    try:
        for module, _ in training:
            module.training = False
        for parameter, _ in flags:
            parameter.requires_grad_(False)
        for module, name, value in anatomy.temporary:
            setattr(module, name, value)
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, was in training:
            module.training = was
        for parameter, was in flags:
            parameter.requires_grad_(was)
        for module, name, value in attributes:
            setattr(module, name, value)
