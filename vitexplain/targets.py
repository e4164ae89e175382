"""Which class to explain: every accepted form of ``target`` becomes one integer tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .capture import capturing
from .errors import InputError

_FORMS = "None, an int, a list or integer tensor (B,), or (B, K) for several classes an image"


def resolve_target(target: Any, logits: Tensor) -> Tensor:
    """``target`` as int64 (B,) or (B, K) on the logits' device; the predicted classes where it is None.

    Objects with a ``category`` attribute (pytorch-grad-cam's ``ClassifierOutputTarget``) stand for their category.

    Raises:
        InputError: wrong type or shape, or a class outside the model's range.
    """
    batch, num_classes = logits.shape
    if target is None:
        return logits.argmax(-1)
    values = _as_tensor(target)
    if values.dim() == 0:
        values = values.expand(batch)
    if values.dim() > 2 or values.shape[0] != batch or values.numel() == 0:
        raise InputError(f"target: expected {_FORMS}, with B={batch}; received shape {tuple(values.shape)}")
    if capturing(logits.device):
        if values.device != logits.device:
            raise InputError(
                f"target: expected None or a tensor on {logits.device} while a CUDA graph is captured, received {values.device}"
            )
        return values.to(torch.int64)
    wrong = values[(values < 0) | (values >= num_classes)]
    if wrong.numel():
        raise InputError(f"target: expected classes 0 to {num_classes - 1}, received {int(wrong[0])}")
    return values.to(device=logits.device, dtype=torch.int64)


def _as_tensor(target: Any) -> Tensor:
    if isinstance(target, list | tuple):
        target = [_category(item) for item in target]
    else:
        target = _category(target)
    try:
        values = torch.as_tensor(target)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"target: expected {_FORMS}; received {type(target).__name__}") from error
    if values.numel() and (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool):
        raise InputError(f"target: expected integers, received {values.dtype}")
    return values


def _category(item: Any) -> Any:
    return getattr(item, "category", item)
