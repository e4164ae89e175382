"""What both Triton kernels of this operation share: the weight of a token before normalisation, and the normalisation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from ..launch_table import TileConfig

NORMALISE = TileConfig(block_m=256, block_n=64, num_warps=4, num_stages=2)  # tokens and partial sums at a time
TINY: tl.constexpr = tl.constexpr(1.1754943508222875e-38)


@triton.jit
def unnormalised_weight(b_dot, b_tokens_sq, b_transformed_sq, LENGTH: tl.constexpr, NECC: tl.constexpr):
    """Norm ratio × exp(cosine), and exp(cosine) for the denominator; a cosine is at most 1, so no maximum is needed."""
    b_norm_tokens = tl.sqrt(b_tokens_sq)
    b_norm_transformed = tl.sqrt(tl.maximum(b_transformed_sq, 0.0))
    b_exp = tl.exp(b_dot / tl.maximum(b_norm_tokens * b_norm_transformed, TINY))
    b_weight = b_norm_transformed / tl.maximum(b_norm_tokens, TINY) if LENGTH else tl.full(b_dot.shape, 1.0, tl.float32)
    if NECC:
        b_weight *= b_exp
    return b_weight, b_exp


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def normalise_kernel(weights, partial_sums, num_tokens, num_blocks, necc_scale, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """grid (token blocks, groups): ``weights`` (groups, n) times necc_scale / Σ ``partial_sums`` (groups, blocks), in place."""
    i_t, i_g = tl.program_id(0), tl.program_id(1).to(tl.int64)
    b_sums = tl.zeros((BLOCK_S,), dtype=tl.float32)
    for start in range(0, num_blocks, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        b_sums += tl.load(partial_sums + i_g * num_blocks + o_s, mask=o_s < num_blocks, other=0.0)
    o_t = i_t * BLOCK_T + tl.arange(0, BLOCK_T)
    p_weights = weights + i_g * num_tokens + o_t
    b_weights = tl.load(p_weights, mask=o_t < num_tokens, other=0.0)
    tl.store(p_weights, b_weights * (necc_scale / tl.sum(b_sums, axis=0)), mask=o_t < num_tokens)


def normalise(weights: Tensor, partial_sums: Tensor, necc_scale: float) -> None:
    """Divide, in place, by the sum of exponentials over all tokens: (…, n) by (…, blocks)."""
    num_tokens, num_blocks = weights.shape[-1], partial_sums.shape[-1]
    grid = (triton.cdiv(num_tokens, NORMALISE.block_m), weights.numel() // num_tokens)
    arguments = (weights, partial_sums, num_tokens, num_blocks, float(necc_scale))
    launch(normalise_kernel, grid, arguments, {"BLOCK_T": NORMALISE.block_m, "BLOCK_S": NORMALISE.block_n}, NORMALISE)
