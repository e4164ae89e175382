"""TokenTM / VTranM: attention weighted by its gradient and by how far each layer moves each token."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..kernels import attention_token_transformation, token_transformation
from ..kernels.dispatch import accumulation_dtype
from ..options import option
from ..relevance import Rows, Trace, Update
from ..tap import BlockTrace
from .base import ChainMethod


@dataclass(frozen=True)
class _Weights:
    """What one block's forward leaves: ‖x⁰‖ (block 0), W_h (B, H, n) and W_f (B, n)."""

    token_norms: Tensor | None
    attention: Tensor | None
    mlp: Tensor | None


@dataclass(frozen=True, kw_only=True)
class TokenTM(ChainMethod):
    """The class row of Π_l U_ffn,l U_mhsa,l C_0 with

        U_mhsa = I + mean_h[relu(G_h) ⊙ P_h · diag(W_h)],  U_ffn = I + diag(W_f),  C_0 = diag(‖x⁰‖)

    and W the norm ratio × NECC between what enters a branch and what the branch adds. ``aggregate=False`` is the last
    block's U_mhsa alone (Eq. 8). ``length=False`` drops norm ratios and C_0, ``necc=False`` the cosine term; with neither,
    W ≡ 1 and there is no FFN factor. ``necc_scale="n"`` is an extension: it gives the NECC a mean of 1 instead of 1/n.
    """

    name: ClassVar[str] = "tokentm"
    title: ClassVar[str] = "TokenTM / VTranM"
    paper: ClassVar[str] = "Token Transformation Matters (CVPR 2024; first as VTranM)"
    cost: ClassVar[str] = "forward + backward + one attention forward per block"
    uses_gradient: ClassVar[bool] = True
    uses_target: ClassVar[bool] = True

    score: str = option("logit", "the scalar explained", choices=("logit", "probability"))
    aggregate: bool = option(True, "multiply over all blocks; false: the last block alone")
    length: bool = option(True, "weigh by how far a layer changes the length of a token")
    necc: bool = option(True, "weigh by the normalised exponential cosine of the change")
    necc_scale: str = option("1", "factor of the NECC; n is an extension of the paper's 1", choices=("1", "n"))
    start_block: int = option(0, "first block of the product", minimum=0)

    @property
    def observes(self) -> bool:
        """Whether token transformations are needed at all."""
        return self.length or self.necc

    @property
    def uses_branches(self) -> bool:
        """W needs the residual branches apart."""
        return self.observes

    def first_block(self, num_blocks: int) -> int:
        return self.start_block if self.aggregate else num_blocks - 1

    def observe(self, block: BlockTrace) -> _Weights:
        tokens, mid_tokens, mlp_out = block.tokens, block.mid_tokens, block.mlp_out
        assert tokens is not None, "there while observers run"
        assert mid_tokens is not None, "there while observers run"
        assert mlp_out is not None, "there while observers run"
        norms = torch.linalg.vector_norm(tokens, dim=-1, dtype=accumulation_dtype(tokens.dtype)) if block.index == 0 else None
        if block.index < self.start_block or not (self.aggregate or block.is_last):
            return _Weights(norms, None, None)
        value = block.value
        weight = block.branches.output_weight().to(value.dtype)
        attention = self._weights(attention_token_transformation, block, tokens.to(value.dtype), value, weight)
        if not self.aggregate:
            return _Weights(norms, attention, None)
        mlp = self._weights(token_transformation, block, mid_tokens, mlp_out.to(mid_tokens.dtype))
        return _Weights(norms, attention, mlp)

    def _weights(self, operation: Callable[..., Tensor], block: BlockTrace, *tensors: Tensor) -> Tensor:
        """Norm ratio × NECC, (B, H, n) or (B, n); padding takes no part in the NECC."""
        num_tokens = tensors[0].shape[1]
        scale = float(num_tokens) if self.necc_scale == "n" else 1.0
        weights = operation(*tensors, length=self.length, necc=self.necc, necc_scale=scale, backend=block.backend)
        if block.valid_tokens is None:
            return weights
        valid = block.valid_tokens.view(len(weights), *(1,) * (weights.dim() - 2), num_tokens)
        weights = weights.masked_fill(~valid, 0)
        if not self.necc:
            return weights
        shares = operation(*tensors, length=False, necc=True, necc_scale=1.0, backend=block.backend)
        total = shares.masked_fill(~valid, 0).sum(-1, keepdim=True)
        count = valid.sum(-1, keepdim=True) / num_tokens if self.necc_scale == "n" else 1.0
        return weights * count / total

    def update(self, trace: Trace, block: BlockTrace, grad_out: Tensor | None) -> Update:  # noqa: ARG002
        weights = block.observed.get(self, _Weights(None, None, None))
        factors = None if weights.mlp is None else 1 + weights.mlp
        return Update(phi="p_relu_g", token_weights=weights.attention, row_factors=factors)

    def finish(self, state: Rows, trace: Trace) -> Tensor:
        if not (self.aggregate and self.length):
            return state.values
        return state.scaled(trace.blocks[0].observed[self].token_norms.to(state.values.dtype)).values
