"""One step of the running row through an attention layer, without the attention map.

    P_h[i, j] = exp(scale · q_h,i · k_h,j − logsumexp_h,i)          G_h[i, j] = grad_out_h,i · v_h,j
    out[b, κ, j] = Σ_h w[b, h] · c[b, h, j] · Σ_i rows[b, κ, i] · φ(P_h[i, j], G_h[i, j])

with φ = P (``"p"``) or P·relu(G) (``"p_relu_g"``). Rows of queries that carry no weight need not be passed: with m
query rows against n keys, ``rows`` is (B, K, m), so that a class-token row costs O(n·dh) instead of O(n²·dh).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype, expect_same, expect_shape, register_operator
from .torch_tiles import row_propagation_tiles

PHIS = ("p", "p_relu_g")


def row_propagation(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    *,
    phi: str = "p",
    scale: float,
    value: Tensor | None = None,
    grad_out: Tensor | None = None,
    head_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Propagate running rows through one attention layer; the head average is taken inside.

    Args:
        query: (B, H, m, dh), the rows of the map that ``rows`` weighs; any strides, so packed qkv views are read in place.
        key: (B, H, n, dh).
        logsumexp: (B, H, m), natural logarithm, of the scaled scores.
        rows: (B, K, m), the running rows; cast to the accumulation type.
        phi: ``"p"`` for the attention map, ``"p_relu_g"`` for P·relu(G), which needs ``value`` and ``grad_out``.
        scale: factor of the scores, usually dh ** -0.5.
        value: (B, H, n, dv).
        grad_out: (B, H, m, dv), gradient of the explained scalar with respect to the attention output.
        head_weights: (B, H); the plain mean over heads where None.
        token_weights: (B, H, n), a factor per head and key token; 1 where None.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (B, K, n), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    if phi not in PHIS:
        raise ValueError(f"unknown phi {phi!r}: expected one of {', '.join(PHIS)}")
    sizes: dict[str, int] = {}
    expect_shape("query", query, ("B", "H", "m", "dh"), sizes)
    expect_shape("key", key, ("B", "H", "n", "dh"), sizes)
    expect_shape("logsumexp", logsumexp, ("B", "H", "m"), sizes)
    expect_shape("rows", rows, ("B", "K", "m"), sizes)
    expect_same("key", key, "query", query)
    expect_same("logsumexp", logsumexp, "query", query, dtype=False)
    expect_same("rows", rows, "query", query, dtype=False)
    if phi == "p":
        value = grad_out = None
    elif value is None or grad_out is None:
        raise ValueError(f"phi {phi!r}: expected value and grad_out, received None")
    else:
        expect_shape("value", value, ("B", "H", "n", "dv"), sizes)
        expect_shape("grad_out", grad_out, ("B", "H", "m", "dv"), sizes)
        expect_same("value", value, "query", query)
        expect_same("grad_out", grad_out, "query", query)
    if head_weights is not None:
        expect_shape("head_weights", head_weights, ("B", "H"), sizes)
        expect_same("head_weights", head_weights, "query", query, dtype=False)
    if token_weights is not None:
        expect_shape("token_weights", token_weights, ("B", "H", "n"), sizes)
        expect_same("token_weights", token_weights, "query", query, dtype=False)
    return _operator(query, key, value, grad_out, logsumexp, rows, head_weights, token_weights, float(scale), phi, backend)


def _fake(query: Tensor, key: Tensor, value, grad_out, logsumexp, rows: Tensor, *rest: object) -> Tensor:  # noqa: ARG001
    shape = (query.shape[0], rows.shape[1], key.shape[2])
    return torch.empty(shape, dtype=accumulation_dtype(query.dtype), device=query.device)


_operator = register_operator(
    "row_propagation(Tensor query, Tensor key, Tensor? value, Tensor? grad_out, Tensor logsumexp, Tensor rows, "
    "Tensor? head_weights, Tensor? token_weights, float scale, str phi, str backend) -> Tensor",
    row_propagation_tiles,
    f"{__name__}.triton_kernel",
    _fake,
)
