"""Norms of the attention map's gradient G_h = grad_out_h · value_hᵀ per head, without forming it.

L2: ‖G_h‖_F² = ⟨grad_out_hᵀ grad_out_h, value_hᵀ value_h⟩        two dh × dh Gram matrices, O(n·dh²)
L1: Σ_ij |grad_out_h,i · value_h,j|                              the tiles of ``row_propagation`` with φ = |G|, O(n²·dh)

Where a row is propagated through the same layer anyway, ``row_propagation_by_head`` gives the L1 norms in that pass. Weights of
heads by these norms are those of GMAR ("GMAR: Gradient-Driven Multi-Head Attention Rollout", 2025).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype, expect_same, expect_shape, register_operator
from ..row_propagation import row_propagation_by_head
from .torch_gram import l2_head_norms_gram

NORMS = ("l1", "l2")


def head_norms(value: Tensor, grad_out: Tensor, *, norm: str = "l1", backend: str = "auto") -> Tensor:
    """Norm of G per image and head.

    Args:
        value: (B, H, n, dv).
        grad_out: (B, H, m, dv), gradient of the explained scalar with respect to the attention output.
        norm: ``"l1"``, the sum of |G|, or ``"l2"``, the Frobenius norm.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (B, H), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    if norm not in NORMS:
        raise ValueError(f"norm: expected one of {', '.join(NORMS)}, received {norm!r}")
    sizes: dict[str, int] = {}
    expect_shape("value", value, ("B", "H", "n", "dv"), sizes)
    expect_shape("grad_out", grad_out, ("B", "H", "m", "dv"), sizes)
    expect_same("grad_out", grad_out, "value", value)
    if norm == "l2":
        return _l2_operator(value, grad_out, backend)
    dtype = accumulation_dtype(value.dtype)
    ones = torch.ones((), dtype=dtype, device=value.device).expand(sizes["B"], sizes["m"])
    by_column, _ = row_propagation_by_head(
        None, None, None, ones, phi="abs_g", scale=1.0, value=value, grad_out=grad_out, backend=backend
    )
    return by_column.sum(-1)


def _fake(value: Tensor, grad_out: Tensor, backend: str) -> Tensor:  # noqa: ARG001
    return torch.empty(value.shape[:2], dtype=accumulation_dtype(value.dtype), device=value.device)


_l2_operator = register_operator(
    "l2_head_norms(Tensor value, Tensor grad_out, str backend) -> Tensor",
    l2_head_norms_gram,
    f"{__name__}.triton_kernel",
    "launch_norms",
    _fake,
)
