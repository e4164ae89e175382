"""The public API: ``Explainer(model, method=…).attribute(images, target=…)``."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .capture import capturing
from .errors import InputError, UnsupportedModelError
from .explanation import Explanation
from .kernels import BACKENDS as KERNEL_BACKENDS
from .kernels import choose_backend
from .kernels.dispatch import accumulation_dtype
from .methods import Method, build_methods
from .models import read_anatomy
from .relevance import (
    Trace,
    contribution_of_all_rows,
    recorded_gradients,
    start_rows,
    walk_with_gradient,
    walk_without_gradient,
)
from .tap import Request, Tap
from .targets import resolve_target

BACKENDS = (*KERNEL_BACKENDS, "dense")


class Explainer:
    """Explains a model's predictions, without ever storing an attention map.

    Args:
        model: a timm ``VisionTransformer`` (possibly compiled or wrapped for data parallelism); left as it was after each
            call, also after an exception. It is run in evaluation mode.
        method: a name or ``Method``, or several, which then share one forward and backward. ``vitexplain.methods()`` lists them.
        backend: ``"auto"`` (Triton on CUDA, tiled torch elsewhere), ``"triton"``, ``"torch"``, or ``"dense"``, the float64
            reference that stores every map. An explicit choice is honoured or refused, never replaced.
        rows: ``"all"`` also returns the whole n × n map of contributions of chain methods.
        **options: the methods' options; each goes to every named method that has it.

    Raises:
        UnsupportedModelError: the model, or a method on this model, cannot be explained; the message says why.
        UnknownNameError: unknown method or option.
        InputError: another argument that does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        method: str | Method | Iterable[str | Method] = "tokentm",
        backend: str = "auto",
        *,
        rows: str | None = None,
        **options: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise InputError(f"backend: expected one of {', '.join(BACKENDS)}, received {backend!r}")
        if rows not in (None, "all"):
            raise InputError(f"rows: expected None or 'all', received {rows!r}")
        self.methods = build_methods(method, options)
        self.backend = backend
        self.rows = rows
        self.anatomy = read_anatomy(model)
        self._several = not isinstance(method, str | Method)
        for item in self.methods:
            item.check(self.anatomy)
            if rows == "all" and not item.is_chain:
                raise InputError(f"rows='all': expected methods that chain update maps, received {item.name!r}")

    def attribute(self, images: Tensor, target: Any = None) -> Explanation | dict[str, Explanation]:
        """Explain a batch of images.

        Args:
            images: (B, c, h, w), as the model takes them: normalised, in the model's dtype, on its device.
            target: class to explain: None for the predicted one, an int, a list or tensor (B,), or (B, K) for several
                classes an image, which share the forward.

        A whole call can be captured in a CUDA graph, after one that was not; nothing is then checked that needs a look at values.

        Returns:
            One ``Explanation``, or a dict by method name where several methods were asked for.

        Raises:
            InputError: images or target that do not fit.
            UnsupportedModelError: the running model does something that cannot be explained.
        """
        images = self._check_images(images)
        if self.backend == "dense":
            explanations = self._dense(images, target)
        else:
            explanations = self._matrix_free(images, target)
        return explanations if self._several else next(iter(explanations.values()))

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_images(self, images: Any) -> Tensor:
        if not isinstance(images, Tensor):
            raise InputError(f"images: expected a tensor (B, c, h, w), received {type(images).__name__}")
        if images.dim() != 4 or 0 in images.shape:
            raise InputError(f"images: expected shape (B, c, h, w) with B ≥ 1, received {tuple(images.shape)}")
        parameter = next(self.anatomy.model.parameters())
        if images.device != parameter.device:
            raise InputError(f"images: expected device {parameter.device} (the model's), received {images.device}")
        autocast = torch.is_autocast_enabled(images.device.type)
        if images.dtype != parameter.dtype and not (autocast and images.is_floating_point()):
            raise InputError(f"images: expected dtype {parameter.dtype} (the model's), received {images.dtype}")
        self.anatomy.check_image_size(*images.shape[1:])
        if not capturing(images.device) and not torch.isfinite(images).all():
            raise InputError("images: expected finite values, received NaN or infinity")
        if self.backend != "dense":
            try:
                choose_backend(self.backend, images.device)  # refuse before any work is done
            except RuntimeError as error:
                raise InputError(str(error)) from error
        return images.detach()

    def _check_logits(self, logits: Any, batch: int) -> Tensor:
        expected = (batch, self.anatomy.num_classes)
        if not isinstance(logits, Tensor) or tuple(logits.shape) != expected:
            received = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UnsupportedModelError(f"model output: expected logits {expected}, received {received}")
        if not capturing(logits.device) and not torch.isfinite(logits).all():
            raise InputError(f"model output: expected finite logits, received NaN or infinity (model in {logits.dtype})")
        return logits

    # -- the two ways ------------------------------------------------------------------------------------------------

    def _matrix_free(self, images: Tensor, target: Any) -> dict[str, Explanation]:
        with torch.inference_mode(False), Tap(self.anatomy, self._request(), self.backend) as tap:
            images = images.clone() if images.is_inference() else images
            logits = self._check_logits(tap.forward(images), len(images))
            classes = resolve_target(target, logits.detach())
            columns = classes.unsqueeze(1) if classes.dim() == 1 else classes
            grid = self.anatomy.grid(*images.shape[-2:])
            num_tokens = self.anatomy.num_prefix_tokens + grid[0] * grid[1]
            pooling, support = start_rows(tap, num_tokens, len(images), tap.blocks[-1].key.dtype, images.device)
            rows = pooling
            if self.rows == "all":
                rows = torch.eye(num_tokens, dtype=pooling.dtype, device=images.device).expand(len(images), -1, -1)
                support = num_tokens
            trace = Trace(self.anatomy, tap.blocks, rows, support)
            walk = self._walk if self.rows is None else self._walk_all_rows
            values = walk(tap, trace, logits, columns)
        return {
            method.name: self._explanation(method, values[method.name], pooling, classes, logits.detach(), grid)
            for method in self.methods
        }

    def _request(self) -> Request:
        methods, num_blocks = self.methods, len(self.anatomy.blocks)
        return Request(
            first_block=min(method.first_block(num_blocks) for method in methods),
            gradient=any(method.uses_gradient for method in methods),
            input_gradient=any(method.uses_input_gradient for method in methods),
            keep_reads=any(method.uses_reads for method in methods),
            branches=any(method.uses_branches for method in methods),
            observers=tuple(method for method in methods if method.observes),
        )

    def _walk(self, tap: Tap, trace: Trace, logits: Tensor, columns: Tensor) -> dict[str, Tensor]:
        """Values (B, K, R, n) of every method, sharing one backward for each class and explained score."""
        num_targets = columns.shape[1]
        values: dict[str, list[Tensor]] = {method.name: [] for method in self.methods}
        by_score: dict[str, list[Method]] = {}
        for method in self.methods:
            if method.uses_gradient:
                by_score.setdefault(method.explained_score, []).append(method)
                continue
            for k in range(num_targets if method.uses_target else 1):
                values[method.name].append(walk_without_gradient(trace, method, columns[:, k]))
        passes = [(score, k) for score in by_score for k in range(num_targets)]
        for number, (score, k) in enumerate(passes):
            target = columns[:, k]
            scalars = _scalars(logits, target, score)
            last = number == len(passes) - 1
            for method, result in zip(
                by_score[score], walk_with_gradient(tap, trace, by_score[score], scalars, target, last=last), strict=True
            ):
                values[method.name].append(result)
        return {
            name: torch.stack(results if len(results) == num_targets else results * num_targets, 1)
            for name, results in values.items()
        }

    def _walk_all_rows(self, tap: Tap, trace: Trace, logits: Tensor, columns: Tensor) -> dict[str, Tensor]:
        """The whole product (B, K, n, n) of every method, from the first block up."""
        num_targets = columns.shape[1]
        values: dict[str, list[Tensor]] = {
            method.name: [contribution_of_all_rows(trace, method, {})] * num_targets
            for method in self.methods
            if not method.uses_gradient
        }
        scores = dict.fromkeys(method.explained_score for method in self.methods if method.uses_gradient)
        passes = [(score, k) for score in scores for k in range(num_targets)]
        for number, (score, k) in enumerate(passes):
            scalars = _scalars(logits, columns[:, k], score)
            grad_out = recorded_gradients(tap, scalars, last=number == len(passes) - 1)
            for method in self.methods:
                if method.uses_gradient and method.explained_score == score:
                    values.setdefault(method.name, []).append(contribution_of_all_rows(trace, method, grad_out))
        return {name: torch.stack(results, 1) for name, results in values.items()}

    def _dense(self, images: Tensor, target: Any) -> dict[str, Explanation]:
        from .testing.dense import DenseReference  # loads only where it is asked for

        reference = DenseReference(self.anatomy.model, images)
        logits = self._check_logits(reference.logits, len(images))
        classes = resolve_target(target, logits)
        columns = classes.unsqueeze(1) if classes.dim() == 1 else classes
        grid = self.anatomy.grid(*images.shape[-2:])
        explanations = {}
        for method in self.methods:
            explained = [reference.explain(method.name, column, rows=self.rows, **asdict(method)) for column in columns.unbind(1)]
            values = torch.stack(explained, 1)
            if self.rows is None:
                values = values.unsqueeze(2)
            pooling = reference.pooling.unsqueeze(1)
            explanations[method.name] = self._explanation(method, values, pooling, classes, logits.to(images.dtype), grid)
        return explanations

    def _explanation(
        self, method: Method, values: Tensor, pooling: Tensor, classes: Tensor, logits: Tensor, grid: tuple[int, int]
    ) -> Explanation:
        """Split values (B, K, R, n) into prefix tokens and the patch grid."""
        contribution = None
        if self.rows == "all":
            contribution = values.float()
            row = (pooling.unsqueeze(1) @ values).squeeze(2)  # (B, K, n)
        else:
            row = values.squeeze(2)
        if classes.dim() == 1:
            row = row[:, 0]
            contribution = None if contribution is None else contribution[:, 0]
        prefix = self.anatomy.num_prefix_tokens
        return Explanation(
            method=method.name,
            options=asdict(method),
            maps=row[..., prefix:].unflatten(-1, grid).float().contiguous(),
            target=classes,
            logits=logits,
            prefix_values=row[..., :prefix].float().contiguous(),
            contribution=contribution,
        )


def explain(
    model: nn.Module,
    images: Tensor,
    target: Any = None,
    method: str | Method | Iterable[str | Method] = "tokentm",
    backend: str = "auto",
    *,
    rows: str | None = None,
    **options: Any,
) -> Explanation | dict[str, Explanation]:
    """Explain a batch of images in one call; see ``Explainer`` and ``Explainer.attribute``."""
    return Explainer(model, method, backend, rows=rows, **options).attribute(images, target)


def _scalars(logits: Tensor, target: Tensor, score: str) -> Tensor:
    """The explained scalar of each image, (B,): the class's logit or its probability."""
    scores = logits.to(accumulation_dtype(logits.dtype))
    scores = scores.softmax(-1) if score == "probability" else scores
    return scores.gather(1, target.unsqueeze(1)).squeeze(1)


__all__ = ["BACKENDS", "Explainer", "explain"]
