"""A dense float64 reference of every method, written from the definitions and independent of the fast code.

Attention is written out, every attention map and its gradient is materialised, and whole n × n matrices are multiplied.
Memory and time are quadratic to cubic in the number of tokens: for tests, and for a first look at what is saved.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .structures import structure_of
from .tape import DenseAttention, Relevance, Tape

Scalar = Callable[[Tensor], Tensor]


class DenseReference:
    """One dense forward of a model, in float64 unless told otherwise; texts with padding are run one by one without it.

    Args:
        model: copied and converted; one attention a block.
        inputs: images (B, c, h, w), or for text a mapping with ``input_ids`` (B, n).
        dtype: of the whole computation; a narrower one shows what plain low-precision torch would give.

    Attributes:
        logits: (B, classes), the model's output.
        pooling: (B, n), the weights with which the head reads the tokens.
        maps: P of each block, (B, H, n, n).
        inputs: x of each block, (B, n, d).

    Raises:
        NotImplementedError: the model is of no class that the reference knows.
    """

    def __init__(self, model: Any, inputs: Tensor | Mapping[str, Tensor], dtype: torch.dtype = torch.float64) -> None:
        self.structure = structure_of(model)
        self.dtype = dtype
        self.model = copy.deepcopy(model).to(dtype).eval().requires_grad_(False)
        for module in self.model.modules():
            if hasattr(module, "fused_attn"):
                module.fused_attn = True  # a call of the fused attention is what a tape writes out
        if hasattr(self.model, "grad_checkpointing"):
            self.model.grad_checkpointing = False
        self.blocks = list(self.structure.blocks(self.model))
        self.singles: list[DenseReference] = []
        if isinstance(inputs, Mapping) and not bool(inputs.get("attention_mask", torch.ones(1)).all()):
            self._read_singly(model, inputs)
            return
        self.maps: list[Tensor] = []
        self.values: list[Tensor] = []
        self.inputs: list[Tensor] = []
        self.middles: list[Tensor] = []
        self.mlp_outs: list[Tensor] = []
        self.attention_inputs: list[Tensor] = []
        self.calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        self.pool_attention: DenseAttention | None = None
        with torch.inference_mode(False), torch.enable_grad():
            if isinstance(inputs, Tensor):
                self.images: Any = inputs.detach().clone().to(dtype).requires_grad_()
            else:
                self.images = dict(inputs)
            leaf: list[Tensor] = []
            handle = None if isinstance(inputs, Tensor) else _on_leaf(self.blocks[0], leaf)  # token ids have no gradient
            self._graph_logits = self._forward(self.images, keep=True)
            if handle is not None:
                handle.remove()
        self.logits = self._graph_logits.detach()
        self.pooling = self._pooling()

    def _read_singly(self, model: Any, inputs: Mapping[str, Tensor]) -> None:
        self.num_tokens = inputs["input_ids"].shape[1]
        self.kept = inputs["attention_mask"].bool()
        for i, kept in enumerate(self.kept):
            single = {name: value[i : i + 1, kept] for name, value in inputs.items()}
            self.singles.append(DenseReference(model, single, self.dtype))
        self.logits = torch.cat([single.logits for single in self.singles])
        self.pooling = self._padded([single.pooling for single in self.singles])

    def _padded(self, values: list[Tensor]) -> Tensor:
        """Values (1, n_i) or maps (1, n_i, n_i) of each text, zero where there is padding."""
        out = values[0].new_zeros(len(values), *(self.num_tokens,) * (values[0].dim() - 1))
        for row, value, kept in zip(out, values, self.kept, strict=True):
            where = kept if value.dim() == 2 else kept.unsqueeze(1) & kept
            row[where] = value[0].flatten()
        return out

    # -- reading the model -------------------------------------------------------------------------------------------

    def _forward(self, inputs: Any, *, keep: bool = False, tape: Tape | None = None) -> Tensor:
        """The model's output; every attention is written out, and what the blocks compute is kept on request."""
        tape = tape or Tape()
        handles: list[Any] = []
        outs: list[Tensor] = []
        blocks, structure = self.blocks, self.structure
        if keep:
            for block in blocks:
                handles.append(_on_input(block, self.inputs))
                handles.append(self._on_call(block))
                handles.append(_on_output(block, outs))
                handles.append(_on_own_input(structure.attention(block), self.attention_inputs))
                if _has(structure.middle, block):
                    handles.append(_on_input(structure.middle(block), self.middles))
                if structure.mlp_out is not None:
                    handles.append(_on_output(structure.mlp_out(block), self.mlp_outs))
        try:
            with tape:
                out = structure.run(self.model, inputs)
        finally:
            for handle in handles:
                handle.remove()
        if keep:
            attentions = tape.attentions[: len(blocks)]
            self.maps = [attention.maps for attention in attentions]
            self.values = [attention.values for attention in attentions]
            if structure.pooling is None:
                self.pool_attention = tape.attentions[len(blocks)]
            if structure.mlp_out is None and len(self.middles) == len(blocks):
                self.mlp_outs = [after - middle for after, middle in zip(outs, self.middles, strict=True)]
        return out

    def _on_call(self, block: Any) -> Any:
        """What else each block is called with beside its tokens."""
        return block.register_forward_pre_hook(
            lambda _, args, kwargs: self.calls.append((args[1:], dict(kwargs))), with_kwargs=True
        )

    def _pooling(self) -> Tensor:
        batch, n, _ = self.inputs[0].shape
        if self.structure.pooling is not None:
            weights = self.structure.pooling(self.model, n).to(self.logits)
            return weights.expand(batch, n)
        assert self.pool_attention is not None, "a structure without pooling has an attention pool"
        read = self.pool_attention.maps.mean((1, 2)).detach()
        return F.pad(read, (n - read.shape[1], 0))

    def _head(self, tokens: Tensor) -> Tensor:
        with Tape():
            return self.structure.head(self.model, tokens)

    # -- gradients ---------------------------------------------------------------------------------------------------

    def _gradients(self, scalar: Scalar, wanted: list[Tensor], score: str = "logit") -> list[Tensor]:
        outputs = self._graph_logits.softmax(-1) if score == "probability" else self._graph_logits
        return list(torch.autograd.grad(scalar(outputs).sum(), wanted, retain_graph=True))

    # -- methods -----------------------------------------------------------------------------------------------------

    def explain(self, method: str, scalar: Scalar | Tensor, *, rows: str | None = None, **options: Any) -> Tensor:
        """Values of all tokens (B, n), or the whole contribution map (B, n, n) of a chain method with ``rows="all"``.

        Args:
            method: name of the method.
            scalar: what is explained, from outputs (B, C) to (B,); or classes (B,), whose logits are.
            rows: ``"all"`` for the whole map.
            **options: the method's options.
        """
        if isinstance(scalar, Tensor):
            classes = scalar.unsqueeze(1)
            return self.explain(method, lambda outputs: outputs.gather(1, classes).squeeze(1), rows=rows, **options)
        if self.singles:
            return self._padded(
                [
                    single.explain(method, _of_row(scalar, i, len(self.singles)), rows=rows, **options)
                    for i, single in enumerate(self.singles)
                ]
            )
        with torch.inference_mode(False), torch.enable_grad():
            result = getattr(self, f"_{method}")(scalar, **options).detach()
        if method in _CHAINS and rows != "all":
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

    def _raw_attention(self, scalar: Scalar) -> Tensor:  # noqa: ARG002
        return self.maps[-1].mean(1)

    def _rollout(self, scalar: Scalar, start_block: int = 0) -> Tensor:  # noqa: ARG002
        return self._chain([0.5 * (attention.mean(1) + self._identity()) for attention in self.maps[start_block:]])

    def _grad_cam(self, scalar: Scalar) -> Tensor:
        (gradient,) = self._gradients(scalar, self.maps[-1:])
        row = torch.einsum("bi,bhij->bhj", self.pooling, self.maps[-1])
        row_gradient = torch.einsum("bi,bhij->bhj", self.pooling, gradient)
        weights = row_gradient[:, :, self.structure.prefix(self.model) :].mean(-1)
        return torch.einsum("bh,bhj->bhj", weights, row).mean(1).clamp(min=0)

    def _transformer_mm(self, scalar: Scalar, start_block: int = 0) -> Tensor:
        gradients = self._gradients(scalar, self.maps)
        pairs = list(zip(self.maps, gradients, strict=True))[start_block:]
        return self._chain([self._identity() + (p * g).clamp(min=0).mean(1) for p, g in pairs])

    def _gmar(self, scalar: Scalar, norm: str = "l1", alpha: float = 1.0, normalize: bool = True, start_block: int = 0) -> Tensor:
        updates = []
        for attention, gradient in list(zip(self.maps, self._gradients(scalar, self.maps), strict=True))[start_block:]:
            size = gradient.abs().sum((-1, -2)) if norm == "l1" else gradient.square().sum((-1, -2)).sqrt()
            weights = size / size.sum(1, keepdim=True)
            update = torch.einsum("bh,bhij->bij", weights, attention) + alpha * self._identity()
            updates.append(update / (1 + alpha) if normalize else update)
        return self._chain(updates)

    def _attcat(self, scalar: Scalar) -> Tensor:
        gradients = self._gradients(scalar, self.inputs)
        total = torch.zeros_like(self.pooling)
        for attention, tokens, gradient in zip(self.maps, self.inputs, gradients, strict=True):
            total = total + attention.mean((1, 2)) * (tokens * gradient).sum(-1)
        return total

    def _tokentm(
        self,
        scalar: Scalar,
        score: str = "logit",
        aggregate: bool = True,
        length: bool = True,
        necc: bool = True,
        necc_scale: str = "1",
        start_block: int = 0,
    ) -> Tensor:
        gradients = self._gradients(scalar, self.maps, score)
        n = self.inputs[0].shape[1]
        switches = length, necc, float(n) if necc_scale == "n" else 1.0
        first = start_block if aggregate else len(self.maps) - 1
        updates = []
        for index in range(first, len(self.maps)):
            block = self.blocks[index]
            update = gradients[index].clamp(min=0) * self.maps[index]
            if length or necc:
                moved = self._moved_values(index, block)  # (B, H, n, d)
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

    def _moved_values(self, index: int, block: Any) -> Tensor:
        """v_h W_O^h of every head, LayerScale applied, output bias not: (B, H, n, d)."""
        value, weight = self.values[index], self.structure.projection(block).weight
        weight = weight.reshape(weight.shape[0], value.shape[1], value.shape[3])
        moved = torch.einsum("bhnk,dhk->bhnd", value, weight)
        scale = self.structure.scale(block)
        return moved if scale is None else moved * scale

    def _locally(self, index: int) -> tuple[Tensor, Tensor]:
        """A block run once more on its own: its map, and what the head says of its output."""
        tape, (args, kwargs) = Tape(), self.calls[index]
        tokens = self.inputs[index].detach().requires_grad_()
        with tape:
            out = self.blocks[index](tokens, *args, **kwargs)
        return tape.attentions[0].maps, self._head(out[0] if isinstance(out, tuple) else out)

    def _legrad(self, scalar: Scalar) -> Tensor:
        total = torch.zeros_like(self.pooling)
        for index in range(len(self.blocks)):
            attention, head = self._locally(index)
            (gradient,) = torch.autograd.grad(scalar(head).sum(), attention)
            total = total + gradient.clamp(min=0).mean((1, 2))
        return total

    def _iba(self, scalar: Scalar, relevance: str = "gradient") -> Tensor:
        maps, logits, probabilities = [], [scalar(self._head(self.inputs[0]))], []
        for index in range(len(self.blocks)):
            attention, head = self._locally(index)
            (gradient,) = torch.autograd.grad(scalar(head).sum(), attention)
            maps.append(torch.einsum("bi,bhij->bhj", self.pooling, (attention * gradient).clamp(min=0)).mean(1))
            logits.append(scalar(head))
            probabilities.append(scalar(head.softmax(-1)))
        if relevance == "gradient":
            return torch.stack(maps).sum(0)
        shares = {
            "gain": [(after - before).clamp(min=0) for before, after in itertools.pairwise(logits)],
            "probability": probabilities,
            "uniform": [torch.ones_like(value) for value in probabilities],
        }[relevance]
        total = torch.stack(shares).sum(0)
        weighed = [(share / total)[:, None] * m / m.max(-1, keepdim=True).values for share, m in zip(shares, maps, strict=True)]
        return torch.stack(weighed).sum(0)

    def _cdam(self, scalar: Scalar) -> Tensor:
        tokens = self.attention_inputs[-1]
        (gradient,) = self._gradients(scalar, [tokens])
        return (tokens * gradient).sum(-1)

    # -- relevance ---------------------------------------------------------------------------------------------------

    def _relevance(self, scalar: Scalar, source: str, *, shared: bool) -> tuple[Tape, Relevance]:
        """A forward on a tape, and relevance sent back over it from the outputs to the images or to block 0's input."""
        tape = Tape(keep_calls=True)
        first: list[Tensor] = []
        handle = _on_input(self.blocks[0], first)
        images = self.images.detach() if isinstance(self.images, Tensor) else self.images
        try:
            with torch.no_grad():
                out = self._forward(images, tape=tape)
        finally:
            handle.remove()
        with torch.enable_grad():
            leaf = out.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(_with_constant_norms(scalar, leaf).sum(), leaf)
        start = torch.stack([g * y / (g @ y) for g, y in zip(gradient, out, strict=True)])  # one unit an image
        sent = Relevance(tape.calls, [images] if source == "images" else first, shared)
        with torch.no_grad():
            sent.send(out, start)
        self.sent_to = images if source == "images" else first[0]
        return tape, sent

    def relevance_of_inputs(self, scalar: Scalar) -> list[Tensor]:
        """What ``transformer_attribution``'s relevance is at each block's input, (B, n, d), from the first to the last."""
        tokens: list[Tensor] = []
        handles = [_on_input(block, tokens) for block in self.blocks]
        try:
            _, sent = self._relevance(scalar, "tokens", shared=True)
        finally:
            for handle in handles:
                handle.remove()
        return [sent.of(value) for value in tokens]

    def _transformer_attribution(self, scalar: Scalar, start_block: int = 0) -> Tensor:
        gradients = self._gradients(scalar, self.maps)
        tape, sent = self._relevance(scalar, "tokens", shared=True)
        relevances = [sent.of(attention.maps) for attention in tape.attentions]
        pairs = list(zip(gradients, relevances, strict=False))[start_block:]
        return self._chain([self._identity() + (g * r).clamp(min=0).mean(1) for g, r in pairs])

    def _partial_lrp(self, scalar: Scalar) -> Tensor:
        tape, sent = self._relevance(scalar, "tokens", shared=False)
        last = sent.of(tape.attentions[len(self.blocks) - 1].maps)
        return torch.einsum("bi,bij->bj", self.pooling, last.clamp(min=0).mean(1))

    def _lrp(self, scalar: Scalar) -> Tensor:
        _, sent = self._relevance(scalar, "images", shared=False)
        return sent.of(self.sent_to).sum(1)

    def _conservative_lrp(self, scalar: Scalar) -> Tensor:
        """Gradient × input of a network whose maps, normalisers, gates and activations' ratios are the numbers of this run."""
        first: list[Tensor] = []
        handle = _on_leaf(self.blocks[0], first)
        try:
            out = self._forward(self.images, tape=Tape(override=_with_constants))
        finally:
            handle.remove()
        if self.dtype == torch.float64:  # constants in their places do not change what the network computes
            torch.testing.assert_close(out.detach(), self.logits, rtol=1e-6, atol=1e-7)
        (gradient,) = torch.autograd.grad(_with_constant_norms(scalar, out).sum(), first)
        return (first[0] * gradient).sum(-1).detach()

    # -- pixels ------------------------------------------------------------------------------------------------------

    def _input_x_gradient(self, scalar: Scalar) -> Tensor:
        (gradient,) = self._gradients(scalar, [self.images])
        return (self.images * gradient).sum(1)

    def _integrated_gradients(self, scalar: Scalar, steps: int = 50, baseline: float = 0.0) -> Tensor:
        points, weights = np.polynomial.legendre.leggauss(steps)
        image = self.images.detach()
        total = torch.zeros_like(image)
        for point, weight in zip(points, weights, strict=True):
            there = (baseline + 0.5 * (1 + float(point)) * (image - baseline)).requires_grad_()
            (gradient,) = torch.autograd.grad(scalar(self._forward(there)).sum(), there)
            total = total + 0.5 * float(weight) * gradient
        return ((image - baseline) * total).sum(1)


_CHAINS = ("rollout", "raw_attention", "transformer_mm", "gmar", "tokentm", "transformer_attribution")


def _has(part: Callable[[Any], Any], block: Any) -> bool:
    """Whether a block has a part: a parallel block has no second norm."""
    try:
        return part(block) is not None
    except (AttributeError, StopIteration):
        return False


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    return args[0] if args else next(iter(kwargs.values()))


def _on_input(module: torch.nn.Module, kept: list[Tensor]) -> Any:
    return module.register_forward_pre_hook(lambda _, args, kwargs: kept.append(_first(args, kwargs)), with_kwargs=True)


def _on_own_input(module: torch.nn.Module, kept: list[Tensor]) -> Any:
    """What the module is called with, as a tensor of its own, so that its gradient is what arrives through this module alone."""

    def replace(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = _first(args, kwargs)
        kept.append(given.clone())
        return (
            tuple(kept[-1] if value is given else value for value in args),
            {name: kept[-1] if value is given else value for name, value in kwargs.items()},
        )

    return module.register_forward_pre_hook(replace, with_kwargs=True)


def _on_output(module: torch.nn.Module, kept: list[Tensor]) -> Any:
    return module.register_forward_hook(lambda _m, _i, out: kept.append(out[0] if isinstance(out, tuple) else out))


def _on_leaf(module: torch.nn.Module, kept: list[Tensor]) -> Any:
    """The module's first input is replaced by a leaf, which is kept."""

    def replace(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaf = _first(args, kwargs).detach().requires_grad_()
        kept.append(leaf)
        if args:
            return (leaf, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): leaf}

    return module.register_forward_pre_hook(replace, with_kwargs=True)


def _of_row(scalar: Scalar, row: int, batch: int) -> Scalar:
    """A scalar of a batch, for one of its rows alone."""
    return lambda outputs: scalar(outputs.expand(batch, -1))[row : row + 1]


def _with_constant_norms(scalar: Scalar, outputs: Tensor) -> Tensor:
    """The scalar, an embedding's norm a constant in it."""
    with Tape(override=_with_constants):
        return scalar(outputs)


def _with_constants(name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Conservative LRP's network: what is a constant in it is detached."""
    if name in ("softmax", "norm", "linalg_vector_norm"):
        return func(*args, **kwargs).detach()
    if name == "normalize":
        return args[0] / args[0].detach().norm(dim=kwargs["dim"], keepdim=True)
    if name in ("gelu", "relu", "silu", "sigmoid", "tanh"):
        value = args[0].detach()
        ratio = func(value, *args[1:], **kwargs) / (value + 1e-9)
        return args[0] * torch.where(value == 0, 0, ratio)
    if name == "layer_norm":
        options = {**dict(zip(("input", "shape", "weight", "bias", "eps"), args, strict=False)), **kwargs}
        x, dims = options["input"], tuple(range(-len(options["shape" if "shape" in options else "normalized_shape"]), 0))
        deviation = (x.detach().var(dims, unbiased=False, keepdim=True) + options.get("eps", 1e-5)).sqrt()
        out = (x - x.mean(dims, keepdim=True)) / deviation
        out = out if options.get("weight") is None else out * options["weight"]
        return out if options.get("bias") is None else out + options["bias"]
    if name == "rms_norm":
        options = {**dict(zip(("input", "shape", "weight", "eps"), args, strict=False)), **kwargs}
        x, eps = options["input"], options.get("eps")
        root = (x.detach().square().mean(-1, keepdim=True) + (torch.finfo(x.dtype).eps if eps is None else eps)).sqrt()
        return x / root if options.get("weight") is None else x / root * options["weight"]
    if name in ("mul", "__mul__", "__rmul__") and all(isinstance(v, Tensor) and v.requires_grad for v in args[:2]):
        left, right = args[:2]
        return 0.5 * (left * right.detach() + left.detach() * right)
    return None


def _token_weights(before: Tensor, moved: Tensor, length: bool, necc: bool, necc_scale: float) -> Tensor:
    """Norm ratio × NECC over the last but one axis (tokens); (…, n, d) to (…, n)."""
    weights = torch.ones(moved.shape[:-1], dtype=moved.dtype, device=moved.device)
    if length:
        weights = weights * moved.norm(dim=-1) / before.norm(dim=-1)
    if necc:
        cosine = (before * moved).sum(-1) / (before.norm(dim=-1) * moved.norm(dim=-1))
        weights = weights * necc_scale * cosine.exp() / cosine.exp().sum(-1, keepdim=True)
    return weights
