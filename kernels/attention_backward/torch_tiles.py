"""``attention_backward`` in torch: the tiles of P and G that the gradients need weigh the running row, too."""

from __future__ import annotations

import torch
from torch import Tensor

from ..phi import weighed
from ..tiles import SUMS, AttentionTiles


def attention_backward_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    grad_out: Tensor,
    logsumexp: Tensor,
    rows: Tensor,
    mask: Tensor | None,
    scale: float,
    phi: str,
    norms: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``attention_backward``."""
    tiles = AttentionTiles(query, key, value, grad_out, logsumexp, mask, scale)
    dtype = tiles.dtype
    rows = rows.to(dtype)
    grad_query, grad_key, grad_value = (
        torch.zeros(tensor.shape, dtype=dtype, device=tiles.device) for tensor in (query, key, value)
    )
    moved = torch.zeros(tiles.batch, tiles.heads, tiles.num_keys, dtype=SUMS, device=tiles.device)
    sums = moved.new_zeros(tiles.batch, tiles.heads) if norms else moved.new_empty(0)
    for b, h, i, probabilities, gradient in tiles.both():
        grad_rows = grad_out[b, h, i].to(dtype)
        delta = torch.linalg.vecdot(grad_rows, out[b, h, i].to(dtype)).unsqueeze(-1)
        grad_value[b, h] += probabilities.transpose(1, 2) @ grad_rows
        grad_scores = (gradient - delta).mul_(probabilities)
        torch.matmul(grad_scores, key[b, h].to(dtype) * scale, out=grad_query[b, h, i])
        grad_key[b, h] += grad_scores.transpose(1, 2) @ (query[b, h, i].to(dtype) * scale)
        if norms:
            sums[b, h] += torch.linalg.vector_norm(gradient, 1, dim=2).sum(1)
        moved[b, h] += torch.matmul(rows[b, i].unsqueeze(0), weighed(probabilities, gradient, phi))[:, 0]
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype), moved.to(dtype), sums.to(dtype)
