"""The operations written out in float64 or any other dtype, every map materialised; and the error budget."""

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
    out: Tensor
    logsumexp: Tensor
    rows: Tensor
    head_weights: Tensor
    token_weights: Tensor
    row_factors: Tensor
    ratio: Tensor
    mask: Tensor | None
    scale: float

    @property
    def layer(self) -> tuple[Tensor, Tensor, Tensor]:
        """The first positional arguments of the operations that read a map."""
        return self.query, self.key, self.logsumexp

    def keywords(self, phi: str, weighted: bool) -> dict[str, object]:
        """Keyword arguments of ``row_propagation``."""
        gradient = {} if phi == "p" else {"value": self.value, "grad_out": self.grad_out}
        weights = {"head_weights": self.head_weights, "token_weights": self.token_weights} if weighted else {}
        return {"phi": phi, "scale": self.scale, "mask": self.mask, **gradient, **weights}


MASKS = ("none", "boolean", "padding", "additive")


def attention_inputs(
    n: int,
    head_dim: int,
    dtype: torch.dtype,
    *,
    num_rows: int = 1,
    num_queries: int | None = None,
    mask: str = "none",
    device: str = "cpu",
    batch: int = 2,
    heads: int = 3,
    whole_numbers: bool = False,
) -> AttentionInputs:
    """Random inputs; ``num_queries`` leading rows of the queries where given.

    ``whole_numbers`` makes queries and keys such, and what a mask adds halves of them before the scale: their products are exact
    and 0 or far from it, so that dividing by them is as accurate in any order of summation.
    """
    generator = torch.Generator().manual_seed(1000 * n + head_dim)
    m = num_queries or n

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    packed = normal(batch, n, 3, heads, head_dim)
    if whole_numbers:
        packed[:, :, :2].round_()
    packed = packed.to(device, dtype)
    query, key, value = packed.permute(2, 0, 3, 1, 4).unbind(0)  # strided views, as timm's attention passes them
    query = query[:, :, :m]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = _mask(mask, batch, heads, m, n, generator).to(device) if mask != "none" else None
    scale = head_dim**-0.5
    if whole_numbers and mask == "additive":
        made = (made.round() + 0.5) * scale
    scores = _scores(query.double(), key.double(), made, scale)
    logsumexp = scores.logsumexp(-1)
    out = _softmax(scores) @ value.double()
    return AttentionInputs(
        query=query,
        key=key,
        value=value,
        grad_out=normal(batch, m, heads, head_dim).transpose(1, 2).to(device, dtype),
        out=out.to(dtype),
        logsumexp=logsumexp.to(wide),
        rows=normal(batch, num_rows, m).abs().to(device, wide),
        head_weights=normal(batch, heads).to(device, torch.float32),
        token_weights=normal(batch, heads, n).abs().to(device, torch.float32),
        row_factors=normal(batch, m).abs().to(device, torch.float32),
        ratio=normal(batch, m, heads, head_dim).transpose(1, 2).to(device, dtype),
        mask=made,
        scale=scale,
    )


def _mask(kind: str, batch: int, heads: int, m: int, n: int, generator: torch.Generator) -> Tensor:
    if kind == "additive":  # a relative position bias: per head, the same for every image
        return torch.randn(1, heads, m, n, generator=generator)
    if kind == "padding":
        return torch.arange(n).view(1, 1, 1, n) < max(1, 2 * n // 3)
    mask = torch.rand(batch, 1, m, n, generator=generator) < 0.7
    mask[:, :, m // 2] = False  # a query that may look nowhere
    return mask


def _scores(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    scores = query @ key.transpose(-1, -2) * scale
    if mask is None:
        return scores
    return scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask.to(scores.dtype)


def _softmax(scores: Tensor) -> Tensor:
    return scores.softmax(-1).nan_to_num(0.0)  # where every key is masked, nothing is looked at


def dense_maps(inputs: AttentionInputs, phi: str, dtype: torch.dtype) -> Tensor:
    """φ(P, G), (B, H, m, n), made in ``dtype``, in at least float32."""
    wide = torch.promote_types(dtype, torch.float32)
    attention = _softmax(_scores(inputs.query.to(dtype), inputs.key.to(dtype), inputs.mask, inputs.scale))
    gradient = inputs.grad_out.to(dtype) @ inputs.value.to(dtype).transpose(-1, -2)
    weighings = {
        "p": lambda: attention,
        "p_relu_g": lambda: attention * gradient.clamp(min=0),
        "p_g": lambda: attention * gradient,
        "relu_g": lambda: gradient.clamp(min=0),
        "abs_g": lambda: gradient.abs(),
    }
    return weighings[phi]().to(wide)


def dense_update(inputs: AttentionInputs, phi: str, weighted: bool, dtype: torch.dtype) -> Tensor:
    """Σ_h w_h c_h[j] φ(P_h, G_h)[i, j], (B, m, n)."""
    maps = dense_maps(inputs, phi, dtype)
    if not weighted:
        return maps.mean(1)
    weights = inputs.head_weights.to(maps.dtype).unsqueeze(-1) * inputs.token_weights.to(maps.dtype)
    return (maps * weights.unsqueeze(2)).sum(1)


def dense_row_propagation(inputs: AttentionInputs, phi: str, weighted: bool, dtype: torch.dtype) -> Tensor:
    """Σ_i r_i of ``dense_update``; the sum in at least float32."""
    update = dense_update(inputs, phi, weighted, dtype)
    return inputs.rows.to(update.dtype) @ update


def dense_backward(inputs: AttentionInputs, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value by autograd of attention written out in ``dtype``."""
    query, key, value = (tensor.detach().to(dtype).requires_grad_() for tensor in (inputs.query, inputs.key, inputs.value))
    scores = query @ key.transpose(-1, -2) * inputs.scale
    if inputs.mask is not None and inputs.mask.dtype == torch.bool:
        attention = scores.masked_fill(~inputs.mask, -1e4).softmax(-1) * inputs.mask
    else:
        attention = (scores if inputs.mask is None else scores + inputs.mask.to(dtype)).softmax(-1)
    return torch.autograd.grad(attention @ value, (query, key, value), inputs.grad_out.to(dtype))


def dense_relevance(inputs: AttentionInputs, gradient: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Relevance of query, key and value, and every head's row, of the map alone or times the gradient; made in ``dtype``."""
    tensors = inputs.query, inputs.key, inputs.value, inputs.ratio, inputs.grad_out
    query, key, value, ratio, grad_out = (tensor.to(dtype) for tensor in tensors)
    attention = _softmax(_scores(query, key, inputs.mask, inputs.scale))
    relevance = 0.5 * attention * (ratio @ value.transpose(-1, -2))
    products = query @ key.transpose(-1, -2)
    if inputs.mask is not None and inputs.mask.dtype != torch.bool:
        products = products + inputs.mask.to(dtype) / inputs.scale
    share = torch.where(products == 0, 0, relevance / (products + 1e-9))
    weights = relevance * (grad_out @ value.transpose(-1, -2)) if gradient else relevance
    wide = torch.promote_types(dtype, torch.float32)
    return (
        0.5 * query * (share @ key),
        0.5 * key * (share.transpose(-1, -2) @ query),
        0.5 * value * (attention.transpose(-1, -2) @ ratio),
        torch.einsum("bi,bhij->bhj", inputs.rows[:, 0].to(wide), weights.clamp(min=0).to(wide)),
    )


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


def assert_within_error_budget(
    actual: Tensor, exact: Tensor, plain: Tensor, dtype: torch.dtype, largest: float | None = None
) -> None:
    """Error against float64 at most twice that of plain torch in ``dtype``, plus a rounding of the largest value.

    The added term is 4 machine epsilons of float32, in which everything is accumulated: a handful of roundings that no
    implementation can avoid, and that plain torch may by luck not show on a small case. ``largest`` replaces the result's own
    largest value where that is no measure of its terms (they cancel).
    """
    assert torch.isfinite(actual).all()
    assert actual.shape == exact.shape
    scale = float(exact.abs().max()) if largest is None else largest
    error, budget = float((actual.double() - exact).abs().max()), float((plain.double() - exact).abs().max())
    accumulation = torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    limit = 2 * budget + 4 * accumulation * scale
    assert error <= limit, f"error {error:.3e}, plain {dtype} torch {budget:.3e}, allowed {limit:.3e}, largest value {scale:.3e}"
