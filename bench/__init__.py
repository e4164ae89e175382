"""Benchmarks and measured decisions; ``python -m bench.<name>``."""

import sys

# From the repository's root, transformers would take the folder ``kernels`` for the package of that name on the hub.
sys.modules.setdefault("kernels", None)  # type: ignore[arg-type]
