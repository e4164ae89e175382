"""Operators as torch sees them: schema, fake, compile; float64; symmetries; bad input."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from vitexplain.kernels import (
    add_token_transformation,
    attention_backward,
    attention_token_transformation,
    choose_backend,
    contribution_map,
    head_norms,
    relevance_backward,
    relevance_rows,
    row_propagation,
    row_propagation_by_head,
    token_transformation,
)

from .reference import (
    AttentionInputs,
    attention_inputs,
    dense_backward,
    dense_head_norms,
    dense_maps,
    dense_relevance,
    dense_row_propagation,
    dense_token_transformation,
    dense_update,
)


def _operator_arguments() -> dict[str, tuple[object, ...]]:
    one, many = attention_inputs(17, 16, torch.float32), attention_inputs(9, 16, torch.float32, num_rows=3, mask="additive")
    tokens, branch, moved = torch.randn(3, 2, 17, 24).unbind(0)
    gradient = (many.value, many.grad_out)
    weights = (many.head_weights, many.token_weights)
    first, mask = many.rows[:, 0], many.mask.expand(2, -1, -1, -1)
    return {
        "row_propagation": (one.query, one.key, None, None, one.logsumexp, one.rows, None, None, None, one.scale, 1.0, 0.0, "p", "auto"),
        "row_propagation.weighted": (
            many.query, many.key, *gradient, many.logsumexp, many.rows, *weights, mask, many.scale, 0.5, 0.5, "p_relu_g", "torch",
        ),
        "row_propagation.gradient_alone": (None, None, *gradient, None, many.rows, *weights, None, 1.0, 1.0, 0.0, "abs_g", "torch"),
        "row_propagation_by_head": (one.query, one.key, None, None, one.logsumexp, one.rows[:, 0], None, one.scale, "p", False, "auto"),
        "row_propagation_by_head.norms": (
            many.query, many.key, *gradient, many.logsumexp, first, mask, many.scale, "p", True, "torch",
        ),
        "attention_backward": (
            many.query, many.key, many.value, many.out, many.grad_out, many.logsumexp, first, mask, many.scale, "p_g", True, "auto",
        ),
        "attention_backward.no_norms": (
            one.query, one.key, one.value, one.out, one.grad_out, one.logsumexp, one.rows[:, 0], None, one.scale, "p", False, "torch",
        ),
        "relevance_backward": (
            many.query, many.key, many.value, many.ratio, many.logsumexp, first, many.grad_out, mask, many.scale, "auto",
        ),
        "relevance_backward.no_row": (
            one.query, one.key, one.value, one.ratio, one.logsumexp, None, None, None, one.scale, "torch",
        ),
        "relevance_rows": (
            many.query, many.key, many.value, many.ratio, many.logsumexp, first, many.grad_out, mask, many.scale, "auto",
        ),
        "relevance_rows.of_the_map": (
            one.query, one.key, one.value, one.ratio, one.logsumexp, one.rows[:, 0], None, None, one.scale, "torch",
        ),
        "contribution_map": (
            many.query, many.key, *gradient, many.logsumexp, torch.rand(2, 9, 4), *weights, many.row_factors, mask, many.scale,
            1.0, 1.0, "p_relu_g", "auto",
        ),
        "l2_head_norms": (one.value, one.grad_out, "auto"),
        "token_transformation": (tokens, None, moved, True, True, 1.0, "auto"),
        "token_transformation.add": (tokens, branch, moved, True, True, 1.0, "torch"),
        "attention_token_transformation": (tokens, one.value, one.query, torch.randn(3, 16, 16), True, False, 2.0, "auto"),
    }  # fmt: skip


def _operator(name: str):
    return getattr(torch.ops.vitexplain, name.partition(".")[0])


def test_every_operator_is_listed_here() -> None:
    registered = {
        name.partition("::")[2].partition(".")[0]
        for name in torch._C._dispatch_get_all_op_names()
        if name.startswith("vitexplain::")
    }
    assert registered == {name.partition(".")[0] for name in _operator_arguments()}


@pytest.mark.parametrize("name", _operator_arguments())
def test_operators_pass_opcheck(name: str) -> None:
    torch.library.opcheck(_operator(name).default, _operator_arguments()[name])


@pytest.mark.parametrize("name", _operator_arguments())
def test_operators_compile_without_a_graph_break(name: str) -> None:
    operator, arguments = _operator(name), _operator_arguments()[name]

    def called(*values: object) -> list[torch.Tensor]:
        result = operator(*values)
        return [2 * tensor for tensor in (result if isinstance(result, tuple) else (result,))]

    torch.compiler.reset()  # each operator is a compilation of its own, not a recompilation of the last one
    compiled = torch.compile(called, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(*arguments), called(*arguments), strict=True):
        assert torch.equal(actual, expected)


def test_float64_inputs_are_computed_in_float64() -> None:
    inputs = attention_inputs(65, 48, torch.float64, num_rows=2)
    rows, contribution = inputs.rows[:, 0], torch.rand(2, 65, 65, dtype=torch.float64)
    exactly = {"rtol": 1e-11, "atol": 1e-11}
    for phi in ("p", "p_relu_g"):
        keywords = inputs.keywords(phi, True)
        exact = dense_row_propagation(inputs, phi, True, torch.float64)
        torch.testing.assert_close(row_propagation(*inputs.layer, inputs.rows, **keywords), exact, **exactly)
        exact = contribution + dense_update(inputs, phi, True, torch.float64) @ contribution
        torch.testing.assert_close(contribution_map(*inputs.layer, contribution, residual=1.0, **keywords), exact, **exactly)
    for norm in ("l1", "l2"):
        exact = dense_head_norms(inputs.value, inputs.grad_out, norm, torch.float64)
        torch.testing.assert_close(head_norms(inputs.value, inputs.grad_out, norm=norm), exact, rtol=1e-12, atol=0)
    *gradients, moved, _ = attention_backward(
        inputs.query, inputs.key, inputs.value, inputs.out, inputs.grad_out, inputs.logsumexp, rows, phi="p_g", scale=inputs.scale
    )
    torch.testing.assert_close(tuple(gradients), dense_backward(inputs, torch.float64), **exactly)
    exact = torch.einsum("bi,bhij->bhj", rows, dense_maps(inputs, "p_g", torch.float64))
    torch.testing.assert_close(moved, exact, **exactly)
    relevance = relevance_backward(*_relevance_layer(inputs), rows=rows, grad_out=inputs.grad_out, scale=inputs.scale)
    for actual, exact in zip(relevance, dense_relevance(inputs, True, torch.float64), strict=True):
        torch.testing.assert_close(actual, exact, rtol=1e-9, atol=1e-9)  # small products that are divided by lose digits
    tokens, branch, moved = torch.randn(3, 2, 65, 40, dtype=torch.float64).unbind(0)
    exact = dense_token_transformation(tokens + branch, moved, True, True, 1.0, torch.float64)
    torch.testing.assert_close(add_token_transformation(tokens, branch, moved)[1], exact, rtol=1e-12, atol=0)


def test_rows_of_the_attention_map_sum_to_one() -> None:
    inputs = attention_inputs(197, 64, torch.float32, num_rows=197)
    rows = torch.eye(197).expand(2, -1, -1)
    actual = row_propagation(*inputs.layer, rows, scale=inputs.scale)
    torch.testing.assert_close(actual.sum(-1), torch.ones(2, 197), rtol=0, atol=1e-5)


def _relevance_layer(inputs: AttentionInputs) -> tuple[torch.Tensor, ...]:
    return inputs.query, inputs.key, inputs.value, inputs.ratio, inputs.logsumexp


@pytest.mark.parametrize("mask", ["none", "padding"])
def test_attention_hands_on_all_relevance_but_what_it_cannot_divide(mask: str) -> None:
    """Half of it to the values, and half through the map to queries and keys."""
    inputs = attention_inputs(65, 32, torch.float64, mask=mask)
    of_out = inputs.ratio * inputs.out
    results = relevance_backward(*_relevance_layer(inputs), scale=inputs.scale, mask=inputs.mask)
    of_query, of_key, of_value = (relevance.sum((-1, -2)) for relevance in results[:3])
    half = 0.5 * of_out.sum((-1, -2))
    torch.testing.assert_close(of_value, half)
    torch.testing.assert_close(of_query + of_key, half, rtol=1e-5, atol=1e-5)  # the stabilizer keeps its share


def test_a_gradient_of_another_type_weighs_relevance() -> None:
    inputs = attention_inputs(17, 16, torch.float32)
    coarse = inputs.grad_out.bfloat16()
    rows = [
        relevance_rows(*_relevance_layer(inputs), inputs.rows[:, 0], grad_out=grad_out, scale=inputs.scale)
        for grad_out in (coarse, coarse.float(), coarse.double())
    ]
    assert torch.equal(rows[0], rows[1])
    assert torch.equal(rows[0], rows[2])


def test_permuting_keys_permutes_the_row() -> None:
    inputs = attention_inputs(65, 32, torch.float32)
    order = torch.randperm(65, generator=torch.Generator().manual_seed(0))
    keywords = inputs.keywords("p_relu_g", True)
    before = row_propagation(inputs.query, inputs.key, inputs.logsumexp, inputs.rows, **keywords)
    keywords |= {"value": inputs.value[:, :, order], "token_weights": inputs.token_weights[:, :, order]}
    after = row_propagation(inputs.query, inputs.key[:, :, order], inputs.logsumexp, inputs.rows, **keywords)
    torch.testing.assert_close(after, before[:, :, order], rtol=1e-5, atol=1e-6)


def test_results_repeat_to_the_bit() -> None:
    inputs = attention_inputs(257, 64, torch.float32)
    results = [row_propagation(inputs.query, inputs.key, inputs.logsumexp, inputs.rows, scale=inputs.scale) for _ in range(3)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


BAD_CALLS = {
    "unknown phi": (lambda i: _propagate(i, phi="g"), "phi: expected one of p, p_relu_g, p_g, relu_g, abs_g, received 'g'"),
    "key of another width": (lambda i: _propagate(i, key=i.key[..., :8]), r"key: expected shape \(B=2, H=3, n=17, dh=16\), received"),
    "logsumexp of another length": (lambda i: _propagate(i, logsumexp=i.logsumexp[..., :4]), r"logsumexp: expected shape \(B=2, H=3, m=17\)"),
    "rows without a batch": (lambda i: _propagate(i, rows=i.rows[0]), r"rows: expected shape \(B=2, K, m=17\), received \(1, 17\)"),
    "key of another dtype": (lambda i: _propagate(i, key=i.key.double()), "key: expected dtype torch.float32"),
    "key on another device": (lambda i: _propagate(i, key=i.key.to("meta")), "key: expected device cpu"),
    "no query": (lambda i: _propagate(i, query=None), "query: expected a tensor, received None"),
    "no gradient": (lambda i: _propagate(i, phi="p_relu_g"), "value, grad_out: expected tensors for phi 'p_relu_g', received None"),
    "no gradient for norms": (lambda i: row_propagation_by_head(*i.layer, i.rows[:, 0], scale=1.0, norms=True), "value, grad_out: expected tensors for norms, received None"),
    "several rows by head": (lambda i: row_propagation_by_head(*i.layer, i.rows, scale=1.0), r"rows: expected shape \(B=2, m=17\)"),
    "head weights of another shape": (lambda i: _propagate(i, head_weights=torch.ones(2, 4)), r"head_weights: expected shape \(B=2, H=3\)"),
    "mask of another shape": (lambda i: _propagate(i, mask=torch.ones(5, 17, dtype=torch.bool)), r"mask: expected a shape that broadcasts to \(B=2, H=3, m=17, n=17\), received \(5, 17\)"),
    "mask of integers": (lambda i: _propagate(i, mask=torch.ones(17, 17, dtype=torch.int64)), "mask: expected a boolean or floating-point dtype, received torch.int64"),
    "residual of queries without keys": (lambda i: _propagate(i, key=i.key[:, :, :5], residual=1.0), "residual: expected at most n=5 query rows, received 17"),
    "unknown backend": (lambda i: _propagate(i, backend="cuda"), "backend: expected one of auto, triton, torch, received 'cuda'"),
    "unknown norm": (lambda i: head_norms(i.value, i.grad_out, norm="l0"), "norm: expected one of l1, l2, received 'l0'"),
    "contribution of another length": (lambda i: contribution_map(*i.layer, torch.eye(9).expand(2, 9, 9), scale=1.0), r"contribution: expected shape \(B=2, n=17, c=9\), received \(2, 9, 9\)"),
    "map without a gradient": (lambda i: contribution_map(*i.layer, torch.eye(17).expand(2, 17, 17), scale=1.0, phi="p_g"), "value, grad_out: expected tensors for phi 'p_g', received None"),
    "factors of another shape": (lambda i: contribution_map(*i.layer, torch.eye(17).expand(2, 17, 17), scale=1.0, row_factors=torch.ones(2, 3)), "row_factors: expected shape"),
    "out of another shape": (lambda i: attention_backward(i.query, i.key, i.value, i.out[:, :1], i.grad_out, i.logsumexp, i.rows[:, 0], scale=1.0), "out: expected shape"),
    "rows of a backward": (lambda i: attention_backward(i.query, i.key, i.value, i.out, i.grad_out, i.logsumexp, i.rows, scale=1.0), r"rows: expected shape \(B=2, m=17\)"),
    "ratio of another shape": (lambda i: _relevance(i, ratio=i.ratio[:, :, :1]), r"ratio: expected shape \(B=2, H=3, m=17, dv=16\)"),
    "ratio of another dtype": (lambda i: _relevance(i, ratio=i.ratio.half()), "ratio: expected dtype torch.float32"),
    "rows of relevance": (lambda i: _relevance(i, rows=i.rows), r"rows: expected shape \(B=2, m=17\)"),
    "gradient of relevance of another shape": (lambda i: _relevance(i, rows=i.rows[:, 0], grad_out=i.grad_out[..., :8]), "grad_out: expected shape"),
    "gradient of integers": (lambda i: _relevance(i, rows=i.rows[:, 0], grad_out=i.grad_out.long()), "grad_out: expected a floating-point dtype, received torch.int64"),
    "gradient of relevance without a row": (lambda i: _relevance(i, grad_out=i.grad_out), "rows: expected a tensor beside grad_out, received None"),
    "mask of relevance of another shape": (lambda i: _relevance(i, mask=torch.ones(5, 17, dtype=torch.bool)), "mask: expected a shape that broadcasts"),
    "relevance rows of another length": (lambda i: relevance_rows(*_relevance_layer(i), i.rows[:, 0, :4], scale=1.0), r"rows: expected shape \(B=2, m=17\)"),
    "transformed of another width": (lambda i: token_transformation(i.key[0], i.key[0, :, :, :4]), "transformed: expected shape"),
    "branch of another dtype": (lambda i: add_token_transformation(i.key[0], i.key[0].half(), i.key[0]), "branch: expected dtype torch.float32"),
    "output weight of another width": (lambda i: attention_token_transformation(torch.ones(2, 17, 9), i.value, torch.ones(9, 40)), r"output_weight: expected shape \(d=9, 48\), received \(9, 40\)"),
}  # fmt: skip


def _propagate(inputs, **changes):
    arguments = {"query": inputs.query, "key": inputs.key, "logsumexp": inputs.logsumexp, "rows": inputs.rows}
    return row_propagation(**{**arguments, "scale": inputs.scale, **changes})


def _relevance(inputs, **changes):
    names = ("query", "key", "value", "ratio", "logsumexp", "scale")
    return relevance_backward(**{**{name: getattr(inputs, name) for name in names}, **changes})


@pytest.mark.parametrize("name", BAD_CALLS)
def test_bad_input_is_refused(name: str) -> None:
    call, message = BAD_CALLS[name]
    with pytest.raises(ValueError, match=message):
        call(attention_inputs(17, 16, torch.float32))


def test_triton_on_a_cpu_is_refused_not_replaced(monkeypatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="needs CUDA tensors, received tensors on 'cpu'"):
        choose_backend("triton", torch.device("cpu"))
    monkeypatch.setattr("vitexplain.kernels.dispatch.triton_installed", lambda: False)
    with pytest.raises(RuntimeError, match="not installed"):
        choose_backend("triton", torch.device("cuda"))
    assert choose_backend("auto", torch.device("cuda")) == "torch"


def test_the_folder_under_its_own_name_registers_nothing() -> None:
    """So that transformers, which looks for a package of that name, may import it from a clone."""
    module = importlib.import_module("kernels")
    assert module.__file__ == str(Path(__file__).parents[2] / "kernels" / "__init__.py")
    assert not hasattr(module, "row_propagation")
