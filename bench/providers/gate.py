"""What an explanation is held against before it is timed: the dense float64 reference, on two images."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from vitexplain.methods import REGISTRY
from vitexplain.testing import DenseReference

from ..registry import Check

FLOAT32_TOLERANCE = 1e-5
LARGEST_LIMIT = 0.2
CHECKED_IMAGES = 2


class Reference(Protocol):
    """A model's explanations of some images, all in one dtype."""

    def explain(self, method: str, classes: Tensor, /, **options: Any) -> Tensor:
        """Values (B, …) of one class an image (B,)."""


class Gate:
    """Relative errors of explanations of one model, and how large they may be.

    In float32 the budget is 1e-5 of the largest value. In half precision, and for methods that send relevance back, whose
    quotients are ill-conditioned, it is twice the root mean square error of plain torch in that precision, plus four roundings,
    and 0.2 at most: where plain torch itself is further off, or not a number, it says nothing about what is right.

    Args:
        model: it is copied.
        images: the first two are used.
        reference: made of model, images and a dtype.
        exact: dtype of what explanations are held against.

    Attributes:
        images: (2, 3, h, w), or (1, 3, h, w) where there is one alone.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        reference: Callable[[nn.Module, Tensor, torch.dtype], Reference] = DenseReference,
        exact: torch.dtype = torch.float64,
    ) -> None:
        self.model, self.images = model, images[:CHECKED_IMAGES]
        self._made_of, self._exact = reference, exact
        self._values: dict[object, Tensor] = {}

    @cached_property
    def exact_run(self) -> Reference:
        """In float64; one run for all methods."""
        return self._made_of(self.model, self.images, self._exact)

    @cached_property
    def plain_run(self) -> Reference:
        """The same computation in the model's precision: what rounding alone does."""
        return self._made_of(self.model, self.images, self.images.dtype)

    def let_go(self) -> None:
        """Free both runs with all their maps; values that they gave stay, and another question starts them again."""
        self.__dict__.pop("exact_run", None)
        self.__dict__.pop("plain_run", None)

    def is_narrow(self, method: str) -> bool:
        """Whether float32's budget would be too small for any implementation."""
        return self.images.dtype != torch.float32 or REGISTRY[method].rules is not None

    def check(self, method: str, values: Tensor, classes: Tensor, **options: Any) -> Check:
        """Error and limit of an implementation's values (2, …), or (2, K, …), of a method with these options.

        ``classes``: what it explained, (2,) or (2, K).
        """
        received = values.double().flatten(1)
        exact = self._values_of("exact_run", method, classes, options)
        if not self.is_narrow(method):
            return Check(float((received - exact).abs().max() / exact.abs().max()), FLOAT32_TOLERANCE)
        plain = self._values_of("plain_run", method, classes, options)
        return Check(_rms_error(received, exact), _limit(_rms_error(plain, exact), self.images.dtype))

    def _values_of(self, run: str, method: str, classes: Tensor, options: dict[str, Any]) -> Tensor:
        """A reference's values of all classes, (2, …) in float64."""
        columns = classes.view(len(classes), -1).unbind(1)
        return torch.stack([self._values_of_one(run, method, column, options) for column in columns], 1).flatten(1)

    def _values_of_one(self, run: str, method: str, classes: Tensor, options: dict[str, Any]) -> Tensor:
        """Of classes (2,), computed once for all providers."""
        key = (run, method, tuple(classes.tolist()), tuple(sorted(options.items())))
        if key not in self._values:
            self._values[key] = getattr(self, run).explain(method, classes, **options).double()
        return self._values[key]


def worst(checks: list[Check]) -> Check:
    """The check that is the nearest to its limit, or the furthest beyond it."""
    failed = [check for check in checks if not check.passed]
    return failed[0] if failed else max(checks, key=lambda check: check.error / check.limit)


def _limit(plain_error: float, dtype: torch.dtype) -> float:
    """What an error may be where plain torch has this one."""
    limit = 2 * plain_error + 4 * torch.finfo(dtype).eps
    return limit if limit < LARGEST_LIMIT else LARGEST_LIMIT  # that of NaN, too, which ``min`` would hand on


def _rms_error(received: Tensor, exact: Tensor) -> float:
    return float((received - exact).norm() / exact.norm())
