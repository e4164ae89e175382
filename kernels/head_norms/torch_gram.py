"""L2 head norms in torch: two Gram matrices a head, by library products."""

from __future__ import annotations

from torch import Tensor

from ..dispatch import accumulation_dtype


def l2_head_norms_gram(value: Tensor, grad_out: Tensor) -> Tensor:
    """(B, H, n, dv) and (B, H, m, dv) to ‖G‖_F as (B, H)."""
    dtype = accumulation_dtype(value.dtype)
    gram_value, gram_grad = (tensor.to(dtype).transpose(-1, -2) @ tensor.to(dtype) for tensor in (value, grad_out))
    return (gram_value * gram_grad).sum((-1, -2)).clamp_min(0).sqrt()  # rounding can leave a tiny negative
