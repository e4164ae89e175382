"""A model taken apart into the functions it calls, every attention map materialised; slow on purpose.

The dense reference's counterpart of interception: attention is written out with matrix products and a softmax, and the
functions that were called are kept, so that relevance can be sent back through them one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map


@dataclass
class Call:
    """One function call: what was called with what, and what came out."""

    name: str
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any


@dataclass
class DenseAttention:
    """One attention, every tensor with its graph: maps (B, H, m, n), values (B, H, n, dv)."""

    maps: Tensor
    values: Tensor


@dataclass
class Tape(TorchFunctionMode):
    """Writes out every fused attention, and notes it; notes every other call where ``calls`` are wanted.

    Attributes:
        attentions: in the order of their calls.
        calls: all calls in order, the parts of attentions among them.
        override: may answer a call itself, with something other than None.
    """

    keep_calls: bool = False
    override: Callable[..., Any] | None = None
    attentions: list[DenseAttention] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)

    def __post_init__(self) -> None:
        TorchFunctionMode.__init__(self)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            with self:
                return self.attention(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return self.multi_head(*args, **kwargs)
        name = getattr(func, "__name__", str(func))
        if name in ("__iadd__", "add_", "__imul__", "mul_"):  # a tape needs both the old and the new tensor
            func = torch.add if "add" in name else torch.mul
            name = func.__name__
        out = None if self.override is None else self.override(name, func, args, kwargs)
        if out is None:
            out = func(*args, **kwargs)
        if self.keep_calls and any(isinstance(value, Tensor) for value in tree_leaves(out)):
            self.calls.append(Call(name, func, args, kwargs, out))
        return out

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """softmax((q kᵀ + mask / scale) · scale) v: so written, a bias shares relevance with the unscaled scores."""
        assert not any((dropout_p, is_causal, enable_gqa))
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = query @ key.transpose(-2, -1)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype, device=query.device).masked_fill(
                    ~attn_mask, -torch.inf
                )
            scores = scores + attn_mask / scale
        scores = scores * scale
        maps = scores.softmax(dim=-1)
        self.attentions.append(DenseAttention(maps, value))
        return maps @ value

    def multi_head(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        width: int,
        num_heads: int,
        in_weight: Tensor,
        in_bias: Tensor,
        *rest: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """``nn.MultiheadAttention`` of (n, B, d), packed weights, no masks."""
        out_weight, out_bias = rest[4], rest[5]
        assert rest[:3] == (None, None, False)
        assert {kwargs.get("attn_mask"), kwargs.get("key_padding_mask")} == {None}
        parts = []
        for number, tokens in enumerate((query, key, value)):
            rows = slice(number * width, (number + 1) * width)
            part = F.linear(tokens, in_weight[rows], in_bias[rows])  # (n, B, d)
            parts.append(part.reshape(part.shape[0], part.shape[1], num_heads, -1).permute(1, 2, 0, 3))
        queries, keys, values = parts
        out = self.attention(queries, keys, values).permute(2, 0, 1, 3).flatten(2)
        return F.linear(out, out_weight, out_bias), None


_SAME = ("layer_norm", "rms_norm", "gelu", "silu", "relu", "sigmoid", "tanh", "softmax", "neg", "__neg__", "dropout")
_SUMS = ("add", "__add__", "__radd__")
_PRODUCTS = ("mul", "__mul__", "__rmul__", "multiply")
_MATRIX_PRODUCTS = ("matmul", "__matmul__")


class Relevance:
    """Sends relevance back over a tape.

    Args:
        calls: of a forward in which everything that carries relevance descends from ``sources``.
        sources: the tensors at which it ends.
        shared: linear layers have one denominator for positive and negative parts, and sums are rescaled.
    """

    def __init__(self, calls: list[Call], sources: list[Tensor], shared: bool) -> None:
        self.calls, self.shared = calls, shared
        self.carriers = {id(tensor) for tensor in sources}
        for call in calls:
            if any(id(value) in self.carriers for value in tree_leaves((call.args, call.kwargs))):
                self.carriers |= {id(value) for value in tree_leaves(call.out) if isinstance(value, Tensor)}
        self.relevance: dict[int, Tensor] = {}

    def of(self, tensor: Tensor) -> Tensor:
        """What has arrived at a tensor."""
        return self.relevance.get(id(tensor), torch.zeros_like(tensor))

    def send(self, tensor: Tensor, relevance: Tensor) -> None:
        """Start at a tensor and go through all calls, last to first."""
        self.relevance = {id(tensor): relevance}
        for call in reversed(self.calls):
            outs = [value for value in tree_leaves(call.out) if isinstance(value, Tensor)]
            found = [self.relevance.get(id(value)) for value in outs]
            carrying = [value for value in tree_leaves((call.args, call.kwargs)) if id(value) in self.carriers]
            if not carrying or all(value is None for value in found):
                continue
            if any(out is value for out in outs for value in carrying):
                continue  # a call that returned its own input
            arrived = [torch.zeros_like(out) if value is None else value for out, value in zip(outs, found, strict=True)]
            for value, share in zip(carrying, self._shares(call, carrying, outs, arrived), strict=True):
                self.relevance[id(value)] = self.of(value) + share

    def _shares(self, call: Call, carrying: list[Tensor], outs: list[Tensor], arrived: list[Tensor]) -> list[Tensor]:
        relevance = arrived[0]
        if call.name == "linear":
            weight = call.kwargs["weight"] if "weight" in call.kwargs else call.args[1]
            return [self._linear(carrying[0], weight, relevance)]
        if call.name == "conv2d":
            return [self._pixels(call, relevance)]
        if call.name in _SAME:
            return [relevance]
        if call.name in _SUMS:
            return self._sum(call, outs[0], relevance)
        if call.name in _PRODUCTS:
            return [relevance.sum_to_size(value.shape) / len(carrying) for value in carrying]
        if call.name in ("div", "__truediv__"):
            return [relevance]
        if call.name in _MATRIX_PRODUCTS:
            return self._matrix_product(call, carrying, outs[0], relevance)
        return self._moved(call, carrying, arrived)

    def _linear(self, tokens: Tensor, weight: Tensor, relevance: Tensor) -> Tensor:
        total = torch.zeros_like(tokens)
        parts = [(tokens.clamp(min=0), weight.clamp(min=0)), (tokens.clamp(max=0), weight.clamp(max=0))]
        positive, negative = (part @ w.T for part, w in parts)
        for (part, w), own in zip(parts, (positive, negative), strict=True):
            total = total + part * (_over(relevance, positive + negative if self.shared else own) @ w)
        return total

    def _sum(self, call: Call, out: Tensor, relevance: Tensor) -> list[Tensor]:
        summands = [value for value in call.args[:2] if isinstance(value, Tensor)]
        if len(summands) == 1 or any(value.dim() <= 1 for value in summands):
            return [relevance]  # a number or a bias
        parts = [value * _over(relevance, out) for value in summands]
        if self.shared and all(id(value) in self.carriers for value in summands):
            batch = relevance.shape[0]
            for i in range(batch):
                sums = [part[i].sum() for part in parts]
                for part, own in zip(parts, sums, strict=True):
                    part[i] *= _over(_over(own.abs(), sums[0].abs() + sums[1].abs()) * relevance[i].sum(), own)
        return [part.sum_to_size(v.shape) for part, v in zip(parts, summands, strict=True) if id(v) in self.carriers]

    def _matrix_product(self, call: Call, carrying: list[Tensor], out: Tensor, relevance: Tensor) -> list[Tensor]:
        left, right = call.args[:2]
        ratio = _over(relevance, out)
        shares = {id(left): 0.5 * left * (ratio @ right.mT), id(right): 0.5 * right * (left.mT @ ratio)}
        return [shares[id(value)].sum_to_size(value.shape) for value in carrying]

    def _pixels(self, call: Call, relevance: Tensor) -> Tensor:
        names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        options = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        image, weight = options.pop("input").detach(), options.pop("weight")
        options.pop("bias")
        low, high = image.amin((1, 2, 3), keepdim=True), image.amax((1, 2, 3), keepdim=True)
        total = torch.zeros_like(image)
        terms = [(image, weight), (-low.expand_as(image), weight.clamp(min=0)), (-high.expand_as(image), weight.clamp(max=0))]
        with torch.enable_grad():
            inputs = [value.clone().requires_grad_() for value, _ in terms]
            products = (F.conv2d(value, w, **options) for value, (_, w) in zip(inputs, terms, strict=True))
            at_pixels, at_low, at_high = products
            z = at_pixels + at_low + at_high + 1e-9
            gradients = torch.autograd.grad(z, inputs, relevance / z.detach())
        for value, gradient in zip(inputs, gradients, strict=True):
            total = total + value.detach() * gradient
        return total

    def _moved(self, call: Call, carrying: list[Tensor], arrived: list[Tensor]) -> list[Tensor]:
        """Functions that are linear in values that they only move or average: their own derivative."""
        copies = {id(value): value.detach().clone().requires_grad_() for value in carrying}
        with torch.enable_grad(), torch._C.DisableTorchFunction():
            args, kwargs = tree_map(lambda value: copies.get(id(value), value), (call.args, call.kwargs))
            outs = [value for value in tree_leaves(call.func(*args, **kwargs)) if isinstance(value, Tensor)]
            pairs = [(out, value) for out, value in zip(outs, arrived, strict=True) if out.requires_grad]
            gradients = torch.autograd.grad(
                [out for out, _ in pairs],
                [copies[id(value)] for value in carrying],
                [value for _, value in pairs],
                allow_unused=True,
            )
        return [torch.zeros_like(v) if g is None else g for v, g in zip(carrying, gradients, strict=True)]


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """a / b with a guard of 1e-9 on b, 0 where b is 0."""
    guarded = denominator + 1e-9
    guarded = guarded.where(guarded != 0, 1e-9)
    return numerator / guarded * (denominator != 0)
