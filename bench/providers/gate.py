"""What an explanation is held against before it is timed: the dense float64 reference, on two images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from vitexplain.methods import REGISTRY
from vitexplain.testing import DenseReference

from ..registry import Check

FLOAT32_TOLERANCE = 1e-5
IMAGES = 2

Explain = Callable[[Tensor, Tensor], Tensor]  # images and classes to values (B, n) or (B, h, w)


class Gate:
    """Relative errors of explanations of one model, and how large they may be.

    In float32 the budget is 1e-5 of the largest value; in half precision, and for methods that send relevance back, whose
    quotients are ill-conditioned, twice the root mean square error of plain torch in that precision, plus four roundings.

    Args:
        model: it is copied.
        images: the first two are used.

    Attributes:
        images: (2, 3, h, w).
    """

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        self.model, self.images = model, images[:IMAGES]
        self._values: dict[object, Tensor] = {}

    @cached_property
    def exact_run(self) -> DenseReference:
        """In float64; one run for all methods."""
        return DenseReference(self.model, self.images)

    @cached_property
    def plain_run(self) -> DenseReference:
        """The same computation in the model's precision: what rounding alone does."""
        return DenseReference(self.model, self.images, self.images.dtype)

    @cached_property
    def target(self) -> Tensor:
        """The predicted classes (2,), as float64 sees them."""
        return self.exact_run.logits.argmax(-1)

    def is_narrow(self, method: str) -> bool:
        """Whether float32's budget would be too small for any implementation."""
        return self.images.dtype != torch.float32 or REGISTRY[method].rules is not None

    def check(self, method: str, explain: Explain, target: Tensor | None = None, **options: Any) -> Check:
        """Error and limit of an implementation of a method with these options, for classes (2,) or (2, K)."""
        target = self.target if target is None else target
        received = explain(self.images, target).double().flatten(1)
        exact = self._reference(self.exact_run, method, target, options)
        if not self.is_narrow(method):
            return Check(float((received - exact).abs().max() / exact.abs().max()), FLOAT32_TOLERANCE)
        plain = self._reference(self.plain_run, method, target, options)
        limit = 2 * _rms_error(plain, exact) + 4 * torch.finfo(self.images.dtype).eps
        return Check(_rms_error(received, exact), limit)

    def _reference(self, run: DenseReference, method: str, target: Tensor, options: dict[str, Any]) -> Tensor:
        """A reference's values (2, …) in float64, computed once for all providers."""
        key = (run.dtype, method, str(target.tolist()), tuple(sorted(options.items())))
        if key not in self._values:
            found = [run.explain(method, classes, **options) for classes in target.view(len(target), -1).unbind(1)]
            self._values[key] = torch.stack(found, 1).double().flatten(1)
        return self._values[key]


def worst(checks: list[Check]) -> Check:
    """The check that is the nearest to its limit, or the furthest beyond it."""
    failed = [check for check in checks if not check.passed]
    return failed[0] if failed else max(checks, key=lambda check: check.error / check.limit)


def _rms_error(received: Tensor, exact: Tensor) -> float:
    return float((received - exact).norm() / exact.norm())
