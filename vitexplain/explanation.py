"""The result of an explanation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import InputError
from .heatmap import as_photo, blend, colorize, upsample

TENSORS = ("maps", "target", "logits", "prefix_values", "contribution")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Explanation:
    """Maps of one method for a batch of images.

    Attributes:
        method: name of the method.
        options: the method's options as used.
        maps: (B, gh, gw), or (B, K, gh, gw) for K targets an image; float32 on the input's device, one value per patch,
            not normalised. One per pixel, (…, h, w), for methods that explain pixels; one per token, (…, n), for text.
        target: (B,) or (B, K) int64, the explained classes; None where a score of its own was explained.
        logits: (B, classes), the model's output.
        prefix_values: (B, p) or (B, K, p), the values of the tokens before the patches.
        contribution: (B, n, n) or (B, K, n, n), the whole map of token contributions, where all rows were asked for.
    """

    method: str
    options: dict[str, Any]
    maps: Tensor
    target: Tensor | None
    logits: Tensor
    prefix_values: Tensor
    contribution: Tensor | None = None

    @property
    def signed(self) -> bool:
        """Whether values below zero carry meaning (evidence against the class)."""
        return bool((self.maps < 0).any())

    def __len__(self) -> int:
        return len(self.maps)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of it by the attribute's name; without those that are None."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def to_image(self, size: int | tuple[int, int]) -> Tensor:
        """Maps up-sampled bilinearly to ``size`` (an int, or height and width): (B, h, w) or (B, K, h, w).

        Raises:
            InputError: the explanation is of texts, or the size does not fit.
        """
        self._expect_images()
        return upsample(self.maps, size)

    def overlay(
        self, image: object, *, index: int = 0, target_index: int = 0, alpha: float = 0.55, colormap: str | None = None
    ) -> Image.Image:
        """One image with its map laid over it, at the image's size.

        Args:
            image: PIL image, uint8 array (h, w, 3), or tensor (3, h, w) in uint8 or [0, 1].
            index: which image of the batch.
            target_index: which of its K classes.
            alpha: the map's share, 0 to 1.
            colormap: name of a matplotlib colour map; chosen by the map's sign where None.

        Raises:
            InputError: an index, image or option that does not fit.
        """
        self._expect_images()
        heat = self._select(index, target_index)
        return blend(as_photo(image), heat, alpha=alpha, signed=self.signed, colormap=colormap)

    def save(self, path: str | Path, *, image: object | None = None, index: int = 0, target_index: int = 0) -> Path:
        """Write the explanation; the suffix decides what.

        ``.npz``: all arrays of the batch. ``.png``, ``.jpg``, ``.jpeg``, ``.webp``: one map as a picture, laid over ``image``
        where it is given, else enlarged to at least 224 pixels.

        Returns:
            The path written.

        Raises:
            InputError: unknown suffix, or a path that cannot be written.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in (".npz", *_PICTURES):
            raise InputError(f"path: expected a suffix of .npz, {', '.join(_PICTURES)}, received {path.name!r}")
        if suffix != ".npz":
            self._expect_images()
        try:
            if suffix == ".npz":
                np.savez_compressed(path, **self._arrays())
            elif image is not None:
                self.overlay(image, index=index, target_index=target_index).save(path)
            else:
                heat = self._select(index, target_index)
                factor = -(-224 // max(heat.shape))
                enlarged = upsample(heat, (heat.shape[0] * factor, heat.shape[1] * factor))
                Image.fromarray(colorize(enlarged, signed=self.signed)).save(path)
        except OSError as error:
            raise InputError(f"path: cannot write {str(path)!r}: {error.strerror or error}") from error
        return path

    def _expect_images(self) -> None:
        if self.maps.dim() - self.prefix_values.dim() == 0:
            raise InputError("picture: expected an explanation of images, received one of texts, whose maps are over tokens")

    def _select(self, index: int, target_index: int) -> Tensor:
        if not 0 <= index < len(self.maps):
            raise InputError(f"index: expected 0 to {len(self.maps) - 1}, received {index}")
        heat = self.maps[index]
        classes = 1 if heat.dim() == 2 else len(heat)
        if not 0 <= target_index < classes:
            raise InputError(f"target_index: expected 0 to {classes - 1}, received {target_index}")
        return heat if heat.dim() == 2 else heat[target_index]

    def _arrays(self) -> dict[str, np.ndarray]:
        arrays = {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
            for name, tensor in self.tensors().items()
        }
        return {"method": np.array(self.method), **arrays}
