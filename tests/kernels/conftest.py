"""Interpreted and ordinary tests cannot share a process: the interpreter is chosen when triton is imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from vitexplain.kernels import interpreting


@pytest.fixture(autouse=True)
def uninitialised_memory_is_nan() -> Iterator[None]:
    """``torch.empty`` is full of NaN, so that a value that was never written shows."""
    was, warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(was, warn_only=warn)
    torch.utils.deterministic.fill_uninitialized_memory = fill


BACKEND = "triton" if interpreting() else "torch"
DTYPES = [torch.float32, torch.float16] if interpreting() else [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture
def backend() -> str:
    """Triton where the interpreter runs it, tiled torch elsewhere."""
    return BACKEND
