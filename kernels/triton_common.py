"""What the Triton kernels share: loads, the weighing φ of an attention tile, and small rules of their launchers."""

from __future__ import annotations

from functools import cache
from typing import overload

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture_of, precision_of
from .launch_table import SMALLEST_PRODUCT as SMALLEST_PRODUCT
from .launch_table import padded_head_dim as padded_head_dim

LOG2_E = 1.4426950408889634
KERNEL_LOG2_E: tl.constexpr = tl.constexpr(LOG2_E)  # as kernels read it
# Arguments that follow the number of tokens (as ``num_queries`` and its like do): no kernel is compiled anew for a length.
LENGTHS = (
    "num_heads", "stride_logsumexp_batch", "stride_logsumexp_head", "stride_rows_batch",
    "stride_mask_batch", "stride_mask_head", "stride_mask_query", "stride_mask_key",
)  # fmt: skip


@overload
def with_unit_last_stride(tensor: Tensor) -> Tensor: ...
@overload
def with_unit_last_stride(tensor: None) -> None: ...
def with_unit_last_stride(tensor: Tensor | None) -> Tensor | None:
    """The tensor itself where its last dimension is contiguous (packed qkv views are), else a contiguous copy."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    """The first ``count`` strides; zeros for a tensor that is not there."""
    return (0,) * count if tensor is None else tensor.stride()[:count]


@cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def splits_to_fill(largest: int, programs: int, device: torch.device) -> int:
    """Into how many parts, up to ``largest``, to split work so that ``programs`` times it fill the device about twice."""
    if device.type != "cuda":
        return min(largest, 2)  # the interpreter: enough to exercise the reduction over splits
    return max(1, min(largest, triton.cdiv(2 * _multiprocessors(device), max(1, programs))))


def check_dtype(tensor: Tensor) -> None:
    """Refuse what the kernels have no matrix product for."""
    if tensor.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"backend 'triton' takes float16, bfloat16 or float32, received {tensor.dtype} (use backend 'torch')")


def check_value_width(head_dim: int, value: Tensor) -> None:
    """Refuse values of another width than queries: the kernels' tiles of both have one shape."""
    if value.shape[-1] != head_dim:
        raise ValueError(f"backend 'triton' expects value width {head_dim} (that of query), received {value.shape[-1]}")


def dot_precision(dtype: torch.dtype) -> str:
    """``input_precision`` of products of two tiles of inputs: float32 is exact unless torch is told to use TF32."""
    return "ieee" if precision_of(dtype) == "ieee" else "tf32"


def float32_product_precision(tensor: Tensor) -> str:
    """``input_precision`` of products of two float32 tiles made on the way.

    With half-precision inputs three TF32 products (about float32's accuracy, on tensor cores) lose nothing that the inputs
    still had; float32 inputs get float32 products.
    """
    if precision_of(tensor.dtype) != "half" or architecture_of(tensor.device).startswith("gfx"):
        return "ieee"
    return "tf32x3"


def mask_kind(mask: Tensor | None) -> str:
    """``"none"``, ``"boolean"`` (True takes part) or ``"additive"``."""
    if mask is None:
        return "none"
    return "boolean" if mask.dtype == torch.bool else "additive"


def mask_pointer(mask: Tensor | None) -> Tensor | None:
    """A boolean mask as bytes, which kernels can read; any other as it is."""
    return mask.view(torch.uint8) if mask is not None and mask.dtype == torch.bool else mask


@triton.jit
def load_tokens(pointer, stride_token, o_token, m_token, o_dim, m_dim):
    """A (tokens, dims) tile from a pointer to one image or head; zero outside."""
    p_tile = pointer + o_token.to(tl.int64)[:, None] * stride_token + o_dim[None, :]
    return tl.load(p_tile, mask=m_token[:, None] & m_dim[None, :], other=0.0)


@triton.jit
def load_head(pointer, stride_token, o_token, m_token, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """A (tokens, BLOCK_D) tile of one head; zero outside. Columns are masked only where the width was padded."""
    o_d = tl.arange(0, BLOCK_D)
    p_tile = pointer + o_token.to(tl.int64)[:, None] * stride_token + o_d[None, :]
    if HEAD_DIM == BLOCK_D:
        return tl.load(p_tile, mask=m_token[:, None], other=0.0)
    return tl.load(p_tile, mask=m_token[:, None] & (o_d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def mask_tile(p_mask, stride_first, stride_second, o_first, o_second, m_first, m_second, MASK: tl.constexpr):
    """What the mask adds to a tile of scores, times log2(e): minus infinity where a boolean mask is False."""
    p_tile = p_mask + o_first.to(tl.int64)[:, None] * stride_first + o_second.to(tl.int64)[None, :] * stride_second
    b_mask = tl.load(p_tile, mask=m_first[:, None] & m_second[None, :], other=0)
    if MASK == "boolean":
        return tl.where(b_mask != 0, 0.0, float("-inf"))
    return b_mask.to(tl.float32) * KERNEL_LOG2_E


@triton.jit
def probabilities(b_scores, b_logsumexp, MASK: tl.constexpr):
    """P from scores and logsumexp, both times log2(e); ``b_logsumexp`` is broadcast. A masked score gives 0 in any row."""
    if MASK == "none":
        return tl.exp2(b_scores - b_logsumexp)
    return tl.where(b_scores == float("-inf"), 0.0, tl.exp2(b_scores - b_logsumexp))


@triton.jit
def weighed(b_probabilities, b_grad, PHI: tl.constexpr):
    """φ(P, G) of a tile; the argument that φ does not read may be anything."""
    if PHI == "p":
        return b_probabilities
    if PHI == "p_relu_g":
        return b_probabilities * tl.maximum(b_grad, 0.0)
    if PHI == "p_g":
        return b_probabilities * b_grad
    if PHI == "relu_g":
        return tl.maximum(b_grad, 0.0)
    return tl.abs(b_grad)


@triton.jit
def averaged_tile(
    query, key, value, grad_out, logsumexp, mask, head_weights, token_weights,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    stride_logsumexp_batch, stride_logsumexp_head,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    i_b, o_m, m_m, o_n, m_n, num_heads, num_keys, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PHI: tl.constexpr, USE_MAP: tl.constexpr, USE_GRAD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_h w_h c_h[j] φ(P_h, G_h)[i, j] of one image, queries × keys, (BLOCK_M, BLOCK_N) float32.

    Rows beyond the last query are zero; columns beyond the last key may hold anything.
    """
    b_update = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for head in range(num_heads):
        i_h = tl.cast(head, tl.int64)
        i_bh = i_b * num_heads + i_h
        b_map = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        b_grad = b_map
        if USE_MAP:
            p_query = query + i_b * stride_query_batch + i_h * stride_query_head
            p_key = key + i_b * stride_key_batch + i_h * stride_key_head
            p_logsumexp = logsumexp + i_b * stride_logsumexp_batch + i_h * stride_logsumexp_head
            b_query = load_head(p_query, stride_query_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            b_key = load_head(p_key, stride_key_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
            b_lse = tl.load(p_logsumexp + o_m, mask=m_m, other=float("inf")).to(tl.float32) * KERNEL_LOG2_E
            b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2  # (BLOCK_M, BLOCK_N)
            if MASK != "none":
                p_mask = mask + i_b * stride_mask_batch + i_h * stride_mask_head
                b_scores += mask_tile(p_mask, stride_mask_query, stride_mask_key, o_m, o_n, m_m, m_n, MASK)
            b_map = probabilities(b_scores, b_lse[:, None], MASK)
        if USE_GRAD:
            p_value = value + i_b * stride_value_batch + i_h * stride_value_head
            p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
            b_grad_out = load_head(p_grad_out, stride_grad_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            b_value = load_head(p_value, stride_value_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
            b_grad = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        b_phi = weighed(b_map, b_grad, PHI)
        if token_weights is not None:
            b_phi *= tl.load(token_weights + i_bh * num_keys + o_n, mask=m_n, other=0.0)[None, :]
        if head_weights is not None:
            b_phi *= tl.load(head_weights + i_bh)
        b_update += b_phi
    return b_update
