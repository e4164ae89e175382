"""Every operation against float64, by tiled torch and, with TRITON_INTERPRET=1, by its Triton kernel."""

from __future__ import annotations

import itertools

import pytest
import torch

from vitexplain.kernels import attention_token_transformation, head_norms, row_propagation, token_transformation

from .conftest import DTYPES
from .reference import (
    assert_within_error_budget,
    attention_inputs,
    dense_head_norms,
    dense_row_propagation,
    dense_token_transformation,
)

pytestmark = pytest.mark.interpreter

LENGTHS = [1, 16, 17, 40, 65, 197]
HEAD_DIMS = [16, 48, 64, 72, 80, 88, 128]
SHAPES = [*((n, 64) for n in LENGTHS), *((33, dh) for dh in HEAD_DIMS)]
SWITCHES = list(itertools.product((True, False), repeat=2))


@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
@pytest.mark.parametrize("phi", ["p", "p_relu_g"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "head_dim"), SHAPES)
def test_row_propagation_of_one_row(backend, n: int, head_dim: int, dtype: torch.dtype, phi: str, weighted: bool) -> None:
    inputs = attention_inputs(n, head_dim, dtype)
    actual = row_propagation(
        inputs.query, inputs.key, inputs.logsumexp, inputs.rows, backend=backend, **inputs.keywords(phi, weighted)
    )
    exact = dense_row_propagation(inputs, phi, weighted, torch.float64)
    assert_within_error_budget(actual, exact, dense_row_propagation(inputs, phi, weighted, dtype), dtype)


@pytest.mark.parametrize("phi", ["p", "p_relu_g"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "num_rows", "num_queries"), [(33, 5, None), (40, 40, None), (33, 1, 1), (65, 2, 3), (17, 33, 2)])
def test_row_propagation_of_many_rows_and_of_leading_queries(
    backend, n: int, num_rows: int, num_queries, dtype, phi: str
) -> None:
    inputs = attention_inputs(n, 48, dtype, num_rows=num_rows, num_queries=num_queries)
    actual = row_propagation(
        inputs.query, inputs.key, inputs.logsumexp, inputs.rows, backend=backend, **inputs.keywords(phi, weighted=True)
    )
    exact = dense_row_propagation(inputs, phi, True, torch.float64)
    assert_within_error_budget(actual, exact, dense_row_propagation(inputs, phi, True, dtype), dtype)


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "head_dim", "num_queries"), [(1, 64, None), (17, 80, None), (65, 48, None), (197, 64, None), (65, 64, 1)]
)
def test_head_norms(backend, n: int, head_dim: int, num_queries, dtype: torch.dtype, norm: str) -> None:
    inputs = attention_inputs(n, head_dim, dtype, num_queries=num_queries)
    actual = head_norms(inputs.value, inputs.grad_out, norm=norm, backend=backend)
    exact = dense_head_norms(inputs.value, inputs.grad_out, norm, torch.float64)
    assert_within_error_budget(actual, exact, dense_head_norms(inputs.value, inputs.grad_out, norm, dtype), dtype)


@pytest.mark.parametrize(("length", "necc"), SWITCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [(1, 48), (17, 192), (65, 100), (197, 384)])
def test_token_transformation(backend, n: int, width: int, dtype: torch.dtype, length: bool, necc: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    tokens, moved = torch.randn(2, 2, n, width, generator=generator).to(dtype).unbind(0)
    actual = token_transformation(tokens, moved, length=length, necc=necc, necc_scale=float(n), backend=backend)
    exact = dense_token_transformation(tokens, moved, length, necc, n, torch.float64)
    plain = dense_token_transformation(tokens, moved, length, necc, n, dtype)
    assert_within_error_budget(actual, exact, plain, dtype)


@pytest.mark.parametrize(("length", "necc"), SWITCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "head_dim"), [(1, 64), (17, 48), (65, 80), (197, 64)])
def test_attention_token_transformation(backend, n: int, head_dim: int, dtype: torch.dtype, length: bool, necc: bool) -> None:
    inputs = attention_inputs(n, head_dim, dtype)
    heads, width = 3, 100
    generator = torch.Generator().manual_seed(n)
    tokens = torch.randn(2, n, width, generator=generator).to(dtype)
    weight = (torch.randn(width, heads * head_dim, generator=generator) * head_dim**-0.5).to(dtype)

    def dense(precision: torch.dtype) -> torch.Tensor:
        by_head = weight.to(precision).unflatten(1, (heads, head_dim))
        moved = torch.einsum("bhnk,dhk->bhnd", inputs.value.to(precision), by_head)
        return dense_token_transformation(tokens.unsqueeze(1), moved, length, necc, 1.0, precision)

    actual = attention_token_transformation(tokens, inputs.value, weight, length=length, necc=necc, backend=backend)
    assert_within_error_budget(actual, dense(torch.float64), dense(dtype), dtype)


def test_nothing_is_written_beyond_the_result(backend, monkeypatch) -> None:
    """Results are made inside a larger buffer of sentinels, which must survive."""
    real_empty, guarded = torch.empty, []

    def empty_with_guards(*shape, **options) -> torch.Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        numel = int(torch.Size(shape).numel())
        buffer = torch.full((numel + 128,), 12345.0, dtype=options.get("dtype"), device=options.get("device"))
        guarded.append((buffer, numel))
        return buffer[64 : 64 + numel].view(shape)

    inputs = attention_inputs(33, 48, torch.float32, num_rows=3)
    expected = row_propagation(
        inputs.query, inputs.key, inputs.logsumexp, inputs.rows, backend=backend, **inputs.keywords("p", True)
    )
    monkeypatch.setattr(torch, "empty", empty_with_guards)
    actual = row_propagation(
        inputs.query, inputs.key, inputs.logsumexp, inputs.rows, backend=backend, **inputs.keywords("p", True)
    )
    head_norms(inputs.value, inputs.grad_out, backend=backend)
    monkeypatch.setattr(torch, "empty", real_empty)
    assert torch.equal(actual, expected)
    assert guarded
    for buffer, numel in guarded:
        assert (buffer[:64] == 12345).all()
        assert (buffer[64 + numel :] == 12345).all()


@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling"])
def test_a_whole_explanation_by_every_method(backend, shape: str) -> None:
    import vitexplain

    from ..conftest import MODEL_SHAPES, all_tokens, build_model, images_for, relative_error

    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    methods = [info.name for info in vitexplain.methods()]
    ours = vitexplain.explain(model, images, method=methods, backend=backend)
    dense = vitexplain.explain(model, images, method=methods, backend="dense")
    for name in methods:
        assert relative_error(all_tokens(ours[name]), all_tokens(dense[name])) <= 1e-5, name
