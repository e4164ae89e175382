"""The reference that everything is tested against: dense, float64, slow on purpose."""

from .dense import DenseReference

__all__ = ["DenseReference"]
