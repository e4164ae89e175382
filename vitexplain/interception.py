"""Calls of attention inside a running model, intercepted, and brought to the one form in which the library takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .errors import UnsupportedModelError


class SdpaMode(TorchFunctionMode):
    """Offers every ``F.scaled_dot_product_attention`` call to a handler, which may decline it.

    ``F.multi_head_attention_forward``, which would make that call out of sight, is taken apart.
    """

    def __init__(self, handler: Callable[..., Tensor | None]) -> None:
        super().__init__()
        self.handler = handler

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention or func is F.multi_head_attention_forward:
            return _intercepted(self, func, args, kwargs)
        return self.other(func, args, kwargs)

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Any other call."""
        return func(*args, **kwargs)


@torch.compiler.disable
def _intercepted(mode: SdpaMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of attention. Where a block is being compiled, its code ends before this and goes on after it."""
    if func is F.multi_head_attention_forward:
        with mode:
            return multi_head_attention(*args, **kwargs)
    result = mode.handler(*args, **kwargs)
    return mode.other(func, args, kwargs) if result is None else result


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,  # noqa: ARG001
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,  # noqa: ARG001 - those of a fused attention do not exist
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,  # noqa: ARG001
    is_causal: bool = False,  # noqa: ARG001 - the mask is there as well
) -> tuple[Tensor, None]:
    """``F.multi_head_attention_forward`` written with ``F.linear`` and ``F.scaled_dot_product_attention``.

    Takes and returns (n, B, d), as that function does, without weights.
    """
    for name, unusual in (("bias_k", bias_k), ("bias_v", bias_v), ("static_k", static_k), ("static_v", static_v)):
        if unusual is not None:
            raise UnsupportedModelError(f"nn.MultiheadAttention: expected {name}=None, received a tensor")
    if add_zero_attn or query.dim() != 3:
        what = "add_zero_attn=True" if add_zero_attn else f"unbatched inputs of shape {tuple(query.shape)}"
        raise UnsupportedModelError(f"nn.MultiheadAttention: expected batched inputs without extra keys, received {what}")
    if use_separate_proj_weight:
        assert q_proj_weight is not None
        assert k_proj_weight is not None
        assert v_proj_weight is not None
        weights: Sequence[Tensor] = (q_proj_weight, k_proj_weight, v_proj_weight)
    else:
        assert in_proj_weight is not None
        weights = in_proj_weight.chunk(3)
    biases = (None,) * 3 if in_proj_bias is None else in_proj_bias.chunk(3)

    def heads(tokens: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        projected = F.linear(tokens.transpose(0, 1), weight, bias)  # (B, n, d)
        return projected.unflatten(-1, (num_heads, -1)).transpose(1, 2)

    queries, keys, values = (heads(*inputs) for inputs in zip((query, key, value), weights, biases, strict=True))
    mask = _joined_masks(attn_mask, key_padding_mask, queries)
    out = F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, dropout_p=dropout_p if training else 0.0)
    out = F.linear(out.transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    return out.transpose(0, 1), None


def _joined_masks(attn_mask: Tensor | None, key_padding_mask: Tensor | None, query: Tensor) -> Tensor | None:
    """``nn.MultiheadAttention``'s masks, whose True means left out, as one to be added to the scores."""
    total = None
    if attn_mask is not None and attn_mask.dim() == 3:
        attn_mask = attn_mask.unflatten(0, (query.shape[0], -1))
    if key_padding_mask is not None:
        key_padding_mask = key_padding_mask[:, None, None]
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        if mask.dtype == torch.bool:
            mask = query.new_zeros(()).masked_fill(mask, -torch.inf)
        total = mask if total is None else total + mask
    return total


def broadcast_mask(mask: Tensor | None, key: Tensor) -> Tensor | None:
    """A mask with four dimensions, that broadcasts to (B, H, m, n)."""
    if mask is None:
        return None
    mask = mask.detach()
    mask = mask.reshape((1,) * (4 - mask.dim()) + tuple(mask.shape))
    return mask.expand(*mask.shape[:3], key.shape[2]) if mask.shape[-1] == 1 else mask


def causal_mask(query: Tensor, key: Tensor) -> Tensor:
    """What ``is_causal`` stands for, (1, 1, m, n)."""
    return torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]


def as_autocast(*tensors: Tensor) -> Sequence[Tensor]:
    """What autocast would do to attention's inputs before the library's operator sees them."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return [tensor.to(dtype) for tensor in tensors]
