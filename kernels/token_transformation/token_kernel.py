"""``token_transformation`` in Triton: each input is read once; a program owns a block of tokens and walks over the width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import check_dtype, load_tokens, with_unit_last_stride
from .common import BLOCK_TOKENS, ROWWISE_STAGES, normalised, unnormalised_weight

BLOCK_WIDTH = 128


@triton.jit(do_not_specialize=["num_tokens"])
def token_transformation_kernel(
    tokens, transformed, weights, partial_sums,
    stride_tokens_batch, stride_tokens_token, stride_transformed_batch, stride_transformed_token,
    num_tokens, width,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, LENGTH: tl.constexpr, NECC: tl.constexpr,
):  # fmt: skip
    """grid (token blocks, B); ``weights`` (B, n), ``partial_sums`` (B, token blocks)."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < num_tokens
    b_dot = tl.zeros((BLOCK_T,), dtype=tl.float32)
    b_tokens_sq = tl.zeros((BLOCK_T,), dtype=tl.float32)
    b_transformed_sq = tl.zeros((BLOCK_T,), dtype=tl.float32)
    p_tokens = tokens + i_b * stride_tokens_batch
    p_transformed = transformed + i_b * stride_transformed_batch
    for start in range(0, width, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        m_w = o_w < width
        b_tokens = load_tokens(p_tokens, stride_tokens_token, o_t, m_t, o_w, m_w).to(tl.float32)  # (BLOCK_T, BLOCK_W)
        b_transformed = load_tokens(p_transformed, stride_transformed_token, o_t, m_t, o_w, m_w).to(tl.float32)
        b_dot += tl.sum(b_tokens * b_transformed, axis=1)
        b_tokens_sq += tl.sum(b_tokens * b_tokens, axis=1)
        b_transformed_sq += tl.sum(b_transformed * b_transformed, axis=1)
    b_weight, b_exp = unnormalised_weight(b_dot, b_tokens_sq, b_transformed_sq, LENGTH, NECC)
    tl.store(weights + i_b * num_tokens + o_t, b_weight, mask=m_t)
    tl.store(partial_sums + i_b * tl.num_programs(0) + i_t, tl.sum(tl.where(m_t, b_exp, 0.0), axis=0))


def launch(tokens: Tensor, transformed: Tensor, length: bool, necc: bool, necc_scale: float) -> Tensor:
    """See ``token_transformation``: (B, n, d) twice to (B, n) float32."""
    check_dtype(tokens)
    tokens, transformed = with_unit_last_stride(tokens), with_unit_last_stride(transformed)
    batch, num_tokens, width = tokens.shape
    blocks = triton.cdiv(num_tokens, BLOCK_TOKENS)
    weights = torch.empty(batch, num_tokens, dtype=torch.float32, device=tokens.device)
    partial_sums = torch.empty(batch, blocks, dtype=torch.float32, device=tokens.device)
    token_transformation_kernel[(blocks, batch)](
        tokens, transformed, weights, partial_sums, *tokens.stride()[:2], *transformed.stride()[:2], num_tokens, width,
        BLOCK_T=BLOCK_TOKENS, BLOCK_W=BLOCK_WIDTH, LENGTH=length, NECC=necc, num_warps=4, num_stages=ROWWISE_STAGES,
    )  # fmt: skip
    return normalised(weights, partial_sums, necc, necc_scale)
