"""The gradients of attention and the running row in one pass over the tiles.

    dv = Pᵀ dO        dS = P ⊙ (G − delta)        dq = scale · dS k        dk = scale · dSᵀ q        delta_i = out_i · dO_i
    S_h[j] = Σ_i rows[i] · φ(P_h[i, j], G_h[i, j])

P and G of a tile are what both need: a row step in a pass of its own makes them twice. Whether one pass beats the library's
backward followed by ``row_propagation`` depends on device and shape; ``choose.py`` reads the measured decision. The gradients are
made as in Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work Partitioning" (2023).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype, expect_attention, expect_mask, expect_same, expect_shape, register_operator
from ..phi import expect_phi
from .torch_tiles import attention_backward_tiles


def attention_backward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad_out: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    *,
    phi: str = "p",
    scale: float,
    mask: Tensor | None = None,
    norms: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, every head's own row, and the L1 norms of G.

    Args:
        query: (B, H, m, dh); any strides, so packed qkv views are read in place.
        key: (B, H, n, dh).
        value: (B, H, n, dv).
        out: (B, H, m, dv), what attention returned.
        grad_out: (B, H, m, dv), gradient of the explained scalar with respect to ``out``.
        logsumexp: (B, H, m), natural logarithm, of the scaled and masked scores.
        rows: (B, m), one running row an image.
        phi: as for ``row_propagation``.
        scale: factor of the scores, usually dh ** -0.5.
        mask: broadcastable to (B, H, m, n): boolean, True where a key takes part, or added to the scores.
        norms: also sum |G|.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        Gradients of query, key and value, in their shapes and dtype; S (B, H, n) and Σ|G| (B, H), float32 (float64 for
        float64 inputs), the last one empty without ``norms``.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    expect_phi(phi)
    sizes: dict[str, int] = {}
    expect_attention(query, key, value, logsumexp, sizes)
    expect_shape("rows", rows, ("B", "m"), sizes)
    expect_same("rows", rows, "query", query, dtype=False)
    for name, tensor in (("out", out), ("grad_out", grad_out)):
        expect_shape(name, tensor, ("B", "H", "m", "dv"), sizes)
        expect_same(name, tensor, "query", query)
    mask = None if mask is None else expect_mask(mask, "query", query, sizes)
    return _operator(query, key, value, out, grad_out, logsumexp, rows, mask, float(scale), phi, norms, backend)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    norms = rest[-2]
    moved = torch.empty(key.shape[:3], dtype=accumulation_dtype(query.dtype), device=key.device)
    gradients = (torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value))
    return *gradients, moved, moved.new_empty(key.shape[:2] if norms else 0)


_operator = register_operator(
    "attention_backward(Tensor query, Tensor key, Tensor value, Tensor out, Tensor grad_out, Tensor logsumexp, Tensor rows, "
    "Tensor? mask, float scale, str phi, bool norms, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    attention_backward_tiles,
    f"{__name__}.triton_kernel",
    "launch_backward",
    _fake,
)
