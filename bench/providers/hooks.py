"""The explanation methods as their papers' authors wrote them: hooks, stored attention maps, chains of n × n matrices.

Fused attention is switched off, a forward hook keeps every block's map and a tensor hook its gradient, and ``backward`` runs with
the parameters' gradients, as a model does that nobody froze. Everything stays in the model's dtype, with maps as they come.
It is a generous rival: it is correct, batched over images (the authors' code takes one image at a time), and lets go of what it
stored. For methods whose authors' code is not of this form the dense reference stands in, in the model's dtype.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Self

import torch
from torch import Tensor, nn

from vitexplain.testing import DenseReference


class StoredMaps:
    """A timm Vision Transformer whose attention maps are kept while the context is open; afterwards it is as it was.

    Args:
        model: it reads its class token.
        gradients: the parameters' gradients are switched on, and ``backward`` keeps every map's.

    Attributes:
        maps, gradients: P and G of each block, (B, H, n, n).
        tokens, token_gradients: x, what enters each block, and its gradient, (B, n, d).
        values: v of each block, (B, H, n, dh).
        middles, mlp_outs: y and f of each block, (B, n, d).
    """

    def __init__(self, model: nn.Module, gradients: bool = True) -> None:
        if model.global_pool != "token":
            raise ValueError(f"expected a model that reads its class token, received global_pool={model.global_pool!r}")
        self.model, self.with_gradients = model, gradients
        self.blocks = list(model.blocks)
        self.maps: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.values: list[Tensor] = []
        self.middles: list[Tensor] = []
        self.mlp_outs: list[Tensor] = []
        self.gradients: dict[int, Tensor] = {}
        self.token_gradients: dict[int, Tensor] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        try:
            for parameter in self.model.parameters() if self.with_gradients else ():
                self._undo.callback(_set_gradient, parameter, parameter.requires_grad)
                parameter.requires_grad_()
            for index, block in enumerate(self.blocks):
                self._undo.callback(setattr, block.attn, "fused_attn", block.attn.fused_attn)
                block.attn.fused_attn = False
                self._listen(index, block)
        except BaseException:
            self._undo.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def _listen(self, index: int, block: nn.Module) -> None:
        def keep_tokens(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.tokens.append(args[0])
            self._keep_gradient(args[0], self.token_gradients, index)

        def keep_map(_: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            self.maps.append(out)
            self._keep_gradient(out, self.gradients, index)

        def keep_values(_: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            heads = block.attn.num_heads
            self.values.append(out.unflatten(-1, (3, heads, -1))[:, :, 2].transpose(1, 2))

        def keep_middle(_: nn.Module, args: tuple[Tensor, ...]) -> None:
            self.middles.append(args[0])

        def keep_mlp_out(_: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            self.mlp_outs.append(out)

        for handle in (
            block.register_forward_pre_hook(keep_tokens),
            block.attn.attn_drop.register_forward_hook(keep_map),
            block.attn.qkv.register_forward_hook(keep_values),
            block.norm2.register_forward_pre_hook(keep_middle),
            block.ls2.register_forward_hook(keep_mlp_out),
        ):
            self._undo.callback(handle.remove)

    def _keep_gradient(self, tensor: Tensor, kept: dict[int, Tensor], index: int) -> None:
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: kept.__setitem__(index, gradient))

    def run(self, images: Tensor, target: Tensor | None = None) -> Tensor:
        """Forward, and backward of the classes (B,), the predicted ones where there are none; logits (B, C)."""
        with torch.set_grad_enabled(self.with_gradients):
            logits = self.model(images)
            if self.with_gradients:
                target = logits.argmax(-1) if target is None else target
                logits.gather(1, target.unsqueeze(1)).sum().backward()
        return logits

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """P and G of each block, (B, H, n, n), in the order of the blocks: backward delivers them the other way round."""
        return [(attention, self.gradients[index]) for index, attention in enumerate(self.maps)]


def _set_gradient(parameter: nn.Parameter, required: bool) -> None:
    parameter.grad = None
    parameter.requires_grad_(required)


def chain(updates: list[Tensor]) -> Tensor:
    """U_L … U_1 (B, n, n), all rows, as every published rollout does it."""
    product = updates[0]
    for update in updates[1:]:
        product = torch.bmm(update, product)
    return product


def identity(like: Tensor) -> Tensor:
    """I (n, n) beside maps (…, n, n)."""
    return torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)


def raw_attention(stored: StoredMaps) -> Tensor:
    """The last block's map, heads averaged: the class row (B, n)."""
    return stored.maps[-1].mean(1)[:, 0]


def rollout(stored: StoredMaps) -> Tensor:
    """The class row (B, n) of Π ½(mean_h P + I)."""
    return chain([0.5 * (attention.mean(1) + identity(attention)) for attention in stored.maps])[:, 0]


def grad_cam(stored: StoredMaps) -> Tensor:
    """relu(mean_h w_h P_h[cls]) (B, n) of the last block, w the mean of G_h[cls] over patch columns."""
    attention, gradient = stored.pairs[-1]
    weights = gradient[:, :, 0, stored.model.num_prefix_tokens :].mean(-1, keepdim=True)  # (B, H, 1)
    return (weights * attention[:, :, 0]).mean(1).clamp(min=0)


def transformer_mm(stored: StoredMaps) -> Tensor:
    """The class row (B, n) of Π (I + mean_h relu(P G))."""
    return chain([identity(p) + (p * g).clamp(min=0).mean(1) for p, g in stored.pairs])[:, 0]


def gmar(stored: StoredMaps) -> Tensor:
    """The class row (B, n) of Π ½(Σ_h w_h P_h + I), w_h the share of head h in the sum of |G|."""
    updates = []
    for attention, gradient in stored.pairs:
        size = gradient.abs().sum((-1, -2))  # (B, H)
        weights = size / size.sum(1, keepdim=True)
        updates.append(0.5 * ((weights[..., None, None] * attention).sum(1) + identity(attention)))
    return chain(updates)[:, 0]


def attcat(stored: StoredMaps) -> Tensor:
    """Σ over blocks of the map's column means × (x · ∂z/∂x), (B, n)."""
    total = torch.zeros_like(stored.maps[0][:, 0, 0])
    for index, attention in enumerate(stored.maps):
        total = total + attention.mean((1, 2)) * (stored.tokens[index] * stored.token_gradients[index]).sum(-1)
    return total


def tokentm(stored: StoredMaps) -> Tensor:
    """The class row (B, n) of Π (I + diag(W_f)) (I + mean_h relu(G) P diag(W_h)) · diag(‖x⁰‖)."""
    updates = []
    for index, (attention, gradient) in enumerate(stored.pairs):
        columns = token_weights(stored.tokens[index].unsqueeze(1), moved_values(stored, index))  # (B, H, n)
        updates.append(identity(attention) + (gradient.clamp(min=0) * attention * columns.unsqueeze(2)).mean(1))
        updates.append(torch.diag_embed(1 + token_weights(stored.middles[index], stored.mlp_outs[index])))
    return chain(updates)[:, 0] * stored.tokens[0].norm(dim=-1)


def moved_values(stored: StoredMaps, index: int) -> Tensor:
    """v_h W_O^h of a block (B, H, n, d), LayerScale applied, output bias not."""
    block, value = stored.blocks[index], stored.values[index]
    weight = block.attn.proj.weight.unflatten(1, (value.shape[1], -1))  # (d, H, dh)
    moved = torch.einsum("bhnk,dhk->bhnd", value, weight)
    return moved if isinstance(block.ls1, nn.Identity) else moved * block.ls1.gamma


def token_weights(before: Tensor, moved: Tensor) -> Tensor:
    """Norm ratio × softmax over tokens of the cosine; (…, n, d) to (…, n)."""
    ratio = moved.norm(dim=-1) / before.norm(dim=-1)
    return ratio * nn.functional.cosine_similarity(before, moved, dim=-1).softmax(-1)


METHODS: dict[str, Callable[[StoredMaps], Tensor]] = {
    function.__name__: function for function in (raw_attention, rollout, grad_cam, transformer_mm, tokentm, gmar, attcat)
}
WITHOUT_GRADIENT = ("raw_attention", "rollout")


def explain(model: nn.Module, images: Tensor, method: str, target: Tensor | None = None, **options: object) -> Tensor:
    """Values of all tokens (B, n), or of all pixels (B, h, w), in the model's dtype; all that was stored is let go of.

    Args:
        model: a timm Vision Transformer; left as it was, without gradients.
        images: (B, 3, h, w) in the model's dtype.
        method: as this library names it, with the default options.
        target: classes (B,); the predicted ones where there are none.
        **options: of a method that the dense reference stands in for.
    """
    if method not in METHODS:
        reference = DenseReference(model, images, images.dtype)
        return reference.explain(method, reference.logits.argmax(-1) if target is None else target, **options)
    with StoredMaps(model, gradients=method not in WITHOUT_GRADIENT) as stored:
        stored.run(images, target)
        with torch.no_grad():
            return METHODS[method](stored)


def stored_bytes(model: nn.Module, batch: int, tokens: int, dtype: torch.dtype) -> float:
    """What all maps and their gradients take, by count: the least that a method on stored maps needs."""
    return 2.0 * len(model.blocks) * model.blocks[0].attn.num_heads * batch * tokens**2 * dtype.itemsize
