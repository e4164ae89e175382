"""``token_transformation`` in Triton: each input is read once; a program owns a block of tokens and walks over the width."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, tile_config
from ..triton_common import check_dtype, load_tokens, strides, with_unit_last_stride
from .common import normalise, unnormalised_weight

ANY_WIDTH = 128  # the launch table's column for head widths, which this kernel does not have


@triton.jit(do_not_specialize=["num_tokens", "num_dims"])
def token_transformation_kernel(
    tokens, branch, transformed, weights, partial_sums, summed,
    stride_tokens_batch, stride_tokens_token, stride_branch_batch, stride_branch_token,
    stride_transformed_batch, stride_transformed_token,
    num_tokens, num_dims,
    BLOCK_T: tl.constexpr, BLOCK_W: tl.constexpr, LENGTH: tl.constexpr, NECC: tl.constexpr,
):  # fmt: skip
    """grid (token blocks, B); ``weights`` (B, n), ``partial_sums`` (B, token blocks), ``summed`` (B, n, d) or None."""
    i_t, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < num_tokens
    b_dot = tl.zeros((BLOCK_T,), dtype=tl.float32)
    b_tokens_sq = tl.zeros((BLOCK_T,), dtype=tl.float32)
    b_transformed_sq = tl.zeros((BLOCK_T,), dtype=tl.float32)
    p_tokens = tokens + i_b * stride_tokens_batch
    p_transformed = transformed + i_b * stride_transformed_batch
    for start in range(0, num_dims, BLOCK_W):
        o_w = start + tl.arange(0, BLOCK_W)
        m_w = o_w < num_dims
        b_tokens = load_tokens(p_tokens, stride_tokens_token, o_t, m_t, o_w, m_w).to(tl.float32)  # (BLOCK_T, BLOCK_W)
        if branch is not None:
            b_branch = load_tokens(branch + i_b * stride_branch_batch, stride_branch_token, o_t, m_t, o_w, m_w)
            b_summed = (b_tokens + b_branch.to(tl.float32)).to(summed.dtype.element_ty)
            p_summed = summed + (i_b * num_tokens + o_t)[:, None] * num_dims + o_w[None, :]
            tl.store(p_summed, b_summed, mask=m_t[:, None] & m_w[None, :])
            b_tokens = b_summed.to(tl.float32)  # as the model would read it back
        b_transformed = load_tokens(p_transformed, stride_transformed_token, o_t, m_t, o_w, m_w).to(tl.float32)
        b_dot += tl.sum(b_tokens * b_transformed, axis=1)
        b_tokens_sq += tl.sum(b_tokens * b_tokens, axis=1)
        b_transformed_sq += tl.sum(b_transformed * b_transformed, axis=1)
    b_weight, b_exp = unnormalised_weight(b_dot, b_tokens_sq, b_transformed_sq, LENGTH, NECC)
    tl.store(weights + i_b * num_tokens + o_t, b_weight, mask=m_t)
    if NECC:
        tl.store(partial_sums + i_b * tl.num_programs(0) + i_t, tl.sum(tl.where(m_t, b_exp, 0.0), axis=0))


def launch_tokens(
    tokens: Tensor, branch: Tensor | None, transformed: Tensor, length: bool, necc: bool, necc_scale: float
) -> tuple[Tensor, Tensor]:
    """See ``token_transformation``: weights (B, n) float32, and tokens + branch (empty without ``branch``)."""
    check_dtype(tokens)
    tokens, branch, transformed = (
        with_unit_last_stride(tokens), with_unit_last_stride(branch), with_unit_last_stride(transformed),
    )  # fmt: skip
    batch, num_tokens, width = tokens.shape
    config = tile_config("token_transformation", tokens, ANY_WIDTH, num_tokens)
    blocks = triton.cdiv(num_tokens, config.block_m)
    weights = torch.empty(batch, num_tokens, dtype=torch.float32, device=tokens.device)
    partial_sums = torch.empty(batch, blocks, dtype=torch.float32, device=tokens.device) if necc else None
    summed = None if branch is None else torch.empty(tokens.shape, dtype=tokens.dtype, device=tokens.device)
    arguments = (
        tokens, branch, transformed, weights, partial_sums, summed,
        *strides(tokens, 2), *strides(branch, 2), *strides(transformed, 2), num_tokens, width,
    )  # fmt: skip
    constants = {"BLOCK_T": config.block_m, "BLOCK_W": config.block_n, "LENGTH": length, "NECC": necc}
    launch(token_transformation_kernel, (blocks, batch), arguments, constants, config)
    if partial_sums is not None:
        normalise(weights, partial_sums, necc_scale)
    return weights, tokens.new_empty(0) if summed is None else summed
