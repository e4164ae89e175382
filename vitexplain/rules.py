"""Layer-wise relevance propagation: what every function a model calls does to relevance on its way back.

While a forward runs under ``RuleMode``, each function's place in the autograd graph is taken by its rule: the backward of
that graph then carries relevance instead of gradients. No model has to be rebuilt for it, and a function without a rule is
refused by name. Relevance is float32 or float64 whatever the model's dtype: it is divided by sums of activations that can cancel.

Rules of ``transformer_attribution`` and of the LRP baselines: Chefer, Gur and Wolf, "Transformer Interpretability Beyond
Attention Visualization" (CVPR 2021), and the z^B rule of Montavon et al., "Explaining nonlinear classification decisions with
deep Taylor decomposition" (2017). The conservative rules: Ali et al., "XAI for Transformers: Better Explanations through
Conservative Propagation" (ICML 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Never

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from .errors import UnsupportedModelError
from .interception import SdpaMode
from .kernels.attention_relevance.common import GUARD

Share = Callable[[Tensor], Sequence[Tensor | None]]


def divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """a ⊘ b: a / b with a tiny signed guard, 0 where b is 0."""
    guarded = (denominator + GUARD).masked_fill_(denominator == 0, torch.inf)
    return numerator / guarded.masked_fill_(guarded == 0, GUARD)


class Propagate(torch.autograd.Function):
    """Puts a rule into the graph: its output is given, its backward shares relevance among the inputs."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, share: Share, *inputs: Tensor) -> Tensor:  # noqa: ARG004
        ctx.share = share
        return out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.share(relevance)


class Refuse(torch.autograd.Function):
    """Stands for a function without a rule: no harm where its result is not used, an error where relevance arrives."""

    @staticmethod
    def forward(ctx: Any, name: str, out: Tensor, *inputs: Tensor) -> Tensor:  # noqa: ARG004
        ctx.name = name
        return out.detach()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, relevance: Tensor) -> Never:  # noqa: ARG004
        raise UnsupportedModelError(f"layer-wise relevance propagation has no rule for {ctx.name}(), which the model calls")


def _computed(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The function's result, its inputs left as they are: sharing relevance needs them."""
    name = func.__name__
    in_place = changes_in_place(name) or bool(kwargs.get("inplace"))
    with torch.no_grad():
        return func(args[0].detach().clone(), *args[1:], **kwargs) if in_place else func(*args, **kwargs)


def changes_in_place(name: str) -> bool:
    """Whether a function of this name changes its first argument: ``x += y`` and ``x.add_(y)`` are the same to torch."""
    return name in ("__setitem__",) or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))


def _carries(value: Any) -> bool:
    """Whether relevance flows through a value."""
    return isinstance(value, Tensor) and value.requires_grad


def _identity(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Relevance passes unchanged: normalisations, activations, and products with what carries none."""
    source = next(value for value in tree_leaves((args, kwargs)) if _carries(value))
    return Propagate.apply(_computed(func, args, kwargs), lambda relevance: (relevance.sum_to_size(source.shape),), source)


def _by_name(names: Sequence[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call's arguments by name, however they were given."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _operands(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Both operands of a sum or product by position."""
    if kwargs.get("alpha", 1) != 1 or kwargs.get("out") is not None or kwargs.get("rounding_mode") is not None:
        raise UnsupportedModelError(f"layer-wise relevance propagation has no rule for a sum or quotient with {sorted(kwargs)}")
    named = [kwargs[name] for name in ("input", "other") if name in kwargs]
    return (*args, *named), {}


def _product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A product of two tensors that both carry relevance, as a gate's, gives each of them half; else an identity."""
    args, kwargs = _operands(args, kwargs)
    carrying = [value for value in args[:2] if _carries(value)]
    if len(carrying) == 1:
        return _identity(func, args, kwargs)
    if func.__name__ in _DIVISIONS:
        raise UnsupportedModelError("layer-wise relevance propagation has no rule for the quotient of two activations")
    return Propagate.apply(
        _computed(func, args, kwargs),
        lambda relevance: [(0.5 * relevance).sum_to_size(value.shape) for value in carrying],
        *carrying,
    )


def _linear(separate: bool) -> Callable[..., Tensor]:
    """The α1β0 rule on x⁺w⁺ and x⁻w⁻, bias ignored: with one denominator for both parts, or one for each (``separate``)."""

    def rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        tokens, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
        if not _carries(tokens) or weight.requires_grad:
            raise UnsupportedModelError("layer-wise relevance propagation has no rule for a linear layer with a computed weight")

        def share(relevance: Tensor) -> Sequence[Tensor]:
            positive, negative = tokens.detach().clamp(min=0), tokens.detach().clamp(max=0)
            weight_positive, weight_negative = weight.clamp(min=0), weight.clamp(max=0)
            through_positive, through_negative = F.linear(positive, weight_positive), F.linear(negative, weight_negative)
            if separate:
                s_positive, s_negative = divide(relevance, through_positive), divide(relevance, through_negative)
            else:
                s_positive = s_negative = divide(relevance, through_positive + through_negative)
            return (positive * (s_positive @ weight_positive) + negative * (s_negative @ weight_negative),)

        return Propagate.apply(_computed(func, args, kwargs), share, tokens)

    return rule


def _add(normalised: bool) -> Callable[..., Tensor]:
    """Relevance of a sum in proportion to its parts; ``normalised`` rescales both to keep the sum, per image.

    A number or a bias vector takes none. Another tensor that carries none (a position embedding) takes its part, where it ends.
    """

    def rule(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        args, kwargs = _operands(args, kwargs)
        carrying = [value for value in args[:2] if _carries(value)]
        others = [value for value in args[:2] if isinstance(value, Tensor) and not value.requires_grad]
        if len(carrying) == 1 and (not others or others[0].dim() <= 1):
            return _identity(func, args, kwargs)
        out = _computed(func, args, kwargs)
        summands = [value for value in args[:2] if isinstance(value, Tensor)]
        values = [value.detach() for value in summands]

        def share(relevance: Tensor) -> Sequence[Tensor]:
            ratio = divide(relevance, out)
            parts: Sequence[Tensor] = [value * ratio for value in values]
            if normalised and len(parts) == 2:
                parts = _rescaled(parts, relevance)
            return [part.sum_to_size(value.shape) for part, value in zip(parts, summands, strict=True) if _carries(value)]

        return Propagate.apply(out, share, *carrying)

    return rule


def _rescaled(parts: Sequence[Tensor], relevance: Tensor) -> Sequence[Tensor]:
    """A ← A · |ΣA| / (|ΣA| + |ΣB|) · ΣR / ΣA and B likewise, sums per image."""
    first, second = (_per_image_sum(part) for part in parts)
    total, weight = _per_image_sum(relevance), first.abs() + second.abs()
    return [
        part * (divide(divide(own.abs(), weight) * total, own)).reshape(-1, *(1,) * (part.dim() - 1))
        for part, own in zip(parts, (first, second), strict=True)
    ]


def _per_image_sum(values: Tensor) -> Tensor:
    return values.flatten(1).sum(1)


def _first_convolution(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The z^B rule between images and patch tokens, bounds per image, bias ignored."""
    images, weight = args[0], args[1] if len(args) > 1 else kwargs["weight"]
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    options = _by_name(names, args, kwargs)
    switches = {name: options[name] for name in names[3:] if name in options}

    def convolve(values: Tensor, kernel: Tensor) -> Tensor:
        return F.conv2d(values, kernel, **switches)

    def back(values: Tensor, kernel: Tensor) -> Tensor:
        with torch.enable_grad():
            source = torch.zeros_like(images.detach()).requires_grad_()  # a convolution's derivative is the same everywhere
            return torch.autograd.grad(convolve(source, kernel), source, values)[0]

    def share(relevance: Tensor) -> Sequence[Tensor]:
        pixels = images.detach()
        low = pixels.amin((1, 2, 3), keepdim=True).expand_as(pixels)
        high = pixels.amax((1, 2, 3), keepdim=True).expand_as(pixels)
        positive, negative = weight.clamp(min=0), weight.clamp(max=0)
        total = convolve(pixels, weight) - convolve(low, positive) - convolve(high, negative) + GUARD
        ratio = relevance / total
        return (pixels * back(ratio, weight) - low * back(ratio, positive) - high * back(ratio, negative),)

    return Propagate.apply(_computed(func, args, kwargs), share, images)


def _constant_factor(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """An activation as a product with a constant: x · (f(x) / x)."""
    source = next(value for value in tree_leaves((args, kwargs)) if _carries(value))
    out = _computed(func, args, kwargs)
    value = source.detach()
    return Propagate.apply(out, lambda gradient: (gradient * divide(out, value),), source)


def _constant_denominator(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """LayerNorm whose standard deviation is a constant: it centres, scales by constants, and shifts."""
    options = _by_name(("input", "normalized_shape", "weight", "bias", "eps"), args, kwargs)
    source, weight = options["input"], options.get("weight")
    dims = tuple(range(-len(options["normalized_shape"]), 0))
    value = source.detach()
    deviation = (value.var(dims, unbiased=False, keepdim=True) + options.get("eps", 1e-5)).sqrt()

    def share(gradient: Tensor) -> Sequence[Tensor]:
        scaled = (gradient if weight is None else gradient * weight) / deviation
        return (scaled - scaled.mean(dims, keepdim=True),)

    return Propagate.apply(_computed(func, args, kwargs), share, source)


def _constant_root(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """RMSNorm whose root mean square is a constant."""
    options = _by_name(("input", "normalized_shape", "weight", "eps"), args, kwargs)
    source, weight, eps = options["input"], options.get("weight"), options.get("eps")
    dims = tuple(range(-len(options["normalized_shape"]), 0))
    value = source.detach()
    eps = torch.finfo(value.dtype).eps if eps is None else eps
    root = (value.square().mean(dims, keepdim=True) + eps).sqrt()
    return Propagate.apply(
        _computed(func, args, kwargs),
        lambda gradient: ((gradient if weight is None else gradient * weight) / root,),
        source,
    )


def _unit_length(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:  # noqa: ARG001
    """``F.normalize`` whose norm is a constant."""
    options = _by_name(("input", "p", "dim", "eps"), args, kwargs)
    source, dim = options["input"], options.get("dim", 1)
    norm = torch.linalg.vector_norm(source.detach(), options.get("p", 2.0), dim, keepdim=True)
    return source / norm.clamp_min(options.get("eps", 1e-12))


def _cosine(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:  # noqa: ARG001
    """``F.cosine_similarity`` whose norms are constants."""
    options = _by_name(("x1", "x2", "dim", "eps"), args, kwargs)
    dim, eps = options.get("dim", 1), options.get("eps", 1e-8)
    units = [
        value / torch.linalg.vector_norm(value.detach(), dim=dim, keepdim=True).clamp_min(eps)
        for value in (options["x1"], options["x2"])
    ]
    return (units[0] * units[1]).sum(dim)


def _half_product(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """A product of two activations: each gets half of the gradient, so that gradient × input keeps its sum."""
    carrying = [value for value in args[:2] if _carries(value)]
    if len(carrying) == 1:
        return func(*args, **kwargs)
    first, second = (value.detach() for value in carrying)
    return Propagate.apply(
        _computed(func, args, kwargs),
        lambda gradient: ((0.5 * gradient * second).sum_to_size(first.shape), (0.5 * gradient * first).sum_to_size(second.shape)),
        *carrying,
    )


_ADDITIONS = ("add", "__add__", "__radd__", "__iadd__", "add_")
_DIVISIONS = ("div", "__truediv__", "__rtruediv__", "true_divide", "__itruediv__", "div_")
_PRODUCTS = ("mul", "__mul__", "__rmul__", "__imul__", "mul_", "multiply", *_DIVISIONS)
_ACTIVATIONS = (
    "gelu",
    "relu",
    "silu",
    "sigmoid",
    "tanh",
    "softplus",
    "hardswish",
    "elu",
    "leaky_relu",
    "relu_",
    "silu_",
    "sigmoid_",
)
_NORMALISATIONS = ("layer_norm", "rms_norm")
# Functions that move values about, and the mean over tokens, which hands out relevance by its pooling weights.
_MOVES = (
    "reshape", "view", "permute", "transpose", "mT", "flatten", "unflatten", "unbind", "chunk", "split", "__getitem__", "cat",
    "stack", "expand", "expand_as", "contiguous", "to", "type_as", "float", "double", "squeeze", "unsqueeze", "clone", "narrow",
    "select", "pad", "movedim", "mean", "tensor_split", "repeat_interleave", "requires_grad_", "register_hook", "roll",
    "concat", "dropout", "alias", "view_as", "reshape_as", "swapaxes", "swapdims", "index_select", "__get__", "detach",
)  # fmt: skip


def _table(*, separate: bool, normalised: bool) -> dict[str, Callable[..., Tensor]]:
    table: dict[str, Callable[..., Tensor]] = {"linear": _linear(separate), "conv2d": _first_convolution}
    table |= dict.fromkeys((*_ACTIVATIONS, *_NORMALISATIONS, "neg", "__neg__"), _identity)
    table |= dict.fromkeys(_ADDITIONS, _add(normalised)) | dict.fromkeys(_PRODUCTS, _product)
    return table


TABLES: dict[str, dict[str, Callable[..., Tensor]]] = {
    "normalised": _table(separate=False, normalised=True),
    "separate": _table(separate=True, normalised=False),
    "conservative": {
        **dict.fromkeys(_ACTIVATIONS, _constant_factor),
        "layer_norm": _constant_denominator,
        "rms_norm": _constant_root,
        "normalize": _unit_length,
        "cosine_similarity": _cosine,
        **dict.fromkeys(("norm", "linalg_norm", "linalg_vector_norm"), _computed),
        **dict.fromkeys((name for name in _PRODUCTS if name not in _DIVISIONS), _half_product),
    },
}


class RuleMode(SdpaMode):
    """Replaces the gradients of what a model computes by the rules of one table.

    Args:
        rules: name of the table. ``"normalised"`` and ``"separate"`` refuse functions that they have no rule for; what
            ``"conservative"`` does not name keeps its gradient.
        handler: is offered every fused attention.
        dtype: float32 or float64; narrower tensors are widened.
    """

    def __init__(self, rules: str, handler: Callable[..., Tensor | None], dtype: torch.dtype = torch.float32) -> None:
        super().__init__(handler)
        self.rules, self.dtype = rules, dtype
        self.table = TABLES[rules]
        self.convolved = False
        self.changed_in_place = False

    def other(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = getattr(func, "__name__", str(func))
        rule = self.table.get(name)
        if rule is not None or name in _COMPUTES or _mixes_types(args, kwargs):
            args, kwargs = tree_map(self._widened, (args, kwargs))
        if rule is None:
            return self._unruled(name, func, args, kwargs)
        if not any(map(_carries, tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        self.changed_in_place |= changes_in_place(name)
        if name == "conv2d":
            self._expect_first_convolution()
        return rule(func, args, kwargs)

    def _expect_first_convolution(self) -> None:
        if self.convolved:
            raise UnsupportedModelError(
                "layer-wise relevance propagation to pixels: expected one convolution, from pixels to patches; received a second "
                "one"
            )
        self.convolved = True

    def _widened(self, value: Any) -> Any:
        """A tensor in the pass's element type, where its own is narrower."""
        if (
            isinstance(value, Tensor)
            and value.is_floating_point()
            and torch.finfo(value.dtype).bits < torch.finfo(self.dtype).bits
        ):
            return value.to(self.dtype)
        return value

    def _unruled(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.rules == "conservative" or name in _MOVES:
            return func(*args, **kwargs)
        carrying = [value for value in tree_leaves((args, kwargs)) if _carries(value)]
        if not carrying:
            return func(*args, **kwargs)
        if changes_in_place(name):
            raise UnsupportedModelError(
                f"layer-wise relevance propagation: expected a model that computes new tensors, received one that changes one "
                f"in place by {name}()"
            )
        out = _computed(func, args, kwargs)
        return tree_map(lambda value: Refuse.apply(name, value, *carrying) if _is_floating(value) else value, out)


def _mixes_types(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether values that were widened meet a model's own weights in a function that expects one type."""
    return len({value.dtype for value in tree_leaves((args, kwargs)) if _is_floating(value)}) > 1


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# Functions with weights: those of a narrower model are widened before the first block, too.
_COMPUTES = ("linear", "conv2d", "layer_norm", "rms_norm", "scaled_dot_product_attention", "matmul", "__matmul__", "embedding")
