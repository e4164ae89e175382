"""What the Triton kernels and their launchers share: a tile load, tile shapes by a table, how far to split the heads.

The table is deterministic (no run-time tuning), so that a launch can be captured in a CUDA graph and compiled ahead of time.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class TileConfig:
    """Tile of queries × keys, and how many warps and pipeline stages work on it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


def tile_config(dtype: torch.dtype, block_d: int) -> TileConfig:
    """Tile shape for an element type and a (padded) head width; every entry compiles without spills for sm_80 to sm_100."""
    if dtype == torch.float32:  # full float32 products run on the ordinary cores: small tiles, or registers spill
        return TileConfig(32, 32, 4, 1) if block_d <= 64 else TileConfig(16, 32, 4, 1)
    if block_d <= 64:
        return TileConfig(64, 64, 4, 2)
    if block_d <= 128:
        return TileConfig(64, 64, 8, 2)
    return TileConfig(32, 32, 4, 1)


def padded_head_dim(head_dim: int) -> int:
    """Head width rounded up to what a matrix product takes: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(head_dim))


def with_unit_last_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where its last dimension is contiguous (packed qkv views are), else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def head_splits(heads: int, programs: int, device: torch.device) -> int:
    """Into how many programs to split the heads so that ``programs`` key tiles fill the device about twice."""
    if device.type != "cuda":
        return min(heads, 2)  # the interpreter: enough to exercise the reduction over splits
    wanted = triton.cdiv(2 * _multiprocessors(device), max(1, programs))
    return max(1, min(heads, wanted))


def check_dtype(tensor: Tensor) -> None:
    """Refuse what the kernels have no matrix product for."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"backend 'triton' takes float16, bfloat16 or float32, received {tensor.dtype} (use backend 'torch')")


def dot_precision(dtype: torch.dtype) -> str:
    """Products of float32 inputs are full float32; the setting has no effect on narrower types."""
    return "ieee" if dtype == torch.float32 else "tf32"


@triton.jit
def load_tokens(pointer, stride_token, o_token, m_token, o_dim, m_dim):
    """A (tokens, BLOCK_D) tile from a pointer to one head; zero outside."""
    p_tile = pointer + o_token.to(tl.int64)[:, None] * stride_token + o_dim[None, :]
    return tl.load(p_tile, mask=m_token[:, None] & m_dim[None, :], other=0.0)
