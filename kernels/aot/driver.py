"""Load and launch a compiled image through the CUDA driver, as Triton's own launcher would; no compiler is involved."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .manifest import Image

MAX_DYNAMIC_SHARED_MEMORY = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
WITHOUT_ASKING = 48 << 10  # more shared memory than this has to be asked for
WARP = 32
C_TYPES = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}


class DriverError(RuntimeError):
    """The CUDA driver refused a call."""


@cache
def driver() -> Any:
    """libcuda, which every machine with an NVIDIA driver has."""
    return ctypes.CDLL("libcuda.so.1")


def _call(name: str, *arguments: Any) -> None:
    code = getattr(driver(), name)(*arguments)
    if code:
        text = ctypes.c_char_p()
        driver().cuGetErrorName(code, ctypes.byref(text))
        raise DriverError(f"{name}: the CUDA driver returned {code} ({(text.value or b'unknown error').decode()})")


class LoadedImage:
    """An image of the manifest, loaded into the driver when a device first needs it."""

    def __init__(self, image: Image, folder: Path) -> None:
        self.image, self.path = image, folder / image.file
        self._kinds = [kind for _, kind in image.types]
        self._functions: dict[int, ctypes.c_void_p] = {}

    def launch(self, grid: tuple[int, ...], arguments: list[Any]) -> None:
        """Run the kernel on torch's current device and stream.

        Args:
            grid: number of programs, up to three dimensions.
            arguments: values of ``image.types``, in order.

        Raises:
            DriverError: the driver refused to load or launch.
        """
        function = self._function(torch.cuda.current_device())
        stream = torch.cuda.current_stream().cuda_stream
        values = [_c_value(kind, value) for kind, value in zip(self._kinds, arguments, strict=True)]
        values += [ctypes.c_uint64(0)] * self.image.trailing_pointers
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        blocks = (*grid, 1, 1)[:3]
        _call(
            "cuLaunchKernel", function, *blocks, WARP * self.image.num_warps, 1, 1, self.image.shared_bytes,
            ctypes.c_void_p(stream), pointers, None,
        )  # fmt: skip

    def _function(self, index: int) -> ctypes.c_void_p:
        if index not in self._functions:
            module, function = ctypes.c_void_p(), ctypes.c_void_p()
            _call("cuModuleLoadData", ctypes.byref(module), self.path.read_bytes())
            _call("cuModuleGetFunction", ctypes.byref(function), module, self.image.symbol.encode())
            if self.image.shared_bytes > WITHOUT_ASKING:
                _call("cuFuncSetAttribute", function, MAX_DYNAMIC_SHARED_MEMORY, self.image.shared_bytes)
            self._functions[index] = function
        return self._functions[index]


def _c_value(kind: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_uint64(value.data_ptr())
    return C_TYPES[kind](value)
