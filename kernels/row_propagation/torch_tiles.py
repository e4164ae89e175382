"""``row_propagation`` in torch: tiles of query rows × all keys, a few heads at a time, never the whole map."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype
from ..tiles import product, tile_shape


def row_propagation_tiles(
    query: Tensor,
    key: Tensor,
    value: Tensor | None,
    grad_out: Tensor | None,
    logsumexp: Tensor,
    rows: Tensor,
    head_weights: Tensor | None,
    token_weights: Tensor | None,
    scale: float,
    phi: str,
) -> Tensor:
    """See ``row_propagation``. Reads (B, H, ·, dh) inputs, returns (B, K, n)."""
    dtype = accumulation_dtype(query.dtype)
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    rows = rows.to(dtype)
    weights = _weights(batch, heads, head_weights, token_weights, dtype, query.device)
    out = torch.zeros(batch, rows.shape[1], num_keys, dtype=dtype, device=query.device)
    head_step, row_step = tile_shape(heads, num_queries, num_keys, query.device)
    scores_buffer = torch.empty(head_step * row_step * num_keys, dtype=dtype, device=query.device)
    grads_buffer = torch.empty_like(scores_buffer) if phi == "p_relu_g" else None
    for b in range(batch):
        for first_head in range(0, heads, head_step):
            h = slice(first_head, min(first_head + head_step, heads))
            keys_t = _with_ones(key[b, h].to(dtype)).transpose(1, 2)
            values_t = value[b, h].to(dtype).transpose(1, 2) if value is not None else None
            for first_row in range(0, num_queries, row_step):
                i = slice(first_row, min(first_row + row_step, num_queries))
                tile = _attention_tile(query[b, h, i].to(dtype), keys_t, logsumexp[b, h, i].to(dtype), scale, scores_buffer)
                if values_t is not None:
                    tile.mul_(product(grad_out[b, h, i].to(dtype), values_t, grads_buffer).relu_())
                if rows.shape[1] == 1:  # one row: reduce over queries first, then over heads
                    moved = torch.matmul(rows[b, :, i], tile)  # (heads, 1, n)
                    out[b, 0] += (moved[:, 0] * weights[b, h]).sum(0)
                else:  # many rows: average the heads first, so that the long product is done once
                    averaged = tile.mul_(weights[b, h, None]).sum(0)
                    out[b] += rows[b, :, i] @ averaged
    return out


def _weights(
    batch: int, heads: int, head_weights: Tensor | None, token_weights: Tensor | None, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """w[b, h] · c[b, h, j] as (B, H, n) or (B, H, 1)."""
    if head_weights is None:
        weights = torch.full((batch, heads, 1), 1 / heads, dtype=dtype, device=device)
    else:
        weights = head_weights.to(dtype).unsqueeze(-1)
    return weights if token_weights is None else weights * token_weights.to(dtype)


def _with_ones(key: Tensor) -> Tensor:
    """Keys (heads, n, dh) with a column of ones, which meets the logsumexp's column of the queries."""
    return torch.cat([key, key.new_ones(*key.shape[:2], 1)], -1)


def _attention_tile(query: Tensor, key_t: Tensor, logsumexp: Tensor, scale: float, buffer: Tensor) -> Tensor:
    """P of one tile, (heads, rows, n), written into ``buffer``: the product subtracts the logsumexp on its way."""
    return product(torch.cat([query * scale, -logsumexp.unsqueeze(-1)], -1), key_t, buffer).exp_()
