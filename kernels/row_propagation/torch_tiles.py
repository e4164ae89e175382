"""``row_propagation`` in torch: tiles of query rows × all keys, a few heads at a time, never the whole map."""

from __future__ import annotations

import torch
from torch import Tensor

from ..phi import weighed
from ..tiles import SUMS, AttentionTiles


def row_propagation_tiles(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    grad_out: Tensor | None,
    logsumexp: Tensor | None,
    rows: Tensor,
    head_weights: Tensor | None,
    token_weights: Tensor | None,
    mask: Tensor | None,
    scale: float,
    factor: float,
    residual: float,
    phi: str,
) -> Tensor:
    """See ``row_propagation``. Reads (B, H, ·, dh) inputs, returns (B, K, n)."""
    tiles = AttentionTiles(query, key, value, grad_out, logsumexp, mask, scale, whole_heads=rows.shape[1] > 1)
    rows = rows.to(tiles.dtype)
    weights = factor * tiles.weights(head_weights, token_weights)
    out = torch.zeros(tiles.batch, rows.shape[1], tiles.num_keys, dtype=SUMS, device=rows.device)
    for b, h, i, probabilities, gradient in tiles:
        tile = weighed(probabilities, gradient, phi)
        if rows.shape[1] == 1:  # one row: reduce over queries first, then over heads
            moved = torch.matmul(rows[b, :, i], tile)  # (heads, 1, n)
            out[b, 0] += (moved[:, 0] * weights[b, h]).sum(0)
        else:  # many rows: average the heads first, so that the long product is done once
            averaged = tile.mul_(weights[b, h, None]).sum(0)
            out[b] += rows[b, :, i] @ averaged
    if residual:
        out[..., : rows.shape[2]] += residual * rows
    return out.to(tiles.dtype)


def row_propagation_by_head_tiles(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    grad_out: Tensor | None,
    logsumexp: Tensor | None,
    rows: Tensor,
    mask: Tensor | None,
    scale: float,
    phi: str,
    norms: bool,
) -> tuple[Tensor, Tensor]:
    """See ``row_propagation_by_head``: (B, H, n) and (B, H)."""
    tiles = AttentionTiles(query, key, value, grad_out, logsumexp, mask, scale)
    rows = rows.to(tiles.dtype)
    out = torch.zeros(tiles.batch, tiles.heads, tiles.num_keys, dtype=SUMS, device=rows.device)
    sums = out.new_zeros(tiles.batch, tiles.heads) if norms else out.new_empty(0)
    for b, h, i, probabilities, gradient in tiles:
        if norms:
            assert gradient is not None, "norms are of the gradient"
            sums[b, h] += torch.linalg.vector_norm(gradient, 1, dim=2).sum(1)
        out[b, h] += torch.matmul(rows[b, i].unsqueeze(0), weighed(probabilities, gradient, phi))[:, 0]
    return out.to(tiles.dtype), sums.to(tiles.dtype)
