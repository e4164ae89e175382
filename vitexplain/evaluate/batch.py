"""A batch under evaluation: its images, what the model says of them, and of them with pixels replaced."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import InputError
from ..heatmap import min_max, upsample
from ..kernels.dispatch import accumulation_dtype
from ..models import Anatomy

SUBSTRATES = ("black", "zeros", "blur", "mean")
BLUR_KERNEL, BLUR_SIGMA = 11, 5.0


class Classifier:
    """A model that is asked for log-probabilities, many images at a time.

    Args:
        anatomy: of the model, in the element type that the forwards are to run in.
        mean, std: its normalisation, three values each.
        forward_batch: images of one forward.
    """

    def __init__(self, anatomy: Anatomy, mean: Sequence[float], std: Sequence[float], forward_batch: int) -> None:
        parameter = next(anatomy.model.parameters())
        self.anatomy, self.forward_batch = anatomy, forward_batch
        self.dtype, self.device = parameter.dtype, parameter.device
        self.mean, self.std = torch.tensor(mean, device=self.device), torch.tensor(std, device=self.device)
        self.num_forwarded = 0
        self._finite = torch.ones((), dtype=torch.bool, device=self.device)

    @property
    def black(self) -> Tensor:
        """(1, 3, 1, 1): what 0 in [0, 1] space is after normalisation."""
        return (-self.mean / self.std).view(1, 3, 1, 1)

    @torch.inference_mode()
    def log_probabilities(self, images: Tensor) -> Tensor:
        """(n, classes), at least float32, for normalised images (n, 3, h, w)."""
        return torch.cat([self._forward(chunk) for chunk in images.split(self.forward_batch)])

    @torch.inference_mode()
    def of_replaced(self, images: Tensor, substrate: Tensor, ranks: Tensor, jobs: Tensor) -> Tensor:
        """What the model says of images whose pixels of some ranks are replaced; they are made here, a forward's worth at once.

        Args:
            images: (B, 3, h, w), normalised.
            substrate: (B, 3, h, w) or broadcastable to it: what takes the pixels' place.
            ranks: (B, h·w) int32, a permutation of the pixels a row.
            jobs: (m, 3) int64 on the CPU: an image of the batch, and the first rank that is replaced and the one behind the last.

        Returns:
            (m, classes), at least float32.
        """
        height, width = images.shape[-2:]
        images, substrate = images.to(self.dtype), substrate.to(self.dtype).expand_as(images)
        outputs = []
        for chunk in jobs.split(self.forward_batch):
            row, start, stop = chunk.to(self.device, non_blocking=True).unbind(1)
            rank = ranks[row]
            inside = (rank >= start.unsqueeze(1)) & (rank < stop.unsqueeze(1))
            outputs.append(self._forward(torch.where(inside.view(-1, 1, height, width), substrate[row], images[row])))
        return torch.cat(outputs)

    def check_finite(self) -> None:
        """Raise ``InputError`` where the model has ever said NaN or infinity; asked once a batch, as it waits for the device."""
        if not bool(self._finite):
            raise InputError(f"model output: expected finite logits, received NaN or infinity (model in {self.dtype})")

    def _forward(self, images: Tensor) -> Tensor:
        self.num_forwarded += len(images)
        logits = self.anatomy.run(images.to(self.dtype))
        self._finite = self._finite & torch.isfinite(logits).all()
        return logits.to(accumulation_dtype(logits.dtype)).log_softmax(-1)


@dataclass(frozen=True)
class Batch:
    """Images that are explained and changed together.

    Attributes:
        images: (B, 3, h, w) float32, normalised, on the classifier's device.
        ids: of the images, in their source.
        labels: (B,) int64, or None where the source has none.
        masks: (B, h, w) bool, or None.
        clean: (B, classes), log-probabilities of the images as they are.
        classifier: what is asked about changed images.
        seed: of the random order of ties and of random maps, together with each image's id.
    """

    images: Tensor
    ids: tuple[str, ...]
    labels: Tensor | None
    masks: Tensor | None
    clean: Tensor
    classifier: Classifier
    seed: int

    @property
    def predicted(self) -> Tensor:
        """(B,) int64, the class of the clean image."""
        return self.clean.argmax(-1)

    @property
    def num_pixels(self) -> int:
        """h·w, of each image."""
        return self.images.shape[-2] * self.images.shape[-1]

    def take(self, rows: Tensor) -> Batch:
        """The batch of some of its images; ``rows`` (m,) int64."""
        return replace(
            self,
            images=self.images[rows],
            ids=tuple(self.ids[row] for row in rows.tolist()),
            labels=None if self.labels is None else self.labels[rows],
            masks=None if self.masks is None else self.masks[rows],
            clean=self.clean[rows],
        )

    def generators(self, purpose: str) -> list[torch.Generator]:
        """A random generator an image that depends on seed, id and purpose alone, not on the batch or the device."""
        return [_generator(f"{self.seed}/{purpose}/{name}") for name in self.ids]

    @cached_property
    def tie_order(self) -> Tensor:
        """(B, h·w) int64: the seeded random order in which pixels of equal importance come, the same for every map."""
        orders = [torch.randperm(self.num_pixels, generator=generator) for generator in self.generators("ties")]
        return torch.stack(orders).to(self.images.device)

    @cached_property
    def _cache(self) -> dict[str, Tensor]:
        return {}

    def substrate(self, name: str) -> Tensor:
        """What replaces pixels, broadcastable to the images: ``black`` (0 before normalisation), ``zeros`` (after it), ``blur``
        (Gaussian, kernel 11, σ 5), ``mean`` (of each image and channel)."""
        if name not in self._cache:
            make = {"black": self._black, "zeros": self._zeros, "blur": self._blur, "mean": self._mean}[name]
            self._cache[name] = make()
        return self._cache[name]

    def _black(self) -> Tensor:
        return self.classifier.black

    def _zeros(self) -> Tensor:
        return self.images.new_zeros(1, 3, 1, 1)

    def _mean(self) -> Tensor:
        return self.images.mean((-2, -1), keepdim=True)

    def _blur(self) -> Tensor:
        offsets = torch.arange(BLUR_KERNEL, dtype=self.images.dtype, device=self.images.device) - BLUR_KERNEL // 2
        weights = torch.exp(-(offsets**2) / (2 * BLUR_SIGMA**2))
        weights = (weights / weights.sum()).expand(3, 1, 1, -1)
        padded = F.pad(self.images, [BLUR_KERNEL // 2] * 4, mode="reflect")
        return F.conv2d(F.conv2d(padded, weights, groups=3), weights.transpose(2, 3), groups=3)

    def probe(self, ranks: Tensor, spans: Tensor, substrate: str) -> Tensor:
        """Log-probabilities of every image with the pixels of each span of ranks replaced.

        Args:
            ranks: (B, h·w) int32.
            spans: (S, 2) int64 on the CPU: the first rank that is replaced and the one behind the last. Nothing is forwarded for
                an empty span, and once a batch for the whole image.
            substrate: name of what takes the pixels' place.

        Returns:
            (B, S, classes), as ``clean``.
        """
        size = len(self.images)
        length = spans[:, 1] - spans[:, 0]
        whole = (length == self.num_pixels).nonzero().squeeze(1)
        chosen = ((length > 0) & (length < self.num_pixels)).nonzero().squeeze(1)
        found = self.clean.unsqueeze(1).repeat(1, len(spans), 1)
        if len(whole):
            found[:, whole.to(found.device)] = self._of_substrate(substrate).unsqueeze(1)
        if len(chosen):
            rows = torch.arange(size).repeat_interleave(len(chosen))
            jobs = torch.cat([rows.unsqueeze(1), spans[chosen].repeat(size, 1)], 1)
            outputs = self.classifier.of_replaced(self.images, self.substrate(substrate), ranks, jobs)
            found[:, chosen.to(found.device)] = outputs.unflatten(0, (size, len(chosen)))
        return found

    def _of_substrate(self, name: str) -> Tensor:
        key = f"log-probabilities of {name}"
        if key not in self._cache:
            substrate = self.substrate(name)
            whole = substrate.expand(len(substrate), *self.images.shape[1:])
            self._cache[key] = self.classifier.log_probabilities(whole).expand(len(self.images), -1)
        return self._cache[key]


@dataclass(frozen=True)
class RankedMaps:
    """One method's maps of a batch at pixel resolution, ranked once for all protocols.

    Attributes:
        pixels: (B, h, w), at least float32.
        ranks: (B, h·w) int32, 0 for the most important pixel.
    """

    pixels: Tensor
    ranks: Tensor

    @classmethod
    def of(cls, maps: Tensor, batch: Batch, label: str) -> RankedMaps:
        """Maps (B, gh, gw), up-sampled bilinearly and sorted; equal values in the batch's random order.

        Raises:
            InputError: a map has NaN or infinity.
        """
        finite = torch.isfinite(maps).flatten(1).all(1)
        if not bool(finite.all()):
            name = batch.ids[int((~finite).nonzero()[0])]
            raise InputError(f"map of {label!r} for image {name!r}: expected finite values, received NaN or infinity")
        # In double precision, so that what is equal on the grid stays equal and no rounding orders it by its place.
        height, width = batch.images.shape[-2:]
        exact = upsample(maps.double(), (height, width))
        pixels = exact.to(accumulation_dtype(maps.dtype))
        shuffled = pixels.flatten(1).gather(1, batch.tie_order)
        order = batch.tie_order.gather(1, shuffled.argsort(dim=1, descending=True, stable=True))
        positions = torch.arange(order.shape[1], dtype=torch.int32, device=order.device).expand_as(order)
        return cls(pixels, torch.empty_like(positions.contiguous()).scatter_(1, order, positions))

    def negated(self) -> RankedMaps:
        """The maps with their sign changed: the order reversed, that of ties as well."""
        return RankedMaps(-self.pixels, self.ranks.shape[1] - 1 - self.ranks)

    @cached_property
    def scaled(self) -> Tensor:
        """(B, h, w) in [0, 1]: each map min–max scaled, a constant one to zeros."""
        return min_max(self.pixels)


def _generator(text: str) -> torch.Generator:
    number = int.from_bytes(hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()[:8], "little") >> 1
    return torch.Generator().manual_seed(number)
