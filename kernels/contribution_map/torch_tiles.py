"""``contribution_map`` in torch: a tile of U (query rows × all keys), averaged over heads, is multiplied at once."""

from __future__ import annotations

from torch import Tensor

from ..phi import weighed
from ..tiles import AttentionTiles


def contribution_map_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_out: Tensor | None,
    logsumexp: Tensor,
    contribution: Tensor,
    head_weights: Tensor | None,
    token_weights: Tensor | None,
    row_factors: Tensor | None,
    mask: Tensor | None,
    scale: float,
    factor: float,
    residual: float,
    phi: str,
) -> Tensor:
    """See ``contribution_map``: (B, n, c) to (B, n, c)."""
    tiles = AttentionTiles(query, key, value, grad_out, logsumexp, mask, scale, whole_heads=True)  # averaged before the product
    contribution = contribution.to(tiles.dtype)
    weights = factor * tiles.weights(head_weights, token_weights)
    out = residual * contribution
    for b, h, i, probabilities, gradient in tiles:
        averaged = weighed(probabilities, gradient, phi).mul_(weights[b, h, None]).sum(0)
        out[b, i].addmm_(averaged, contribution[b])
    return out if row_factors is None else out.mul_(row_factors.to(tiles.dtype).unsqueeze(-1))
