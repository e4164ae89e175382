"""The operations of a layer by their dense formulas, with every map in memory.

In the layer's own element type they are what a user would write by hooks, the benchmark's rival, and what rounding alone does;
in float64 they are what results are held against.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .layer import Layer

EPSILON = 1e-9  # of relevance's quotients


def attention_map(layer: Layer) -> Tensor:
    """(B, H, n, n): P."""
    return (layer.query @ layer.key.transpose(-1, -2) * layer.scale).softmax(-1)


def gradient_map(layer: Layer) -> Tensor:
    """(B, H, n, n): G, the gradient at the attention map."""
    return layer.grad_out @ layer.value.transpose(-1, -2)


def rollout_update(layer: Layer) -> Tensor:
    """(B, n, n): P, mean over heads."""
    return attention_map(layer).mean(1)


def positive_map(layer: Layer) -> Tensor:
    """(B, H, n, n): P·relu(G)."""
    return attention_map(layer) * gradient_map(layer).relu()


def weighed_update(layer: Layer) -> Tensor:
    """(B, n, n): P·relu(G) times token weights, mean over heads."""
    return (positive_map(layer) * layer.token_weights.to(layer.dtype).unsqueeze(2)).mean(1)


def rollout_row(layer: Layer) -> Tensor:
    """(B, 1, n)."""
    return layer.row.to(layer.dtype) @ rollout_update(layer)


def column_means(layer: Layer) -> Tensor:
    """(B, n): rollout's first step."""
    return attention_map(layer).mean((1, 2))


def weighed_row(layer: Layer) -> Tensor:
    """(B, 1, n)."""
    return layer.row.to(layer.dtype) @ weighed_update(layer)


def weighed_rows(layer: Layer) -> Tensor:
    """(B, NUM_ROWS, n)."""
    return layer.rows.to(layer.dtype) @ weighed_update(layer)


def first_row(layer: Layer) -> Tensor:
    """(B, 1, n): what the first query alone passes on."""
    return layer.row[:, :, :1].to(layer.dtype) @ weighed_update(layer)[:, :1]


def rows_by_head(layer: Layer) -> tuple[Tensor, Tensor]:
    """(B, H, n) by φ = P, and (B, H), the L1 norms of G."""
    return torch.einsum("bi,bhij->bhj", layer.row[:, 0].to(layer.dtype), attention_map(layer)), l1_norms(layer)


def l1_norms(layer: Layer) -> Tensor:
    """(B, H)."""
    return gradient_map(layer).abs().sum((-1, -2))


def l2_norms(layer: Layer) -> Tensor:
    """(B, H)."""
    return gradient_map(layer).square().sum((-1, -2)).sqrt()


def token_weights(layer: Layer) -> Tensor:
    """(B, n): norm ratio × NECC."""
    return _weights(layer.tokens, layer.moved)


def added_token_weights(layer: Layer) -> tuple[Tensor, Tensor]:
    """(B, n, d) and (B, n): the residual add, and the same of its result."""
    summed = layer.tokens + layer.branch
    return summed, _weights(summed, layer.moved)


def attention_token_weights(layer: Layer) -> Tensor:
    """(B, H, n): the same of every head's values after the output projection."""
    weights = layer.output_weight.unflatten(1, (layer.size.heads, layer.size.head_dim))  # (d, H, dh)
    moved = torch.einsum("bhjc,dhc->bhjd", layer.value, weights)
    return _weights(layer.tokens.unsqueeze(1).expand_as(moved), moved)


def _weights(tokens: Tensor, moved: Tensor) -> Tensor:
    return moved.norm(dim=-1) / tokens.norm(dim=-1) * F.cosine_similarity(tokens, moved, dim=-1).softmax(-1)


def contribution(layer: Layer) -> Tensor:
    """(B, n, n): one step of a contribution map."""
    start = layer.contribution.to(layer.dtype)
    return start + weighed_update(layer) @ start


def gradients_and_rows(layer: Layer) -> tuple[Tensor, ...]:
    """Gradients of query, key and value, (B, H, n, dh), and every head's row by P·relu(G), (B, H, n)."""
    leaves = [tensor.detach().requires_grad_() for tensor in (layer.query, layer.key, layer.value)]
    with torch.enable_grad():
        out = (leaves[0] @ leaves[1].transpose(-1, -2) * layer.scale).softmax(-1) @ leaves[2]
        gradients = torch.autograd.grad(out, leaves, layer.grad_out)
    return *gradients, torch.einsum("bi,bhij->bhj", layer.row[:, 0].to(layer.dtype), positive_map(layer))


def gradients_and_row(layer: Layer) -> tuple[Tensor, ...]:
    """The same with the row's mean over heads, (B, 1, n)."""
    *gradients, rows = gradients_and_rows(layer)
    return *gradients, rows.mean(1, keepdim=True)


def relevance_and_rows(layer: Layer) -> tuple[Tensor, ...]:
    """Relevance of query, key and value, (B, H, n, dh), and every head's row, (B, H, n)."""
    q, k, v = layer.query, layer.key, layer.value
    products, attention, ratio = q @ k.transpose(-1, -2), attention_map(layer), layer.ratio
    relevance = 0.5 * attention * (ratio @ v.transpose(-1, -2))
    share = relevance / (products + EPSILON)
    rows = torch.einsum("bi,bhij->bhj", layer.row[:, 0].to(layer.dtype), (gradient_map(layer) * relevance).relu())
    of_value = 0.5 * v * (attention.transpose(-1, -2) @ ratio)
    return 0.5 * q * (share @ k), 0.5 * k * (share.transpose(-1, -2) @ q), of_value, rows


def relevance_rows(layer: Layer) -> Tensor:
    """The rows alone, (B, H, n)."""
    return relevance_and_rows(layer)[3]
