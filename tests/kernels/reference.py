"""The three operations written out in float64 or any other dtype, every map materialised; and the error budget."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class AttentionInputs:
    """Inputs of an attention-shaped operation; query, key and value are views of one packed tensor."""

    query: Tensor
    key: Tensor
    value: Tensor
    grad_out: Tensor
    logsumexp: Tensor
    rows: Tensor
    head_weights: Tensor
    token_weights: Tensor
    scale: float

    def keywords(self, phi: str, weighted: bool) -> dict[str, object]:
        """Keyword arguments of ``row_propagation``."""
        gradient = {"value": self.value, "grad_out": self.grad_out} if phi == "p_relu_g" else {}
        weights = {"head_weights": self.head_weights, "token_weights": self.token_weights} if weighted else {}
        return {"phi": phi, "scale": self.scale, **gradient, **weights}


def attention_inputs(
    n: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    num_rows: int = 1,
    num_queries: int | None = None,
    device: str = "cpu",
    heads: int = 3,
) -> AttentionInputs:
    """Random inputs for two images; ``num_queries`` leading rows of the queries where given."""
    generator = torch.Generator().manual_seed(1000 * n + head_dim)
    batch, m = 2, num_queries or n

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    packed = normal(batch, n, 3, heads, head_dim).to(device, dtype)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # strided views, as timm's attention passes them
    query = query[:, :, :m]
    scale = head_dim**-0.5
    logsumexp = (query.double() @ key.double().transpose(-1, -2) * scale).logsumexp(-1).float()
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        grad_out=normal(batch, m, heads, head_dim).transpose(1, 2).to(device, dtype),
        logsumexp=logsumexp.double() if dtype == torch.float64 else logsumexp,
        rows=normal(batch, num_rows, m).abs().to(device, torch.float64 if dtype == torch.float64 else torch.float32),
        head_weights=normal(batch, heads).to(device, torch.float32),
        token_weights=normal(batch, heads, n).abs().to(device, torch.float32),
        scale=scale,
    )


def dense_row_propagation(inputs: AttentionInputs, phi: str, weighted: bool, dtype: torch.dtype) -> Tensor:
    """Σ_h w_h c_h[j] Σ_i r_i φ(P_h, G_h)[i, j], maps in ``dtype``; the weighted sum in at least float32."""
    query, key = inputs.query.to(dtype), inputs.key.to(dtype)
    attention = (query @ key.transpose(-1, -2) * inputs.scale).softmax(-1)
    if phi == "p_relu_g":
        attention = attention * (inputs.grad_out.to(dtype) @ inputs.value.to(dtype).transpose(-1, -2)).clamp(min=0)
    wide = torch.promote_types(dtype, torch.float32)
    moved = torch.einsum("bki,bhij->bkhj", inputs.rows.to(wide), attention.to(wide))
    if not weighted:
        return moved.mean(2)
    weights = inputs.head_weights.to(wide).unsqueeze(-1) * inputs.token_weights.to(wide)
    return (moved * weights.unsqueeze(1)).sum(2)


def dense_head_norms(value: Tensor, grad_out: Tensor, norm: str, dtype: torch.dtype) -> Tensor:
    """Norm of G per head, G in ``dtype``."""
    gradient = (grad_out.to(dtype) @ value.to(dtype).transpose(-1, -2)).to(torch.promote_types(dtype, torch.float32))
    return gradient.abs().sum((-1, -2)) if norm == "l1" else gradient.square().sum((-1, -2)).sqrt()


def dense_token_transformation(
    tokens: Tensor, moved: Tensor, length: bool, necc: bool, necc_scale: float, dtype: torch.dtype
) -> Tensor:
    """Norm ratio × NECC over the last but one axis, (…, n, d) to (…, n)."""
    tokens, moved = tokens.to(dtype), moved.to(dtype)
    weights = torch.ones(torch.broadcast_shapes(tokens.shape, moved.shape)[:-1], dtype=dtype, device=tokens.device)
    if length:
        weights = weights * moved.norm(dim=-1) / tokens.norm(dim=-1)
    if necc:
        cosine = (tokens * moved).sum(-1) / (tokens.norm(dim=-1) * moved.norm(dim=-1))
        weights = weights * necc_scale * cosine.exp() / cosine.exp().sum(-1, keepdim=True)
    return weights


def assert_within_error_budget(actual: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype) -> None:
    """Error against float64 at most twice that of plain torch in ``dtype``, plus a rounding of the largest value.

    The added term is 4 machine epsilons of float32, in which everything is accumulated: a handful of roundings that no
    implementation can avoid, and that plain torch may by luck not show on a small case.
    """
    assert torch.isfinite(actual).all()
    assert actual.shape == exact.shape
    scale = float(exact.abs().max())
    error, budget = float((actual.double() - exact).abs().max()), float((plain.double() - exact).abs().max())
    accumulation = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    limit = 2 * budget + 4 * accumulation * scale
    assert error <= limit, f"error {error:.3e}, plain {dtype} torch {budget:.3e}, allowed {limit:.3e}, largest value {scale:.3e}"
