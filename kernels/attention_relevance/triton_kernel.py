"""``relevance_backward`` and ``relevance_rows`` in Triton: Z, P and R_P of a tile are made once and serve all that is asked for.

A program owns a share of one head's key blocks. It keeps a block's keys and values in place, walks over query blocks, and
multiplies each tile of E at once by queries and by keys. E k is summed over key blocks in a slab of float32 partial sums of the
program's own; shares are added in a fixed order afterwards. Memory is linear in the number of tokens, and results repeat to the
bit. Where the row alone is asked for, every key block is a program.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, tile_config
from ..triton_common import (
    KERNEL_LOG2_E,
    LENGTHS,
    LOG2_E,
    check_dtype,
    check_value_width,
    dot_precision,
    load_head,
    mask_kind,
    mask_pointer,
    mask_tile,
    padded_head_dim,
    probabilities,
    splits_to_fill,
    strides,
    with_unit_last_stride,
)
from .common import GUARD

KERNEL_GUARD: tl.constexpr = tl.constexpr(GUARD)
LARGEST_SPLIT = 8  # bounds the memory of the partial sums of E k


@triton.jit
def quotient(b_numerator, b_denominator):
    """a ⊘ b = a / (b + guard) where b is not 0, else 0."""
    b_stable = b_denominator + KERNEL_GUARD
    b_stable = tl.where(b_stable == 0.0, KERNEL_GUARD, b_stable)
    return tl.where(b_denominator == 0.0, 0.0, b_numerator / b_stable)


@triton.jit(do_not_specialize=[*LENGTHS, "num_queries", "num_keys", "num_blocks"])
def attention_relevance_kernel(
    query, key, value, ratio, grad_out, logsumexp, mask, rows,
    partial_query, relevance_key, relevance_value, moved,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_ratio_batch, stride_ratio_head, stride_ratio_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    stride_logsumexp_batch, stride_logsumexp_head,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_rows_batch,
    num_heads, num_queries, num_keys, num_blocks, scale_log2, inverse_scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (splits, H, B); ``partial_query`` (splits, B, H, m, dh), ``moved`` (B, H, n).

    ``moved`` is None without rows; ``partial_query`` and the relevances are None where the row alone is asked for.
    """
    i_split, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_bh = i_b * num_heads + i_h
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_query = query + i_b * stride_query_batch + i_h * stride_query_head
    p_key = key + i_b * stride_key_batch + i_h * stride_key_head
    p_value = value + i_b * stride_value_batch + i_h * stride_value_head
    p_ratio = ratio + i_b * stride_ratio_batch + i_h * stride_ratio_head
    p_logsumexp = logsumexp + i_b * stride_logsumexp_batch + i_h * stride_logsumexp_head
    if partial_query is not None:
        p_slab = partial_query + ((i_split * tl.num_programs(2) + i_b) * num_heads + i_h) * num_queries * HEAD_DIM
    for i_n in range(i_split, num_blocks, tl.num_programs(0)):
        if partial_query is not None:
            tl.debug_barrier()  # the partial sums that the program's other threads have just written are read again
            num_summed = tl.minimum(i_n - i_split, 1) * num_queries  # none at the first block: so nobody has to clear the slab
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < num_keys
        b_key = load_head(p_key, stride_key_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        b_value = load_head(p_value, stride_value_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        b_sum_key = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        b_sum_value = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        b_moved = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, num_queries, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < num_queries
            b_query = load_head(p_query, stride_query_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            b_ratio = load_head(p_ratio, stride_ratio_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            b_lse = tl.load(p_logsumexp + o_m, mask=m_m, other=float("inf")).to(tl.float32) * KERNEL_LOG2_E
            b_product = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M), Z
            b_scores = b_product * scale_log2
            if MASK != "none":
                p_mask = mask + i_b * stride_mask_batch + i_h * stride_mask_head
                b_mask = mask_tile(p_mask, stride_mask_key, stride_mask_query, o_n, o_m, m_n, m_m, MASK)
                b_scores += b_mask
                if MASK == "additive":
                    b_product += b_mask * inverse_scale_log2
            b_map = probabilities(b_scores, b_lse[None, :], MASK)
            b_map = tl.where(m_n[:, None], b_map, 0.0)  # keys beyond the last are none: a sum over keys must not meet infinity
            b_relevance = tl.dot(b_value, tl.trans(b_ratio), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
            b_relevance *= 0.5 * b_map
            if moved is not None:
                b_rows = tl.load(rows + i_b * stride_rows_batch + o_m, mask=m_m, other=0.0)  # (BLOCK_M,)
                b_weights = b_relevance
                if grad_out is not None:
                    p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
                    b_grad_out = load_head(p_grad_out, stride_grad_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
                    if PRECISION == "ieee":  # the other way round than T vᵀ: values that the two shared would stay in registers
                        b_grad = tl.trans(tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION))
                    else:
                        b_grad = tl.dot(b_value, tl.trans(b_grad_out), input_precision=PRECISION)
                    b_weights *= b_grad  # (BLOCK_N, BLOCK_M)
                b_moved += tl.sum(tl.maximum(b_weights, 0.0) * b_rows[None, :], axis=1)
            if partial_query is not None:
                b_sum_value += tl.dot(b_map.to(b_ratio.dtype), b_ratio, input_precision=PRECISION)
                b_share = quotient(b_relevance, b_product)  # (BLOCK_N, BLOCK_M), E: float32, as half types end too early for it
                b_sum_key += tl.dot(b_share, b_query.to(tl.float32), input_precision=PRECISION)
                b_sum_query = tl.dot(tl.trans(b_share), b_key.to(tl.float32), input_precision=PRECISION)  # (BLOCK_M, BLOCK_D)
                b_sum_query *= 0.5  # here, lest the product be added to the loaded sum, which then takes registers all along
                o_sum = o_m.to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
                b_sum_query += tl.load(p_slab + o_sum, mask=(o_m < num_summed)[:, None] & m_d[None, :], other=0.0)
                tl.store(p_slab + o_sum, b_sum_query, mask=m_m[:, None] & m_d[None, :])
        if partial_query is not None:
            # kept over the loop until here, keys and values would take registers that its products need
            b_key = load_head(p_key, stride_key_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
            b_value = load_head(p_value, stride_value_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
            p_out = (i_bh * num_keys + o_n.to(tl.int64))[:, None] * HEAD_DIM + o_d[None, :]
            m_out = m_n[:, None] & m_d[None, :]
            b_sum_key *= 0.5 * b_key.to(tl.float32)
            b_sum_value *= 0.5 * b_value.to(tl.float32)
            tl.store(relevance_key + p_out, b_sum_key.to(relevance_key.dtype.element_ty), mask=m_out)
            tl.store(relevance_value + p_out, b_sum_value.to(relevance_value.dtype.element_ty), mask=m_out)
        if moved is not None:
            tl.store(moved + i_bh * num_keys + o_n, b_moved, mask=m_n)


def launch_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ratio: Tensor,
    logsumexp: Tensor,
    rows: Tensor | None,
    grad_out: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``relevance_backward``."""
    relevances, moved = _launch(query, key, value, ratio, logsumexp, rows, grad_out, mask, scale, backward=True)
    assert relevances is not None
    return *relevances, torch.empty(0, dtype=torch.float32, device=query.device) if moved is None else moved


def launch_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ratio: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    grad_out: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See ``relevance_rows``."""
    _, moved = _launch(query, key, value, ratio, logsumexp, rows, grad_out, mask, scale, backward=False)
    assert moved is not None
    return moved


def _launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ratio: Tensor,
    logsumexp: Tensor,
    rows: Tensor | None,
    grad_out: Tensor | None,
    mask: Tensor | None,
    scale: float,
    *,
    backward: bool,
) -> tuple[tuple[Tensor, Tensor, Tensor] | None, Tensor | None]:
    """Relevance of query, key and value with ``backward``, and S where rows are given."""
    check_dtype(query)
    query, key, value, ratio = map(with_unit_last_stride, (query, key, value, ratio))
    grad_out = with_unit_last_stride(grad_out)
    batch, heads, num_queries, head_dim = query.shape
    num_keys, device = key.shape[2], query.device
    check_value_width(head_dim, value)
    block_d = padded_head_dim(head_dim)
    config = tile_config("attention_relevance", query, block_d, num_keys)
    key_blocks = triton.cdiv(num_keys, config.block_n)
    programs = splits_to_fill(min(key_blocks, LARGEST_SPLIT), batch * heads, device) if backward else key_blocks
    partial_query = relevance_key = relevance_value = moved = None
    if backward:
        partial_query = torch.empty(programs, batch, heads, num_queries, head_dim, dtype=torch.float32, device=device)
        relevance_key, relevance_value = (torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in (key, value))
    if rows is not None:
        moved = torch.empty(batch, heads, num_keys, dtype=torch.float32, device=device)
        rows = with_unit_last_stride(rows.float())
    logsumexp = with_unit_last_stride(logsumexp.float())
    arguments = (
        query, key, value, ratio, grad_out, logsumexp, mask_pointer(mask), rows,
        partial_query, relevance_key, relevance_value, moved,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *ratio.stride()[:3], *strides(grad_out, 3),
        *logsumexp.stride()[:2], *strides(mask, 4), *strides(rows, 1),
        heads, num_queries, num_keys, key_blocks, float(scale * LOG2_E), float(1 / (scale * LOG2_E)),
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "MASK": mask_kind(mask), "PRECISION": dot_precision(query.dtype),
    }  # fmt: skip
    launch(attention_relevance_kernel, (programs, heads, batch), arguments, constants, config)
    if partial_query is None or relevance_key is None or relevance_value is None:
        return None, moved
    sums = partial_query[0] if programs == 1 else partial_query.sum(0)
    return (sums.mul_(query).to(query.dtype), relevance_key, relevance_value), moved
