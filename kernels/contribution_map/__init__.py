"""One layer's update of the whole contribution map, the update map never stored.

    U[i, j] = residual · [i = j] + factor · Σ_h w_h · c_h[j] · φ(P_h[i, j], G_h[i, j])
    out = diag(row_factors) · U · C

For all rows at once, where ``row_propagation`` follows a few: tiles of U are made on the fly, averaged over heads, and
multiplied at once, so that beside C and the result nothing is n × n, and nothing at all is H × n × n.

Sources: attention rollout of Abnar and Zuidema, "Quantifying Attention Flow in Transformers" (ACL 2020), and P·relu(G) of Chefer,
Gur and Wolf, "Generic Attention-model Explainability for Interpreting Bi-Modal and Encoder-Decoder Transformers" (ICCV 2021).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import (
    accumulation_dtype,
    expect_attention,
    expect_gradient,
    expect_mask,
    expect_same,
    expect_shape,
    register_operator,
)
from ..phi import WITH_GRADIENT, expect_phi
from .torch_tiles import contribution_map_tiles


def contribution_map(
    query: Tensor,
    key: Tensor,
    logsumexp: Tensor,
    contribution: Tensor,
    *,
    phi: str = "p",
    scale: float,
    value: Tensor | None = None,
    grad_out: Tensor | None = None,
    head_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    row_factors: Tensor | None = None,
    mask: Tensor | None = None,
    factor: float = 1.0,
    residual: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """diag(row_factors) · U · C of one attention layer.

    Args:
        query: (B, H, n, dh); any strides, so packed qkv views are read in place.
        key: (B, H, n, dh).
        logsumexp: (B, H, n), natural logarithm, of the scaled and masked scores.
        contribution: (B, n, c), C: how much column c contributes to token j so far; usually c = n.
        phi: as for ``row_propagation``; all but ``"p"`` need ``value`` and ``grad_out``.
        scale: factor of the scores, usually dh ** -0.5.
        value: (B, H, n, dv).
        grad_out: (B, H, n, dv), gradient of the explained scalar with respect to the attention output.
        head_weights: (B, H); the plain mean over heads where None.
        token_weights: (B, H, n), a factor per head and key token; 1 where None.
        row_factors: (B, n), a factor per row of the result; 1 where None.
        mask: broadcastable to (B, H, n, n): boolean, True where a key takes part, or added to the scores.
        factor: of the head average.
        residual: weight of the identity in U.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (B, n, c), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    expect_phi(phi)
    sizes: dict[str, int] = {}
    value, grad_out = expect_gradient(f"phi {phi!r}", value, grad_out) if phi in WITH_GRADIENT else (None, None)
    expect_attention(query, key, value, logsumexp, sizes, queries="n")
    expect_shape("contribution", contribution, ("B", "n", "c"), sizes)
    if grad_out is not None:
        expect_shape("grad_out", grad_out, ("B", "H", "n", "dv"), sizes)
        expect_same("grad_out", grad_out, "query", query)
    shapes = {"head_weights": ("B", "H"), "token_weights": ("B", "H", "n"), "row_factors": ("B", "n")}
    weights = {"head_weights": head_weights, "token_weights": token_weights, "row_factors": row_factors}
    for name, weight in weights.items():
        if weight is not None:
            expect_shape(name, weight, shapes[name], sizes)
    for name, other in {"contribution": contribution, **weights}.items():
        if other is not None:
            expect_same(name, other, "query", query, dtype=False)
    mask = None if mask is None else expect_mask(mask, "query", query, {**sizes, "m": sizes["n"]})
    return _operator(
        query, key, value, grad_out, logsumexp, contribution, head_weights, token_weights, row_factors, mask,
        float(scale), float(factor), float(residual), phi, backend,
    )  # fmt: skip


def _fake(
    query: Tensor,
    key: Tensor,  # noqa: ARG001
    value: Tensor | None,  # noqa: ARG001
    grad_out: Tensor | None,  # noqa: ARG001
    logsumexp: Tensor,  # noqa: ARG001
    contribution: Tensor,
    *rest: Any,  # noqa: ARG001
) -> Tensor:
    return torch.empty(contribution.shape, dtype=accumulation_dtype(query.dtype), device=query.device)


_operator = register_operator(
    "contribution_map(Tensor query, Tensor key, Tensor? value, Tensor? grad_out, Tensor logsumexp, Tensor contribution, "
    "Tensor? head_weights, Tensor? token_weights, Tensor? row_factors, Tensor? mask, float scale, float factor, "
    "float residual, str phi, str backend) -> Tensor",
    contribution_map_tiles,
    f"{__name__}.triton_kernel",
    "launch_map",
    _fake,
)
