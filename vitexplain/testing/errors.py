"""How far values are from what they should be."""

from __future__ import annotations

from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Largest difference of two tensors (…) of one shape over the largest magnitude expected; 0 where both are all zero."""
    difference = float((actual.double() - expected.double()).abs().max())
    return difference / max(float(expected.double().abs().max()), 1e-300)
