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
from .heatmap import ALPHA, as_photo, blend, colorize, is_signed, upsample

TENSORS = ("maps", "target", "logits", "prefix_values", "contribution", "by_block")
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


@dataclass(frozen=True)
class Explanation:
    """Maps of one method for a batch of images, or of texts.

    Attributes:
        method: name of the method.
        options: the method's options as used.
        maps: (B, gh, gw), or (B, K, gh, gw) for K targets an image; float32 on the input's device, one value per patch,
            not normalised. One per pixel, (…, h, w), for methods that explain pixels; one per token, (…, n), for text.
        target: (B,) or (B, K) int64, the explained classes; None where a score of its own was explained.
        logits: (B, classes), the model's output.
        prefix_values: (B, p) or (B, K, p), the values of the tokens before the patches.
        contribution: (B, n, n) or (B, K, n, n), the whole map of token contributions, where all rows were asked for.
        by_block: (B, L, gh, gw) or (B, K, L, gh, gw), for text (…, L, n), where it was asked for: entry l is the map as it stands
            when the walk from the last of L blocks has reached block l and included it. Entry 0 is ``maps``, entry L − 1 the
            last block alone; blocks below the first that a method looks at add nothing.
    """

    method: str
    options: dict[str, Any]
    maps: Tensor
    target: Tensor | None
    logits: Tensor
    prefix_values: Tensor
    contribution: Tensor | None = None
    by_block: Tensor | None = None

    @property
    def signed(self) -> bool:
        """Whether values below zero carry meaning (evidence against the class)."""
        return is_signed(self.maps)

    @property
    def is_text(self) -> bool:
        """Whether texts were explained, whose maps are over tokens."""
        return self.maps.dim() == self.prefix_values.dim()

    @property
    def num_targets(self) -> int | None:
        """K, the number of classes explained of each image; None where maps have no axis for them."""
        return self.maps.shape[1] if self.prefix_values.dim() == 3 else None

    def __len__(self) -> int:
        return len(self.maps)

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor of it by the attribute's name; without those that are None."""
        found = {name: getattr(self, name) for name in TENSORS}
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def select(self, index: int = 0, target_index: int = 0, *, by_block: bool = False) -> Tensor:
        """One of the maps.

        Args:
            index: which image or text of the batch.
            target_index: which of its K classes.
            by_block: that of each block instead.

        Returns:
            (gh, gw), (h, w) for methods that explain pixels, (n,) for text; (L, …) by block.

        Raises:
            InputError: an index out of range, or no map for each block was asked for.
        """
        maps = self.by_block if by_block else self.maps
        if maps is None:
            raise InputError("by_block: expected an explanation with rows='by_block', received one without")
        _check_index("index", index, len(maps))
        _check_index("target_index", target_index, self.num_targets or 1)
        return maps[index] if self.num_targets is None else maps[index, target_index]

    def to_image(self, size: int | tuple[int, int]) -> Tensor:
        """Maps up-sampled bilinearly.

        Args:
            size: in pixels, of both sides or height and width.

        Returns:
            (B, h, w) or (B, K, h, w) float32, not normalised.

        Raises:
            InputError: the explanation is of texts, or the size does not fit.
        """
        self.expect_images()
        return upsample(self.maps, size)

    def overlay(
        self, image: object, *, index: int = 0, target_index: int = 0, alpha: float = ALPHA, colormap: str | None = None
    ) -> Image.Image:
        """One image with its map laid over it, at the image's size.

        Args:
            image: PIL image, uint8 array (h, w, 3), or tensor (3, h, w) in uint8 or [0, 1].
            index: which image of the batch.
            target_index: which of its K classes.
            alpha: the map's share, 0 to 1.
            colormap: name of a matplotlib colour map; chosen by the map's sign where None.

        Returns:
            An RGB image.

        Raises:
            InputError: an index, image or alpha that does not fit, or an explanation of texts.
            UnknownNameError: no colour map has that name.
        """
        self.expect_images()
        heat = self.select(index, target_index)
        return blend(as_photo(image), heat, alpha=alpha, signed=self.signed, colormap=colormap)

    def save(self, path: str | Path, *, image: object | None = None, index: int = 0, target_index: int = 0) -> Path:
        """Write the explanation; the suffix decides what.

        ``.npz``: all arrays of the batch. ``.png``, ``.jpg``, ``.jpeg``, ``.webp``: one map as a picture, laid over ``image``
        where it is given, else enlarged to at least 224 pixels. Texts have pictures of their own:
        ``vitexplain.visualize.tokens``.

        Returns:
            The path written.

        Raises:
            InputError: unknown suffix, a path that cannot be written, or a picture of a text.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in (".npz", *_PICTURES):
            raise InputError(f"path: expected a suffix of .npz, {', '.join(_PICTURES)}, received {path.name!r}")
        if suffix != ".npz":
            self.expect_images()
        try:
            if suffix == ".npz":
                np.savez_compressed(path, **self._arrays())
            elif image is not None:
                self.overlay(image, index=index, target_index=target_index).save(path)
            else:
                heat = self.select(index, target_index)
                factor = -(-224 // max(heat.shape))
                enlarged = upsample(heat, (heat.shape[0] * factor, heat.shape[1] * factor))
                Image.fromarray(colorize(enlarged, signed=self.signed)).save(path)
        except OSError as error:
            raise InputError(f"path: cannot write {str(path)!r}: {error.strerror or error}") from error
        return path

    def expect_images(self) -> None:
        """Refuse a picture of a text, with ``InputError`` that says what draws one."""
        if self.is_text:
            raise InputError(
                "picture: expected an explanation of images, received one of texts, whose maps are over tokens; "
                "vitexplain.visualize.tokens(words, explanation) draws them"
            )

    def _arrays(self) -> dict[str, Any]:
        arrays = {
            name: (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).cpu().numpy()
            for name, tensor in self.tensors().items()
        }
        return {"method": np.array(self.method), **arrays}


def _check_index(name: str, index: int, count: int) -> None:
    if not 0 <= index < count:
        raise InputError(f"{name}: expected 0 to {count - 1}, received {index}")
