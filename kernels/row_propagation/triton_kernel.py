"""``row_propagation`` in Triton: tiles of P and G are made in registers, weighted, and reduced at once.

One running row: a program owns a block of keys, keeps its keys and values in place, and walks over heads and query
blocks. Where key blocks alone do not fill the device, heads are split over programs, whose partial sums are added in
a fixed order. Many rows: a program owns a block of keys and a block of rows; heads are averaged inside the tile before
the tile is multiplied, so that the long product is done once and not once per head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import (
    LOG2_E,
    check_dtype,
    dot_precision,
    head_splits,
    load_tokens,
    padded_head_dim,
    tile_config,
    with_unit_last_stride,
)

BLOCK_ROWS = 32


@triton.jit
def phi_tile(
    p_query, p_grad_out, p_logsumexp, stride_query_token, stride_grad_token, o_m, m_m, o_d, m_d, b_key, b_value, scale_log2,
    USE_GRAD: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """φ(P, G) of one head, (BLOCK_M, BLOCK_N) float32; rows beyond the last query are zero."""
    b_query = load_tokens(p_query, stride_query_token, o_m, m_m, o_d, m_d)  # (BLOCK_M, BLOCK_D)
    b_lse = tl.load(p_logsumexp + o_m, mask=m_m, other=float("inf")).to(tl.float32) * 1.4426950408889634  # (BLOCK_M,)
    b_scores = tl.dot(b_query, tl.trans(b_key), input_precision=PRECISION) * scale_log2  # (BLOCK_M, BLOCK_N)
    b_phi = tl.exp2(b_scores - b_lse[:, None])
    if USE_GRAD:
        b_grad_out = load_tokens(p_grad_out, stride_grad_token, o_m, m_m, o_d, m_d)  # (BLOCK_M, BLOCK_D)
        b_grad = tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION)  # (BLOCK_M, BLOCK_N)
        b_phi = b_phi * tl.maximum(b_grad, 0.0)
    return b_phi


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def single_row_kernel(
    query, key, value, grad_out, logsumexp, rows, head_weights, token_weights, out,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    num_heads, num_queries, num_keys, heads_per_split, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    USE_GRAD: tl.constexpr, USE_HEAD_WEIGHTS: tl.constexpr, USE_TOKEN_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (key blocks, head splits, B); ``rows`` (B, m), ``out`` (splits, B, n)."""
    i_n, i_split, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_d = o_n < num_keys, o_d < HEAD_DIM
    b_out = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first_head = i_split * heads_per_split
    for i_h in range(first_head, tl.minimum(first_head + heads_per_split, num_heads)):
        i_bh = i_b * num_heads + i_h
        p_query = query + i_b * stride_query_batch + i_h * stride_query_head
        p_key = key + i_b * stride_key_batch + i_h * stride_key_head
        p_value = value + i_b * stride_value_batch + i_h * stride_value_head
        p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
        b_key = load_tokens(p_key, stride_key_token, o_n, m_n, o_d, m_d)  # (BLOCK_N, BLOCK_D)
        b_value = b_key
        if USE_GRAD:
            b_value = load_tokens(p_value, stride_value_token, o_n, m_n, o_d, m_d)  # (BLOCK_N, BLOCK_D)
        b_head = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, num_queries, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < num_queries
            b_phi = phi_tile(
                p_query, p_grad_out, logsumexp + i_bh * num_queries, stride_query_token, stride_grad_token,
                o_m, m_m, o_d, m_d, b_key, b_value, scale_log2, USE_GRAD, PRECISION,
            )  # fmt: skip
            b_rows = tl.load(rows + i_b * num_queries + o_m, mask=m_m, other=0.0)  # (BLOCK_M,)
            b_head += tl.sum(b_rows[:, None] * b_phi, axis=0)
        if USE_TOKEN_WEIGHTS:
            b_head *= tl.load(token_weights + i_bh * num_keys + o_n, mask=m_n, other=0.0)
        b_out += b_head * tl.load(head_weights + i_bh) if USE_HEAD_WEIGHTS else b_head / num_heads
    p_out = out + (i_split * tl.num_programs(2) + i_b) * num_keys + o_n
    tl.store(p_out, b_out, mask=m_n)


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_rows"])
def many_rows_kernel(
    query, key, value, grad_out, logsumexp, rows, head_weights, token_weights, out,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    num_heads, num_queries, num_keys, num_rows, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    USE_GRAD: tl.constexpr, USE_HEAD_WEIGHTS: tl.constexpr, USE_TOKEN_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (key blocks, row blocks, B); ``rows`` (B, K, m), ``out`` (B, K, n)."""
    i_n, i_k, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    o_d = tl.arange(0, BLOCK_D)
    m_n, m_k, m_d = o_n < num_keys, o_k < num_rows, o_d < HEAD_DIM
    p_rows = rows + (i_b * num_rows + o_k.to(tl.int64)) * num_queries  # (BLOCK_K,)
    b_out = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for start in range(0, num_queries, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < num_queries
        b_update = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for i_h in range(num_heads):
            i_bh = i_b * num_heads + i_h
            p_query = query + i_b * stride_query_batch + i_h * stride_query_head
            p_key = key + i_b * stride_key_batch + i_h * stride_key_head
            p_value = value + i_b * stride_value_batch + i_h * stride_value_head
            p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
            b_key = load_tokens(p_key, stride_key_token, o_n, m_n, o_d, m_d)  # (BLOCK_N, BLOCK_D)
            b_value = b_key
            if USE_GRAD:
                b_value = load_tokens(p_value, stride_value_token, o_n, m_n, o_d, m_d)  # (BLOCK_N, BLOCK_D)
            b_phi = phi_tile(
                p_query, p_grad_out, logsumexp + i_bh * num_queries, stride_query_token, stride_grad_token,
                o_m, m_m, o_d, m_d, b_key, b_value, scale_log2, USE_GRAD, PRECISION,
            )  # fmt: skip
            if USE_TOKEN_WEIGHTS:
                b_phi *= tl.load(token_weights + i_bh * num_keys + o_n, mask=m_n, other=0.0)[None, :]
            b_update += b_phi * tl.load(head_weights + i_bh) if USE_HEAD_WEIGHTS else b_phi / num_heads
        b_rows = tl.load(p_rows[:, None] + o_m[None, :], mask=m_k[:, None] & m_m[None, :], other=0.0)  # (BLOCK_K, BLOCK_M)
        b_out += tl.dot(b_rows, b_update, input_precision="ieee")
    p_out = out + (i_b * num_rows + o_k.to(tl.int64)[:, None]) * num_keys + o_n[None, :]
    tl.store(p_out, b_out, mask=m_k[:, None] & m_n[None, :])


def launch(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_out: Tensor | None,
    logsumexp: Tensor,
    rows: Tensor,
    head_weights: Tensor | None,
    token_weights: Tensor | None,
    scale: float,
    phi: str,
) -> Tensor:
    """See ``row_propagation``; ``rows`` (B, K, m) gives (B, K, n) float32."""
    check_dtype(query)
    batch, heads, num_queries, head_dim = query.shape
    num_keys, num_rows = key.shape[2], rows.shape[1]
    use_grad = phi == "p_relu_g"
    if use_grad and value.shape[-1] != head_dim:
        raise ValueError(f"backend 'triton' expects value width {head_dim} (that of query), received {value.shape[-1]}")
    query, key = with_unit_last_stride(query), with_unit_last_stride(key)
    value = with_unit_last_stride(value) if use_grad else key
    grad_out = with_unit_last_stride(grad_out) if use_grad else query
    block_d = padded_head_dim(head_dim)
    config = tile_config(query.dtype, block_d)
    arguments = (
        query, key, value, grad_out, logsumexp.float().contiguous(), rows.float().contiguous(),
        rows if head_weights is None else head_weights.float().contiguous(),
        rows if token_weights is None else token_weights.float().contiguous(),
    )  # fmt: skip
    strides = [tensor.stride(dim) for tensor in (query, key, value, grad_out) for dim in range(3)]
    constants = dict(
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        USE_GRAD=use_grad, USE_HEAD_WEIGHTS=head_weights is not None, USE_TOKEN_WEIGHTS=token_weights is not None,
        PRECISION=dot_precision(query.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    key_blocks = triton.cdiv(num_keys, config.block_n)
    if num_rows == 1:
        splits = head_splits(heads, key_blocks * batch, query.device)
        per_split = triton.cdiv(heads, splits)
        splits = triton.cdiv(heads, per_split)
        out = torch.empty(splits, batch, num_keys, dtype=torch.float32, device=query.device)
        single_row_kernel[(key_blocks, splits, batch)](
            *arguments, out, *strides, heads, num_queries, num_keys, per_split, scale * LOG2_E, **constants
        )
        return out.sum(0).unsqueeze(1)
    out = torch.empty(batch, num_rows, num_keys, dtype=torch.float32, device=query.device)
    many_rows_kernel[(key_blocks, triton.cdiv(num_rows, BLOCK_ROWS), batch)](
        *arguments, out, *strides, heads, num_queries, num_keys, num_rows, scale * LOG2_E, BLOCK_K=BLOCK_ROWS, **constants
    )
    return out
