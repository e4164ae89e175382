"""``attention_backward`` in Triton: five products a tile, every tile made once, nothing added in an arbitrary order.

A program owns a share of one head's key blocks. It keeps a block's keys and values in place, walks over query blocks, and
from the tile of P and G that dk, dv and dq need anyway it weighs the running row. dq is summed over key blocks in a slab of
float32 partial sums of the program's own. A program that has all key blocks writes dq itself; shares are added in a fixed
order afterwards. Memory is linear in the number of tokens, and results repeat to the bit.
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
    weighed,
    with_unit_last_stride,
)

LARGEST_SPLIT = 8  # bounds the memory of dq's partial sums
DELTA_TOKENS = 64


@triton.jit(do_not_specialize=["num_heads", "num_queries"])
def delta_kernel(
    out, grad_out, delta,
    stride_out_batch, stride_out_head, stride_out_token, stride_grad_batch, stride_grad_head, stride_grad_token,
    num_heads, num_queries,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """grid (token blocks, H, B); ``delta`` (B, H, m): Σ_j P_ij G_ij, which is out_i · grad_out_i."""
    i_t, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < num_queries
    p_out = out + i_b * stride_out_batch + i_h * stride_out_head
    p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
    b_out = load_head(p_out, stride_out_token, o_t, m_t, HEAD_DIM, BLOCK_D).to(tl.float32)  # (BLOCK_T, BLOCK_D)
    b_grad_out = load_head(p_grad_out, stride_grad_token, o_t, m_t, HEAD_DIM, BLOCK_D).to(tl.float32)
    tl.store(delta + (i_b * num_heads + i_h) * num_queries + o_t, tl.sum(b_out * b_grad_out, axis=1), mask=m_t)


@triton.jit(do_not_specialize=[*LENGTHS, "num_queries", "num_keys", "num_blocks"])
def attention_backward_kernel(
    query, key, value, grad_out, logsumexp, delta, mask, rows, partial_grad_query, grad_query, grad_key, grad_value, moved, norms,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    stride_logsumexp_batch, stride_logsumexp_head,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_rows_batch,
    num_heads, num_queries, num_keys, num_blocks, scale, scale_log2,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PHI: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (splits, H, B); ``partial_grad_query`` (splits, B, H, m, dh), ``moved`` (B, H, n), ``norms`` (B, H, key blocks).

    ``grad_query`` is None where there are several splits, whose partial sums are yet to be added.
    """
    i_split, i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_bh = i_b * num_heads + i_h
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_query = query + i_b * stride_query_batch + i_h * stride_query_head
    p_key = key + i_b * stride_key_batch + i_h * stride_key_head
    p_value = value + i_b * stride_value_batch + i_h * stride_value_head
    p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
    p_logsumexp = logsumexp + i_b * stride_logsumexp_batch + i_h * stride_logsumexp_head
    p_slab = partial_grad_query + ((i_split * tl.num_programs(2) + i_b) * num_heads + i_h) * num_queries * HEAD_DIM
    for i_n in range(i_split, num_blocks, tl.num_programs(0)):
        tl.debug_barrier()  # the partial sums that the program's other threads have just written are read again
        num_summed = tl.minimum(i_n - i_split, 1) * num_queries  # none at the first block: so nobody has to clear the slab
        num_unfinished = tl.minimum((num_blocks - 1 - i_n) // tl.num_programs(0), 1) * num_queries  # none at the last
        o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
        m_n = o_n < num_keys
        b_key = load_head(p_key, stride_key_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        b_value = load_head(p_value, stride_value_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        b_grad_key = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        b_grad_value = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
        b_moved = tl.zeros((BLOCK_N,), dtype=tl.float32)
        b_norm = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, num_queries, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < num_queries
            b_query = load_head(p_query, stride_query_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            b_grad_out = load_head(p_grad_out, stride_grad_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
            b_lse = tl.load(p_logsumexp + o_m, mask=m_m, other=float("inf")).to(tl.float32) * KERNEL_LOG2_E
            b_delta = tl.load(delta + i_bh * num_queries + o_m, mask=m_m, other=0.0)  # (BLOCK_M,)
            b_rows = tl.load(rows + i_b * stride_rows_batch + o_m, mask=m_m, other=0.0)  # (BLOCK_M,)
            b_scores = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION) * scale_log2  # (BLOCK_N, BLOCK_M)
            if MASK != "none":
                p_mask = mask + i_b * stride_mask_batch + i_h * stride_mask_head
                b_scores += mask_tile(p_mask, stride_mask_key, stride_mask_query, o_n, o_m, m_n, m_m, MASK)
            b_map = probabilities(b_scores, b_lse[None, :], MASK)
            b_map = tl.where(m_n[:, None], b_map, 0.0)  # dq sums over keys: those beyond the last are none
            b_grad = tl.dot(b_value, tl.trans(b_grad_out), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
            b_moved += tl.sum(weighed(b_map, b_grad, PHI) * b_rows[None, :], axis=1)
            if norms is not None:
                b_norm += tl.sum(tl.abs(b_grad), axis=1)
            b_grad_value += tl.dot(b_map.to(b_grad_out.dtype), b_grad_out, input_precision=PRECISION)
            b_grad_scores = (b_map * (b_grad - b_delta[None, :])).to(b_query.dtype)
            b_grad_key += tl.dot(b_grad_scores, b_query, input_precision=PRECISION)
            b_grad_query = tl.dot(tl.trans(b_grad_scores), b_key, input_precision=PRECISION) * scale  # (BLOCK_M, BLOCK_D)
            o_sum = o_m.to(tl.int64)[:, None] * HEAD_DIM + o_d[None, :]
            b_grad_query += tl.load(p_slab + o_sum, mask=(o_m < num_summed)[:, None] & m_d[None, :], other=0.0)
            m_sum = m_m[:, None] & m_d[None, :]
            if grad_query is None:
                tl.store(p_slab + o_sum, b_grad_query, mask=m_sum)
            else:
                tl.store(p_slab + o_sum, b_grad_query, mask=(o_m < num_unfinished)[:, None] & m_d[None, :])
                p_finished = grad_query + i_bh * num_queries * HEAD_DIM + o_sum
                b_finished = b_grad_query.to(grad_query.dtype.element_ty)
                tl.store(p_finished, b_finished, mask=m_sum & (o_m >= num_unfinished)[:, None])
        p_out = (i_bh * num_keys + o_n.to(tl.int64))[:, None] * HEAD_DIM + o_d[None, :]
        m_out = m_n[:, None] & m_d[None, :]
        tl.store(grad_key + p_out, (b_grad_key * scale).to(grad_key.dtype.element_ty), mask=m_out)
        tl.store(grad_value + p_out, b_grad_value.to(grad_value.dtype.element_ty), mask=m_out)
        tl.store(moved + i_bh * num_keys + o_n, b_moved, mask=m_n)
        if norms is not None:
            tl.store(norms + i_bh * num_blocks + i_n, tl.sum(b_norm, axis=0))


def launch_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad_out: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scale: float,
    phi: str,
    norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``attention_backward``."""
    check_dtype(query)
    query, key, value, out, grad_out = map(with_unit_last_stride, (query, key, value, out, grad_out))
    batch, heads, num_queries, head_dim = query.shape
    num_keys, device = key.shape[2], query.device
    check_value_width(head_dim, value)
    block_d = padded_head_dim(head_dim)
    config = tile_config("attention_backward", query, block_d, num_keys)
    key_blocks = triton.cdiv(num_keys, config.block_n)
    splits = splits_to_fill(min(key_blocks, LARGEST_SPLIT), batch * heads, device)
    delta = torch.empty(batch, heads, num_queries, dtype=torch.float32, device=device)
    shape = {"HEAD_DIM": head_dim, "BLOCK_D": block_d}
    launch(
        delta_kernel, (triton.cdiv(num_queries, DELTA_TOKENS), heads, batch),
        (out, grad_out, delta, *out.stride()[:3], *grad_out.stride()[:3], heads, num_queries),
        {**shape, "BLOCK_T": DELTA_TOKENS}, config,
    )  # fmt: skip
    partial_grad_query = torch.empty(splits, batch, heads, num_queries, head_dim, dtype=torch.float32, device=device)
    grad_key, grad_value = (torch.empty(tensor.shape, dtype=tensor.dtype, device=device) for tensor in (key, value))
    grad_query = torch.empty(query.shape, dtype=query.dtype, device=device) if splits == 1 else None
    moved = torch.empty(batch, heads, num_keys, dtype=torch.float32, device=device)
    partial_norms = torch.empty(batch, heads, key_blocks, dtype=torch.float32, device=device) if norms else None
    logsumexp, rows = with_unit_last_stride(logsumexp.float()), with_unit_last_stride(rows.float())
    arguments = (
        query, key, value, grad_out, logsumexp, delta, mask_pointer(mask), rows,
        partial_grad_query, grad_query, grad_key, grad_value, moved, partial_norms,
        *query.stride()[:3], *key.stride()[:3], *value.stride()[:3], *grad_out.stride()[:3],
        *logsumexp.stride()[:2], *strides(mask, 4), rows.stride(0),
        heads, num_queries, num_keys, key_blocks, float(scale), float(scale * LOG2_E),
    )  # fmt: skip
    constants = {
        **shape, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n,
        "PHI": phi, "MASK": mask_kind(mask), "PRECISION": dot_precision(query.dtype),
    }  # fmt: skip
    launch(attention_backward_kernel, (splits, heads, batch), arguments, constants, config)
    if grad_query is None:
        grad_query = partial_grad_query.sum(0).to(query.dtype)
    return grad_query, grad_key, grad_value, moved, moved.new_empty(0) if partial_norms is None else partial_norms.sum(-1)
