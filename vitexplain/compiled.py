"""``torch.compile`` of a model's blocks while they are being explained.

A block's attention is called as it is, between two compiled parts: before it, a normalisation and the projections; after it, the
output projection, both residual sums, the second normalisation and the MLP. Blocks of one class share what was compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .errors import InputError, UnsupportedModelError
from .messages import brief

MODES = ("default", "max-autotune-no-cudagraphs")
MOST_VARIANTS = 64  # of one class of block: shapes, element types, with and without a gradient
_REPORT = "_vitexplain_report"


def check_mode(mode: Any) -> str | None:
    """The mode of ``torch.compile`` that ``compile=`` asks for; None where it does not.

    Raises:
        InputError: another value.
    """
    if isinstance(mode, bool):
        return MODES[0] if mode else None
    if mode not in MODES:
        raise InputError(f"compile: expected True, False or one of {', '.join(map(repr, MODES))}, received {mode!r}")
    return mode


@contextmanager
def compiling(mode: str | None) -> Iterator[None]:
    """The compiler's settings that an explanation needs, forward and backward; none where nothing is compiled."""
    if mode is None:
        yield
        return
    import torch._dynamo.config
    import torch._functorch.config

    fastpath = torch.backends.mha.get_fastpath_enabled()
    with (
        # code is shared by all models of a class: one with hooks inside its blocks must get code of its own
        torch._dynamo.config.patch(
            skip_nnmodule_hook_guards=False, recompile_limit=MOST_VARIANTS, fail_on_recompile_limit_hit=True
        ),
        # a backward for each target goes over the same graph
        torch._functorch.config.patch(donated_buffer=False),
    ):
        torch.backends.mha.set_fastpath_enabled(False)  # no call of attention would be seen
        try:
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fastpath)


@lru_cache(maxsize=32)
def _compiled(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    return torch.compile(forward, mode=mode)


def run_compiled(forward: Callable[..., Any], mode: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What a block's own ``forward`` returns, computed by compiled code.

    Raises:
        UnsupportedModelError: it cannot be compiled.
    """
    block = getattr(forward, "__self__", None)
    if block is None or getattr(forward, "__func__", None) is not type(block).forward:
        raise UnsupportedModelError("compile: expected blocks with their class's forward, received one that was set on a block")
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

    try:
        with torch.compiler.set_stance("default"):
            return _compiled(type(block).forward, mode)(block, *args, **kwargs)
    except FailOnRecompileLimitHit as error:
        raise UnsupportedModelError(
            f"compile: expected at most {MOST_VARIANTS} shapes and settings for the blocks of {type(block).__name__}, received "
            "one more; torch.compiler.reset() forgets the others"
        ) from error
    except TorchDynamoException as error:
        raise UnsupportedModelError(f"compile: {type(block).__name__} cannot be compiled: {brief(error)}") from error


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Run something else where a module is called; its hooks still run around it."""
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


# What modules inside a compiled block are called with, and return, leaves it as an attribute of theirs. Hooks would be looked at
# anew by the compiler whenever they are registered; an attribute is one more output of the compiled code.


def _report_input(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    setattr(self, _REPORT, args[0].detach())
    return type(self).forward(self, *args, **kwargs)


def _report_output(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    out = type(self).forward(self, *args, **kwargs)
    setattr(self, _REPORT, out.detach())
    return out


@contextmanager
def reporting(takes: nn.Module, returns: nn.Module) -> Iterator[None]:
    """Have one module keep its input and another its output, for ``reported`` inside this context.

    Raises:
        UnsupportedModelError: what they return is changed from outside their class.
    """
    for module in (takes, returns):
        if "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
            raise UnsupportedModelError(
                f"compile: expected {type(module).__name__} inside a block without hooks and with its class's forward, received "
                "one with a hook or a forward of its own"
            )
    try:
        with (
            forward_replaced(takes, MethodType(_report_input, takes)),
            forward_replaced(returns, MethodType(_report_output, returns)),
        ):
            yield
    finally:
        for module in (takes, returns):
            module.__dict__.pop(_REPORT, None)


def reported(module: nn.Module) -> Tensor | None:
    """What a module has kept; None where it was not called."""
    return module.__dict__.get(_REPORT)
