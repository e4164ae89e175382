"""What the families of Hugging Face transformers share: finding parts by their names, and running a model for its logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from ..errors import UnsupportedModelError
from .anatomy import BlockAnatomy, ResidualBranches


def is_transformers_model(model: nn.Module, names: Any) -> bool:
    """Whether a class of transformers by one of these names, or a subclass, is what the model is; nothing is imported."""
    return any(kind.__name__ in names and kind.__module__.startswith("transformers.") for kind in type(model).__mro__)


def class_name(model: nn.Module, names: Any) -> str:
    """The first of these names among the model's classes."""
    return next(kind.__name__ for kind in type(model).__mro__ if kind.__name__ in names)


def part(module: nn.Module, *paths: str) -> Any:
    """The first of these dotted paths that the module has; versions of transformers name the same part differently.

    Raises:
        UnsupportedModelError: it has none of them.
    """
    for path in paths:
        found: Any = module
        for name in path.split("."):
            found = getattr(found, name, None)
        if found is not None:
            return found
    raise UnsupportedModelError(
        f"{type(module).__name__}: expected a part named {' or '.join(paths)}, found none (in this version of transformers)"
    )


def optional_part(module: nn.Module, *paths: str) -> Any:
    """The same, or None."""
    try:
        return part(module, *paths)
    except UnsupportedModelError:
        return None


def use_sdpa(model: nn.Module, base: nn.Module) -> tuple[tuple[Any, str, object], ...]:
    """What makes a model built with another attention implementation call ``F.scaled_dot_product_attention``."""
    configs: dict[int, Any] = {}
    waiting = [model.config, base.config, *(module.config for module in base.modules() if hasattr(module, "config"))]
    while waiting:  # parents before their parts: setting a parent's sets its parts', which are then set back to their own
        config = waiting.pop(0)
        if id(config) not in configs and hasattr(config, "_attn_implementation"):
            configs[id(config)] = config
            waiting += [value for value in vars(config).values() if hasattr(value, "_attn_implementation")]
    return tuple((config, "_attn_implementation", "sdpa") for config in configs.values())


def pre_norm_block(block: nn.Module) -> BlockAnatomy:
    """A transformers block of the pre-norm kind: its projection, LayerScale, norms and MLP by any of their names."""
    projection = part(block, "attention.o_proj", "attention.output.dense", "attention.out_proj", "self_attn.out_proj")
    norm = part(block, "layernorm_after", "norm2", "layer_norm2")
    attention_scale = optional_part(block, "layer_scale1.lambda1", "lambda_1")
    mlp_scale_module = optional_part(block, "layer_scale2")
    mlp_scale = optional_part(block, "lambda_2")
    mlp = optional_part(block, "mlp")
    layers = [mlp] if mlp is not None else [part(block, "intermediate"), part(block, "output.dense")]

    def output_weight() -> Tensor:
        return projection.weight if attention_scale is None else projection.weight * attention_scale.unsqueeze(-1)

    def branch(tokens: Tensor) -> Tensor:
        values = norm(tokens)
        for layer in layers:
            values = layer(values)
        if mlp_scale_module is not None:
            return mlp_scale_module(values)
        return values if mlp_scale is None else values * mlp_scale

    branches = ResidualBranches(output_weight, branch, norm, mlp_scale_module or layers[-1], lambda: mlp_scale)
    return BlockAnatomy(
        block,
        attention=part(block, "attention", "self_attn"),
        branches=branches,
        absent_in_replay=tuple(
            (module, name)
            for module in block.modules()
            for name in ("relative_position_bias", "has_relative_position_bias")
            if hasattr(module, name)
        ),
    )


def logits_of(model: nn.Module, field: str) -> Callable[..., Tensor]:
    """The model as a function of keyword inputs that returns one field of its output."""
    return lambda **inputs: getattr(model(**inputs, return_dict=True), field)
