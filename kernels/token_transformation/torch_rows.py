"""``token_transformation`` and ``attention_token_transformation`` in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype


def token_transformation_rows(
    tokens: Tensor, branch: Tensor | None, transformed: Tensor, length: bool, necc: bool, necc_scale: float
) -> tuple[Tensor, Tensor]:
    """See ``token_transformation``: weights (B, n), and tokens + branch (empty without ``branch``)."""
    dtype = accumulation_dtype(tokens.dtype)
    entering = tokens if branch is None else tokens + branch
    wide, moved = entering.to(dtype), transformed.to(dtype)
    norm_entering, norm_moved = (torch.linalg.vector_norm(vectors, dim=-1) for vectors in (wide, moved))
    weights = _weights(_inner_product(wide, moved), norm_entering, norm_moved, length, necc, necc_scale)
    return weights, tokens.new_empty(0) if branch is None else entering


def attention_token_transformation_rows(
    tokens: Tensor, value: Tensor, projection: Tensor, gram: Tensor, length: bool, necc: bool, necc_scale: float
) -> Tensor:
    """See ``attention_token_transformation``: ``projection`` (B, H, n, dv) is x W_hᵀ, ``gram`` (H, dv, dv); returns (B, H, n)."""
    dtype = accumulation_dtype(tokens.dtype)
    value = value.to(dtype)
    dot = _inner_product(value, projection.to(dtype))
    norm_transformed = _inner_product(value @ gram.to(dtype), value).clamp_min(0).sqrt()
    norm_tokens = torch.linalg.vector_norm(tokens.to(dtype), dim=-1).unsqueeze(1)  # (B, 1, n)
    return _weights(dot, norm_tokens, norm_transformed, length, necc, necc_scale)


def _inner_product(left: Tensor, right: Tensor) -> Tensor:
    return torch.linalg.vecdot(left, right, dim=-1)


def _weights(dot: Tensor, norm_tokens: Tensor, norm_transformed: Tensor, length: bool, necc: bool, necc_scale: float) -> Tensor:
    tiny = torch.finfo(dot.dtype).tiny
    weights = norm_transformed / norm_tokens.clamp_min(tiny) if length else torch.ones_like(norm_transformed)
    if necc:
        cosine = dot / (norm_tokens * norm_transformed).clamp_min(tiny)
        weights = weights * necc_scale * cosine.softmax(-1)
    return weights
