"""The explanation methods as their papers' authors wrote them: hooks, stored attention maps, chains of n × n matrices.

Fused attention is switched off, a forward hook keeps every block's map and a tensor hook its gradient, and ``backward`` runs with
the parameters' gradients, as a model does that nobody froze; a variant with frozen parameters tells what the maps cost from what
those gradients cost. Everything stays in the model's dtype, with maps as they come. It is a generous rival: it is correct,
batched over images (the authors' code takes one image at a time), and lets go of what it stored. CDAM stores no map.

For ``transformer_attribution``, ``lrp``, ``partial_lrp`` and ``conservative_lrp`` the dense reference stands in, in the model's
dtype: the authors' code is a model of its own, which records every layer's input as the reference does. Methods on pixels have no
rival here: they need no map, and captum's own are what they are held against.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Self

import torch
from torch import Tensor, nn

from vitexplain.testing import DenseReference

STANDS_IN = ("transformer_attribution", "lrp", "partial_lrp", "conservative_lrp")  # the dense reference, for these


@contextmanager
def with_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """Every parameter requires its gradient; afterwards none has one, and all require what they did."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.requires_grad_()
        yield
    finally:
        for parameter, required in before:
            parameter.grad = None
            parameter.requires_grad_(required)


class StoredMaps:
    """A timm Vision Transformer whose attention maps are kept while the context is open; afterwards it is as it was.

    Args:
        model: it reads its class token.
        gradients: every map's gradient is kept, too.
        frozen: parameters get no gradients: ``backward`` ends at block 0's input.
        by_block: every block's input is detached, and a map's gradient is that of what the model's head says at its own block.

    Attributes:
        maps, gradients: P and G of each block, (B, H, n, n).
        tokens, token_gradients: x, what enters each block, and its gradient, (B, n, d).
        values: v of each block, (B, H, n, dh).
        middles, mlp_outs: y and f of each block, (B, n, d).
        outs: what leaves each block, (B, n, d); only ``by_block``.
    """

    def __init__(self, model: nn.Module, gradients: bool = True, *, frozen: bool = False, by_block: bool = False) -> None:
        if model.global_pool != "token":
            raise ValueError(f"expected a model that reads its class token, received global_pool={model.global_pool!r}")
        self.model, self.with_gradients, self.frozen, self.by_block = model, gradients, frozen, by_block
        self.blocks = list(model.blocks)
        self.maps: list[Tensor] = []
        self.tokens: list[Tensor] = []
        self.values: list[Tensor] = []
        self.middles: list[Tensor] = []
        self.mlp_outs: list[Tensor] = []
        self.outs: list[Tensor] = []
        self.gradients: dict[int, Tensor] = {}
        self.token_gradients: dict[int, Tensor] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Self:
        try:
            if self.with_gradients and not self.frozen:
                self._undo.enter_context(with_parameter_gradients(self.model))
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
        def keep_tokens(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            tokens = self._entering(index, args[0])
            self.tokens.append(tokens)
            self._keep_gradient(tokens, self.token_gradients, index)
            return tokens, *args[1:]

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

        def keep_out(_: nn.Module, _args: tuple[Tensor, ...], out: Tensor) -> None:
            self.outs.append(out)

        handles = [
            block.register_forward_pre_hook(keep_tokens),
            block.attn.attn_drop.register_forward_hook(keep_map),
            block.attn.qkv.register_forward_hook(keep_values),
            block.norm2.register_forward_pre_hook(keep_middle),
            block.ls2.register_forward_hook(keep_mlp_out),
        ]
        if self.by_block:
            handles.append(block.register_forward_hook(keep_out))
        for handle in handles:
            self._undo.callback(handle.remove)

    def _entering(self, index: int, tokens: Tensor) -> Tensor:
        """What a block is given (B, n, d): a leaf where a graph of its own begins."""
        if self.by_block:
            tokens = tokens.detach()
        begins = self.with_gradients and self.frozen and (self.by_block or index == 0)
        return tokens.detach().requires_grad_() if begins else tokens

    def _keep_gradient(self, tensor: Tensor, kept: dict[int, Tensor], index: int) -> None:
        if tensor.requires_grad and not self.by_block:
            tensor.register_hook(lambda gradient: kept.__setitem__(index, gradient))

    def run(self, images: Tensor, target: Tensor | None = None) -> Tensor:
        """Forward, and backward of the classes (B,), the predicted ones where there are none; logits (B, C)."""
        with torch.set_grad_enabled(self.with_gradients):
            logits = self.model(images)
            target = logits.argmax(-1) if target is None else target
            if self.by_block:
                self._ask_blocks(target)
            elif self.with_gradients:
                _of_classes(logits, target).backward()
        return logits

    def _ask_blocks(self, target: Tensor) -> None:
        """The gradient of each block's map, of what the head says at that block."""
        for index, (attention, out) in enumerate(zip(self.maps, self.outs, strict=True)):
            logits = self.model.forward_head(self.model.norm(out))
            (self.gradients[index],) = torch.autograd.grad(_of_classes(logits, target), attention)

    @property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        """P and G of each block, (B, H, n, n), in the order of the blocks: backward delivers them the other way round."""
        return [(attention, self.gradients[index]) for index, attention in enumerate(self.maps)]


def _of_classes(logits: Tensor, target: Tensor) -> Tensor:
    """The sum over images of the logits (B, C) of classes (B,)."""
    return logits.gather(1, target.unsqueeze(1)).sum()


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


def legrad(stored: StoredMaps) -> Tensor:
    """Σ over blocks of the mean over heads and rows of relu(G), (B, n), G each block's own."""
    return torch.stack([gradient.clamp(min=0).mean((1, 2)) for _, gradient in stored.pairs]).sum(0)


def iba(stored: StoredMaps) -> Tensor:
    """Σ over blocks of mean_h relu(P_h[cls] G_h[cls]), (B, n), G each block's own."""
    return torch.stack([(p[:, :, 0] * g[:, :, 0]).clamp(min=0).mean(1) for p, g in stored.pairs]).sum(0)


def cdam(model: nn.Module, images: Tensor, target: Tensor | None = None) -> Tensor:
    """Σ over channels of t · ∂z/∂t (B, n), t what the last block's attention is called with: no map, fused attention."""
    kept: list[Tensor] = []
    handle = model.blocks[-1].attn.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        with with_parameter_gradients(model), torch.enable_grad():
            logits = model(images)
            kept[0].retain_grad()
            _of_classes(logits, logits.argmax(-1) if target is None else target).backward()
    finally:
        handle.remove()
    return (kept[0].detach() * kept[0].grad).sum(-1)


METHODS: dict[str, Callable[[StoredMaps], Tensor]] = {
    function.__name__: function
    for function in (raw_attention, rollout, grad_cam, transformer_mm, tokentm, gmar, attcat, legrad, iba)
}
WITHOUT_GRADIENT = ("raw_attention", "rollout")
BY_BLOCK = ("legrad", "iba")


def explain(model: nn.Module, images: Tensor, method: str, target: Tensor | None = None, *, frozen: bool = False) -> Tensor:
    """Values of all tokens (B, n), or of all pixels (B, h, w) for LRP, in the model's dtype; all that was stored is let go of.

    Args:
        model: a timm Vision Transformer; left as it was, without gradients.
        images: (B, 3, h, w) in the model's dtype.
        method: as this library names it, with the default options.
        target: classes (B,); the predicted ones where there are none.
        frozen: parameters get no gradients; of a method on stored maps.
    """
    if method == cdam.__name__:
        return cdam(model, images, target)
    if method in STANDS_IN:
        reference = DenseReference(model, images, images.dtype)
        return reference.explain(method, reference.logits.argmax(-1) if target is None else target)
    stored_maps = StoredMaps(model, method not in WITHOUT_GRADIENT, frozen=frozen, by_block=method in BY_BLOCK)
    with stored_maps as stored:
        stored.run(images, target)
        with torch.no_grad():
            return METHODS[method](stored)


def stored_bytes(model: nn.Module, batch: int, tokens: int, dtype: torch.dtype) -> float:
    """What all maps and their gradients take, by count: the least that a method on stored maps needs."""
    return 2.0 * len(model.blocks) * model.blocks[0].attn.num_heads * batch * tokens**2 * dtype.itemsize
