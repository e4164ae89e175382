"""Tiling of attention-shaped work in torch: a bounded number of elements at a time, whatever the number of tokens."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .dispatch import accumulation_dtype

# Elements of a tile: 4 MiB in float32. Larger tiles gain little on a CPU (measured from 2^16 to 2^21 at 197 to 4097 tokens).
TILE_ELEMENTS = 1 << 20
# On an accelerator a larger tile keeps the machine busy; the memory bound stays independent of the number of tokens.
ACCELERATOR_TILE_ELEMENTS = 1 << 24
MINIMUM_TILE_ROWS = 16


# Of what tiles add to rows: of 16,385 tokens there are thousands of tiles, each with a share of some roundings of float32.
SUMS = torch.float64


def tile_shape(heads: int, num_queries: int, num_keys: int, device: torch.device, whole_heads: bool = False) -> tuple[int, int]:
    """How many heads and query rows one tile covers, for a bounded number of elements: many rows, or all heads of fewer."""
    elements = TILE_ELEMENTS if device.type == "cpu" else ACCELERATOR_TILE_ELEMENTS
    least_heads = heads if whole_heads else 1
    row_step = min(num_queries, max(MINIMUM_TILE_ROWS, elements // (num_keys * least_heads)))
    head_step = min(heads, max(least_heads, elements // (row_step * num_keys)))
    return head_step, row_step


def product(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """Batched product (h, m, d) @ (h, d, n), written into the front of a flat buffer."""
    shape = (left.shape[0], left.shape[1], right.shape[2])
    return torch.bmm(left, right, out=buffer[: shape[0] * shape[1] * shape[2]].view(shape))


class AttentionTiles:
    """Walks over tiles (heads × query rows × all keys) of P and G, in the accumulation type; on request of all heads at once.

    Yields (image, heads, query rows, P, G); P is None without ``query``, G without ``value``. Both live in buffers that the
    next tile overwrites, and may be written to.
    """

    def __init__(
        self,
        query: Tensor | None,
        key: Tensor | None,
        value: Tensor | None,
        grad_out: Tensor | None,
        logsumexp: Tensor | None,
        mask: Tensor | None,
        scale: float,
        whole_heads: bool = False,
    ) -> None:
        self.whole_heads = whole_heads
        self.query, self.key, self.value, self.grad_out = query, key, value, grad_out
        self.logsumexp, self.mask, self.scale = logsumexp, mask, scale
        queries, keys = (query, key) if query is not None else (grad_out, value)
        assert queries is not None, "query and key, or value and grad_out"
        assert keys is not None, "query and key, or value and grad_out"
        self.batch, self.heads, self.num_queries, _ = queries.shape
        self.num_keys, self.device = keys.shape[2], keys.device
        self.dtype = accumulation_dtype(keys.dtype)

    def __iter__(self) -> Iterator[tuple[int, slice, slice, Tensor | None, Tensor | None]]:
        head_step, row_step = tile_shape(self.heads, self.num_queries, self.num_keys, self.device, self.whole_heads)
        size = head_step * row_step * self.num_keys
        scores_buffer, grads_buffer = (
            torch.empty(size if needed is not None else 0, dtype=self.dtype, device=self.device)
            for needed in (self.query, self.value)
        )
        for b in range(self.batch):
            for first_head in range(0, self.heads, head_step):
                h = slice(first_head, min(first_head + head_step, self.heads))
                keys_t = values_t = None
                if self.query is not None and self.key is not None:
                    keys_t = _with_ones(self.key[b, h].to(self.dtype)).transpose(1, 2)
                if self.value is not None:
                    values_t = self.value[b, h].to(self.dtype).transpose(1, 2)
                for first_row in range(0, self.num_queries, row_step):
                    i = slice(first_row, min(first_row + row_step, self.num_queries))
                    probabilities = None if keys_t is None else self._probabilities(b, h, i, keys_t, scores_buffer)
                    gradient = None
                    if values_t is not None and self.grad_out is not None:
                        gradient = product(self.grad_out[b, h, i].to(self.dtype), values_t, grads_buffer)
                    yield b, h, i, probabilities, gradient

    def both(self) -> Iterator[tuple[int, slice, slice, Tensor, Tensor]]:
        """The tiles of an operation that reads both P and G."""
        for b, h, i, probabilities, gradient in self:
            assert probabilities is not None, "query and key, and value and grad_out"
            assert gradient is not None, "query and key, and value and grad_out"
            yield b, h, i, probabilities, gradient

    def _probabilities(self, b: int, h: slice, i: slice, keys_t: Tensor, buffer: Tensor) -> Tensor:
        """P of one tile, (heads, rows, n): the product subtracts the logsumexp on its way."""
        assert self.query is not None, "what has a key has a query and a logsumexp"
        assert self.logsumexp is not None, "what has a key has a query and a logsumexp"
        query, logsumexp = self.query[b, h, i].to(self.dtype), self.logsumexp[b, h, i].to(self.dtype)
        if self.mask is not None:  # where every key is masked the logsumexp is minus infinity, and P is 0
            logsumexp = logsumexp.masked_fill(logsumexp == -torch.inf, 0)
        scores = product(torch.cat([query * self.scale, -logsumexp.unsqueeze(-1)], -1), keys_t, buffer)
        if self.mask is None:
            return scores.exp_()
        mask = self.mask[b, h, i]
        if mask.dtype == torch.bool:
            return scores.exp_().masked_fill_(~mask, 0)
        return scores.add_(mask).exp_()

    def weights(self, head_weights: Tensor | None, token_weights: Tensor | None) -> Tensor:
        """w[b, h] · c[b, h, j] as (B, H, n) or (B, H, 1); 1/H for the plain mean."""
        if head_weights is None:
            weights = torch.full((self.batch, self.heads, 1), 1 / self.heads, dtype=self.dtype, device=self.device)
        else:
            weights = head_weights.to(self.dtype).unsqueeze(-1)
        return weights if token_weights is None else weights * token_weights.to(self.dtype)


def _with_ones(key: Tensor) -> Tensor:
    """Keys (heads, n, dh) with a column of ones, which meets the logsumexp's column of the queries."""
    return torch.cat([key, key.new_ones(*key.shape[:2], 1)], -1)
