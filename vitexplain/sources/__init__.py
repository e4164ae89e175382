"""Labelled images from what users have: folders, tables, Hugging Face datasets, .npz files and tar shards, read in one way."""

from .base import Sample, Source, parse_slice
from .files import IMAGE_SUFFIXES
from .masks import foreground
from .opening import EXPECTED, open_source
from .tables import TABLE_COLUMNS

__all__ = ["EXPECTED", "IMAGE_SUFFIXES", "TABLE_COLUMNS", "Sample", "Source", "foreground", "open_source", "parse_slice"]
