"""Launching a Triton kernel: tile shapes from a table, images compiled ahead of time where they are installed.

Every launcher goes through ``launch``. Under ``recorded_launches`` nothing runs: what would have been launched is written
down instead, which is how the ahead-of-time build, the tuner and the tests learn of the variants without a list of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

from . import aot
from .launch_table import TileConfig, looked_up

TYPE_NAMES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
}
ALIGNMENT = 16


@dataclass(frozen=True)
class KernelVariant:
    """One compiled form of a kernel.

    Attributes:
        kernel: the kernel's name.
        types: of the arguments that are no constants, by name: ``"*bf16"``, ``"i32"``, ``"i64"``, ``"fp32"``; an absent
            pointer is the constant None.
        divisible: names of the arguments that are multiples of 16 (pointers: bytes).
        constants: compile-time values by name.
        num_warps, num_stages, max_registers: as the launcher chose them.
        function: the Triton function.
    """

    kernel: str
    types: tuple[tuple[str, str], ...]
    divisible: frozenset[str]
    constants: tuple[tuple[str, Any], ...]
    num_warps: int
    num_stages: int
    max_registers: int
    function: Any = field(compare=False, repr=False)


@dataclass
class _Recording:
    """What is noted while launches are recorded, and for which architecture launchers are to choose."""

    architecture: str
    variants: list[KernelVariant] = field(default_factory=list)


# Module state, not context variables: the backward of CUDA tensors runs in a thread of its own, which has no context.
_recording: _Recording | None = None
_forced: TileConfig | None = None


@contextmanager
def recorded_launches(architecture: str) -> Iterator[list[KernelVariant]]:
    """Note launches, of any thread, instead of making them; tensors may be on the meta device.

    ``architecture`` is what tile shapes are looked up for: ``"90"``, ``"gfx942"``.
    """
    global _recording
    before, _recording = _recording, _Recording(architecture)
    try:
        yield _recording.variants
    finally:
        _recording = before


@contextmanager
def forced_config(config: TileConfig) -> Iterator[None]:
    """Launch with these tile shapes, in any thread, whatever the table says (for tuning)."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


@cache
def _architecture_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "any"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.partition(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"{major}{minor}"


def architecture_of(device: torch.device) -> str:
    """``"90"`` for compute capability 9.0, ``"gfx942"`` on AMD, ``"any"`` off the GPU; what is recorded for, while recording."""
    return _recording.architecture if _recording is not None else _architecture_of(device)


def tile_config(kernel: str, tensor: Tensor, block_d: int, num_tokens: int) -> TileConfig:
    """Tile shape for a kernel on a tensor's device and element type: from the table, unless the tuner has forced another."""
    return _forced or looked_up(kernel, architecture_of(tensor.device), precision_of(tensor.dtype), block_d, num_tokens)


def precision_of(dtype: torch.dtype) -> str:
    """How products of this element type are made: ``"half"``, ``"tf32"`` or ``"ieee"``; float32 follows torch's own switch."""
    if dtype != torch.float32:
        return "half"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def describe(kernel: Any, arguments: tuple[Any, ...], constants: dict[str, Any], config: TileConfig) -> KernelVariant:
    """The variant that these arguments need: types, divisibility and constants, by name."""
    names = kernel.arg_names[: len(arguments)]
    unspecialised = _unspecialised(kernel)
    types, divisible, fixed = [], set(), dict(constants)
    for name, value in zip(names, arguments, strict=True):
        if value is None:
            fixed[name] = None
            continue
        types.append((name, _type_of(name, value)))
        number = value.data_ptr() if isinstance(value, Tensor) else value
        if isinstance(number, int) and name not in unspecialised and number % ALIGNMENT == 0:
            divisible.add(name)
    # Triton's wrappers keep the Python function in ``fn``
    return KernelVariant(
        kernel.fn.__name__,
        tuple(types),
        frozenset(divisible),
        tuple(sorted(fixed.items())),
        config.num_warps,
        config.num_stages,
        config.max_registers,
        kernel,
    )


@cache
def _unspecialised(kernel: Any) -> frozenset[str]:
    """Arguments for whose values a kernel is never compiled anew."""
    return frozenset(parameter.name for parameter in kernel.params if parameter.do_not_specialize)


def _type_of(name: str, value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + TYPE_NAMES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    raise TypeError(f"{name}: expected a tensor, an int, a float or None, received {type(value).__name__}")


def launch(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], constants: dict[str, Any], config: TileConfig) -> None:
    """Run a Triton kernel, from an installed image where there is one, else compiled by Triton when first met.

    Args:
        kernel: the Triton function; its arguments are ``arguments`` in order, then ``constants`` by name.
        grid: number of programs, up to three dimensions.
        arguments: tensors, ints, floats, or None for a pointer that is not there.
        constants: compile-time values.
        config: its warps, stages and registers are used.
    """
    if _recording is not None:
        _recording.variants.append(describe(kernel, arguments, constants, config))
        return
    device = next(value.device for value in arguments if isinstance(value, Tensor))
    if device.type != "cuda":  # in the interpreter
        _launch_by_triton(kernel, grid, arguments, constants, config)
        return
    with torch.cuda.device(device):
        image = aot.find(describe(kernel, arguments, constants, config), architecture_of(device)) if aot.installed() else None
        if image is not None:
            image.launch(grid, [value for value in arguments if value is not None])
        else:
            _launch_by_triton(kernel, grid, arguments, constants, config)


def _launch_by_triton(kernel: Any, grid: Any, arguments: Any, constants: dict[str, Any], config: TileConfig) -> None:
    kernel[grid](*arguments, **constants, **options(config.num_warps, config.num_stages, config.max_registers))


def options(num_warps: int, num_stages: int, max_registers: int, *, nvidia: bool = not torch.version.hip) -> dict[str, int]:
    """Triton's names of the launch options; AMD's compiler has none for registers."""
    limit = {"maxnreg": max_registers} if max_registers and nvidia else {}
    return {"num_warps": num_warps, "num_stages": num_stages, **limit}
