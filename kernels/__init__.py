"""Fused operations of matrix-free attribution: Triton on CUDA, tiled torch elsewhere. Installed as ``vitexplain.kernels``.

One folder per operation: ``__init__`` validates and dispatches, ``torch_tiles`` and ``triton_kernel`` implement, and
neither of the two knows the other.
"""

# Where a clone is on the path, transformers finds this folder as ``kernels`` and takes it for the hub's package of that name: it
# gets an empty one, as each operation can be registered but once.
if __name__ != "kernels":
    from .attention_backward import attention_backward
    from .attention_relevance import relevance_backward, relevance_rows
    from .contribution_map import contribution_map
    from .dispatch import BACKENDS, choose_backend, interpreting, triton_installed
    from .head_norms import head_norms
    from .phi import PHIS
    from .row_propagation import row_propagation, row_propagation_by_head
    from .token_transformation import add_token_transformation, attention_token_transformation, token_transformation

    __all__ = [
        "BACKENDS",
        "PHIS",
        "add_token_transformation",
        "attention_backward",
        "attention_token_transformation",
        "choose_backend",
        "contribution_map",
        "head_norms",
        "interpreting",
        "relevance_backward",
        "relevance_rows",
        "row_propagation",
        "row_propagation_by_head",
        "token_transformation",
        "triton_installed",
    ]
