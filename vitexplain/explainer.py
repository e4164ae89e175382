"""The public API: ``Explainer(model, method=…).attribute(images, target=…)``."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from itertools import chain
from typing import Any, Generic, cast, overload

import torch
from torch import Tensor, nn
from typing_extensions import TypeVar  # with a default, as typing's has from Python 3.13 on

from .compiled import check_mode
from .cuda_graphs import CannotBeCapturedError, GraphCache
from .errors import InputError, UnsupportedModelError
from .explaining import Run, expect_finite_logits
from .explanation import TENSORS, Explanation
from .kernels import BACKENDS as KERNEL_BACKENDS
from .kernels import choose_backend
from .methods import CaptumMethod, ChainMethod, Method, MethodChoice, SeveralMethods, build_methods
from .models import Anatomy, read_anatomy, unwrap
from .tap import Running
from .targets import Score, resolve_target
from .value_checks import expect, expect_finite, looking_once, without_looking

BACKENDS = (*KERNEL_BACKENDS, "dense")
ROWS = (None, "all", "by_block")
REPLAYED_ON = "cuda"


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
        self.running = Running(check_mode(compile), _flag("checkpoint", checkpoint))
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

    def _check_switches(self, cuda_graph: Any) -> None:
        """What is asked for is done, or refused."""
        running, cuda_graph = self.running, _flag("cuda_graph", cuda_graph)
        switches = {"compile": running.compile_mode, "checkpoint": running.checkpoint, "cuda_graph": cuda_graph}
        foreign = [method.name for method in self.methods if isinstance(method, CaptumMethod)]
        for name in (name for name, value in switches.items() if value):
            if self.backend == "dense" or foreign:
                received = f"methods by captum ({', '.join(foreign)})" if foreign else "backend 'dense'"
                raise InputError(f"{name}: expected this library's own methods and kernels, received {received}")
        if self.rows == "by_block" and self.backend == "dense":
            raise InputError("rows='by_block': expected a backend of this library's own kernels, received 'dense'")
        if running.compile_mode and all(method.rules is not None and not method.uses_gradient for method in self.methods):
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
        expect_finite_logits(next(iter(explanations.values())).logits)
        return explanations

    # -- the two ways ------------------------------------------------------------------------------------------------

    def _explain(self, inputs: Any, target: Any) -> dict[str, Explanation]:
        if self.backend == "dense":
            return self._dense(inputs, target)
        return self._matrix_free(inputs, target) if self._graphs is None else self._replayed(self._graphs, inputs, target)

    def _run(self, inputs: Any, target: Any) -> Run:
        return Run(
            inputs,
            target,
            anatomy=self.anatomy,
            methods=self.methods,
            backend=self.backend,
            rows=self.rows,
            score=self.score,
            running=self.running,
        )

    def _matrix_free(self, inputs: Any, target: Any) -> dict[str, Explanation]:
        with torch.inference_mode(False):
            if isinstance(inputs, Tensor):
                inputs = inputs.clone() if inputs.is_inference() else inputs
            run = self._run(inputs, target)
            run.walk_beside_the_model()
            run.walk_with_rules()
            run.run_captum()
        return {label: run.explanation(method) for label, method in self.labels.items()}

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
        run = self._run(inputs, target)
        run.set_output(reference.logits)
        run.pooling = reference.pooling.unsqueeze(1)
        for method in self.methods:
            options = {name: value for name, value in asdict(method).items() if name != "precision"}
            for item in run.targets:
                values = reference.explain(method.name, item.value, rows=self.rows, **options)
                run.add(method, values if self.rows == "all" else values.unsqueeze(1))
        run.output = reference.logits.to(next(self.anatomy.model.parameters()).dtype)
        return {label: run.explanation(method) for label, method in self.labels.items()}


def _flag(name: str, value: Any) -> bool:
    """A switch, which is true or false."""
    if not isinstance(value, bool):
        raise InputError(f"{name}: expected True or False, received {value!r}")
    return value


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
    compile: bool | str = False,
    checkpoint: bool = False,
    cuda_graph: bool = False,
    check_values: bool = True,
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
    compile: bool | str = False,
    checkpoint: bool = False,
    cuda_graph: bool = False,
    check_values: bool = True,
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
    compile: bool | str = False,
    checkpoint: bool = False,
    cuda_graph: bool = False,
    check_values: bool = True,
    **options: Any,
) -> Explanation | dict[str, Explanation]:
    """Explain a batch of images or texts in one call, without ever storing an attention map.

    For many batches make an ``Explainer`` once: it takes the same arguments, and says more of each.

    Args:
        model: a model of a known family, or any other with ``anatomy``; left as it was after the call, also after an exception.
        inputs: images (B, c, h, w), as the model takes them: normalised, in the model's dtype, on its device; for a model of
            text what its tokenizer returns, at least ``input_ids`` (B, n), with ``attention_mask`` where there is padding.
        target: class to explain: None for the predicted one, an int, a list or tensor (B,), or (B, K) for several classes an
            image, which share the forward; ``"top3"`` for the three with the largest logits. None where a ``score`` says what
            is explained.
        method: a name or ``Method``; or several, or a mapping of labels to them, which then share one forward and backward.
            ``vitexplain.methods()`` lists them.
        backend: ``"auto"``, ``"triton"``, ``"torch"``, or ``"dense"``, the float64 reference that stores every map. An explicit
            choice is honoured or refused, never replaced.
        rows: ``"all"`` also returns the whole n × n map of contributions of chain methods; ``"by_block"`` the map as it stands
            after each block.
        score: what is explained instead of a class logit: a differentiable function of the model's output (B, C) to (B,) or
            (B, K). A string is the option of that name of the methods that have one.
        anatomy: a description of the model, for one of no known family.
        compile: run the model's blocks as ``torch.compile`` makes them: True, or one of its modes.
        checkpoint: keep the input alone of every block but the last, and run it again when the gradient reaches it: a second
            forward for a fraction of the memory.
        cuda_graph: capture the explanation in a CUDA graph, as ``Explainer`` does, which gains by it in its later calls.
        check_values: refuse images, logits and classes that are not finite or out of range; a GPU is waited for once, at the
            end, and without it never.
        **options: the methods' options; each goes to every named method that has it.

    Returns:
        One ``Explanation``, whose ``maps`` are (B, gh, gw), or (B, K, gh, gw) for K targets, and for texts (B, n) or (B, K, n);
        or a dict by method name (or label) where several methods were asked for.

    Raises:
        UnsupportedModelError: the model, or a method on this model, cannot be explained; the message says why.
        UnknownNameError: unknown method or option.
        InputError: another argument that does not fit.
    """
    explainer = Explainer(
        model,
        method,
        backend,
        rows=rows,
        score=score,
        anatomy=anatomy,
        compile=compile,
        checkpoint=checkpoint,
        cuda_graph=cuda_graph,
        **options,
    )
    return explainer.attribute(inputs, target, check_values=check_values)


__all__ = ["BACKENDS", "Explainer", "explain"]
