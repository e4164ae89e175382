"""torch's own fused attention, forward and backward, with the logsumexp kept.

``F.scaled_dot_product_attention`` does not hand out its logsumexp, so the library operators behind it are called directly:
flash on a CPU, flash or memory-efficient attention on CUDA (the latter where there is a mask).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UnsupportedModelError

_ATEN = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
# Of fewer query tokens a CPU's backward takes smaller tiles, on which bfloat16 takes twice the time of float32 (measured at 197
# and 577 tokens; equal at 1025).
WIDENED_TOKENS = 768


@dataclass
class AttentionState:
    """What a fused forward leaves for its backward, beside its inputs and output.

    Attributes:
        operator: ``"cpu"``, ``"flash"`` or ``"efficient"``.
        saved_logsumexp: as the operator returned it; ``logsumexp`` is the part that belongs to queries.
        logsumexp: (B, H, m), natural logarithm, of the scaled and masked scores.
        extras: the operator's other results.
        bias: what was added to the scores, as the operator took it.
    """

    operator: str
    saved_logsumexp: Tensor
    logsumexp: Tensor
    extras: tuple[Any, ...] = ()
    bias: Tensor | None = None


def attention_forward(
    query: Tensor, key: Tensor, value: Tensor, scale: float, mask: Tensor | None = None
) -> tuple[Tensor, AttentionState]:
    """Fused attention of (B, H, m, dh), (B, H, n, dh), (B, H, n, dv) without dropout; output (B, H, m, dv).

    ``mask`` broadcasts to (B, H, m, n): boolean, True where a key takes part, or added to the scores.

    Raises:
        UnsupportedModelError: float64 on a GPU.
    """
    bias = None if mask is None else _bias(mask, query.dtype)
    if query.device.type == "cpu":
        width = value.shape[-1]
        query, key, value = _of_one_width(query, key, value)
        out, logsumexp = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, False, attn_mask=bias, scale=scale
        )
        return out[..., :width], AttentionState("cpu", logsumexp, logsumexp, bias=bias)
    if query.dtype == torch.float64:
        raise UnsupportedModelError("attention in float64 on a GPU: torch has no fused kernel for it; explain the model on a CPU")
    width, num_queries = value.shape[-1], query.shape[2]
    if bias is not None:
        bias = _aligned_bias(bias, (*query.shape[:3], key.shape[2]))
    query, key, value = (_aligned(tensor) for tensor in (query, key, value))
    flash = query.dtype in _HALF and torch.cuda.get_device_capability(query.device) >= (8, 0)
    if flash and bias is None and query.shape[-1] == value.shape[-1] <= 256:
        out, logsumexp, *extras, _ = _ATEN._scaled_dot_product_flash_attention(query, key, value, 0.0, False, False, scale=scale)
        return out[..., :width], AttentionState("flash", logsumexp, logsumexp, tuple(extras))
    out, logsumexp, *extras = _ATEN._scaled_dot_product_efficient_attention(
        query, key, value, bias, True, 0.0, False, scale=scale
    )
    return out[..., :width], AttentionState("efficient", logsumexp, logsumexp[..., :num_queries], tuple(extras), bias)


def attention_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, state: AttentionState, scale: float
) -> tuple[Tensor, ...]:
    """Gradients of query, key and value by the library's fused backward."""
    widths = query.shape[-1], key.shape[-1], value.shape[-1]
    if state.operator == "cpu":
        dtype, bias = query.dtype, state.bias
        tensors = _of_one_width(grad_out, query, key, value, out)
        if dtype == torch.bfloat16 and query.shape[2] < WIDENED_TOKENS:
            tensors = [tensor.float() for tensor in tensors]
            bias = None if bias is None else bias.float()
        gradients = _ATEN._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, state.saved_logsumexp, 0.0, False, attn_mask=bias, scale=scale
        )
        return tuple(gradient[..., :width].to(dtype) for gradient, width in zip(gradients, widths, strict=True))
    grad_out, query, key, value, out = (_aligned(tensor) for tensor in (grad_out, query, key, value, out))
    if state.operator == "flash":
        cumulative_query, cumulative_key, longest_query, longest_key, seed, offset = state.extras
        gradients = _ATEN._scaled_dot_product_flash_attention_backward(
            grad_out, query, key, value, out, state.saved_logsumexp, cumulative_query, cumulative_key, longest_query, longest_key,
            0.0, False, seed, offset, scale=scale,
        )  # fmt: skip
    else:
        *gradients, _ = _ATEN._scaled_dot_product_efficient_attention_backward(
            grad_out, query, key, value, state.bias, out, state.saved_logsumexp, *state.extras,
            0.0, [True, True, True, False], False, scale=scale,
        )  # fmt: skip
    return tuple(gradient[..., :width] for gradient, width in zip(gradients, widths, strict=True))


def leading_rows_backward(
    grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, state: AttentionState, scale: float, num_rows: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients where only the first ``num_rows`` rows of ``grad_out`` are non-zero: O(num_rows · n · dh)."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    grad_rows, query_rows, out_rows = (tensor[:, :, :num_rows].to(dtype) for tensor in (grad_out, query, out))
    wide_key, wide_value = key.to(dtype), value.to(dtype)
    scores = (query_rows * scale) @ wide_key.transpose(-1, -2)
    if state.bias is not None:
        scores = scores + (state.bias if state.bias.shape[-2] == 1 else state.bias[..., :num_rows, :])
    probabilities = (scores - state.logsumexp[:, :, :num_rows, None]).exp()  # (B, H, num_rows, n)
    grad_probabilities = grad_rows @ wide_value.transpose(-1, -2)
    delta = (grad_rows * out_rows).sum(-1, keepdim=True)
    grad_scores = probabilities * (grad_probabilities - delta) * scale
    grad_query = torch.zeros_like(query)
    grad_query[:, :, :num_rows] = (grad_scores @ wide_key).to(query.dtype)
    grad_key = grad_scores.transpose(-1, -2) @ query_rows
    grad_value = probabilities.transpose(-1, -2) @ grad_rows
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _of_one_width(*tensors: Tensor) -> list[Tensor]:
    """Head widths padded with zeros to the widest, and rows without gaps: what the CPU operator takes for granted."""
    width = max(tensor.shape[-1] for tensor in tensors)
    return [
        F.pad(tensor, (0, width - tensor.shape[-1])) if tensor.shape[-1] < width else _without_gaps(tensor) for tensor in tensors
    ]


def _aligned(tensor: Tensor) -> Tensor:
    """Head width padded with zeros to the multiple of 8 that the CUDA operators want."""
    missing = -tensor.shape[-1] % 8
    return F.pad(tensor, (0, missing)) if missing else _without_gaps(tensor)


def _without_gaps(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _bias(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to the scores, in their element type."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def _aligned_bias(bias: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Expanded to (B, H, m, n), with rows that start at the addresses that the CUDA operator wants."""
    missing = -bias.shape[-1] % 16
    if missing:
        bias = F.pad(bias, (0, missing))[..., :-missing]
    bias = _without_gaps(bias)
    return bias.expand(shape)
