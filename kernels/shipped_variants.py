"""The kernel variants that explanations launch, found by launching them on tensors that hold no data.

The ahead-of-time build compiles these, and the tests check each against its budgets. What is not among them (masks, other
weighings) is compiled by Triton when it is first met.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .attention_backward.triton_kernel import launch_backward
from .attention_relevance.triton_kernel import launch_backward as launch_relevance
from .attention_relevance.triton_kernel import launch_rows as launch_relevance_rows
from .contribution_map.triton_kernel import launch_map
from .head_norms.triton_kernel import launch_norms
from .row_propagation.triton_kernel import launch_by_head, launch_rows
from .token_transformation.attention_kernel import launch_heads
from .token_transformation.token_kernel import launch_tokens

# One number of tokens on each side of every bound that the launch table may have; odd, so that nothing relies on alignment.
LENGTHS = (65, 197, 257, 577, 1025, 1370, 4097, 16385)
BATCH, HEADS = 2, 4
NUM_ROWS = 8  # several rows at once


def record_shipped_launches(dtype: torch.dtype, head_dim: int) -> None:
    """Make every launch that explanations of a model with this element type and head width make; see ``recorded_launches``."""
    for num_tokens in LENGTHS:
        inputs = ShippedInputs(dtype, head_dim, num_tokens)
        inputs.every_launch(num_tokens)
        inputs.rows_launches(1)  # the last block of a class-token model
        ShippedInputs(torch.float32, head_dim, num_tokens).relevance_launches()  # the relevance pass of a model of any type


class ShippedInputs:
    """Tensors without data of one layer's shapes, and the launches that explanations make with them."""

    def __init__(self, dtype: torch.dtype, head_dim: int, num_tokens: int) -> None:
        self.dtype, self.head_dim, self.num_tokens, self.width = dtype, head_dim, num_tokens, HEADS * head_dim
        packed = torch.empty(BATCH, num_tokens, 3, HEADS, head_dim, dtype=dtype, device="meta")
        self.query, self.key, self.value = packed.permute(2, 0, 3, 1, 4).unbind(0)
        self.out, self.grad_out = (self._inputs(num_tokens, HEADS, head_dim).transpose(1, 2) for _ in range(2))
        self.logsumexp = self._floats(HEADS, num_tokens)
        self.head_weights, self.token_weights = self._floats(HEADS), self._floats(HEADS, num_tokens)
        self.scale = head_dim**-0.5

    def _inputs(self, *shape: int) -> Tensor:
        return torch.empty(BATCH, *shape, dtype=self.dtype, device="meta")

    def _floats(self, *shape: int) -> Tensor:
        return torch.empty(BATCH, *shape, dtype=torch.float32, device="meta")

    def every_launch(self, m: int) -> None:
        """All operations, ``m`` query rows where a row is propagated."""
        self.rows_launches(m)
        self.map_launches()
        self.backward_launches()
        self.transformation_launches()

    def rows_launches(self, m: int) -> None:
        """One running row, several, and those by head."""
        query, grad_out, logsumexp = self.query[:, :, :m], self.grad_out[:, :, :m], self.logsumexp[:, :, :m]
        row, rows = self._floats(1, m), self._floats(NUM_ROWS, m)
        w, c = self.head_weights, self.token_weights
        for value, gradient, weights, token_weights, phi in (
            (None, None, None, None, "p"),  # rollout, raw_attention, attcat
            (None, None, w, None, "p"),  # gmar, grad_cam
            (self.value, grad_out, None, None, "p_relu_g"),  # transformer_mm, iba
            (self.value, grad_out, None, c, "p_relu_g"),  # tokentm
        ):
            for running in (row, rows):
                launch_rows(
                    query, self.key, value, gradient, logsumexp, running, weights, token_weights, None, self.scale, 1.0, 0.0, phi
                )
        launch_rows(None, None, self.value, grad_out, None, row, None, None, None, 1.0, 1.0, 0.0, "relu_g")  # legrad
        launch_by_head(query, self.key, self.value, grad_out, logsumexp, row[:, 0], None, self.scale, "p", True)  # gmar, l1
        launch_by_head(None, None, self.value, grad_out, None, row[:, 0], None, 1.0, "abs_g", False)  # head_norms, l1
        for few in (m, 1):  # gmar, l2: tokens split over programs, and not
            launch_norms(self.value[:, :, :few], grad_out[:, :, :few])

    def map_launches(self) -> None:
        """The whole contribution map."""
        contribution, factors = self._floats(self.num_tokens, self.num_tokens), self._floats(self.num_tokens)
        for value, weights, token_weights, row_factors, phi in (
            (None, None, None, None, "p"),
            (None, self.head_weights, None, None, "p"),
            (self.value, None, None, None, "p_relu_g"),
            (self.value, None, self.token_weights, factors, "p_relu_g"),
        ):
            grad_out = None if value is None else self.grad_out
            launch_map(
                self.query, self.key, value, grad_out, self.logsumexp, contribution, weights, token_weights, row_factors, None,
                self.scale, 1.0, 1.0, phi,
            )  # fmt: skip

    def backward_launches(self) -> None:
        """Gradients and row in one pass."""
        for phi, norms in (("p", False), ("p", True), ("p_relu_g", False)):
            for few in (self.num_tokens, 1):  # key blocks split over programs, and not
                query, key, value, out, grad_out = (
                    tensor[:, :, :few] for tensor in (self.query, self.key, self.value, self.out, self.grad_out)
                )
                rows, logsumexp = self._floats(few), self.logsumexp[:, :, :few]
                launch_backward(query, key, value, out, grad_out, logsumexp, rows, None, self.scale, phi, norms)

    def relevance_launches(self) -> None:
        """Layer-wise relevance beside the row of the gradient, that of the map alone and none; and the rows alone."""
        layer, rows = (self.query, self.key, self.value, self.out, self.logsumexp), self._floats(self.num_tokens)
        for gradient in (self.grad_out, None):
            launch_relevance(*layer, rows, gradient, None, self.scale)
            launch_relevance_rows(*layer, rows, gradient, None, self.scale)
        launch_relevance(*layer, None, None, None, self.scale)

    def transformation_launches(self) -> None:
        """Norm ratio × NECC of attention and MLP."""
        tokens = self._inputs(self.num_tokens, self.width)
        projection = self._inputs(self.num_tokens, HEADS, self.head_dim).transpose(1, 2)
        gram = torch.empty(HEADS, self.head_dim, self.head_dim, dtype=torch.float32, device="meta")
        launch_tokens(tokens, None, tokens, True, True, 1.0)
        launch_heads(tokens, self.value, projection, gram, True, True, 1.0)
