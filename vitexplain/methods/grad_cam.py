"""Grad-CAM on the last block's attention."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..relevance import Rows, Trace, propagate
from ..tap import BlockTrace
from .base import Method


@dataclass(frozen=True, kw_only=True)
class GradCAM(Method):
    """relu(mean_h w_h P_h[cls, ·]) of the last block, w_h the mean over patch columns of G_h[cls, ·].

    For a mean-pooled head the class row is the pooling-weighted mean of the patches' rows.
    """

    name: ClassVar[str] = "grad_cam"
    title: ClassVar[str] = "Attention Grad-CAM"
    paper: ClassVar[str] = "Grad-CAM (ICCV 2017), on attention as in Transformer Interpretability Beyond Attention (CVPR 2021)"
    cost: ClassVar[str] = "forward + backward of the head and the last MLP"
    uses_gradient: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True
    reads_head_rows: ClassVar[bool] = True

    def first_block(self, num_blocks: int) -> int:
        return num_blocks - 1

    def step(self, state: Rows, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Rows:
        assert grad_out is not None, "given to methods that use the gradient"
        m, dtype = state.support, state.values.dtype
        row_gradient = (state.values[:, :, :m].unsqueeze(1) @ grad_out[:, :, :m].to(dtype)).squeeze(2)  # (B, H, dv)
        mean_value = block.value[:, :, trace.anatomy.num_prefix_tokens :].mean(2, dtype=dtype)  # (B, H, dv)
        if block.valid_tokens is not None:  # padding has no value, and does not count
            mean_value = mean_value / block.valid_tokens.to(dtype).mean(1)[:, None, None]
        weights = (row_gradient * mean_value).sum(-1) / block.value.shape[1]  # mean of G over patch columns, over H
        return state.dense(propagate(state, block, head_weights=weights).relu())
