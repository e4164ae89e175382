"""This library's explanations as providers: what is timed, and what of it is held against the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

import vitexplain
from vitexplain import Explainer, Explanation
from vitexplain.errors import ExplanationError

from ..registry import Check, Unavailable
from .gate import Gate, worst

COMPILED, CUDA_GRAPH, CHECKPOINTED = "compiled", "CUDA graph", "checkpointed"
FLOAT32_RELEVANCE = "relevance in float32"
SWITCHES: dict[str, dict[str, Any]] = {
    COMPILED: {"compile": True},
    CUDA_GRAPH: {"cuda_graph": True},
    CHECKPOINTED: {"checkpoint": True},
    FLOAT32_RELEVANCE: {"precision": "float32"},
}
CALLS = {"cpu": 1, "cuda": 2}  # of what is gated: the first of a CUDA graph captures, the second is what is timed, a replay


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


def called(call: Callable[[], object], device: torch.device) -> list[Explanation]:
    """The explanations that a timed call returns, one or several, from a call that is like all that come after it.

    Raises:
        Unavailable: the library refuses.
    """
    try:
        for _ in range(CALLS[device.type]):
            found = call()
    except ExplanationError as reason:
        raise Unavailable(str(reason)) from reason
    return list(_each(found))


def _each(found: object) -> Iterator[Explanation]:
    if isinstance(found, Explanation):
        yield found
        return
    for one in found.values() if isinstance(found, dict) else found:
        yield from _each(one)


def check(gate: Gate, explanations: list[Explanation], options: Mapping[str, Any] = MappingProxyType({})) -> Check:
    """The worst of several explanations' checks, each for the classes that it says it explains, of the gate's images alone."""
    first = slice(len(gate.images))
    return worst([gate.check(one.method, all_values(one)[first], one.target[first], **options) for one in explanations])


def all_values(explanation: Explanation) -> Tensor:
    """Prefix and patch values together (B, n) or (B, K, n), or all pixels (B, h, w): an error is judged against the largest."""
    if explanation.prefix_values.shape[-1] == 0:
        return explanation.maps
    return torch.cat([explanation.prefix_values, explanation.maps.flatten(-2)], -1)
