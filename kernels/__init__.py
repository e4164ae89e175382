"""Fused operations of matrix-free attribution: Triton on CUDA, tiled torch elsewhere. Installed as ``vitexplain.kernels``.

One folder per operation: ``__init__`` validates and dispatches, ``torch_tiles`` and ``triton_kernel`` implement, and
neither of the two knows the other.
"""

from .dispatch import BACKENDS, choose_backend, interpreting, triton_installed
from .head_norms import head_norms
from .row_propagation import PHIS, row_propagation
from .token_transformation import attention_token_transformation, token_transformation

__all__ = [
    "BACKENDS",
    "PHIS",
    "attention_token_transformation",
    "choose_backend",
    "head_norms",
    "interpreting",
    "row_propagation",
    "token_transformation",
    "triton_installed",
]
