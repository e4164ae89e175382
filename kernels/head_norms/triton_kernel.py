"""L2 head norms in Triton: values and gradients are read once, in their own precision; Gram matrices stay in registers.

A program owns a block of the two Gram matrices' columns and walks over the tokens. Where heads alone do not fill the device,
tokens are split over programs, and partial Gram matrices are added in a fixed order.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, tile_config
from ..triton_common import (
    check_dtype,
    dot_precision,
    load_head,
    load_tokens,
    padded_head_dim,
    splits_to_fill,
    with_unit_last_stride,
)

LARGEST_COLUMN_BLOCK = 64
LARGEST_SPLIT = 16


@triton.jit
def gram_block(
    pointer, stride_token, first, last, o_c, m_c,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Some columns of xᵀx over tokens first to last − 1, (BLOCK_D, BLOCK_C) float32."""
    b_gram = tl.zeros((BLOCK_D, BLOCK_C), dtype=tl.float32)
    for start in range(first, last, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T)
        m_t = o_t < last
        b_tokens = load_head(pointer, stride_token, o_t, m_t, HEAD_DIM, BLOCK_D)  # (BLOCK_T, BLOCK_D)
        if BLOCK_C == BLOCK_D:
            b_columns = b_tokens
        else:
            b_columns = load_tokens(pointer, stride_token, o_t, m_t, o_c, m_c)  # (BLOCK_T, BLOCK_C)
        b_gram += tl.dot(tl.trans(b_tokens), b_columns, input_precision=PRECISION)
    return b_gram


@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_splits"])
def l2_head_norms_kernel(
    value, grad_out, squares, grams,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    num_queries, num_keys, num_splits,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_T: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (column blocks × splits, H, B); ``squares`` (B, H, column blocks), or ``grams`` (B, H, splits, 2, dv, dv)."""
    i_split, i_c = tl.program_id(0) % num_splits, tl.program_id(0) // num_splits
    i_h, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    i_bh = i_b * tl.num_programs(1) + i_h
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < HEAD_DIM
    p_value = value + i_b * stride_value_batch + i_h * stride_value_head
    p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
    keys, queries = tl.cdiv(num_keys, num_splits), tl.cdiv(num_queries, num_splits)
    b_gram_value = gram_block(
        p_value, stride_value_token, i_split * keys, tl.minimum((i_split + 1) * keys, num_keys), o_c, m_c,
        HEAD_DIM, BLOCK_D, BLOCK_C, BLOCK_T, PRECISION,
    )  # fmt: skip
    b_gram_grad = gram_block(
        p_grad_out, stride_grad_token, i_split * queries, tl.minimum((i_split + 1) * queries, num_queries), o_c, m_c,
        HEAD_DIM, BLOCK_D, BLOCK_C, BLOCK_T, PRECISION,
    )  # fmt: skip
    if grams is None:
        column_blocks = tl.num_programs(0) // num_splits
        tl.store(squares + i_bh * column_blocks + i_c, tl.sum(tl.sum(b_gram_value * b_gram_grad, axis=1), axis=0))
    else:
        o_d = tl.arange(0, BLOCK_D)
        o_gram = o_d[:, None] * HEAD_DIM + o_c[None, :]
        m_gram = (o_d < HEAD_DIM)[:, None] & m_c[None, :]
        p_gram = grams + (i_bh * num_splits + i_split) * 2 * HEAD_DIM * HEAD_DIM
        tl.store(p_gram + o_gram, b_gram_value, mask=m_gram)
        tl.store(p_gram + HEAD_DIM * HEAD_DIM + o_gram, b_gram_grad, mask=m_gram)


def launch_norms(value: Tensor, grad_out: Tensor) -> Tensor:
    """See ``head_norms``: (B, H, n, dv) and (B, H, m, dv) to ‖G‖_F as (B, H) float32."""
    check_dtype(value)
    value, grad_out = with_unit_last_stride(value), with_unit_last_stride(grad_out)
    batch, heads, num_keys, head_dim = value.shape
    num_queries, device = grad_out.shape[2], value.device
    block_d = padded_head_dim(head_dim)
    config = tile_config("l2_head_norms", value, block_d, num_keys)
    block_c = min(LARGEST_COLUMN_BLOCK, block_d)
    column_blocks = triton.cdiv(head_dim, block_c)
    longest = min(LARGEST_SPLIT, triton.cdiv(max(num_keys, num_queries), config.block_m))
    splits = splits_to_fill(longest, batch * heads * column_blocks, device)
    squares = grams = None
    if splits == 1:
        squares = torch.empty(batch, heads, column_blocks, dtype=torch.float32, device=device)
    else:
        grams = torch.empty(batch, heads, splits, 2, head_dim, head_dim, dtype=torch.float32, device=device)
    arguments = (
        value, grad_out, squares, grams, *value.stride()[:3], *grad_out.stride()[:3], num_queries, num_keys, splits,
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_C": block_c, "BLOCK_T": config.block_m,
        "PRECISION": dot_precision(value.dtype),
    }  # fmt: skip
    launch(l2_head_norms_kernel, (column_blocks * splits, heads, batch), arguments, constants, config)
    if grams is not None:
        squares = grams.sum(2).prod(2).flatten(2)  # products of the two whole Gram matrices
    assert squares is not None
    return squares.sum(-1).clamp_min(0).sqrt()  # rounding can leave a tiny negative
