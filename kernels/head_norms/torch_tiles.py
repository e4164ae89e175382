"""L1 head norms in torch: tiles of query rows × all keys, one image at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import accumulation_dtype
from ..tiles import product, tile_shape


def l1_head_norms_tiles(value: Tensor, grad_out: Tensor) -> Tensor:
    """(B, H, n, dv) and (B, H, m, dv) to Σ|G| as (B, H)."""
    dtype = accumulation_dtype(value.dtype)
    batch, heads, num_keys, _ = value.shape
    num_queries = grad_out.shape[2]
    head_step, row_step = tile_shape(heads, num_queries, num_keys, value.device)
    buffer = torch.empty(head_step * row_step * num_keys, dtype=dtype, device=value.device)
    out = torch.zeros(batch, heads, dtype=dtype, device=value.device)
    for b in range(batch):
        for first_head in range(0, heads, head_step):
            h = slice(first_head, min(first_head + head_step, heads))
            values_t = value[b, h].to(dtype).transpose(1, 2)
            for first_row in range(0, num_queries, row_step):
                i = slice(first_row, min(first_row + row_step, num_queries))
                out[b, h] += product(grad_out[b, h, i].to(dtype), values_t, buffer).abs_().sum((1, 2))
    return out
