"""What to explain: every accepted form of ``target`` or ``score`` becomes one scalar of each image."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import InputError
from .value_checks import expect, expect_finite, unseen

Score = Callable[[Tensor], Tensor]  # from outputs (B, C) to what is explained, (B,) or (B, K)

_FORMS = "None, an int, a list or integer tensor (B,), (B, K) for several classes an image, or 'topK' for the K likeliest"


@dataclass(frozen=True)
class Target:
    """One explained scalar of each image: a class, or one column of a score.

    Attributes:
        classes: (B,) int64, or None.
        score: from outputs (B, C) to (B,) or (B, K), or None.
        column: which of a score's K.
    """

    classes: Tensor | None = None
    score: Score | None = None
    column: int = 0

    def value(self, outputs: Tensor) -> Tensor:
        """The scalars (B,) of outputs (B, C)."""
        if self.score is None:
            assert self.classes is not None, "a target is a class or a score's"
            return outputs.gather(1, self.classes.unsqueeze(1)).squeeze(1)
        values = self.score(outputs)
        return values if values.dim() == 1 else values[:, self.column]

    def probability(self, outputs: Tensor) -> Tensor:
        """The class's probability, (B,)."""
        return self.value(outputs.softmax(-1))


def targets_of(target: Any, outputs: Tensor, score: Score | None) -> tuple[Tensor | None, list[Target], bool]:
    """The classes (B,) or (B, K), None for a score; the explained scalars one by one; whether there is an axis of K.

    Raises:
        InputError: ``target`` or ``score`` does not fit.
    """
    if score is None:
        classes = resolve_target(target, outputs.detach())
        columns = classes.unsqueeze(1) if classes.dim() == 1 else classes
        return classes, [Target(column) for column in columns.unbind(1)], classes.dim() == 2
    if target is not None:
        raise InputError("target: expected None beside a score, which says what is explained; received a target as well")
    values = score(outputs)
    if not isinstance(values, Tensor) or values.dim() not in (1, 2) or len(values) != len(outputs) or 0 in values.shape:
        received = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise InputError(f"score: expected a function to (B,) or (B, K) with B={len(outputs)}, received {received}")
    if outputs.requires_grad and not values.requires_grad:
        raise InputError("score: expected a differentiable function of the model's output, received one without a gradient")
    expect_finite(values, "score: expected finite values, received NaN or infinity")
    num_columns = values.shape[1] if values.dim() == 2 else 1
    return None, [Target(score=score, column=column) for column in range(num_columns)], values.dim() == 2


def margin(first: int, second: int) -> Score:
    """A score: how much the logit of class ``first`` exceeds that of class ``second``."""

    def score(logits: Tensor) -> Tensor:
        for index in (first, second):
            if not 0 <= index < logits.shape[1]:
                raise InputError(f"margin: expected classes 0 to {logits.shape[1] - 1}, received {index}")
        return logits[:, first] - logits[:, second]

    return score


def similarity(embeddings: Tensor) -> Score:
    """A score for models that embed: cosine similarity of an image's embedding to given ones.

    Args:
        embeddings: (d,) or (K, d), for example CLIP's embeddings of K prompts.

    Returns:
        A function from (B, d) to (B,) or (B, K).
    """
    if embeddings.dim() not in (1, 2) or not embeddings.is_floating_point():
        raise InputError(
            f"embeddings: expected floating-point (d,) or (K, d), received {embeddings.dtype} {tuple(embeddings.shape)}"
        )

    def score(outputs: Tensor) -> Tensor:
        if outputs.shape[1] != embeddings.shape[-1]:
            raise InputError(f"similarity: expected embeddings of width {outputs.shape[1]}, received {embeddings.shape[-1]}")
        directions = torch.nn.functional.normalize(embeddings.to(outputs), dim=-1)
        return torch.nn.functional.normalize(outputs, dim=-1) @ directions.transpose(0, -1)

    return score


def resolve_target(target: Any, logits: Tensor) -> Tensor:
    """``target`` as int64 (B,) or (B, K) on the logits' device; the predicted classes where it is None.

    ``"topK"`` stands for the K classes with the largest logits, the likeliest first. Objects with a ``category`` attribute
    (pytorch-grad-cam's ``ClassifierOutputTarget``) stand for their category.

    Raises:
        InputError: wrong type or shape, or a class outside the model's range.
    """
    batch, num_classes = logits.shape
    if target is None:
        return logits.argmax(-1)
    if isinstance(target, str):
        return logits.topk(num_top(target, num_classes), dim=-1).indices
    values = _as_tensor(target)
    if values.dim() == 0:
        values = values.expand(batch)
    if values.dim() > 2 or values.shape[0] != batch or values.numel() == 0:
        raise InputError(f"target: expected {_FORMS}, with B={batch}; received shape {tuple(values.shape)}")
    if unseen(logits.device) and values.device != logits.device:
        raise InputError(
            f"target: expected None or a tensor on {logits.device} where values are not looked at (check_values=False, or while "
            f"a CUDA graph is captured), received {values.device}"
        )
    known = (values >= 0) & (values < num_classes)
    expect(
        known.all,
        values.device,
        lambda: InputError(f"target: expected classes 0 to {num_classes - 1}, received {int(values[~known][0])}"),
    )
    # an index out of range would stop a GPU for good, before its check is looked at or without one
    return values.to(device=logits.device, dtype=torch.int64, non_blocking=True).clamp(0, num_classes - 1)


def num_top(target: str, num_classes: int) -> int:
    """The K of ``"topK"``.

    Raises:
        InputError: another text, or more classes than there are.
    """
    found = re.fullmatch(r"top([1-9][0-9]*)", target)
    if found is None:
        raise InputError(f"target: expected {_FORMS}; received {target!r}")
    count = int(found.group(1))
    if count > num_classes:
        raise InputError(f"target: expected at most top{num_classes}, as there are {num_classes} classes, received {target!r}")
    return count


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
    return (values.clone() if values.is_inference() else values).to(torch.int64)


def _category(item: Any) -> Any:
    return getattr(item, "category", item)
