"""``attention_token_transformation`` in Triton: a program owns a block of tokens and walks over heads."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, tile_config
from ..triton_common import check_dtype, dot_precision, load_tokens, padded_head_dim, with_unit_last_stride
from .common import normalise, unnormalised_weight

BLOCK_COLUMNS = 32


@triton.jit(do_not_specialize=["num_heads", "num_tokens", "num_dims"])
def attention_token_transformation_kernel(
    tokens, value, projection, gram, weights, partial_sums,
    stride_tokens_batch, stride_tokens_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_projection_batch, stride_projection_head, stride_projection_token,
    num_heads, num_tokens, num_dims,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_C: tl.constexpr,
    LENGTH: tl.constexpr, NECC: tl.constexpr, SPLIT_GRAM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (token blocks, B); ``weights`` (B, H, n), ``partial_sums`` (B, H, token blocks), ``gram`` (H, dv, dv)."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    o_d = tl.arange(0, BLOCK_D)
    m_t, m_d = o_t < num_tokens, o_d < HEAD_DIM
    b_tokens_sq = tl.zeros((BLOCK_T,), dtype=tl.float32)
    p_tokens = tokens + i_b * stride_tokens_batch
    for start in range(0, num_dims, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        b_tokens = load_tokens(p_tokens, stride_tokens_token, o_t, m_t, o_w, o_w < num_dims).to(tl.float32)  # (BLOCK_T, BLOCK_W)
        b_tokens_sq += tl.sum(b_tokens * b_tokens, axis=1)
    for head in range(num_heads):
        i_h = tl.cast(head, tl.int64)
        i_bh = i_b * num_heads + i_h
        p_value = value + i_b * stride_value_batch + i_h * stride_value_head
        p_projection = projection + i_b * stride_projection_batch + i_h * stride_projection_head
        b_value = load_tokens(p_value, stride_value_token, o_t, m_t, o_d, m_d)  # (BLOCK_T, BLOCK_D)
        b_projection = load_tokens(p_projection, stride_projection_token, o_t, m_t, o_d, m_d)  # (BLOCK_T, BLOCK_D)
        b_dot = tl.sum(b_value.to(tl.float32) * b_projection.to(tl.float32), axis=1)
        b_transformed_sq = tl.zeros((BLOCK_T,), dtype=tl.float32)
        for start in range(0, HEAD_DIM, BLOCK_C):  # a block of the Gram matrix' columns at a time: it may not fit at once
            o_c = start + tl.arange(0, BLOCK_C)
            m_c = o_c < HEAD_DIM
            b_gram = load_tokens(gram + i_h * HEAD_DIM * HEAD_DIM, HEAD_DIM, o_d, m_d, o_c, m_c)  # (BLOCK_D, BLOCK_C)
            b_coarse = b_gram.to(b_value.dtype)
            b_moved = tl.dot(b_value, b_coarse, input_precision=PRECISION)  # (BLOCK_T, BLOCK_C)
            if SPLIT_GRAM:  # a quadratic form in a rounded matrix loses digits: add what the rounding took away
                b_moved += tl.dot(b_value, (b_gram - b_coarse.to(tl.float32)).to(b_value.dtype), input_precision=PRECISION)
            b_columns = load_tokens(p_value, stride_value_token, o_t, m_t, o_c, m_c).to(tl.float32)  # (BLOCK_T, BLOCK_C)
            b_transformed_sq += tl.sum(b_moved * b_columns, axis=1)
        b_weight, b_exp = unnormalised_weight(b_dot, b_tokens_sq, b_transformed_sq, LENGTH, NECC)
        tl.store(weights + i_bh * num_tokens + o_t, b_weight, mask=m_t)
        if NECC:
            tl.store(partial_sums + i_bh * tl.num_programs(0) + i_t, tl.sum(tl.where(m_t, b_exp, 0.0), axis=0))


def launch_heads(
    tokens: Tensor, value: Tensor, projection: Tensor, gram: Tensor, length: bool, necc: bool, necc_scale: float
) -> Tensor:
    """See ``attention_token_transformation``: returns (B, H, n) float32."""
    check_dtype(tokens)
    tokens, value, projection = map(with_unit_last_stride, (tokens, value, projection))
    batch, heads, num_tokens, head_dim = value.shape
    block_d = padded_head_dim(head_dim)
    config = tile_config("attention_token_transformation", tokens, block_d, num_tokens)
    blocks = triton.cdiv(num_tokens, config.block_m)
    weights = torch.empty(batch, heads, num_tokens, dtype=torch.float32, device=tokens.device)
    partial_sums = torch.empty(batch, heads, blocks, dtype=torch.float32, device=tokens.device) if necc else None
    arguments = (
        tokens, value, projection, gram.contiguous(), weights, partial_sums,
        *tokens.stride()[:2], *value.stride()[:3], *projection.stride()[:3], heads, num_tokens, tokens.shape[2],
    )  # fmt: skip
    constants = {
        "HEAD_DIM": head_dim, "BLOCK_D": block_d, "BLOCK_T": config.block_m, "BLOCK_W": config.block_n,
        "BLOCK_C": min(BLOCK_COLUMNS, block_d), "LENGTH": length, "NECC": necc,
        "SPLIT_GRAM": value.dtype != torch.float32, "PRECISION": dot_precision(value.dtype),
    }  # fmt: skip
    launch(attention_token_transformation_kernel, (blocks, batch), arguments, constants, config)
    if partial_sums is not None:
        normalise(weights, partial_sums, necc_scale)
    return weights
