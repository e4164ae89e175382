"""Tiling of attention-shaped work in torch: a bounded number of elements at a time, whatever the number of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of a tile: 4 MiB in float32. Larger tiles gain little on a CPU (measured from 2^16 to 2^21 at 197 to 4097 tokens).
TILE_ELEMENTS = 1 << 20
# On an accelerator a larger tile keeps the machine busy; the memory bound stays independent of the number of tokens.
ACCELERATOR_TILE_ELEMENTS = 1 << 24
MINIMUM_TILE_ROWS = 16


def tile_shape(heads: int, num_queries: int, num_keys: int, device: torch.device) -> tuple[int, int]:
    """How many heads and query rows one tile covers, for a bounded number of elements."""
    elements = TILE_ELEMENTS if device.type == "cpu" else ACCELERATOR_TILE_ELEMENTS
    row_step = min(num_queries, max(MINIMUM_TILE_ROWS, elements // num_keys))
    head_step = min(heads, max(1, elements // (row_step * num_keys)))
    return head_step, row_step


def product(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """Batched product (h, m, d) @ (h, d, n), written into the front of a flat buffer."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=buffer[: shape[0] * shape[1] * shape[2]].view(shape))
