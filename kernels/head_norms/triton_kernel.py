"""L1 head norms in Triton: each program reduces one key block of one head over all queries; partial sums add in order."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton_common import check_dtype, dot_precision, load_tokens, padded_head_dim, tile_config, with_unit_last_stride


@triton.jit(do_not_specialize=["num_queries", "num_keys"])
def l1_head_norms_kernel(
    value, grad_out, out,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    num_queries, num_keys,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (key blocks, H, B); ``out`` (B, H, key blocks)."""
    i_n, i_h, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < HEAD_DIM
    p_value = value + i_b * stride_value_batch + i_h * stride_value_head
    p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
    b_value = load_tokens(p_value, stride_value_token, o_n, o_n < num_keys, o_d, m_d)  # (BLOCK_N, BLOCK_D)
    b_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, num_queries, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        b_grad_out = load_tokens(p_grad_out, stride_grad_token, o_m, o_m < num_queries, o_d, m_d)  # (BLOCK_M, BLOCK_D)
        b_sum += tl.sum(tl.abs(tl.dot(b_grad_out, tl.trans(b_value), input_precision=PRECISION)), axis=0)
    tl.store(out + (i_b * tl.num_programs(1) + i_h) * tl.num_programs(0) + i_n, tl.sum(b_sum, axis=0))


def launch(value: Tensor, grad_out: Tensor) -> Tensor:
    """See ``head_norms``: (B, H, n, dv) and (B, H, m, dv) to Σ|G| as (B, H) float32."""
    check_dtype(value)
    value, grad_out = with_unit_last_stride(value), with_unit_last_stride(grad_out)
    batch, heads, num_keys, head_dim = value.shape
    block_d = padded_head_dim(head_dim)
    config = tile_config(value.dtype, block_d)
    key_blocks = triton.cdiv(num_keys, config.block_n)
    out = torch.empty(batch, heads, key_blocks, dtype=torch.float32, device=value.device)
    l1_head_norms_kernel[(key_blocks, heads, batch)](
        value, grad_out, out, *value.stride()[:3], *grad_out.stride()[:3], grad_out.shape[2], num_keys,
        HEAD_DIM=head_dim, BLOCK_D=block_d, BLOCK_M=config.block_m, BLOCK_N=config.block_n,
        PRECISION=dot_precision(value.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    return out.sum(-1)
