"""What only a GPU can show: the kernels in their own precision, at real sizes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vitexplain
from vitexplain.kernels import (
    PHIS,
    aot,
    attention_backward,
    attention_token_transformation,
    contribution_map,
    head_norms,
    launch,
    relevance_backward,
    relevance_rows,
    row_propagation,
    row_propagation_by_head,
    token_transformation,
)
from vitexplain.kernels.attention_backward.choose import forced
from vitexplain.testing import DenseReference

from ..conftest import MODEL_SHAPES, PLAIN_METHODS, build_model, images_for, relative_error, rms_error
from .reference import (
    MASKS,
    AttentionInputs,
    assert_within_error_budget,
    attention_inputs,
    dense_backward,
    dense_head_norms,
    dense_maps,
    dense_relevance,
    dense_row_propagation,
    dense_token_transformation,
    dense_update,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [1, 16, 17, 197, 198, 257, 577, 1025, 1370]
HEAD_DIMS = [32, 48, 64, 80, 128]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def _row(inputs: AttentionInputs, phi: str, weighted: bool = True, **options: object) -> torch.Tensor:
    return row_propagation(*inputs.layer, inputs.rows, backend="triton", **inputs.keywords(phi, weighted), **options)


def _backward(inputs: AttentionInputs, phi: str) -> tuple[torch.Tensor, ...]:
    return attention_backward(
        inputs.query, inputs.key, inputs.value, inputs.out, inputs.grad_out, inputs.logsumexp, inputs.rows[:, 0],
        phi=phi, scale=inputs.scale, mask=inputs.mask, norms=True, backend="triton",
    )  # fmt: skip


def _relevance(inputs: AttentionInputs) -> tuple[torch.Tensor, ...]:
    return relevance_backward(
        inputs.query, inputs.key, inputs.value, inputs.ratio, inputs.logsumexp,
        rows=inputs.rows[:, 0], grad_out=inputs.grad_out, scale=inputs.scale, mask=inputs.mask, backend="triton",
    )  # fmt: skip


def _map(inputs: AttentionInputs, phi: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, _, n, _ = inputs.query.shape
    contribution = torch.rand(batch, n, n, generator=torch.Generator("cuda").manual_seed(n), device="cuda")
    keywords = inputs.keywords(phi, True)
    return contribution, contribution_map(*inputs.layer, contribution, residual=1.0, backend="triton", **keywords)


def _check_row(inputs: AttentionInputs, phi: str, dtype: torch.dtype) -> None:
    actual = _row(inputs, phi)
    assert torch.equal(actual, _row(inputs, phi)), "not deterministic"
    exact, plain = (dense_row_propagation(inputs, phi, True, kind) for kind in (torch.float64, dtype))
    assert_within_error_budget(actual, exact, plain, dtype)


def _check_by_head(inputs: AttentionInputs, phi: str, dtype: torch.dtype, moved: torch.Tensor, norms: torch.Tensor) -> None:
    rows = inputs.rows[:, 0]
    maps = (dense_maps(inputs, phi, kind) for kind in (torch.float64, dtype))
    exact, plain = (torch.einsum("bi,bhij->bhj", rows.to(kind.dtype), kind) for kind in maps)
    assert_within_error_budget(moved, exact, plain, dtype)
    exact, plain = (dense_head_norms(inputs.value, inputs.grad_out, "l1", kind) for kind in (torch.float64, dtype))
    assert_within_error_budget(norms, exact, plain, dtype)


def _check_backward(inputs: AttentionInputs, phi: str, dtype: torch.dtype) -> None:
    results = _backward(inputs, phi)
    assert all(torch.equal(*pair) for pair in zip(results, _backward(inputs, phi), strict=True)), "not deterministic"
    *gradients, moved, norms = results
    expected = dense_backward(inputs, torch.float64)
    largest = max(float(exact.abs().max()) for exact in expected)
    for actual, exact, plain in zip(gradients, expected, dense_backward(inputs, dtype), strict=True):
        assert_within_error_budget(actual, exact, plain, dtype, largest)
    _check_by_head(inputs, phi, dtype, moved, norms)


def _check_relevance(inputs: AttentionInputs, dtype: torch.dtype) -> None:
    results = _relevance(inputs)
    assert all(torch.equal(*pair) for pair in zip(results, _relevance(inputs), strict=True)), "not deterministic"
    expected = (dense_relevance(inputs, True, kind) for kind in (torch.float64, dtype))
    for actual, exact, plain in zip(results, *expected, strict=True):
        assert_within_error_budget(actual, exact, plain, dtype)
    alone = relevance_rows(
        inputs.query, inputs.key, inputs.value, inputs.ratio, inputs.logsumexp, inputs.rows[:, 0],
        grad_out=inputs.grad_out, scale=inputs.scale, mask=inputs.mask, backend="triton",
    )  # fmt: skip
    assert_within_error_budget(alone, *(dense_relevance(inputs, True, kind)[-1] for kind in (torch.float64, dtype)), dtype)


def _check_map(inputs: AttentionInputs, phi: str, dtype: torch.dtype) -> None:
    contribution, actual = _map(inputs, phi)
    assert torch.equal(actual, _map(inputs, phi)[1]), "not deterministic"
    updates = (dense_update(inputs, phi, True, kind) for kind in (torch.float64, dtype))
    exact, plain = (contribution.to(update.dtype) + update @ contribution.to(update.dtype) for update in updates)
    assert_within_error_budget(actual, exact, plain, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("n", LENGTHS)
def test_every_attention_shaped_operation_is_within_the_error_budget(n: int, head_dim: int, dtype: torch.dtype) -> None:
    for phi in ("p", "p_relu_g"):
        for num_rows in (1, 3):
            _check_row(attention_inputs(n, head_dim, dtype, num_rows=num_rows, device="cuda"), phi, dtype)
        if n > 1:
            _check_row(attention_inputs(n, head_dim, dtype, num_queries=1, device="cuda"), phi, dtype)
    inputs = attention_inputs(n, head_dim, dtype, device="cuda")
    moved, norms = row_propagation_by_head(
        *inputs.layer, inputs.rows[:, 0], scale=inputs.scale, value=inputs.value, grad_out=inputs.grad_out, norms=True
    )
    _check_by_head(inputs, "p", dtype, moved, norms)
    _check_backward(inputs, "p_relu_g", dtype)
    _check_map(inputs, "p_relu_g", dtype)
    for num_queries in (None, 1):
        _check_relevance(attention_inputs(n, head_dim, dtype, num_queries=num_queries, device="cuda", whole_numbers=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_relevance_with_every_mask(mask: str, dtype: torch.dtype) -> None:
    _check_relevance(attention_inputs(198, 64, dtype, mask=mask, device="cuda", whole_numbers=True), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("mask", MASKS)
def test_every_weighing_and_mask(mask: str, phi: str, dtype: torch.dtype) -> None:
    inputs = attention_inputs(198, 64, dtype, mask=mask, device="cuda")
    _check_row(inputs, phi, dtype)
    _check_row(attention_inputs(198, 64, dtype, mask=mask, num_rows=3, device="cuda"), phi, dtype)
    _check_backward(inputs, phi, dtype)
    _check_map(inputs, phi, dtype)


@pytest.mark.parametrize("head_dim", [16, 72, 88, 96, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unusual_head_widths(head_dim: int, dtype: torch.dtype) -> None:
    inputs = attention_inputs(197, head_dim, dtype, device="cuda")
    _check_row(inputs, "p_relu_g", dtype)
    _check_backward(inputs, "p_relu_g", dtype)
    _check_map(inputs, "p_relu_g", dtype)
    _check_relevance(attention_inputs(197, head_dim, dtype, device="cuda", whole_numbers=True), dtype)


def test_tf32_follows_the_switch_of_torch() -> None:
    inputs = attention_inputs(577, 64, torch.float32, device="cuda")
    exact = dense_row_propagation(inputs, "p_relu_g", True, torch.float64)
    was = torch.backends.cuda.matmul.fp32_precision
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        plain = dense_row_propagation(inputs, "p_relu_g", True, torch.float32)
        tf32 = _row(inputs, "p_relu_g")
        assert_within_error_budget(tf32, exact, plain, torch.float32)
    finally:
        torch.backends.cuda.matmul.fp32_precision = was
    full = _row(inputs, "p_relu_g")
    assert relative_error(full, exact) < min(1e-5, relative_error(tf32, exact))


def test_more_than_two_to_the_31_elements_of_index_space() -> None:
    """Heads a billion elements apart: an offset of 32 bits would wrap."""
    small = attention_inputs(33, 64, torch.bfloat16, batch=1, device="cuda")
    stride = 1_200_000_000
    storage = torch.empty(2 * stride + 33 * 64, dtype=torch.bfloat16, device="cuda")

    def far(tensor: torch.Tensor) -> torch.Tensor:
        view = storage.as_strided(tensor.shape, (3 * stride, stride, 64, 1))
        return view.copy_(tensor)

    for name in ("query", "key", "value", "grad_out"):
        apart = AttentionInputs(**{**vars(small), name: far(getattr(small, name))})
        assert torch.equal(_row(apart, "p_relu_g"), _row(small, "p_relu_g")), name
        assert all(torch.equal(*pair) for pair in zip(_backward(apart, "p"), _backward(small, "p"), strict=True)), name
        assert torch.equal(_map(apart, "p_relu_g")[1], _map(small, "p_relu_g")[1]), name
    for name in ("query", "key", "value", "ratio", "grad_out"):
        apart = AttentionInputs(**{**vars(small), name: far(getattr(small, name))})
        assert all(torch.equal(*pair) for pair in zip(_relevance(apart), _relevance(small), strict=True)), name


@pytest.mark.parametrize("passes", ["one pass", "two passes"])
@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling", "attention_pooling", "n197"])
def test_a_whole_explanation_can_be_captured_in_a_graph(shape: str, passes: str) -> None:
    model = build_model(**MODEL_SHAPES[shape]).to("cuda", torch.bfloat16)
    images, others = (images_for(model, 3, seed).to("cuda", torch.bfloat16) for seed in (1, 2))
    methods = PLAIN_METHODS
    explainer = vitexplain.Explainer(model, methods)
    target = torch.tensor([1, 2, 3], device="cuda")
    held = images.clone()
    with forced(passes):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                explainer.attribute(held, target)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = explainer.attribute(held, target)
        for batch in (images, others):
            expected = explainer.attribute(batch, target)
            held.copy_(batch)
            graph.replay()
            for name in methods:
                assert relative_error(captured[name].maps, expected[name].maps) < 1e-3, name


@pytest.mark.parametrize("passes", ["one pass", "two passes"])
def test_images_compiled_ahead_of_time_change_nothing_and_leave_nothing_to_compile(tmp_path, monkeypatch, passes: str) -> None:
    architecture = launch.architecture_of(torch.device("cuda", torch.cuda.current_device()))
    build = ["-m", "kernels.aot.compile", "--architecture", architecture, "--output", str(tmp_path / architecture)]
    root = Path(__file__).resolve().parent.parent.parent
    subprocess.run([sys.executable, *build, "--dtypes", "bfloat16", "--head-dims", "64"], check=True, cwd=root)
    model = build_model(embed_dim=128, num_heads=2).to("cuda", torch.bfloat16)
    images = images_for(model, 3).to("cuda", torch.bfloat16)
    methods = PLAIN_METHODS
    with forced(passes):
        compiled_by_triton = vitexplain.explain(model, images, method=methods)
        monkeypatch.setenv("VITEXPLAIN_AOT_IMAGES", str(tmp_path))
        monkeypatch.setattr(launch, "_launch_by_triton", lambda kernel, *_: pytest.fail(f"compiled at run time: {kernel}"))
        for cached in (aot.images_folder, aot._images):
            cached.cache_clear()
        try:
            from_images = vitexplain.explain(model, images, method=methods)
        finally:
            monkeypatch.undo()
            for cached in (aot.images_folder, aot._images):
                cached.cache_clear()
    for name in methods:
        assert relative_error(from_images[name].maps, compiled_by_triton[name].maps) < 1e-6, name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LENGTHS)
def test_head_norms_and_token_transformations(n: int, dtype: torch.dtype) -> None:
    inputs = attention_inputs(n, 64, dtype, device="cuda")
    for norm in ("l1", "l2"):
        exact, plain = (dense_head_norms(inputs.value, inputs.grad_out, norm, precision) for precision in (torch.float64, dtype))
        assert_within_error_budget(head_norms(inputs.value, inputs.grad_out, norm=norm), exact, plain, dtype)
    tokens, moved = torch.randn(2, 2, n, 192, device="cuda").to(dtype).unbind(0)
    exact, plain = (dense_token_transformation(tokens, moved, True, True, 1.0, precision) for precision in (torch.float64, dtype))
    assert_within_error_budget(token_transformation(tokens, moved), exact, plain, dtype)
    weight = (torch.randn(192, 192, device="cuda") / 8).to(dtype)

    def dense(precision: torch.dtype) -> torch.Tensor:
        by_head = weight.to(precision).unflatten(1, (3, 64))
        projected = torch.einsum("bhnk,dhk->bhnd", inputs.value.to(precision), by_head)
        return dense_token_transformation(tokens.unsqueeze(1), projected, True, True, 1.0, precision)

    actual = attention_token_transformation(tokens, inputs.value, weight)
    assert_within_error_budget(actual, dense(torch.float64), dense(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("passes", ["one pass", "two passes"])
@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_explanations_on_the_gpu_are_within_the_error_budget(shape: str, passes: str, dtype: torch.dtype) -> None:
    model = build_model(**MODEL_SHAPES[shape]).to("cuda", dtype)
    images = images_for(model, 4).to("cuda", dtype)
    methods = PLAIN_METHODS
    reference = DenseReference(model, images)
    plain = DenseReference(model, images, dtype=dtype)
    target = reference.logits.argmax(-1)
    with forced(passes):
        ours = vitexplain.explain(model, images, target=target, method=methods)
    prefix = model.num_prefix_tokens
    for name in methods:
        exact = reference.explain(name, target)
        values = torch.cat([ours[name].prefix_values, ours[name].maps.flatten(1)], -1)
        eager = rms_error(plain.explain(name, target), exact)
        assert values.shape[1] == prefix + model.patch_embed.num_patches
        assert rms_error(values, exact) <= 2 * eager + 4 * torch.finfo(dtype).eps, name
