"""One step of the running row through an attention layer, without the attention map.

    P_h[i, j] = exp(scale · q_h,i · k_h,j + mask_h[i, j] − logsumexp_h,i)          G_h[i, j] = grad_out_h,i · v_h,j
    S_h[κ, j] = Σ_i rows[κ, i] · φ(P_h[i, j], G_h[i, j])
    out[κ, j] = residual · rows[κ, j] + factor · Σ_h w_h · c_h[j] · S_h[κ, j]

with φ one of P (``"p"``), P·relu(G) (``"p_relu_g"``), P·G (``"p_g"``), relu(G) (``"relu_g"``), |G| (``"abs_g"``). Rows of
queries that carry no weight need not be passed: with m query rows against n keys, ``rows`` is (B, K, m), so that a
class-token row, which is one-hot, costs O(n·dh) instead of O(n²·dh).

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
from ..phi import PHIS, WITH_GRADIENT, WITH_MAP, expect_phi
from .torch_tiles import row_propagation_by_head_tiles, row_propagation_tiles


def row_propagation(
    query: Tensor | None,
    key: Tensor | None,
    logsumexp: Tensor | None,
    rows: Tensor,
    *,
    phi: str = "p",
    scale: float,
    value: Tensor | None = None,
    grad_out: Tensor | None = None,
    head_weights: Tensor | None = None,
    token_weights: Tensor | None = None,
    mask: Tensor | None = None,
    factor: float = 1.0,
    residual: float = 0.0,
    backend: str = "auto",
) -> Tensor:
    """Propagate running rows through one attention layer; the head average is taken inside.

    Args:
        query: (B, H, m, dh), the rows of the map that ``rows`` weighs; any strides, so packed qkv views are read in place.
            None where φ reads G alone, as ``key`` and ``logsumexp``.
        key: (B, H, n, dh).
        logsumexp: (B, H, m), natural logarithm, of the scaled and masked scores.
        rows: (B, K, m), the running rows; cast to the accumulation type.
        phi: ``"p"``, ``"p_relu_g"``, ``"p_g"``, ``"relu_g"`` or ``"abs_g"``; all but the first need ``value`` and ``grad_out``.
        scale: factor of the scores, usually dh ** -0.5.
        value: (B, H, n, dv).
        grad_out: (B, H, m, dv), gradient of the explained scalar with respect to the attention output.
        head_weights: (B, H); the plain mean over heads where None.
        token_weights: (B, H, n), a factor per head and key token; 1 where None.
        mask: broadcastable to (B, H, m, n): boolean, True where a key takes part, or added to the scores.
        factor: of the head average.
        residual: weight of the rows themselves in the result, of tokens 0 to m − 1.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (B, K, n), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    expect_phi(phi)
    sizes: dict[str, int] = {}
    query, key, logsumexp, value, grad_out, mask = _checked(query, key, logsumexp, value, grad_out, mask, sizes, phi)
    source_name, source = ("query", query) if phi in WITH_MAP else ("grad_out", grad_out)
    assert source is not None, "what a φ reads has been checked"
    expect_shape("rows", rows, ("B", "K", "m"), sizes)
    expect_same("rows", rows, source_name, source, dtype=False)
    if head_weights is not None:
        expect_shape("head_weights", head_weights, ("B", "H"), sizes)
        expect_same("head_weights", head_weights, source_name, source, dtype=False)
    if token_weights is not None:
        expect_shape("token_weights", token_weights, ("B", "H", "n"), sizes)
        expect_same("token_weights", token_weights, source_name, source, dtype=False)
    if residual and sizes["m"] > sizes["n"]:
        raise ValueError(f"residual: expected at most n={sizes['n']} query rows, received {sizes['m']}")
    return _rows_operator(
        query,
        key,
        value,
        grad_out,
        logsumexp,
        rows,
        head_weights,
        token_weights,
        mask,
        float(scale),
        float(factor),
        float(residual),
        phi,
        backend,
    )


def row_propagation_by_head(
    query: Tensor | None,
    key: Tensor | None,
    logsumexp: Tensor | None,
    rows: Tensor,
    *,
    phi: str = "p",
    scale: float,
    value: Tensor | None = None,
    grad_out: Tensor | None = None,
    mask: Tensor | None = None,
    norms: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Every head's own row S_h and, in the same pass over the tiles, Σ_ij |G_h[i, j]|: for weights that depend on the norms.

    Args:
        query, key, logsumexp: (B, H, m, dh), (B, H, n, dh), (B, H, m), as for ``row_propagation``.
        rows: (B, m), one row an image.
        value, grad_out: (B, H, n, dv) and (B, H, m, dv), as for ``row_propagation``.
        mask: broadcastable to (B, H, m, n): boolean, True where a key takes part, or added to the scores.
        norms: also sum |G| over the passed query rows; needs ``value`` and ``grad_out`` whatever φ is.
        phi, scale, backend: as for ``row_propagation``.

    Returns:
        (B, H, n) and (B, H), float32 (float64 for float64 inputs); without ``norms`` the second is empty.

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    expect_phi(phi)
    sizes: dict[str, int] = {}
    query, key, logsumexp, value, grad_out, mask = _checked(query, key, logsumexp, value, grad_out, mask, sizes, phi, norms=norms)
    source_name, source = ("query", query) if phi in WITH_MAP else ("grad_out", grad_out)
    assert source is not None, "what a φ reads has been checked"
    expect_shape("rows", rows, ("B", "m"), sizes)
    expect_same("rows", rows, source_name, source, dtype=False)
    return _by_head_operator(query, key, value, grad_out, logsumexp, rows, mask, float(scale), phi, norms, backend)


def _checked(
    query: Tensor | None,
    key: Tensor | None,
    logsumexp: Tensor | None,
    value: Tensor | None,
    grad_out: Tensor | None,
    mask: Tensor | None,
    sizes: dict[str, int],
    phi: str,
    *,
    norms: bool = False,
) -> tuple[Tensor | None, ...]:
    """The inputs, checked; those that neither φ nor the norms of G read are None."""
    uses_map, uses_grad = phi in WITH_MAP, phi in WITH_GRADIENT or norms
    if uses_map:
        if query is None or key is None or logsumexp is None:
            name = "query" if query is None else "key" if key is None else "logsumexp"
            raise ValueError(f"{name}: expected a tensor, received None")
        expect_attention(query, key, None, logsumexp, sizes)
    if uses_grad:
        value, grad_out = expect_gradient(f"phi {phi!r}" if phi in WITH_GRADIENT else "norms", value, grad_out)
        expect_shape("grad_out", grad_out, ("B", "H", "m", "dv"), sizes)
        expect_shape("value", value, ("B", "H", "n", "dv"), sizes)
        expect_same("value", value, "grad_out", grad_out)
        if query is not None and uses_map:
            expect_same("grad_out", grad_out, "query", query)
    if mask is not None and query is not None and uses_map:
        mask = expect_mask(mask, "query", query, sizes)
    if not uses_map:
        query = key = logsumexp = mask = None
    if not uses_grad:
        value = grad_out = None
    return query, key, logsumexp, value, grad_out, mask


def _rows_fake(
    query: Tensor | None,  # noqa: ARG001
    key: Tensor | None,
    value: Tensor | None,
    grad_out: Tensor | None,  # noqa: ARG001
    logsumexp: Tensor | None,  # noqa: ARG001
    rows: Tensor,
    *rest: Any,  # noqa: ARG001
) -> Tensor:
    keys = value if key is None else key
    assert keys is not None, "a φ reads the map or its gradient"
    shape = (rows.shape[0], rows.shape[1], keys.shape[2])
    return torch.empty(shape, dtype=accumulation_dtype(keys.dtype), device=rows.device)


def _by_head_fake(
    query: Tensor | None,  # noqa: ARG001
    key: Tensor | None,
    value: Tensor | None,
    grad_out: Tensor | None,  # noqa: ARG001
    logsumexp: Tensor | None,  # noqa: ARG001
    rows: Tensor,  # noqa: ARG001
    mask: Tensor | None,  # noqa: ARG001
    scale: float,  # noqa: ARG001
    phi: str,  # noqa: ARG001
    norms: bool,
    backend: str,  # noqa: ARG001
) -> tuple[Tensor, Tensor]:
    keys = value if key is None else key
    assert keys is not None, "a φ reads the map or its gradient"
    out = torch.empty((*keys.shape[:2], keys.shape[2]), dtype=accumulation_dtype(keys.dtype), device=keys.device)
    return out, out.new_empty(keys.shape[:2] if norms else 0)


_INPUTS = "Tensor? query, Tensor? key, Tensor? value, Tensor? grad_out, Tensor? logsumexp, Tensor rows"
_rows_operator = register_operator(
    f"row_propagation({_INPUTS}, Tensor? head_weights, Tensor? token_weights, Tensor? mask, float scale, float factor, "
    "float residual, str phi, str backend) -> Tensor",
    row_propagation_tiles,
    f"{__name__}.triton_kernel",
    "launch_rows",
    _rows_fake,
)
_by_head_operator = register_operator(
    f"row_propagation_by_head({_INPUTS}, Tensor? mask, float scale, str phi, bool norms, str backend) -> (Tensor, Tensor)",
    row_propagation_by_head_tiles,
    f"{__name__}.triton_kernel",
    "launch_by_head",
    _by_head_fake,
)

__all__ = ["PHIS", "row_propagation", "row_propagation_by_head"]
