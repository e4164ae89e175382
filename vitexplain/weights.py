"""Weights from files: state dicts that run no code when read, filled into a model strictly."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from .errors import InputError
from .files import check_file
from .messages import some

WEIGHT_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin")


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The state dict in a file, in float32; ``{"state_dict": …}`` and ``{"model": …}`` around it are taken off.

    Raises:
        InputError: no such file, not readable as weights, or a file that would run code when read.
    """
    path = Path(path)
    if path.suffix.lower() not in WEIGHT_SUFFIXES:
        raise InputError(f"weights: expected a file ending in {', '.join(WEIGHT_SUFFIXES)}, received {path.name!r}")
    check_file(path, "weights")
    try:
        if path.suffix.lower() == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file can raise anything inside a parser
        raise InputError(_why_unreadable(path, error)) from error
    return float32_state(_unwrap_state(content, path))


def _why_unreadable(path: Path, error: Exception) -> str:
    named = re.search(r"GLOBAL ([\w.]+)", str(error))
    code = named or re.search(r"Unsupported (?:global|class)|[Uu]nrecognized function", str(error))
    if isinstance(error, OSError):
        return f"weights: cannot read {str(path)!r}: {error.strerror or error}"
    if code is None:
        return f"weights: cannot read {str(path)!r}: not a file of weights, or damaged ({type(error).__name__})"
    what = named.group(1) if named else "objects other than tensors"
    return (
        f"weights: refused {str(path)!r}: it holds {what}, and unpickling that could run any code; "
        "expected tensors only (a state_dict, better as .safetensors)"
    )


def _unwrap_state(content: Any, path: Path) -> dict[str, Tensor]:
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not content or not all(isinstance(value, Tensor) for value in content.values()):
        raise InputError(f"weights: expected a state dict of tensors in {str(path)!r}, received {_describe(content)}")
    if all(str(key).startswith("module.") for key in content):  # saved from inside a data-parallel wrapper
        return {str(key).removeprefix("module."): value for key, value in content.items()}
    return dict(content)


def _describe(content: Any) -> str:
    if isinstance(content, Mapping):
        odd = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
        return f"a dict with other values under {some(odd)}" if odd else "an empty dict"
    return type(content).__name__


def float32_state(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.float() if value.is_floating_point() else value for name, value in state.items()}


def num_classes_of(model: nn.Module, state: Mapping[str, Tensor]) -> int | None:
    """The number of classes that the head in a state dict has; None where there is no head of the model's name."""
    head = (getattr(model, "pretrained_cfg", None) or {}).get("classifier") or "head"
    weight = state.get(f"{head if isinstance(head, str) else head[0]}.weight")
    return None if weight is None or weight.dim() != 2 else len(weight)


def fill(model: nn.Module, state: Mapping[str, Tensor], source: object, name: str) -> None:
    """Strictly load a state dict.

    Raises:
        InputError: it does not fit; the message names a few of the keys.
    """
    own = model.state_dict()
    missing = [key for key in own if key not in state]
    unexpected = [key for key in state if key not in own]
    wrong = [
        f"{key} (expected {tuple(own[key].shape)}, received {tuple(state[key].shape)})"
        for key in own
        if key in state and own[key].shape != state[key].shape
    ]
    parts = [("missing", missing), ("unexpected", unexpected), ("wrong shape", wrong)]
    problems = "; ".join(f"{what} {some(keys)}" for what, keys in parts if keys)
    if problems:
        raise InputError(f"weights: {str(source)!r} does not fit model {name!r}: {problems}")
    model.load_state_dict(state)
