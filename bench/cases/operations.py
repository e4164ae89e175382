"""Operations on one layer: this library's, torch's own fused attention, the dense formulas, flash-colreduce; and the peaks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from typing import ClassVar

import torch
from torch import Tensor

from vitexplain.kernels import triton_installed

from ..layer import CPU_SIZES, GPU_SIZES, Layer, LayerSize
from ..layer_operations import BY_WORK, EITHER, LIBRARY, LIBRARY_CALLS, OPERATIONS, tensors_of
from ..peaks import BANDWIDTH, COMPUTE, peaks
from ..providers.gate import worst
from ..record import Row, spread
from ..registry import OPERATION, TORCH, TRITON, Check, Counted, Entry, Prepared, Setting, Size, TimedCase, Unavailable, ours

EPSILONS = 4  # roundings that no implementation can avoid
GATED_TOKENS = 130  # the gate's small layer
MOST_GATED_TOKENS = 1370  # up to which it looks at a layer of the timed length, too: one image, a pair of heads
PEAK, DEVICE = "peak", "device"
PEAKS = {"large product": (COMPUTE, "TFLOP/s"), "large copy": (BANDWIDTH, "TB/s")}
DTYPES = {"cpu": ("float32", "bfloat16"), "cuda": ("bfloat16", "float32")}
BACKENDS = {TORCH: "torch", TRITON: "triton"}


def check(work: str, provider: str, layer: Layer) -> Check | None:
    """Calls on layers of this one's head width: a small one, and one of as many tokens where that fits in float64.

    Raises ``Unavailable`` where the provider cannot run.
    """
    operation = BY_WORK.get(work)
    if operation is None or operation.exact is None:
        return None
    size = layer.size
    gated = [LayerSize(2, 2, GATED_TOKENS, size.head_dim)]
    if size.tokens <= MOST_GATED_TOKENS:
        gated.append(LayerSize(1, 2, size.tokens, size.head_dim))
    return worst([check_at(work, provider, one, layer.dtype, layer.device) for one in gated])


@cache
def check_at(work: str, provider: str, size: LayerSize, dtype: torch.dtype, device: torch.device) -> Check:
    """One call held against the dense formula in float64, once a process: relative errors in root mean square.

    It may be twice as far as the formula in the layer's own type, plus a few roundings, plus what the operation alone may.
    """
    operation = BY_WORK[work]
    layer = Layer(size, dtype, device, operation.positive)
    found = tensors_of(call_of(work, provider, layer)())
    exact, plain = (tensors_of(operation.exact(one)) for one in (layer.cast(torch.float64), layer))
    roundings = EPSILONS * torch.finfo(dtype).eps + operation.single_roundings * torch.finfo(torch.float32).eps
    limits = [2 * _rms_error(one, right) + roundings for one, right in zip(plain, exact, strict=True)]
    errors = [_rms_error(one, right) for one, right in zip(found, exact, strict=True)]
    return worst(list(map(Check, errors, limits)))


def _rms_error(received: Tensor, exact: Tensor) -> float:
    return float((received.double() - exact).norm() / exact.norm())


def call_of(work: str, provider: str, layer: Layer) -> Callable[[], object]:
    """A provider's way to do a piece of work on a layer."""
    if work in LIBRARY_CALLS:
        return partial(LIBRARY_CALLS[work][0], layer)
    operation = BY_WORK[work]
    if provider == TRITON and not triton_installed():
        raise Unavailable("triton is not installed")
    if provider in BACKENDS:
        backend = BACKENDS[provider] if operation.both else "auto"
        return partial(operation.ours, layer, backend)
    return partial(operation.others(layer.device.type)[provider], layer)


class _OnLayer(Prepared):
    """A layer whose operations are timed."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def call(self, entry: Entry) -> Callable[[], object]:
        return call_of(entry.work, entry.provider, self.layer)

    def check(self, entry: Entry) -> Check | None:
        return check(entry.work, entry.provider, self.layer)

    def counted(self, entry: Entry) -> Counted | None:
        if entry.work in LIBRARY_CALLS:
            _, flops, moved_bytes = LIBRARY_CALLS[entry.work]
            return Counted(flops(self.layer), moved_bytes(self.layer), COMPUTE)
        operation = BY_WORK[entry.work]
        flops, moved_bytes = operation.flops(self.layer), operation.moved_bytes(self.layer)
        bound = self._bound(flops / moved_bytes) if operation.bound == EITHER else operation.bound
        return Counted(flops, moved_bytes, bound, operation.against)

    def _bound(self, intensity: float) -> str:
        """Which roof stands above so many FLOPs a byte."""
        found = peaks(self.layer.device, self.layer.dtype)
        return COMPUTE if intensity > found[COMPUTE].rate / found[BANDWIDTH].rate else BANDWIDTH


class Operations(TimedCase):
    """Every operation at the layers of usual models, beside what the device can do at most."""

    name: ClassVar[str] = "operations"
    kind: ClassVar[str] = OPERATION
    title: ClassVar[str] = "single operations on one layer: time, FLOPs and bytes, fractions of measured peaks"

    def sizes(self, device_type: str) -> Sequence[Size]:
        layers = GPU_SIZES if device_type == "cuda" else CPU_SIZES
        return [
            size
            for dtype in DTYPES[device_type]
            for size in (
                Size(DEVICE, 0, 0, 0, dtype),
                *(Size(layer.form, layer.batch, layer.tokens, 0, dtype) for layer in layers),
            )
        ]

    def entries(self, size: Size, device_type: str) -> Sequence[Entry]:
        if size.model == DEVICE:
            return [Entry(PEAK, provider) for provider in PEAKS]
        found = [Entry(work, LIBRARY, baseline=True) for work in LIBRARY_CALLS]
        for operation in OPERATIONS:
            if operation.most_tokens is not None and size.tokens > operation.most_tokens:
                continue
            beside = [TORCH] if operation.both and device_type == "cuda" else []
            providers = [ours(device_type), *beside, *operation.others(device_type)]
            # On a CPU each peak is a process of its own, and the explanations show it.
            found += [Entry(operation.work, provider, memory=device_type == "cuda") for provider in providers]
        return found

    def prepare(self, size: Size, setting: Setting) -> Prepared:
        return _OnLayer(Layer(LayerSize.of(size.model, size.batch, size.tokens), size.torch_dtype, setting.device))

    def measure(self, size: Size, setting: Setting) -> Iterator[Row]:
        yield from self._peaks(size, setting) if size.model == DEVICE else super().measure(size, setting)

    def lead(self, entry: Entry) -> tuple[str, str]:
        return ("rate", PEAKS[entry.provider][1]) if entry.work == PEAK else ("time", "ms")

    def _peaks(self, size: Size, setting: Setting) -> Iterator[Row]:
        found = peaks(setting.device, size.torch_dtype)
        for entry in self.entries(size, setting.device.type):
            rates = [rate / 1e12 for rate in found[PEAKS[entry.provider][0]].rates]
            yield self.row(entry, size, *self.lead(entry), spread(rates), setting.device)
