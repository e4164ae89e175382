"""What both Triton kernels of this operation share: the weight of a token before normalisation, and the normalisation."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

BLOCK_TOKENS = 32
ROWWISE_STAGES = 2
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


def normalised(weights: Tensor, partial_sums: Tensor, necc: bool, necc_scale: float) -> Tensor:
    """Divide by the sum of exponentials over all tokens: (…, n) and (…, blocks) to (…, n)."""
    return weights * (necc_scale / partial_sums.sum(-1, keepdim=True)) if necc else weights
