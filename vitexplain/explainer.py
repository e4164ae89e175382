"""The public API: ``Explainer(model, method=…).attribute(images, target=…)``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import chain
from typing import Any, Generic, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar  # with a default, as typing's has from Python 3.13 on

from .capture import expect, expect_finite, looking_once, without_looking
from .compiled import check_mode
from .cuda_graphs import CannotBeCapturedError, GraphCache
from .errors import InputError, UnsupportedModelError
from .explanation import TENSORS, Explanation
from .kernels import BACKENDS as KERNEL_BACKENDS
from .kernels import choose_backend
from .kernels.dispatch import accumulation_dtype
from .methods import CaptumMethod, ChainMethod, Method, MethodChoice, SeveralMethods, build_methods
from .models import Anatomy, read_anatomy, unwrap
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
from .targets import Target, resolve_target, targets_of

BACKENDS = (*KERNEL_BACKENDS, "dense")
ROWS = (None, "all", "by_block")
REPLAYED_ON = "cuda"

Score = Callable[[Tensor], Tensor]


# What ``attribute`` gives: one explanation where one method was asked for, else one for each.
Found = TypeVar(
    "Found",
    bound=Explanation | dict[str, Explanation],
    default=Explanation | dict[str, Explanation],
    covariant=True,
)


class Explainer(Generic[Found]):
    """Explains a model's predictions, without ever storing an attention map.

    Args:
        model: a model of a known family (timm's and torchvision's Vision Transformers, transformers' image models and BERT-like
            text classifiers; possibly compiled or wrapped for data parallelism), or any other with ``anatomy``. It is left as it
            was after each call, also after an exception, and is run in evaluation mode.
        method: a name or ``Method``, or several, which then share one forward and backward. ``vitexplain.methods()`` lists them.
            A mapping of labels to them can hold one method several times with different options.
        backend: ``"auto"`` (Triton on CUDA, tiled torch elsewhere), ``"triton"``, ``"torch"``, or ``"dense"``, the float64
            reference that stores every map. An explicit choice is honoured or refused, never replaced.
        rows: ``"all"`` also returns the whole n × n map of contributions of chain methods; ``"by_block"`` the map as it stands
            after each block of the walk from the last one down, of methods that read more than the last block.
        score: what is explained instead of a class logit: a differentiable function of the model's output (B, C) to (B,), or to
            (B, K) for K explanations an image that share the forward. See ``margin`` and ``similarity``. A string is the option
            of that name of the methods that have one.
        anatomy: a description of the model, for one of no known family.
        compile: run the model's blocks as ``torch.compile`` makes them: True, or one of its modes, ``"default"`` or
            ``"max-autotune-no-cudagraphs"``. New shapes of input take the compiler's time. The last block, where it is run on
            the head's rows alone, and relevance passes (LRP and its kin), which have rules in the place of what would be
            compiled, run as they are.
        checkpoint: keep the input alone of every block but the last, and run the block again when the gradient reaches it: a
            second forward for each target, for a fraction of the memory. Methods without a gradient in the same call keep
            query, key and value of every block.
        cuda_graph: capture the whole explanation in a CUDA graph for each shape of input and form of target, and replay it from
            then on; the four last used are kept, and with them the memory that they work in. Weights may change in between;
            what the model's code does, hooks among it, may not.
        **options: the methods' options; each goes to every named method that has it.

    Raises:
        UnsupportedModelError: the model, or a method on this model, cannot be explained; the message says why.
        UnknownNameError: unknown method or option.
        InputError: another argument that does not fit.
    """

    @overload
    def __init__(
        self: Explainer[Explanation],
        model: nn.Module,
        method: str | Method = "tokentm",
        backend: str = "auto",
        *,
        rows: str | None = None,
        score: Score | str | None = None,
        anatomy: Anatomy | None = None,
        compile: bool | str = False,
        checkpoint: bool = False,
        cuda_graph: bool = False,
        **options: Any,
    ) -> None: ...
    @overload
    def __init__(
        self: Explainer[dict[str, Explanation]],
        model: nn.Module,
        method: SeveralMethods,
        backend: str = "auto",
        *,
        rows: str | None = None,
        score: Score | str | None = None,
        anatomy: Anatomy | None = None,
        compile: bool | str = False,
        checkpoint: bool = False,
        cuda_graph: bool = False,
        **options: Any,
    ) -> None: ...
    def __init__(
        self,
        model: nn.Module,
        method: MethodChoice = "tokentm",
        backend: str = "auto",
        *,
        rows: str | None = None,
        score: Score | str | None = None,
        anatomy: Anatomy | None = None,
        compile: bool | str = False,
        checkpoint: bool = False,
        cuda_graph: bool = False,
        **options: Any,
    ) -> None:
        if backend not in BACKENDS:
            raise InputError(f"backend: expected one of {', '.join(BACKENDS)}, received {backend!r}")
        if rows not in ROWS:
            raise InputError(f"rows: expected None, 'all' or 'by_block', received {rows!r}")
        if score is not None and not callable(score):
            options["score"] = score
        self.score: Score | None = score if callable(score) else None
        self.labels = build_methods(method, options)
        self.methods = list(dict.fromkeys(self.labels.values()))
        self.backend = backend
        self.rows = rows
        self.compile_mode, self.checkpoint = check_mode(compile), _flag("checkpoint", checkpoint)
        self.anatomy = read_anatomy(model) if anatomy is None else _described(model, anatomy)
        self._several = not isinstance(method, str | Method)
        self._check_methods()
        self._check_switches(cuda_graph)
        self._graphs = GraphCache() if cuda_graph else None

    def attribute(self, inputs: Tensor | Mapping[str, Tensor], target: Any = None, *, check_values: bool = True) -> Found:
        """Explain a batch of images, or of texts.

        Args:
            inputs: images (B, c, h, w), as the model takes them: normalised, in the model's dtype, on its device; for a model of
                text what its tokenizer returns, at least ``input_ids`` (B, n), with ``attention_mask`` where there is padding.
            target: class to explain: None for the predicted one, an int, a list or tensor (B,), or (B, K) for several
                classes an image, which share the forward; ``"top3"`` for the three with the largest logits, ``"top1"`` with an
                axis of one. None where a ``score`` says what is explained.
            check_values: refuse images, logits and classes that are not finite or out of range; a GPU is waited for once, at
                the end. Without it never; what is not finite shows in the maps, a class out of range stands for the nearest one,
                and a target is None, ``"topK"``, or a tensor on the device.

        A whole call on images can also be captured in a CUDA graph of the caller's, after one that was not; nothing is then
        checked that needs a look at values.

        Returns:
            One ``Explanation``, or a dict by method name (or label) where several methods were asked for.

        Raises:
            InputError: inputs or target that do not fit.
            UnsupportedModelError: the running model does something that cannot be explained.
        """
        with looking_once() if check_values else without_looking():
            inputs = self._check_tokens(inputs) if self.anatomy.is_text else self._check_images(inputs)
            explanations = self._explain(inputs, target)
        # __init__'s two forms say which of them it is
        return cast(Found, explanations if self._several else next(iter(explanations.values())))

    # -- checks ------------------------------------------------------------------------------------------------------

    def _check_methods(self) -> None:
        name = type(self.anatomy.model).__name__
        if not self.anatomy.has_classes and self.score is None:
            raise UnsupportedModelError(
                f"{name} has no classifier: expected a model with logits, or score= to say what of its embedding is explained"
            )
        if any(parameter.is_inference() for parameter in self.anatomy.model.parameters()):
            raise UnsupportedModelError(
                f"{name} was built in inference mode, which leaves no gradient: expected one built outside it"
            )
        for method in self.methods:
            method.check(self.anatomy)
            if self.rows == "all" and not isinstance(method, ChainMethod):
                raise InputError(f"rows='all': expected methods that chain update maps, received {method.name!r}")
            if self.rows == "by_block" and not method.grows(len(self.anatomy.blocks)):
                raise InputError(
                    f"rows='by_block': expected methods whose map of patches or tokens grows over several blocks, received "
                    f"{method.name!r}"
                )
            if self.score is not None and method.needs_class:
                raise InputError(f"score: {method.name!r} with these options explains a class's probability, received a function")

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
        expect_finite(images, "images: expected finite values, received NaN or infinity")
        self.check_backend(images.device)
        return images.detach()

    def _check_tokens(self, inputs: Any) -> dict[str, Tensor]:
        if not isinstance(inputs, Mapping) or not isinstance(inputs.get("input_ids"), Tensor):
            raise InputError(
                f"inputs: expected a mapping with input_ids (B, n), as a tokenizer returns it, received {type(inputs).__name__}"
            )
        inputs, ids = dict(inputs), inputs["input_ids"]
        if ids.dim() != 2 or 0 in ids.shape or ids.dtype not in (torch.int64, torch.int32):
            raise InputError(f"input_ids: expected integers (B, n) with B ≥ 1, received {ids.dtype} {tuple(ids.shape)}")
        device = next(self.anatomy.model.parameters()).device
        for name, tensor in inputs.items():
            if not isinstance(tensor, Tensor) or tensor.shape[:2] != ids.shape:
                received = tuple(tensor.shape) if isinstance(tensor, Tensor) else type(tensor).__name__
                raise InputError(
                    f"{name}: expected a tensor of shape {tuple(ids.shape)} (that of input_ids), received {received}"
                )
            if tensor.device != device:
                raise InputError(f"{name}: expected device {device} (the model's), received {tensor.device}")
        self.anatomy.check_tokens(ids)
        mask = self.anatomy.token_mask(inputs) if self.anatomy.token_mask is not None else None
        if mask is not None:
            expect(
                mask[:, 0].all,
                device,
                lambda: InputError(
                    "attention_mask: expected every text's first token, which the head reads, to take part; one does not"
                ),
            )
        self.check_backend(device)
        return inputs

    def check_backend(self, device: torch.device) -> None:
        """Refuse a backend that cannot run on a device before any work is done.

        Raises:
            InputError: it cannot.
        """
        if self.backend != "dense":
            try:
                choose_backend(self.backend, device)
            except RuntimeError as error:
                raise InputError(str(error)) from error

    def _check_output(self, output: Any, batch: int) -> Tensor:
        expected = (batch, self.anatomy.num_classes)
        if not isinstance(output, Tensor) or tuple(output.shape) != expected:
            received = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise UnsupportedModelError(f"model output: expected logits {expected}, received {received}")
        _expect_finite_logits(output)
        return output

    def _check_switches(self, cuda_graph: Any) -> None:
        """What is asked for is done, or refused."""
        switches = {"compile": self.compile_mode, "checkpoint": self.checkpoint, "cuda_graph": _flag("cuda_graph", cuda_graph)}
        foreign = [method.name for method in self.methods if isinstance(method, CaptumMethod)]
        for name in (name for name, value in switches.items() if value):
            if self.backend == "dense" or foreign:
                received = f"methods by captum ({', '.join(foreign)})" if foreign else "backend 'dense'"
                raise InputError(f"{name}: expected this library's own methods and kernels, received {received}")
        if self.rows == "by_block" and self.backend == "dense":
            raise InputError("rows='by_block': expected a backend of this library's own kernels, received 'dense'")
        if self.compile_mode and all(method.rules is not None and not method.uses_gradient for method in self.methods):
            named = ", ".join(method.name for method in self.methods)
            raise InputError(f"compile: expected a method without rules of its own for a relevance pass, received {named}")
        if cuda_graph and self.anatomy.is_text:
            raise InputError("cuda_graph: expected a model of images, received one of text, whose work depends on its padding")

    # -- replayed ----------------------------------------------------------------------------------------------------

    def _replayed(self, graphs: GraphCache, images: Tensor, target: Any) -> dict[str, Explanation]:
        """``_matrix_free`` from a graph."""
        if images.device.type != REPLAYED_ON:
            raise InputError(f"cuda_graph: expected a model on a GPU, received one on {images.device}")
        classes = None
        if target is not None and not isinstance(target, str) and self.score is None:
            classes = resolve_target(target, images.new_empty(len(images), self.anatomy.num_classes))
            target = None

        def call(images: Tensor, classes: Tensor | None) -> dict[str, Tensor]:
            with without_looking():
                found = self._matrix_free(images, target if classes is None else classes)
            return {f"{label}/{name}": tensor for label, one in found.items() for name, tensor in one.tensors().items()}

        autocast = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        model = self.anatomy.model
        places = tuple(tensor.data_ptr() for tensor in chain(model.parameters(), model.buffers()))
        precision = torch.are_deterministic_algorithms_enabled(), torch.backends.cuda.matmul.fp32_precision
        form = target, None if classes is None else classes.shape
        try:
            assert self._graphs is not None, "only with cuda_graph"
            with torch.inference_mode(False):
                key = (images.shape, images.dtype, form, autocast, precision, places)
                tensors = graphs(key, call, (images, classes), images.device)
        except CannotBeCapturedError as error:
            raise UnsupportedModelError(f"cuda_graph: {type(self.anatomy.model).__name__} cannot be captured: {error}") from error
        explanations = {}
        for label, method in self.labels.items():
            found = {name: tensors[f"{label}/{name}"] for name in TENSORS if f"{label}/{name}" in tensors}
            explanations[label] = Explanation(method.name, asdict(method), target=found.pop("target", None), **found)
        _expect_finite_logits(next(iter(explanations.values())).logits)
        return explanations

    # -- the two ways ------------------------------------------------------------------------------------------------

    def _explain(self, inputs: Any, target: Any) -> dict[str, Explanation]:
        if self.backend == "dense":
            return self._dense(inputs, target)
        return self._matrix_free(inputs, target) if self._graphs is None else self._replayed(self._graphs, inputs, target)

    def _matrix_free(self, inputs: Any, target: Any) -> dict[str, Explanation]:
        with torch.inference_mode(False):
            if isinstance(inputs, Tensor):
                inputs = inputs.clone() if inputs.is_inference() else inputs
            run = _Run(self, inputs, target)
            run.walk_beside_the_model()
            run.walk_with_rules()
            run.run_captum()
        return {label: self._explanation(method, run) for label, method in self.labels.items()}

    def _dense(self, inputs: Any, target: Any) -> dict[str, Explanation]:
        from .testing.dense import DenseReference  # loads only where it is asked for

        for method in self.methods:
            if not hasattr(DenseReference, f"_{method.name}"):
                raise InputError(
                    f"backend 'dense': there is no reference of {method.name!r}, whose values depend on random numbers"
                )
        try:
            reference = DenseReference(self.anatomy.model, inputs)
        except NotImplementedError as error:
            raise UnsupportedModelError(f"backend 'dense': {error}") from error
        run = _Run(self, inputs, target)
        run.set_output(reference.logits)
        run.pooling = reference.pooling.unsqueeze(1)
        for method in self.methods:
            options = {name: value for name, value in asdict(method).items() if name != "precision"}
            for item in run.targets:
                values = reference.explain(method.name, item.value, rows=self.rows, **options)
                run.add(method, values if self.rows == "all" else values.unsqueeze(1))
        run.output = reference.logits.to(next(self.anatomy.model.parameters()).dtype)
        return {label: self._explanation(method, run) for label, method in self.labels.items()}

    def _explanation(self, method: Method, run: _Run) -> Explanation:
        """Split values (B, K, R, n) into prefix tokens and the patch grid; pixels (B, K, 1, h, w) are a map already.

        One row of the R is the map, unless there is one for each token or, of what the walk found, for each block.
        """
        assert run.output is not None, "every method has run the model"
        values = torch.stack(run.values[method], 1).float()
        if len(run.targets) > values.shape[1]:  # the same for every target
            values = values.expand(-1, len(run.targets), *values.shape[2:])
        found: dict[str, Tensor] = {}
        if method.resolution == "pixels":
            found["maps"], found["prefix_values"] = values.squeeze(2), values.new_empty(*values.shape[:2], 0)
        else:
            row = values[:, :, 0]
            if self.rows == "all":
                assert run.pooling is not None, "found by the walk"
                assert run.pooling is not None, "read before the first walk"
                found["contribution"], row = values, (run.pooling.float().unsqueeze(1) @ values).squeeze(2)  # (B, K, n)
            found["maps"], found["prefix_values"] = run.patches(row), row[..., : self.anatomy.num_prefix_tokens]
            if self.rows == "by_block":
                found["by_block"] = run.patches(values)
        if not run.has_target_axis:
            found = {name: tensor[:, 0] for name, tensor in found.items()}
        found = {name: tensor.contiguous() for name, tensor in found.items()}
        assert run.output is not None, "found by the walk"
        return Explanation(method.name, asdict(method), target=run.classes, logits=run.output.detach(), **found)


class _Run:
    """One call of ``attribute``: its inputs, what is explained of them, and the values found so far.

    Attributes:
        values: by method, one (B, R, n) or (B, 1, h, w) a target, or a single one where it is the same for all; R is 1, or the
            number of tokens or of blocks where a row for each was asked for.
        output: the model's.
        classes, targets, has_target_axis: see ``targets_of``.
        pooling: the head's pooling weights (B, 1, n).
        grid: of patches; None for text.
    """

    def __init__(self, explainer: Explainer, inputs: Any, target: Any) -> None:
        self.explainer, self.inputs, self.target = explainer, inputs, target
        self.anatomy, self.methods, self.rows = explainer.anatomy, explainer.methods, explainer.rows
        self.by_block = self.rows == "by_block"
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
        """Take a forward's output; the first one decides what is explained."""
        output = self.explainer._check_output(output, self.batch)
        if self.output is None:
            self.output = output.detach()
            self.classes, self.targets, self.has_target_axis = targets_of(self.target, output, self.explainer.score)
        return output

    # -- beside the model's own backward -----------------------------------------------------------------------------

    def walk_beside_the_model(self) -> None:
        """The methods that need nothing but the model's forward and its gradient, in one pass of each."""
        plain = [method for method in self.methods if method.rules is None and not isinstance(method, CaptumMethod)]
        recorded = [method for method in self.methods if method.rules is not None and method.uses_gradient]
        if not plain and not recorded:
            return
        request = self._request(plain, recorded)
        keep_attention = self.rows == "all" or any(not method.uses_gradient for method in plain)
        running = Running(self.explainer.compile_mode, self.explainer.checkpoint, keep_attention)
        with Tap(self.anatomy, request, self.explainer.backend, running) as tap:
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
        chains = [method for method in methods if isinstance(method, ChainMethod)]  # no other is let in with all rows
        for method in chains:
            if not method.uses_gradient:
                self.add(method, contribution_of_all_rows(trace, method, {}))
        scores = dict.fromkeys(method.explained_score for method in chains if method.uses_gradient)
        passes = [(score, target) for score in scores for target in self.targets]
        for number, (score, target) in enumerate(passes):
            scalars = _scalars(output, target, score)
            grad_out: dict[int, Tensor] = {}
            walk_with_gradient(tap, trace, [], scalars, target, last=number == len(passes) - 1, recorded=grad_out)
            for method in chains:
                if method.uses_gradient and method.explained_score == score:
                    self.add(method, contribution_of_all_rows(trace, method, grad_out))

    # -- with rules of relevance -------------------------------------------------------------------------------------

    def walk_with_rules(self) -> None:
        """The methods that send relevance back: a forward under each set of rules, and a pass for each target."""
        device = next(self.anatomy.model.parameters()).device
        backend = choose_backend(self.explainer.backend, device)
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
                backend=self.explainer.backend,
                dtype=dtype,
                checkpoint=self.explainer.checkpoint,
            ) as tap:
                output = self.set_output(tap.forward(self.inputs))
                assert self.output is not None, "set a line before"
                assert self.output is not None, "just set, if not before"
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


def _flag(name: str, value: Any) -> bool:
    """A switch, which is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: expected True or False, received {value!r}")
    return value


def _expect_finite_logits(output: Tensor) -> None:
    expect_finite(output, f"model output: expected finite logits, received NaN or infinity (model in {output.dtype})")


def _of_label(tensors: Mapping[str, Tensor], label: str) -> dict[str, Any]:
    """One explanation's tensors by the attributes' names, None where it has none."""
    return {name: tensors.get(f"{label}/{name}") for name in TENSORS}


def _described(model: nn.Module, anatomy: Anatomy) -> Anatomy:
    """A user's description of a model, where it is one of this model."""
    if not isinstance(anatomy, Anatomy):
        raise InputError(f"anatomy: expected a vitexplain.Anatomy, received {type(anatomy).__name__}")
    if unwrap(model) is not unwrap(anatomy.model):
        raise InputError(
            f"anatomy: expected a description of the model that is to be explained ({type(model).__name__}), "
            f"received one of another {type(anatomy.model).__name__}"
        )
    if not anatomy.blocks:
        raise InputError("anatomy: expected at least one block, received none")
    return anatomy


@overload
def explain(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    target: Any = None,
    method: str | Method = "tokentm",
    backend: str = "auto",
    *,
    rows: str | None = None,
    score: Score | str | None = None,
    anatomy: Anatomy | None = None,
    **options: Any,
) -> Explanation: ...
@overload
def explain(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    target: Any = None,
    method: SeveralMethods = ...,
    backend: str = "auto",
    *,
    rows: str | None = None,
    score: Score | str | None = None,
    anatomy: Anatomy | None = None,
    **options: Any,
) -> dict[str, Explanation]: ...
def explain(
    model: nn.Module,
    inputs: Tensor | Mapping[str, Tensor],
    target: Any = None,
    method: MethodChoice = "tokentm",
    backend: str = "auto",
    *,
    rows: str | None = None,
    score: Score | str | None = None,
    anatomy: Anatomy | None = None,
    **options: Any,
) -> Explanation | dict[str, Explanation]:
    """Explain a batch of images or texts in one call; see ``Explainer`` and ``Explainer.attribute``."""
    return Explainer(model, method, backend, rows=rows, score=score, anatomy=anatomy, **options).attribute(inputs, target)


def _scalars(output: Tensor, target: Target, score: str) -> Tensor:
    """The explained scalar of each image, (B,): the target's value, or its class's probability."""
    output = output.to(accumulation_dtype(output.dtype))
    return target.probability(output) if score == "probability" else target.value(output)


__all__ = ["BACKENDS", "Explainer", "explain"]
