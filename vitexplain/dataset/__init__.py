"""Whole data sets: explained into a store that survives every interruption, or as an iterator of tensors.

``run`` explains into a store, ``open`` reads one, ``stream`` gives tensors and writes nothing.
"""

from __future__ import annotations

from .auto_batch import Measured
from .entry import ExplainedBatch, Report, run, stream
from .maps import MapStore
from .maps import open_maps as open
from .work import Progress

__all__ = ["ExplainedBatch", "MapStore", "Measured", "Progress", "Report", "open", "run", "stream"]
