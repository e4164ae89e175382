"""Choice of implementation, and registration of the operators with torch.

Every operation is one ``torch.library`` operator under ``torch.ops.vitexplain``. Its ``backend`` argument chooses
between the tiled torch implementation and the Triton kernel; an explicit choice is honoured or refused, never replaced.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

BACKENDS = ("auto", "triton", "torch")

_LIBRARY = torch.library.Library("vitexplain", "DEF")


def interpreting() -> bool:
    """True where Triton kernels run in Triton's interpreter, on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def triton_installed() -> bool:
    """True where the ``triton`` package can be imported."""
    return importlib.util.find_spec("triton") is not None


def choose_backend(backend: str, device: torch.device) -> str:
    """Resolve ``backend`` for tensors on ``device`` to ``"triton"`` or ``"torch"``.

    ``"auto"`` is Triton on CUDA where triton is installed, tiled torch elsewhere.

    Raises:
        ValueError: an unknown name.
        RuntimeError: Triton was asked for where it cannot run.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, received {backend!r}")
    if backend == "auto":
        return "triton" if device.type == "cuda" and triton_installed() else "torch"
    if backend == "triton":
        if not triton_installed():
            raise RuntimeError("backend 'triton' needs the triton package, which is not installed (pip install triton)")
        if device.type != "cuda" and not interpreting():
            raise RuntimeError(
                f"backend 'triton' needs CUDA tensors, received tensors on {device.type!r} "
                "(on a CPU, TRITON_INTERPRET=1 runs the kernels in Triton's interpreter)"
            )
    return backend


def register_operator(
    signature: str, torch_implementation: Callable[..., Any], triton_module: str, launcher: str, fake: Callable[..., Any]
) -> Callable[..., Any]:
    """Register one operator and return its callable.

    Args:
        signature: schema whose last argument is ``str backend``, for example ``"name(Tensor x, str backend) -> Tensor"``.
        torch_implementation: called with all arguments but ``backend``.
        triton_module: imported when first needed.
        launcher: its function of the same arguments.
        fake: shape function, called with all arguments.
    """
    name = signature.partition("(")[0]

    def implementation(*arguments: Any) -> Any:
        *given, backend = arguments
        device = next(value.device for value in given if isinstance(value, torch.Tensor))
        if choose_backend(backend, device) == "triton":
            return getattr(importlib.import_module(triton_module), launcher)(*given)
        return torch_implementation(*given)

    _LIBRARY.define(signature)
    for key in ("CPU", "CUDA"):
        _LIBRARY.impl(name, implementation, key)
    torch.library.register_fake(f"vitexplain::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.vitexplain, name)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def expect_shape(name: str, tensor: torch.Tensor, expected: tuple[int | str, ...], sizes: dict[str, int]) -> None:
    """Check a shape against named sizes, filling in ``sizes`` where a name is met for the first time.

    Raises:
        ValueError: another shape.
    """
    if tensor.dim() == len(expected):
        for size, wanted in zip(tensor.shape, expected, strict=True):
            if isinstance(wanted, str):
                sizes.setdefault(wanted, size)
        if all(
            size == (sizes[want] if isinstance(want, str) else want) for size, want in zip(tensor.shape, expected, strict=True)
        ):
            return
    wanted_text = ", ".join(f"{want}={sizes[want]}" if want in sizes else str(want) for want in expected)
    raise ValueError(f"{name}: expected shape ({wanted_text}), received {tuple(tensor.shape)}")


def expect_same(name: str, tensor: torch.Tensor, reference_name: str, reference: torch.Tensor, *, dtype: bool = True) -> None:
    """Check that two tensors share device and, unless told otherwise, dtype.

    Raises:
        ValueError: they do not.
    """
    if tensor.device != reference.device:
        raise ValueError(f"{name}: expected device {reference.device} (that of {reference_name}), received {tensor.device}")
    if dtype and tensor.dtype != reference.dtype:
        raise ValueError(f"{name}: expected dtype {reference.dtype} (that of {reference_name}), received {tensor.dtype}")


def expect_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor | None,
    logsumexp: torch.Tensor,
    sizes: dict[str, int],
    *,
    queries: str = "m",
) -> None:
    """Check what every operation on the tiles of one attention layer reads, filling in ``sizes``.

    Args:
        query: (B, H, m, dh).
        key: (B, H, n, dh).
        value: (B, H, n, dv); None where it is not read.
        logsumexp: (B, H, m), of any dtype.
        sizes: those known so far.
        queries: name of the number of queries; ``"n"`` where it is to be that of the keys.

    Raises:
        ValueError: a shape, dtype or device that does not fit.
    """
    expect_shape("query", query, ("B", "H", queries, "dh"), sizes)
    expect_shape("key", key, ("B", "H", "n", "dh"), sizes)
    expect_same("key", key, "query", query)
    if value is not None:
        expect_shape("value", value, ("B", "H", "n", "dv"), sizes)
        expect_same("value", value, "query", query)
    expect_shape("logsumexp", logsumexp, ("B", "H", queries), sizes)
    expect_same("logsumexp", logsumexp, "query", query, dtype=False)


def expect_gradient(reader: str, value: torch.Tensor | None, grad_out: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``value`` and ``grad_out``, whose product the gradient of the map is.

    Raises:
        ValueError: one is None; the message names their ``reader``, such as ``phi 'p_g'``.
    """
    if value is None or grad_out is None:
        raise ValueError(f"value, grad_out: expected tensors for {reader}, received None")
    return value, grad_out


def expect_mask(mask: torch.Tensor, reference_name: str, reference: torch.Tensor, sizes: dict[str, int]) -> torch.Tensor:
    """A mask expanded to (B, H, m, n), of sizes already known; nothing is copied.

    It is boolean, True where a key takes part, or floating-point, added to the scores.

    Raises:
        ValueError: another dtype or device, or a shape that does not broadcast.
    """
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"mask: expected a boolean or floating-point dtype, received {mask.dtype}")
    expect_same("mask", mask, reference_name, reference, dtype=False)
    shape = tuple(sizes[name] for name in ("B", "H", "m", "n"))
    try:
        return mask.expand(shape)
    except RuntimeError:
        wanted = ", ".join(f"{name}={size}" for name, size in zip(("B", "H", "m", "n"), shape, strict=True))
        raise ValueError(f"mask: expected a shape that broadcasts to ({wanted}), received {tuple(mask.shape)}") from None
