"""A dense float64 reference of every method, written from the definitions and independent of the fast code.

Fused attention is off, every attention map and its gradient is materialised, and whole n × n matrices are multiplied.
Memory and time are quadratic to cubic in the number of tokens: for tests, and for a first look at what is saved.
"""

from __future__ import annotations

import copy
import itertools
from typing import Any

import torch
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor


class DenseReference:
    """One dense forward of a timm VisionTransformer, in float64 unless told otherwise.

    Args:
        model: copied and converted; pre-norm blocks with one attention each.
        images: (B, c, h, w).
        dtype: of the whole computation; a narrower one shows what plain low-precision torch would give.

    Attributes:
        logits: (B, classes).
        pooling: (B, n), the weights with which the head reads the tokens.
        maps: P of each block, (B, H, n, n).
        inputs: x of each block, (B, n, d).
    """

    def __init__(self, model: VisionTransformer, images: Tensor, dtype: torch.dtype = torch.float64) -> None:
        self.dtype = dtype
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = False
        if hasattr(self.model, "grad_checkpointing"):
            self.model.grad_checkpointing = False
        self.maps: list[Tensor] = []
        self.values: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.middles: list[Tensor] = []
        self.mlp_outs: list[Tensor] = []
        self._handles: list[Any] = []
        with torch.inference_mode(False), torch.enable_grad():
            self._listen()
            try:
                images = images.detach().clone().to(dtype).requires_grad_()
                self._graph_logits = self.model(images)
            finally:
                for handle in self._handles:
                    handle.remove()
        self.logits = self._graph_logits.detach()
        self.pooling = self._pooling()

    # -- reading the model -------------------------------------------------------------------------------------------

    def _listen(self) -> None:
        for block in self.model.blocks:
            self._on_input(block, self.inputs)
            attention = getattr(block, "attn", block)
            self._on_output(attention.attn_drop, self.maps)
            if isinstance(block, Block):
                self._handles.append(attention.qkv.register_forward_hook(self._keep_value(attention.num_heads)))
                self._on_input(block.norm2, self.middles)
                self._on_output(block.drop_path2, self.mlp_outs)

    def _on_input(self, module: torch.nn.Module, kept: list[Tensor]) -> None:
        self._handles.append(module.register_forward_pre_hook(lambda _, args: kept.append(args[0])))

    def _on_output(self, module: torch.nn.Module, kept: list[Tensor]) -> None:
        self._handles.append(module.register_forward_hook(lambda _m, _i, out: kept.append(out)))

    def _keep_value(self, num_heads: int):
        def keep(_module: torch.nn.Module, _inputs: object, out: Tensor) -> None:
            batch, n, _ = out.shape
            self.values.append(out.reshape(batch, n, 3, num_heads, -1)[:, :, 2].transpose(1, 2))

        return keep

    def _pooling(self) -> Tensor:
        model = self.model
        batch, n, _ = self.inputs[0].shape
        weights = torch.zeros(batch, n, dtype=self.dtype, device=self.logits.device)
        first = 0 if model.pool_include_prefix else model.num_prefix_tokens
        if model.attn_pool is not None:
            pool = model.attn_pool
            tokens = model.norm(self._last_output())[:, first:]
            queries = pool.q_norm(pool.q(pool.latent).reshape(1, -1, pool.num_heads, pool.head_dim).transpose(1, 2))
            keys = pool.kv(tokens)[..., : pool.kv.out_features // 2]
            keys = pool.k_norm(keys.reshape(batch, -1, pool.num_heads, pool.head_dim).transpose(1, 2))
            attention = (queries @ keys.transpose(-1, -2) / pool.head_dim**0.5).softmax(-1)
            weights[:, first:] = attention.mean((1, 2)).detach()
        elif isinstance(model, VisionTransformerDistilled):
            weights[:, :2] = 0.5
        elif model.global_pool == "token":
            weights[:, 0] = 1
        else:
            weights[:, first:] = 1 / (n - first)
        return weights

    def _last_output(self) -> Tensor:
        return self.middles[-1] + self.mlp_outs[-1]

    def _head(self, tokens: Tensor) -> Tensor:
        return self.model.forward_head(self.model.norm(tokens))

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _gradients(self, target: Tensor, wanted: list[Tensor], score: str = "logit") -> list[Tensor]:
        scores = self._graph_logits.softmax(-1) if score == "probability" else self._graph_logits
        scalar = scores[torch.arange(len(target)), target].sum()
        return list(torch.autograd.grad(scalar, wanted, retain_graph=True))

    # -- methods -----------------------------------------------------------------------------------------------------

    def explain(self, method: str, target: Tensor, *, rows: str | None = None, **options: Any) -> Tensor:
        """Values of all tokens (B, n), or the whole contribution map (B, n, n) of a chain method with ``rows="all"``.

        Args:
            method: name of the method.
            target: (B,) int64.
            rows: ``"all"`` for the whole map.
            **options: the method's options.
        """
        with torch.inference_mode(False), torch.enable_grad():
            result = getattr(self, f"_{method}")(target, **options).detach()
        if result.dim() == 3 and rows != "all":
            return torch.einsum("bi,bij->bj", self.pooling, result)
        return result

    def _identity(self) -> Tensor:
        batch, n, _ = self.inputs[0].shape
        return torch.eye(n, dtype=self.dtype, device=self.logits.device).expand(batch, n, n)

    def _chain(self, updates: list[Tensor]) -> Tensor:
        product = self._identity()
        for update in updates:
            product = update @ product
        return product

    def _raw_attention(self, target: Tensor) -> Tensor:  # noqa: ARG002
        return self.maps[-1].mean(1)

    def _rollout(self, target: Tensor, start_block: int = 0) -> Tensor:  # noqa: ARG002
        return self._chain([0.5 * (attention.mean(1) + self._identity()) for attention in self.maps[start_block:]])

    def _grad_cam(self, target: Tensor) -> Tensor:
        (gradient,) = self._gradients(target, self.maps[-1:])
        row = torch.einsum("bi,bhij->bhj", self.pooling, self.maps[-1])
        row_gradient = torch.einsum("bi,bhij->bhj", self.pooling, gradient)
        weights = row_gradient[:, :, self.model.num_prefix_tokens :].mean(-1)
        return torch.einsum("bh,bhj->bhj", weights, row).mean(1).clamp(min=0)

    def _transformer_mm(self, target: Tensor, start_block: int = 0) -> Tensor:
        gradients = self._gradients(target, self.maps)
        pairs = list(zip(self.maps, gradients, strict=True))[start_block:]
        return self._chain([self._identity() + (p * g).clamp(min=0).mean(1) for p, g in pairs])

    def _gmar(self, target: Tensor, norm: str = "l1", alpha: float = 1.0, normalize: bool = True, start_block: int = 0) -> Tensor:
        updates = []
        for attention, gradient in list(zip(self.maps, self._gradients(target, self.maps), strict=True))[start_block:]:
            size = gradient.abs().sum((-1, -2)) if norm == "l1" else gradient.square().sum((-1, -2)).sqrt()
            weights = size / size.sum(1, keepdim=True)
            update = torch.einsum("bh,bhij->bij", weights, attention) + alpha * self._identity()
            updates.append(update / (1 + alpha) if normalize else update)
        return self._chain(updates)

    def _attcat(self, target: Tensor) -> Tensor:
        gradients = self._gradients(target, self.inputs)
        total = torch.zeros_like(self.pooling)
        for attention, tokens, gradient in zip(self.maps, self.inputs, gradients, strict=True):
            total = total + attention.mean((1, 2)) * (tokens * gradient).sum(-1)
        return total

    def _tokentm(
        self,
        target: Tensor,
        score: str = "logit",
        aggregate: bool = True,
        length: bool = True,
        necc: bool = True,
        necc_scale: str = "1",
        start_block: int = 0,
    ) -> Tensor:
        gradients = self._gradients(target, self.maps, score)
        n = self.inputs[0].shape[1]
        switches = length, necc, float(n) if necc_scale == "n" else 1.0
        first = start_block if aggregate else len(self.maps) - 1
        updates = []
        for index in range(first, len(self.maps)):
            attention = self.model.blocks[index].attn
            update = gradients[index].clamp(min=0) * self.maps[index]
            if length or necc:
                moved = self._moved_values(index, attention)  # (B, H, n, d)
                weights = _token_weights(self.inputs[index].unsqueeze(1), moved, *switches)
                update = torch.einsum("bhij,bhj->bhij", update, weights)
            updates.append(self._identity() + update.mean(1))
            if aggregate and (length or necc):
                weights = _token_weights(self.middles[index], self.mlp_outs[index], *switches)
                updates.append(self._identity() + torch.diag_embed(weights))
        product = self._chain(updates)
        if aggregate and length:
            product = product @ torch.diag_embed(self.inputs[0].norm(dim=-1))
        return product

    def _moved_values(self, index: int, attention: torch.nn.Module) -> Tensor:
        """v_h W_O^h of every head, LayerScale applied, output bias not: (B, H, n, d)."""
        value = self.values[index]
        weight = attention.proj.weight.reshape(attention.proj.out_features, value.shape[1], value.shape[3])
        moved = torch.einsum("bhnk,dhk->bhnd", value, weight)
        scale = getattr(self.model.blocks[index].ls1, "gamma", None)
        return moved if scale is None else moved * scale

    def _iba(self, target: Tensor, relevance: str = "gradient") -> Tensor:
        index = torch.arange(len(target))
        maps, logits, probabilities = [], [self._head(self.inputs[0])[index, target]], []
        for block, tokens in zip(self.model.blocks, self.inputs, strict=True):
            kept: list[Tensor] = []
            handle = getattr(block, "attn", block).attn_drop.register_forward_hook(
                lambda _m, _i, out, kept=kept: kept.append(out)
            )
            try:
                head = self._head(block(tokens.detach().requires_grad_()))
            finally:
                handle.remove()
            (attention,) = kept
            (gradient,) = torch.autograd.grad(head[index, target].sum(), attention)
            maps.append(torch.einsum("bi,bhij->bhj", self.pooling, (attention * gradient).clamp(min=0)).mean(1))
            logits.append(head[index, target])
            probabilities.append(head.softmax(-1)[index, target])
        if relevance == "gradient":
            return torch.stack(maps).sum(0)
        shares = {
            "gain": [(after - before).clamp(min=0) for before, after in itertools.pairwise(logits)],
            "probability": probabilities,
            "uniform": [torch.ones_like(value) for value in probabilities],
        }[relevance]
        total = sum(shares)
        return sum((share / total)[:, None] * m / m.max(-1, keepdim=True).values for share, m in zip(shares, maps, strict=True))


def _token_weights(before: Tensor, moved: Tensor, length: bool, necc: bool, necc_scale: float) -> Tensor:
    """Norm ratio × NECC over the last but one axis (tokens); (…, n, d) to (…, n)."""
    weights = torch.ones(moved.shape[:-1], dtype=moved.dtype, device=moved.device)
    if length:
        weights = weights * moved.norm(dim=-1) / before.norm(dim=-1)
    if necc:
        cosine = (before * moved).sum(-1) / (before.norm(dim=-1) * moved.norm(dim=-1))
        weights = weights * necc_scale * cosine.exp() / cosine.exp().sum(-1, keepdim=True)
    return weights
