"""``relevance_backward`` and ``relevance_rows`` in torch: tiles of P and T vᵀ, and of Z by a product of its own.

Z is divided by: from P's logarithm it would come back with an error relative to the logsumexp, and where P is 0 not at all.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tiles import AttentionTiles, product
from .common import GUARD


def relevance_backward_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ratio: Tensor,
    logsumexp: Tensor,
    rows: Tensor | None,
    grad_out: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``relevance_backward``."""
    tiles = AttentionTiles(query, key, value, ratio, logsumexp, mask, scale)
    dtype = tiles.dtype
    relevance_query, relevance_key, relevance_value = (
        torch.zeros(tensor.shape, dtype=dtype, device=tiles.device) for tensor in (query, key, value)
    )
    moved = _zero_rows(tiles) if rows is not None else relevance_query.new_empty(0)
    for b, h, i, probabilities, relevance in tiles.both():
        relevance_value[b, h] += probabilities.transpose(1, 2) @ ratio[b, h, i].to(dtype)
        relevance.mul_(probabilities).mul_(0.5)
        buffer = probabilities.view(-1)  # P has been used: its buffer takes the next products
        if rows is not None:
            moved[b, h] += _moved(rows, grad_out, value, relevance, buffer, b, h, i)
        queries, keys = query[b, h, i].to(dtype), key[b, h].to(dtype)
        scores = product(queries, keys.transpose(1, 2), buffer)
        if mask is not None and mask.dtype != torch.bool:
            scores.add_(mask[b, h, i], alpha=1 / scale)
        relevance.div_(_stabilized(scores))  # 0 wherever P is
        torch.matmul(relevance, keys, out=relevance_query[b, h, i])
        relevance_key[b, h] += relevance.transpose(1, 2) @ queries
    of_query, of_key, of_value = (
        summed.mul_(tensor).mul_(0.5).to(tensor.dtype)
        for summed, tensor in ((relevance_query, query), (relevance_key, key), (relevance_value, value))
    )
    return of_query, of_key, of_value, moved


def relevance_rows_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    ratio: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    grad_out: Tensor | None,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """See ``relevance_rows``."""
    tiles = AttentionTiles(query, key, value, ratio, logsumexp, mask, scale)
    moved = _zero_rows(tiles)
    for b, h, i, probabilities, relevance in tiles.both():
        relevance.mul_(probabilities).mul_(0.5)
        moved[b, h] += _moved(rows, grad_out, value, relevance, probabilities.view(-1), b, h, i)
    return moved


def _zero_rows(tiles: AttentionTiles) -> Tensor:
    return torch.zeros(tiles.batch, tiles.heads, tiles.num_keys, dtype=tiles.dtype, device=tiles.device)


def _moved(
    rows: Tensor, grad_out: Tensor | None, value: Tensor, relevance: Tensor, buffer: Tensor, b: int, h: slice, i: slice
) -> Tensor:
    """What one tile of R_P adds to S, (heads, n); R_P itself is kept."""
    dtype = relevance.dtype
    if grad_out is None:
        weights = torch.clamp(relevance, min=0, out=buffer.view(relevance.shape))
    else:
        gradient = product(grad_out[b, h, i].to(dtype), value[b, h].to(dtype).transpose(1, 2), buffer)
        weights = gradient.mul_(relevance).clamp_(min=0)
    return torch.matmul(rows[b, i].to(dtype).unsqueeze(0), weights)[:, 0]


def _stabilized(denominator: Tensor) -> Tensor:
    """What to divide by for ⊘, in place: infinity where the denominator is 0, so that the quotient is."""
    denominator.masked_fill_(denominator == 0, torch.inf).add_(GUARD)
    return denominator.masked_fill_(denominator == 0, GUARD)
