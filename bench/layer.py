"""One attention layer with random inputs: what operations are measured on, and launch shapes are chosen on."""

from __future__ import annotations

import copy
import re
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vitexplain import kernels
from vitexplain.fused_attention import attention_backward as library_backward
from vitexplain.fused_attention import attention_forward

NUM_ROWS = 8


@dataclass(frozen=True)
class LayerSize:
    """One layer: images, heads, tokens, head width."""

    batch: int
    heads: int
    tokens: int
    head_dim: int

    @property
    def form(self) -> str:
        """For the table's model column."""
        return f"{self.heads} heads of {self.head_dim}"

    @classmethod
    def of(cls, form: str, batch: int, tokens: int) -> LayerSize:
        """From the table's columns."""
        heads, head_dim = map(int, re.findall(r"\d+", form))
        return cls(batch, heads, tokens, head_dim)


GPU_SIZES = (
    LayerSize(64, 12, 197, 64), LayerSize(32, 16, 577, 64), LayerSize(16, 16, 1025, 64), LayerSize(8, 16, 1370, 64),
    LayerSize(16, 16, 257, 80), LayerSize(4, 16, 4097, 64), LayerSize(1, 16, 16385, 64),
)  # fmt: skip
CPU_SIZES = (LayerSize(8, 6, 197, 64), LayerSize(2, 6, 577, 64), LayerSize(1, 6, 1025, 64))


class Layer:
    """Random inputs of one layer on a device, and what torch's own attention leaves.

    Attributes:
        query, key, value: (B, H, n, dh), views into one projection, as models have them.
        grad_out, ratio: (B, H, n, dh), the gradient and the relevance at the attention's output.
        out, state, logsumexp: of torch's fused forward.
        row, rows, even_row: (B, 1, n), (B, NUM_ROWS, n) and (B, 1, n), float32; the last is 1 / n everywhere.
        token_weights: (B, H, n) float32, not negative.
        tokens, branch, moved: (B, n, H·dh), the residual stream and what branches add.
        output_weight: (H·dh, H·dh).
    """

    def __init__(self, size: LayerSize, dtype: torch.dtype, device: torch.device, positive: bool = False) -> None:
        """With ``positive`` queries and keys: relevance divides by their products, and near 0 no type has digits."""
        generator = torch.Generator(device).manual_seed(0)
        self.size, self.dtype, self.device = size, dtype, device
        batch, heads, n, dh = size.batch, size.heads, size.tokens, size.head_dim

        def normal(*shape: int, kind: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator, device=device).to(kind)

        self.query, self.key, self.value = normal(batch, n, 3, heads, dh).permute(2, 0, 3, 1, 4).unbind(0)
        if positive:
            self.query, self.key = self.query.abs(), self.key.abs()
        self.grad_out, self.ratio = (normal(batch, n, heads, dh).transpose(1, 2) for _ in range(2))
        self.scale = dh**-0.5
        self.out, self.state = attention_forward(self.query, self.key, self.value, self.scale)
        self.logsumexp = self.state.logsumexp
        self.row, self.rows = (normal(batch, k, n, kind=torch.float32).abs() for k in (1, NUM_ROWS))
        self.even_row = torch.full_like(self.row, 1 / n)
        self.token_weights = normal(batch, heads, n, kind=torch.float32).abs()
        self.tokens, self.branch, self.moved = (normal(batch, n, heads * dh) for _ in range(3))
        self.output_weight = normal(heads * dh, heads * dh) * 0.05

    def cast(self, dtype: torch.dtype) -> Layer:
        """A copy with every input in that element type; ``out`` and ``logsumexp`` are cast as they are, not computed anew."""
        made = copy.copy(self)
        made.dtype = dtype
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(made, name, value.to(dtype))
        return made

    @cached_property
    def contribution(self) -> Tensor:
        """(B, n, n) float32: a contribution map to go on from; made when it is asked for, as it is large."""
        generator = torch.Generator(self.device).manual_seed(1)
        tokens = self.size.tokens
        return torch.rand(self.size.batch, tokens, tokens, generator=generator, device=self.device)

    @property
    def pair_flops(self) -> float:
        """Of one product of all queries with all keys."""
        return 2.0 * self.size.batch * self.size.heads * self.size.tokens**2 * self.size.head_dim

    @property
    def head_bytes(self) -> float:
        """Of one (B, H, n, dh) tensor."""
        return float(self.query.numel() * self.query.element_size())


def one_pass(layer: Layer, backend: str = "auto") -> tuple[Tensor, ...]:
    """Gradients of query, key and value, and every head's row, at once."""
    return kernels.attention_backward(
        layer.query, layer.key, layer.value, layer.out, layer.grad_out, layer.logsumexp, layer.row[:, 0],
        phi="p_relu_g", scale=layer.scale, backend=backend,
    )[:4]  # fmt: skip


def backward_pass(layer: Layer) -> tuple[Tensor, ...]:
    """Gradients of query, key and value by torch's fused backward."""
    return library_backward(layer.grad_out, layer.query, layer.key, layer.value, layer.out, layer.state, layer.scale)


def row_pass(layer: Layer) -> Tensor:
    """(B, 1, n): the row after the gradient is there, as ``one_pass`` passes it."""
    inputs = layer.query, layer.key, layer.logsumexp, layer.row
    return kernels.row_propagation(
        *inputs, phi="p_relu_g", scale=layer.scale, value=layer.value, grad_out=layer.grad_out
    )  # fmt: skip


def relevance(layer: Layer) -> tuple[Tensor, ...]:
    """Relevance of query, key and value, and the row."""
    return kernels.relevance_backward(
        layer.query, layer.key, layer.value, layer.ratio, layer.logsumexp,
        rows=layer.row[:, 0], grad_out=layer.grad_out, scale=layer.scale,
    )  # fmt: skip
