"""``contribution_map`` in Triton: one launch does a layer's whole update.

A program owns a block of queries (rows of the result) and a block of columns, and walks over key blocks: it makes the tile
of U, averaged over heads, in registers and multiplies it at once with the rows of C that it meets. The fewer column blocks,
the less often a tile of U is made.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, tile_config
from ..phi import WITH_MAP
from ..triton_common import (
    LENGTHS,
    LOG2_E,
    averaged_tile,
    check_dtype,
    check_value_width,
    dot_precision,
    float32_product_precision,
    mask_kind,
    mask_pointer,
    padded_head_dim,
    strides,
    with_unit_last_stride,
)

COLUMN_BLOCK = 128
WIDE_HEAD = 256  # such heads leave room for half as many columns


@triton.jit(do_not_specialize=[*LENGTHS, "num_tokens", "num_columns"])
def contribution_map_kernel(
    query, key, value, grad_out, logsumexp, mask, contribution, head_weights, token_weights, row_factors, out,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    stride_logsumexp_batch, stride_logsumexp_head,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    num_heads, num_tokens, num_columns, scale_log2, factor, residual,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_C: tl.constexpr,
    PHI: tl.constexpr, USE_MAP: tl.constexpr, USE_GRAD: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, MAP_PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (query blocks, column blocks, B); ``contribution`` and ``out`` (B, n, c)."""
    i_m, i_c, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_m, m_c = o_m < num_tokens, o_c < num_columns
    p_contribution = contribution + i_b * num_tokens * num_columns
    b_out = tl.zeros((BLOCK_M, BLOCK_C), dtype=tl.float32)
    for start in range(0, num_tokens, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        m_n = o_n < num_tokens
        b_update = averaged_tile(
            query, key, value, grad_out, logsumexp, mask, head_weights, token_weights,
            stride_query_batch, stride_query_head, stride_query_token,
            stride_key_batch, stride_key_head, stride_key_token,
            stride_value_batch, stride_value_head, stride_value_token,
            stride_grad_batch, stride_grad_head, stride_grad_token,
            stride_logsumexp_batch, stride_logsumexp_head,
            stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
            i_b, o_m, m_m, o_n, m_n, num_heads, num_tokens, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PHI, USE_MAP, USE_GRAD, MASK, PRECISION,
        )  # fmt: skip
        b_update = tl.where(m_n[None, :], b_update, 0.0)  # keys beyond the last token have some P, maybe an infinite one
        p_tile = p_contribution + o_n.to(tl.int64)[:, None] * num_columns + o_c[None, :]
        b_contribution = tl.load(p_tile, mask=m_n[:, None] & m_c[None, :], other=0.0)  # (BLOCK_N, BLOCK_C)
        b_out += tl.dot(b_update, b_contribution, input_precision=MAP_PRECISION)
    o_tile = o_m.to(tl.int64)[:, None] * num_columns + o_c[None, :]
    m_tile = m_m[:, None] & m_c[None, :]
    b_out = b_out * factor + residual * tl.load(p_contribution + o_tile, mask=m_tile, other=0.0)
    if row_factors is not None:
        b_out *= tl.load(row_factors + i_b * num_tokens + o_m, mask=m_m, other=0.0)[:, None]
    tl.store(out + i_b * num_tokens * num_columns + o_tile, b_out, mask=m_tile)


def launch_map(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_out: Tensor | None,
    logsumexp: Tensor,
    contribution: Tensor,
    head_weights: Tensor | None,
    token_weights: Tensor | None,
    row_factors: Tensor | None,
    mask: Tensor | None,
    scale: float,
    factor: float,
    residual: float,
    phi: str,
) -> Tensor:
    """See ``contribution_map``: float32."""
    check_dtype(query)
    batch, heads, num_tokens, head_dim = query.shape
    if value is not None:
        check_value_width(head_dim, value)
    query, key = with_unit_last_stride(query), with_unit_last_stride(key)
    value, grad_out = with_unit_last_stride(value), with_unit_last_stride(grad_out)
    logsumexp = with_unit_last_stride(logsumexp.float())
    weights = (None if tensor is None else tensor.float().contiguous() for tensor in (head_weights, token_weights, row_factors))
    num_columns = contribution.shape[2]
    block_d = padded_head_dim(head_dim)
    config = tile_config("contribution_map", query, block_d, num_tokens)
    block_c = COLUMN_BLOCK // 2 if block_d >= WIDE_HEAD else COLUMN_BLOCK
    out = torch.empty(batch, num_tokens, num_columns, dtype=torch.float32, device=query.device)
    arguments = (
        query, key, value, grad_out, logsumexp, mask_pointer(mask), contribution.float().contiguous(), *weights, out,
        *strides(query, 3), *strides(key, 3), *strides(value, 3), *strides(grad_out, 3), *strides(logsumexp, 2),
        *strides(mask, 4), heads, num_tokens, num_columns,
        float(scale * LOG2_E), float(factor / heads if head_weights is None else factor), float(residual),
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_C": block_c,
        "PHI": phi, "USE_MAP": phi in WITH_MAP, "USE_GRAD": value is not None, "MASK": mask_kind(mask),
        "PRECISION": dot_precision(query.dtype), "MAP_PRECISION": float32_product_precision(query),
    }  # fmt: skip
    grid = (triton.cdiv(num_tokens, config.block_m), triton.cdiv(num_columns, block_c), batch)
    launch(contribution_map_kernel, grid, arguments, constants, config)
    return out
