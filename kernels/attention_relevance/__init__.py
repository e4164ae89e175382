"""Layer-wise relevance propagation through attention in tiles: no (n, n) tensor is stored.

    P = exp(scale · Z + b − logsumexp)        Z = q kᵀ        T = R_O ⊘ O, made by the caller
    R_P = ½ P ⊙ (T vᵀ)                        E = R_P ⊘ (Z + b / scale)
    R_q = ½ q ⊙ (E k)        R_k = ½ k ⊙ (Eᵀ q)        R_v = ½ v ⊙ (Pᵀ T)
    S_h[j] = Σ_i rows[i] · relu(G_ij R_P_ij)        G = grad_out vᵀ; Σ_i rows[i] · relu(R_P_ij) without a gradient

b is the additive mask (a boolean one sets P to 0 instead), and a ⊘ b is a / (b + 1e-9) where b is not 0, else 0. The two halves
are the share of each factor of a product. Softmax and scale hand relevance on as it is. Rules: Chefer, Gur and Wolf, "Transformer
Interpretability Beyond Attention Visualization" (CVPR 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype, expect_attention, expect_mask, expect_same, expect_shape, register_operator
from .torch_tiles import relevance_backward_tiles, relevance_rows_tiles


def relevance_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ratio: Tensor,
    logsumexp: Tensor,
    *,
    rows: Tensor | None = None,
    grad_out: Tensor | None = None,
    scale: float,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Relevance of query, key and value, and every head's own row.

    Args:
        query: (B, H, m, dh); any strides, so packed qkv views are read in place. Fewer queries than keys are the leading ones.
        key: (B, H, n, dh).
        value: (B, H, n, dv).
        ratio: (B, H, m, dv), T: relevance of what attention returned over what it returned.
        logsumexp: (B, H, m), natural logarithm, of the scaled and masked scores.
        rows: (B, m), one running row an image; S is made where they are given.
        grad_out: (B, H, m, dv), of any floating dtype: gradient of the explained scalar with respect to the attention's output.
        scale: factor of the scores, usually dh ** -0.5.
        mask: broadcastable to (B, H, m, n): boolean, True where a key takes part, or added to the scores.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Relevance of query, key and value, in their shapes and dtype; S (B, H, n), float32 (float64 for float64 inputs), empty
        without ``rows``.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    if rows is None and grad_out is not None:
        raise ValueError("rows: expected a tensor beside grad_out, received None")
    grad_out, mask = _checked(query, key, value, ratio, logsumexp, rows, grad_out, mask)
    return _backward_operator(query, key, value, ratio, logsumexp, rows, grad_out, mask, float(scale), backend)


def relevance_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ratio: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    *,
    grad_out: Tensor | None = None,
    scale: float,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """S alone, for the block where a walk ends: (B, H, n). Arguments and errors are those of ``relevance_backward``."""
    grad_out, mask = _checked(query, key, value, ratio, logsumexp, rows, grad_out, mask)
    return _rows_operator(query, key, value, ratio, logsumexp, rows, grad_out, mask, float(scale), backend)


def _checked(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ratio: Tensor,
    logsumexp: Tensor,
    rows: Tensor | None,
    grad_out: Tensor | None,
    mask: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """``grad_out`` in query's dtype and the mask expanded, where all fit together."""
    sizes: dict[str, int] = {}
    expect_attention(query, key, value, logsumexp, sizes)
    expect_shape("ratio", ratio, ("B", "H", "m", "dv"), sizes)
    expect_same("ratio", ratio, "query", query)
    if rows is not None:
        expect_shape("rows", rows, ("B", "m"), sizes)
        expect_same("rows", rows, "query", query, dtype=False)
    if grad_out is not None:
        expect_shape("grad_out", grad_out, ("B", "H", "m", "dv"), sizes)
        expect_same("grad_out", grad_out, "query", query, dtype=False)
        if not grad_out.is_floating_point():
            raise ValueError(f"grad_out: expected a floating-point dtype, received {grad_out.dtype}")
        grad_out = grad_out.to(query.dtype)
    return grad_out, None if mask is None else expect_mask(mask, "query", query, sizes)


def _fake_rows(query: Tensor, key: Tensor, *_: Any) -> Tensor:
    return torch.empty(key.shape[:3], dtype=accumulation_dtype(query.dtype), device=key.device)


def _fake_backward(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    rows = rest[2]
    relevance = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value))
    moved = _fake_rows(query, key)
    return *relevance, moved if rows is not None else moved.new_empty(0)


_backward_operator = register_operator(
    "relevance_backward(Tensor query, Tensor key, Tensor value, Tensor ratio, Tensor logsumexp, Tensor? rows, Tensor? grad_out, "
    "Tensor? mask, float scale, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
    relevance_backward_tiles,
    f"{__name__}.triton_kernel",
    "launch_backward",
    _fake_backward,
)
_rows_operator = register_operator(
    "relevance_rows(Tensor query, Tensor key, Tensor value, Tensor ratio, Tensor logsumexp, Tensor rows, Tensor? grad_out, "
    "Tensor? mask, float scale, str backend) -> Tensor",
    relevance_rows_tiles,
    f"{__name__}.triton_kernel",
    "launch_rows",
    _fake_rows,
)
