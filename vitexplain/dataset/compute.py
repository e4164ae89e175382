"""The device's part: a batch of photos in, packed maps out, and no waiting for the device in between."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cuda_graphs import CannotBeCapturedError, CapturedCall
from ..errors import InputError
from ..explainer import Explainer
from ..explanation import Explanation
from ..loading import LoadedModel, in_dtype
from ..messages import brief
from ..methods import CaptumMethod, Method

_LARGEST_EXPONENT = 126  # of a scale: its inverse must be a normal float32, too


@dataclass(frozen=True)
class BatchResult:
    """What was found for the images of one batch.

    Attributes:
        maps: by label, (n, gh, gw), or (n, K, gh, gw) for K targets; packed they are float16 and want their ``scales``.
        scales: by label, (n,) or (n, K) float32; empty where maps are not packed.
        finite: by label, (n,) bool, whether an image's maps are finite.
        finite_logits: (n,) bool.
        prediction: (n,) int64; ``score`` its probability (n,) float32.
        target: (n,) or (n, K) int64; ``target_score`` their probabilities, float32.
    """

    maps: Mapping[str, Tensor]
    scales: Mapping[str, Tensor]
    finite: Mapping[str, Tensor]
    finite_logits: Tensor
    prediction: Tensor
    score: Tensor
    target: Tensor
    target_score: Tensor


def pack(maps: Tensor) -> tuple[Tensor, Tensor]:
    """Maps in half precision and what they are to be multiplied by.

    A scale is a power of two that puts the largest magnitude of its map into [0.5, 1], so that half precision neither overflows
    nor loses small values: maps are not normalised, and gradients can be of any size. Dividing by it rounds nothing.

    Args:
        maps: (…, h, w) float32.

    Returns:
        (…, h, w) float16 and (…) float32; a map that is not finite becomes NaN throughout, and so does its scale.
    """
    largest = maps.abs().amax((-2, -1))
    exponent = torch.frexp(torch.nan_to_num(largest, 1.0)).exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    scale = ((exponent.int() + 127) << 23).view(torch.float32)  # the number whose exponent it is, to the bit
    scale = torch.where(torch.isfinite(largest), scale, torch.nan)  # the largest of a map with NaN is NaN
    return (maps / scale[..., None, None]).half(), scale


class Pending:
    """A batch that the device has been given; ``result`` waits for it."""

    def __init__(
        self, outputs: dict[str, Tensor], count: int, done: torch.cuda.Event | None, copied: torch.cuda.Event | None
    ) -> None:
        self._outputs, self._count, self._done, self._copied = outputs, count, done, copied

    def wait_for_input(self) -> None:
        """Until the photos have been read, so that their place can be filled anew."""
        if self._copied is not None:
            self._copied.synchronize()

    def result(self) -> BatchResult:
        """What was found for the images that are no padding."""
        if self._done is not None:
            self._done.synchronize()
        parts = {name: tensor[: self._count] for name, tensor in self._outputs.items()}
        return BatchResult(
            maps=_of_kind(parts, "maps"),
            scales=_of_kind(parts, "scales"),
            finite=_of_kind(parts, "finite"),
            finite_logits=parts["finite_logits"],
            prediction=parts["prediction"],
            score=parts["score"],
            target=parts["target"],
            target_score=parts["target_score"],
        )


class BatchExplainer:
    """Explains batches of one shape, one after the other, on a model's device.

    On CUDA photos are copied on a stream of their own, the whole explanation is replayed from a graph, and results come back
    while the next batch is being explained.

    Args:
        model: on its device.
        methods: by label.
        target: ``"pred"``, ``"label"`` or ``"topK"``.
        dtype: element type that the model runs in.
        backend: of ``Explainer``.
        batch: images in every batch, padding included.
        compile: run the model's blocks as ``torch.compile`` makes them.
        cuda_graph: capture the explanation in a CUDA graph where that can be done.
        packed: give maps in half precision with their scales, on the host; else float32, on the device.

    Attributes:
        busy, idle: seconds that the device was explaining, and that it waited between two batches.
        graphed: whether batches are replayed from a graph, or will be; false from the first batch on where that cannot be done.
    """

    def __init__(
        self,
        model: LoadedModel,
        methods: Mapping[str, Method],
        *,
        target: str,
        dtype: torch.dtype,
        backend: str,
        batch: int,
        compile: bool = False,
        cuda_graph: bool = True,
        packed: bool = True,
    ) -> None:
        inside = in_dtype(model.model, dtype)
        self.explainer = Explainer(inside, methods, backend, compile=compile)
        self.device = next(inside.parameters()).device
        self.dtype, self.batch, self.target, self.packed = dtype, batch, target, packed
        self.input_size = model.input_size
        self.busy, self.idle = 0.0, 0.0
        self.graphed = cuda_graph and self.device.type == "cuda" and backend != "dense" and not _by_captum(methods)
        self._mean, self._std = (
            torch.tensor(values, dtype=torch.float32, device=self.device).view(3, 1, 1) for values in (model.mean, model.std)
        )
        self._captured: CapturedCall | None = None
        self._copying = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._ended: float | None = None  # the last batch, on a CPU
        self._last: torch.cuda.Event | None = None  # its end, on a GPU
        self._timed: list[tuple[torch.cuda.Event, torch.cuda.Event, torch.cuda.Event | None]] = []

    # -- one batch -----------------------------------------------------------------------------------------------------

    def submit(self, photos: Tensor, classes: Tensor | None, count: int) -> Pending:
        """Give the device a batch.

        Args:
            photos: (batch, 3, h, w) uint8 on the host, best in pinned memory; must stay as they are until ``wait_for_input``.
            classes: (batch,) int64 on the host where labels are explained, else None.
            count: how many images are no padding.
        """
        if self._copying is None:
            return self._submit_to_cpu(photos, classes, count)
        with torch.cuda.device(self.device):  # events, graphs and streams belong to the current one
            return self._submit(photos, classes, count)

    def _submit_to_cpu(self, photos: Tensor, classes: Tensor | None, count: int) -> Pending:
        started = time.perf_counter()
        self.idle += 0.0 if self._ended is None else started - self._ended
        outputs = self._outputs(photos, classes)
        self._ended = time.perf_counter()
        self.busy += self._ended - started
        return Pending(outputs, count, None, None)

    def _submit(self, photos: Tensor, classes: Tensor | None, count: int) -> Pending:
        main, copied = torch.cuda.current_stream(self.device), torch.cuda.Event()
        with torch.cuda.stream(self._copying):
            photos = photos.to(self.device, non_blocking=True)
            classes = None if classes is None else classes.to(self.device, non_blocking=True)
            copied.record()
        main.wait_event(copied)
        for tensor in (photos, classes):
            if tensor is not None:
                tensor.record_stream(main)
        if self.graphed and self._captured is None:
            self._capture(photos, classes)
        started, done = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        started.record(main)
        outputs = self._outputs(photos, classes) if self._captured is None else self._captured(photos, classes)
        outputs = {name: self._hand_out(name, tensor) for name, tensor in outputs.items()}
        done.record(main)
        self._timed.append((started, done, self._last))
        self._last = done
        return Pending(outputs, count, done, copied)

    def _hand_out(self, name: str, tensor: Tensor) -> Tensor:
        """On the host; maps that are not packed on the device, as a copy where the next replay writes over them."""
        if not self.packed and name.startswith("maps/"):
            return tensor.clone() if self.graphed else tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)

    def settle(self) -> None:
        """Add up the times of what the device has finished."""
        unfinished = []
        for started, done, before in self._timed:
            if not done.query():
                unfinished.append((started, done, before))
                continue
            self.busy += started.elapsed_time(done) / 1000
            self.idle += 0.0 if before is None else max(0.0, before.elapsed_time(started) / 1000)
        self._timed = unfinished

    def explain(self, photos: Tensor, classes: Tensor | None, *, check_values: bool = False) -> dict[str, Explanation]:
        """The explanation alone, of photos (batch, 3, h, w) uint8 on the device: by label."""
        return self.explainer.attribute(self.normalised(photos), self._asked(classes), check_values=check_values)

    def normalised(self, photos: Tensor) -> Tensor:
        """The model's input: to the last bit what the model's own transform gives."""
        return photos.float().div(255).sub_(self._mean).div_(self._std).to(self.dtype)

    def _asked(self, classes: Tensor | None) -> Tensor | str | None:
        return {"pred": None, "label": classes}.get(self.target, self.target)

    def _outputs(self, photos: Tensor, classes: Tensor | None) -> dict[str, Tensor]:
        """All that is kept of a batch, as tensors on the device by name."""
        explanations = self.explain(photos, classes)
        first = next(iter(explanations.values()))
        assert first.target is not None, "classes are explained, and no score"
        probabilities = first.logits.float().softmax(-1)
        score, prediction = probabilities.max(-1)
        columns = first.target if first.target.dim() == 2 else first.target.unsqueeze(1)
        target_score = probabilities.gather(1, columns).reshape(first.target.shape)
        outputs = {
            "finite_logits": torch.isfinite(first.logits).all(-1),
            "prediction": prediction, "score": score, "target": first.target, "target_score": target_score,
        }  # fmt: skip
        for label, explanation in explanations.items():
            maps = explanation.maps.float()
            outputs[f"finite/{label}"] = torch.isfinite(maps).flatten(1).all(1)
            if self.packed:
                outputs[f"maps/{label}"], outputs[f"scales/{label}"] = pack(maps)
            else:
                outputs[f"maps/{label}"] = maps
        return outputs

    # -- the graph -----------------------------------------------------------------------------------------------------

    def _capture(self, photos: Tensor, classes: Tensor | None) -> None:
        """Capture the explanation of a batch of this shape; where the model or a method cannot be captured, do without."""
        try:
            self._captured = CapturedCall(self._outputs, (photos, classes), self.device)
        except CannotBeCapturedError as error:
            warnings.warn(f"explanations are not replayed from a CUDA graph: {error}", stacklevel=2)
            self.graphed = False

    # -- its own speed -------------------------------------------------------------------------------------------------

    def sample_batch(self) -> tuple[Tensor, Tensor | None]:
        """A batch of noise on the device, and classes where labels are explained: what a measurement is done with."""
        generator = torch.Generator().manual_seed(0)
        photos = torch.randint(0, 256, (self.batch, 3, *self.input_size), dtype=torch.uint8, generator=generator)
        classes = torch.zeros(self.batch, dtype=torch.int64, device=self.device) if self.target == "label" else None
        return photos.to(self.device), classes

    def bare_images_per_second(self, repeats: int = 3) -> float:
        """The median speed of ``attribute`` on a batch that is on the device already, in a loop with nothing else."""
        photos, classes = self.sample_batch()
        images, target = self.normalised(photos), self._asked(classes)
        seconds = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            self.explainer.attribute(images, target)
            if self.device.type == "cuda":
                torch.cuda.synchronize(self.device)
            seconds.append(time.perf_counter() - started)
        return self.batch / float(np.median(seconds[1:]))


@contextmanager
def deterministic(device: torch.device, *, enabled: bool) -> Iterator[None]:
    """Have torch choose algorithms that give the same bits each time; a CPU does so by itself.

    Raises:
        InputError: something has no such algorithm.
    """
    if not enabled or device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it torch refuses matrix products
    before, only_warn = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    switches: Any = torch.utils.deterministic  # a module whose switch is a property, which torch does not annotate
    filling = switches.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)  # only warned, attention would still take the faster algorithm
    switches.fill_uninitialized_memory = False  # nothing here reads what it has not written
    try:
        yield
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        raise InputError(f"deterministic: {brief(error)}; expected deterministic=False (--no-deterministic) here") from error
    finally:
        torch.use_deterministic_algorithms(before, warn_only=only_warn)
        switches.fill_uninitialized_memory = filling


def _by_captum(methods: Mapping[str, Method]) -> bool:
    return any(isinstance(method, CaptumMethod) for method in methods.values())


def _of_kind(parts: Mapping[str, Tensor], kind: str) -> dict[str, Tensor]:
    prefix = f"{kind}/"
    return {name.removeprefix(prefix): tensor for name, tensor in parts.items() if name.startswith(prefix)}
