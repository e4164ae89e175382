"""Benchmarks and measured decisions; ``python -m bench.<name>``."""
