"""This library's explanations as providers: what is timed, and what of it is held against the reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import vitexplain
from vitexplain import Explainer, Explanation
from vitexplain.errors import ExplanationError

from ..registry import Unavailable
from .gate import Explain

COMPILED, CUDA_GRAPH, CHECKPOINTED = "compiled", "CUDA graph", "checkpointed"
FLOAT32_RELEVANCE = "relevance in float32"
SWITCHES: dict[str, dict[str, Any]] = {
    COMPILED: {"compile": True},
    CUDA_GRAPH: {"cuda_graph": True},
    CHECKPOINTED: {"checkpoint": True},
    FLOAT32_RELEVANCE: {"precision": "float32"},
}
CALLS_UNTIL_REPLAY = 3  # a captured call is itself only after some that prepare it


def switched(provider: str, *switches: str) -> str:
    """The provider's name with ways of running it, ``"vitexplain (Triton), compiled, CUDA graph"``."""
    return ", ".join((provider, *switches))


def build(provider: str, model: nn.Module, method: str | tuple[str, ...], options: dict[str, Any]) -> Explainer:
    """The explainer that a provider's name stands for; ``Unavailable`` where the library refuses."""
    for name in provider.split(", ")[1:]:
        options = {**options, **SWITCHES[name]}
    try:
        return vitexplain.Explainer(model, method, **options)
    except ExplanationError as reason:
        raise Unavailable(str(reason)) from reason


def timed(explainer: Explainer, images: Tensor, target: Any = None) -> Callable[[], object]:
    """The call as users make it: on a GPU without a look at values, which would wait for the device."""
    return lambda: explainer.attribute(images, target, check_values=images.device.type == "cpu")


def gated(explainer: Explainer, images: Tensor, label: str | None = None) -> Explain:
    """What the gate calls: it explains some images as the first of the whole batch, which is what is timed.

    Args:
        explainer: of one method, or of several.
        images: (B, 3, h, w), the gate's first.
        label: of the method, where there are several.
    """

    def explain(first: Tensor, target: Tensor) -> Tensor:
        batch = torch.cat([first, images[len(first) :]])
        targets = torch.cat([target, target[:1].expand(len(batch) - len(first), *target.shape[1:])])
        try:
            for _ in range(1 if images.device.type == "cpu" else CALLS_UNTIL_REPLAY):
                found = timed(explainer, batch, targets)()
        except ExplanationError as reason:
            raise Unavailable(str(reason)) from reason
        return all_values(found if label is None else found[label])[: len(first)]

    return explain


def all_values(explanation: Explanation) -> Tensor:
    """Prefix and patch values together (B, n) or (B, K, n), or all pixels (B, h, w): an error is judged against the largest."""
    if explanation.prefix_values.shape[-1] == 0:
        return explanation.maps
    return torch.cat([explanation.prefix_values, explanation.maps.flatten(-2)], -1)
