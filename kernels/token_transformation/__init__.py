"""How far a layer moves each token: norm ratio × NECC, the weights of TokenTM.

    NECC(j) = exp cos(x_j, f_j) / Σ_k exp cos(x_k, f_k)                  over all n tokens
    W(j)    = ‖f_j‖ / ‖x_j‖ · NECC(j)

``token_transformation`` reads both vectors; ``add_token_transformation`` also makes the first, as the sum of the residual
stream and the branch before. ``attention_token_transformation`` has f_h,j = v_h,j W_h for every head and
never forms it: ‖v W_h‖² = v (W_h W_hᵀ) vᵀ needs one dv × dv Gram matrix a head, and x · (v W_h) = (x W_hᵀ) · v needs one
projection of x. Source: VTranM / Token Transformation Matters (CVPR 2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype, expect_same, expect_shape, register_operator
from .torch_rows import attention_token_transformation_rows, token_transformation_rows


def token_transformation(
    tokens: Tensor, transformed: Tensor, *, length: bool = True, necc: bool = True, necc_scale: float = 1.0, backend: str = "auto"
) -> Tensor:
    """Norm ratio × NECC between a branch's input and output.

    Args:
        tokens: (B, n, d), the residual stream entering the branch.
        transformed: (B, n, d), what the branch adds to it.
        length: include the ratio of norms.
        necc: include the normalised exponential cosine.
        necc_scale: factor of the NECC.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (B, n), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    _expect_tokens(tokens, transformed=transformed)
    return _token_operator(tokens, None, transformed, length, necc, float(necc_scale), backend)[0]


def add_token_transformation(
    tokens: Tensor,
    branch: Tensor,
    transformed: Tensor,
    *,
    length: bool = True,
    necc: bool = True,
    necc_scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """``token_transformation`` fused with the residual add before it: y = tokens + branch, and the weights of y and transformed.

    Args:
        tokens: (B, n, d), the residual stream before the add.
        branch: (B, n, d), added to it.
        transformed: (B, n, d), what the next branch adds to the sum.
        length, necc, necc_scale, backend: as for ``token_transformation``.

    Returns:
        y (B, n, d) in the inputs' dtype, as the model's own add would round it, and the weights (B, n).

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    _expect_tokens(tokens, branch=branch, transformed=transformed)
    weights, summed = _token_operator(tokens, branch, transformed, length, necc, float(necc_scale), backend)
    return summed, weights


def _expect_tokens(tokens: Tensor, **others: Tensor) -> None:
    sizes: dict[str, int] = {}
    for name, tensor in {"tokens": tokens, **others}.items():
        expect_shape(name, tensor, ("B", "n", "d"), sizes)
        expect_same(name, tensor, "tokens", tokens)


def attention_token_transformation(
    tokens: Tensor,
    value: Tensor,
    output_weight: Tensor,
    *,
    length: bool = True,
    necc: bool = True,
    necc_scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Norm ratio × NECC per head between tokens and their values after the output projection.

    Args:
        tokens: (B, n, d), the residual stream entering the block.
        value: (B, H, n, dv), as it reaches the attention (value bias included).
        output_weight: (d, H·dv), the output projection's weight, LayerScale multiplied in, without bias.
        length: include the ratio of norms.
        necc: include the normalised exponential cosine.
        necc_scale: factor of the NECC.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        (B, H, n), float32 (float64 for float64 inputs).

    Raises:
        ValueError: a shape, dtype, device or name that does not fit.
        RuntimeError: Triton was asked for where it cannot run.
    """
    sizes: dict[str, int] = {}
    expect_shape("tokens", tokens, ("B", "n", "d"), sizes)
    expect_shape("value", value, ("B", "H", "n", "dv"), sizes)
    expect_shape("output_weight", output_weight, ("d", sizes["H"] * sizes["dv"]), sizes)
    expect_same("value", value, "tokens", tokens)
    expect_same("output_weight", output_weight, "tokens", tokens)
    head_weights = output_weight.unflatten(1, (sizes["H"], sizes["dv"])).permute(1, 2, 0)  # (H, dv, d)
    wide = head_weights.to(accumulation_dtype(tokens.dtype))
    gram = wide @ wide.transpose(1, 2)  # (H, dv, dv)
    projection = (tokens @ output_weight).unflatten(2, (sizes["H"], sizes["dv"])).transpose(1, 2)  # (B, H, n, dv)
    return _attention_operator(tokens, value, projection, gram, length, necc, float(necc_scale), backend)


def _token_fake(tokens: Tensor, branch: Tensor | None, *rest: object) -> tuple[Tensor, Tensor]:  # noqa: ARG001
    weights = torch.empty(tokens.shape[:2], dtype=accumulation_dtype(tokens.dtype), device=tokens.device)
    return weights, tokens.new_empty(0 if branch is None else tokens.shape)


def _attention_fake(tokens: Tensor, value: Tensor, *rest: object) -> Tensor:  # noqa: ARG001
    return torch.empty(value.shape[:3], dtype=accumulation_dtype(tokens.dtype), device=tokens.device)


_token_operator = register_operator(
    "token_transformation(Tensor tokens, Tensor? branch, Tensor transformed, bool length, bool necc, float necc_scale, "
    "str backend) -> (Tensor, Tensor)",
    token_transformation_rows,
    f"{__name__}.token_kernel",
    "launch_tokens",
    _token_fake,
)
_attention_operator = register_operator(
    "attention_token_transformation(Tensor tokens, Tensor value, Tensor projection, Tensor gram, "
    "bool length, bool necc, float necc_scale, str backend) -> Tensor",
    attention_token_transformation_rows,
    f"{__name__}.attention_kernel",
    "launch_heads",
    _attention_fake,
)
