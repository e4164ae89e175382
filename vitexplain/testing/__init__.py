"""The reference that everything is tested against: dense, float64, slow on purpose."""

from .dense import DenseReference
from .errors import relative_error

__all__ = ["DenseReference", "relative_error"]
