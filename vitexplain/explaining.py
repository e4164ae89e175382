"""One call of ``Explainer.attribute``: the passes through the model that the methods share, and what is made of their values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .errors import UnsupportedModelError
from .explanation import Explanation
from .kernels import choose_backend
from .kernels.dispatch import accumulation_dtype
from .methods import CaptumMethod, ChainMethod, Method
from .models import Anatomy
from .relevance import (
    Trace,
    contribution_of_all_rows,
    start_rows,
    walk_with_gradient,
    walk_with_relevance,
    walk_without_gradient,
)
from .relevance_tap import RelevanceTap
from .tap import Request, Running, Tap, frozen
from .targets import Score, Target, targets_of
from .value_checks import expect_finite


class Run:
    """One call of ``attribute``: its inputs, what is explained of them, and the values found so far.

    Args:
        inputs: images (B, c, h, w) or a mapping of text inputs, checked.
        target: as ``attribute`` takes it.
        anatomy: of the model.
        methods: each one once.
        backend: for kernels.
        rows: None, ``"all"`` or ``"by_block"``.
        score: explained in the place of a class.
        running: how the blocks are run; which attentions are kept is found here.

    Attributes:
        values: by method, one (B, R, n) or (B, 1, h, w) a target, or a single one where it is the same for all; R is 1, or the
            number of tokens or of blocks where a row for each was asked for.
        output: the model's.
        classes, targets, has_target_axis: see ``targets_of``.
        pooling: the head's pooling weights (B, 1, n).
        grid: of patches; None for text.
    """

    def __init__(
        self,
        inputs: Any,
        target: Any,
        *,
        anatomy: Anatomy,
        methods: Sequence[Method],
        backend: str,
        rows: str | None,
        score: Score | None,
        running: Running,
    ) -> None:
        self.inputs, self.target, self.score = inputs, target, score
        self.anatomy, self.methods, self.backend, self.running = anatomy, methods, backend, running
        self.rows, self.by_block = rows, rows == "by_block"
        self.values: dict[Method, list[Tensor]] = {}
        self.output: Tensor | None = None
        self.classes: Tensor | None = None
        self.targets: list[Target] = []
        self.has_target_axis = False
        self.pooling: Tensor | None = None
        self.grad_out: list[dict[int, Tensor]] = []
        self.grid: tuple[int, int] | None = None
        if self.anatomy.grid is None:
            self.batch, num_patches = inputs["input_ids"].shape
        else:
            self.grid = self.anatomy.grid(*inputs.shape[-2:])
            self.batch, num_patches = len(inputs), self.grid[0] * self.grid[1]
        self.num_tokens = self.anatomy.num_prefix_tokens + num_patches

    def add(self, method: Method, values: Tensor) -> None:
        """Values of the next target."""
        self.values.setdefault(method, []).append(values)

    def patches(self, values: Tensor) -> Tensor:
        """Values (…, n) of all tokens without those before the patches: (…, gh, gw), or (…, n) for text."""
        patches = values[..., self.anatomy.num_prefix_tokens :]
        return patches if self.grid is None else patches.unflatten(-1, self.grid)

    def set_output(self, output: Any) -> Tensor:
        """Take a forward's output; the first one decides what is explained.

        Raises:
            UnsupportedModelError: it is no tensor of logits.
            InputError: target or score do not fit it, or a value is not finite.
        """
        self._check_output(output)
        if self.output is None:
            self.output = output.detach()
            self.classes, self.targets, self.has_target_axis = targets_of(self.target, output, self.score)
        return output

    def explanation(self, method: Method) -> Explanation:
        """What was found of a method, when every pass is done.

        Values (B, K, R, n) are split into prefix tokens and the patch grid; pixels (B, K, 1, h, w) are a map already. One row of
        the R is the map, unless there is one for each token or, of what the walk found, for each block.
        """
        values = torch.stack(self.values[method], 1).float()
        if len(self.targets) > values.shape[1]:  # the same for every target
            values = values.expand(-1, len(self.targets), *values.shape[2:])
        found: dict[str, Tensor] = {}
        if method.resolution == "pixels":
            found["maps"], found["prefix_values"] = values.squeeze(2), values.new_empty(*values.shape[:2], 0)
        else:
            row = values[:, :, 0]
            if self.rows == "all":
                assert self.pooling is not None, "found by the walk"
                found["contribution"], row = values, (self.pooling.float().unsqueeze(1) @ values).squeeze(2)  # (B, K, n)
            found["maps"], found["prefix_values"] = self.patches(row), row[..., : self.anatomy.num_prefix_tokens]
            if self.rows == "by_block":
                found["by_block"] = self.patches(values)
        if not self.has_target_axis:
            found = {name: tensor[:, 0] for name, tensor in found.items()}
        found = {name: tensor.contiguous() for name, tensor in found.items()}
        assert self.output is not None, "every method has run the model"
        return Explanation(method.name, asdict(method), target=self.classes, logits=self.output.detach(), **found)

    def _check_output(self, output: Any) -> None:
        expected = (self.batch, self.anatomy.num_classes)
        if not isinstance(output, Tensor) or tuple(output.shape) != expected:
            received = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UnsupportedModelError(f"model output: expected logits {expected}, received {received}")
        expect_finite_logits(output)

    # -- beside the model's own backward -----------------------------------------------------------------------------

    def walk_beside_the_model(self) -> None:
        """The methods that need nothing but the model's forward and its gradient, in one pass of each."""
        plain = [method for method in self.methods if method.rules is None and not isinstance(method, CaptumMethod)]
        recorded = [method for method in self.methods if method.rules is not None and method.uses_gradient]
        if not plain and not recorded:
            return
        request = self._request(plain, recorded)
        keep_attention = self.rows == "all" or any(not method.uses_gradient for method in plain)
        running = replace(self.running, keep_attention=keep_attention)
        with Tap(self.anatomy, request, self.backend, running) as tap:
            output = self.set_output(tap.forward(self.inputs))
            trace = self._trace(tap)
            if self.rows == "all":
                chains = [method for method in plain if isinstance(method, ChainMethod)]  # others are refused
                self._walk_all_rows(chains, tap, trace, output)
            else:
                self._walk(plain, tap, trace, output, record=bool(recorded))

    def _request(self, plain: list[Method], recorded: list[Method]) -> Request:
        num_blocks = len(self.anatomy.blocks)
        return Request(
            first_block=min(method.first_block(num_blocks) for method in plain + recorded),
            gradient=bool(recorded) or any(method.uses_gradient for method in plain),
            input_gradient=any(method.uses_input_gradient for method in plain),
            attention_input_gradient=any(method.uses_attention_input_gradient for method in plain),
            keep_reads=any(method.uses_reads for method in plain),
            head_rows=self.rows != "all" and all(method.reads_head_rows for method in plain + recorded),
            branches=any(method.uses_branches for method in plain),
            observers=tuple(method for method in plain if method.observes),
        )

    def _trace(self, tap: Tap) -> Trace:
        last = tap.blocks[-1].key
        pooling, support = start_rows(tap, self.num_tokens, self.batch, last.dtype, last.device)
        self.pooling = pooling if self.pooling is None else self.pooling
        if self.rows == "all":
            identity = torch.eye(self.num_tokens, dtype=pooling.dtype, device=pooling.device).expand(self.batch, -1, -1)
            return Trace(self.anatomy, tap.blocks, identity, self.num_tokens)
        return Trace(self.anatomy, tap.blocks, pooling, support)

    def _walk(self, methods: list[Method], tap: Tap, trace: Trace, output: Tensor, *, record: bool) -> None:
        """Values (B, 1, n), or (B, L, n) by block, of every method, sharing one backward for each target and explained score.

        ``record``: the gradients of the logits are kept for methods that read them beside relevance.
        """
        by_score: dict[str, list[Method]] = {"logit": []} if record else {}
        for method in methods:
            if method.uses_gradient:
                by_score.setdefault(method.explained_score, []).append(method)
                continue
            for target in self.targets if method.uses_target else self.targets[:1]:
                self.add(method, walk_without_gradient(trace, method, target, by_block=self.by_block))
        passes = [(score, target) for score in by_score for target in self.targets]
        for number, (score, target) in enumerate(passes):
            scalars = _scalars(output, target, score)
            last = number == len(passes) - 1
            recorded: dict[int, Tensor] | None = {} if record and score == "logit" else None
            values = walk_with_gradient(
                tap, trace, by_score[score], scalars, target, last=last, recorded=recorded, by_block=self.by_block
            )
            if recorded is not None:
                self.grad_out.append(recorded)
            for method, value in zip(by_score[score], values, strict=True):
                self.add(method, value)

    def _walk_all_rows(self, methods: list[ChainMethod], tap: Tap, trace: Trace, output: Tensor) -> None:
        """The whole product (B, n, n) of every method, from the first block up."""
        for method in methods:
            if not method.uses_gradient:
                self.add(method, contribution_of_all_rows(trace, method, {}))
        scores = dict.fromkeys(method.explained_score for method in methods if method.uses_gradient)
        passes = [(score, target) for score in scores for target in self.targets]
        for number, (score, target) in enumerate(passes):
            scalars = _scalars(output, target, score)
            grad_out: dict[int, Tensor] = {}
            walk_with_gradient(tap, trace, [], scalars, target, last=number == len(passes) - 1, recorded=grad_out)
            for method in methods:
                if method.uses_gradient and method.explained_score == score:
                    self.add(method, contribution_of_all_rows(trace, method, grad_out))

    # -- with rules of relevance -------------------------------------------------------------------------------------

    def walk_with_rules(self) -> None:
        """The methods that send relevance back: a forward under each set of rules, and a pass for each target."""
        device = next(self.anatomy.model.parameters()).device
        backend = choose_backend(self.backend, device)
        by_rules: dict[tuple[str, torch.dtype], list[Method]] = {}
        for method in self.methods:
            if method.rules is not None:
                by_rules.setdefault((method.rules, method.relevance_dtype(backend)), []).append(method)
        for (rules, dtype), methods in by_rules.items():
            first_block = min(method.first_block(len(self.anatomy.blocks)) for method in methods)
            to_inputs = any(method.to_inputs for method in methods)
            with RelevanceTap(
                self.anatomy,
                rules,
                first_block=first_block,
                to_inputs=to_inputs,
                backend=self.backend,
                dtype=dtype,
                checkpoint=self.running.checkpoint,
            ) as tap:
                output = self.set_output(tap.forward(self.inputs))
                assert self.output is not None, "set a line before"
                self.output = self.output.to(next(self.anatomy.model.parameters()).dtype)
                trace = self._trace(tap)
                for number, target in enumerate(self.targets):
                    last = number == len(self.targets) - 1
                    grad_out = self.grad_out[number] if self.grad_out else {}
                    values = walk_with_relevance(tap, trace, methods, output, target, grad_out, last=last, by_block=self.by_block)
                    for method, value in zip(methods, values, strict=True):
                        self.add(method, value)

    # -- by captum ---------------------------------------------------------------------------------------------------

    def run_captum(self) -> None:
        """The adapters, which run the model as often as they like."""
        methods = [method for method in self.methods if isinstance(method, CaptumMethod)]
        if not methods:
            return
        with frozen(self.anatomy):
            for method in sorted(methods, key=lambda method: not method.one_forward):
                if self.output is None and not method.one_forward:
                    with torch.no_grad():
                        self.set_output(self.anatomy.run(self.inputs))
                self.add(method, method.values(self.anatomy, self.inputs, partial(self._target, 0)))
                for number in range(1, len(self.targets)):
                    self.add(method, method.values(self.anatomy, self.inputs, partial(self._target, number)))

    def _target(self, number: int, output: Tensor | None) -> Target:
        """One of the targets; the first output of all decides what they are."""
        if self.output is None:
            self.set_output(output)
        return self.targets[number]


def expect_finite_logits(output: Tensor) -> None:
    """Refuse a model's output (B, C) with a value that is NaN or infinite; on a GPU at the end of ``looking_once``.

    Raises:
        InputError: there is one.
    """
    expect_finite(output, f"model output: expected finite logits, received NaN or infinity (model in {output.dtype})")


def _scalars(output: Tensor, target: Target, score: str) -> Tensor:
    """The explained scalar of each image, (B,): the target's value, or its class's probability."""
    output = output.to(accumulation_dtype(output.dtype))
    return target.probability(output) if score == "probability" else target.value(output)
