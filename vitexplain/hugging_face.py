"""Hugging Face: transformers' image classifiers by name or folder, and what is done where the hub is out of reach."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from huggingface_hub import constants
from torch import nn

from .errors import InputError
from .messages import brief, quiet

PREFIX = "transformers:"
# by PIL's numbers, which processors store
_INTERPOLATIONS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}


def transformers_model(name: str) -> tuple[nn.Module, dict[str, Any], tuple[str, ...] | None]:
    """A classifier with its attention as it comes, its data configuration, and its class names.

    Args:
        name: of a model on the hub, or a folder as ``save_pretrained`` writes it, after ``"transformers:"``.

    Raises:
        InputError: transformers is not installed, or the model or its processor cannot be had or understood.
    """
    source = _source(name)
    with _fetching(name) as transformers:
        model = transformers.AutoModelForImageClassification.from_pretrained(source, dtype=torch.float32)
        processor = transformers.AutoImageProcessor.from_pretrained(source)
    labels = model.config.id2label
    return model, data_config(processor.to_dict(), name), tuple(str(labels[index]) for index in range(len(labels)))


def untrained_transformers_model(name: str) -> nn.Module:
    """The same classifier as its configuration alone makes it, on the meta device: it has no weights.

    Raises:
        InputError: transformers is not installed, or the configuration cannot be had or understood.
    """
    with _fetching(name) as transformers, torch.device("meta"):
        config = transformers.AutoConfig.from_pretrained(_source(name))
        return transformers.AutoModelForImageClassification.from_config(config)


def _source(name: str) -> str:
    """The name on the hub, or the folder, of which no shell has expanded a ``~`` in the middle of a word."""
    return os.path.expanduser(name.removeprefix(PREFIX))


def is_folder(name: str) -> bool:
    """Whether what stands after ``"transformers:"`` is the path of a folder, be it there or not, and no name on the hub."""
    source = _source(name)
    return source.startswith((".", os.sep)) or source.count("/") > 1 or os.path.isdir(source)


@contextmanager
def _fetching(name: str) -> Iterator[Any]:
    """transformers, without its bars and warnings; what goes wrong while it is used becomes one line."""
    try:
        import transformers
        from transformers.utils import logging as transformers_logging
    except ImportError as error:
        raise InputError(
            f"model: {name!r} needs Hugging Face transformers: pip install 'vitexplain[transformers]' ({error})"
        ) from error
    if is_folder(name) and not os.path.isdir(_source(name)):
        raise InputError(f"model: there is no folder {_source(name)!r}")
    shows_bars = transformers_logging.is_progress_bar_enabled()
    with quiet("huggingface_hub", "transformers"), within_reach():
        transformers_logging.disable_progress_bar()
        try:
            yield transformers
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # the hub's client, its transport and damaged files have no common base
            raise InputError(
                f"model: {name!r} cannot be had here: expected the name of an image classifier on the hub or its folder "
                f"({brief(error)})"
            ) from error
        finally:
            if shows_bars:
                transformers_logging.enable_progress_bar()


def data_config(processor: dict[str, Any], name: str) -> dict[str, Any]:
    """A processor's settings as timm names them, which every transform here is made of.

    Raises:
        InputError: it does something that no timm transform does.
    """
    size, crops = processor.get("size") or {}, bool(processor.get("do_center_crop"))
    if isinstance(size, int):  # as older files have it
        size = {"shortest_edge": size} if crops else {"height": size, "width": size}
    shape = (processor.get("crop_size") or {}) if crops else size
    if not processor.get("do_resize", True) or "height" not in shape:
        raise InputError(f"model: expected a processor of {name!r} that resizes to a height and width, received size {size}")
    scale = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", True) else 1.0
    if abs(scale * 255 - 1) > 1e-3:
        raise InputError(f"model: expected a processor of {name!r} that rescales by 1/255, received {scale:.6g}")
    resample = processor.get("resample")
    interpolation = _INTERPOLATIONS.get(2 if resample is None else resample)
    if interpolation is None:
        raise InputError(f"model: expected a processor of {name!r} that resamples as Pillow does, received {resample!r}")
    normalises = processor.get("do_normalize", True)
    if normalises and not (processor.get("image_mean") and processor.get("image_std")):
        raise InputError(f"model: expected a processor of {name!r} with image_mean and image_std, received none")
    resized = size.get("shortest_edge") or size["height"]
    return dict(
        input_size=(3, shape["height"], shape["width"]),
        interpolation=interpolation,
        crop_pct=shape["height"] / resized if crops else 1.0,
        crop_mode="center" if "shortest_edge" in size else "squash",
        mean=tuple(processor["image_mean"]) if normalises else (0.0, 0.0, 0.0),
        std=tuple(processor["image_std"]) if normalises else (1.0, 1.0, 1.0),
    )


class _Reach:
    """Whether the hub's client looks in its cache alone, which is one switch for the whole process.

    Of several uses at once, in threads, the first in remembers the switch, and the last out restores it.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._uses = 0
        self._before = False

    def __enter__(self) -> None:
        with self._lock:
            if not self._uses:
                self._before = constants.HF_HUB_OFFLINE
                constants.HF_HUB_OFFLINE = self._before or _out_of_reach()
            self._uses += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._uses -= 1
            if not self._uses:
                constants.HF_HUB_OFFLINE = self._before


_REACH = _Reach()


def within_reach() -> AbstractContextManager[None]:
    """Where the hub's name does not resolve, its client looks in its cache alone, instead of trying again for a minute."""
    return _REACH


def _out_of_reach() -> bool:
    if any(name.lower() in ("http_proxy", "https_proxy", "all_proxy", "hf_endpoint") for name in os.environ):
        return False  # through another
    try:
        socket.getaddrinfo("huggingface.co", 443)
    except OSError:
        return True
    return False
