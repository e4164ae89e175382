"""Operators as torch sees them: schema, fake, compile; float64; symmetries; bad input."""

from __future__ import annotations

import pytest
import torch

from vitexplain.kernels import (
    attention_token_transformation,
    choose_backend,
    head_norms,
    row_propagation,
    token_transformation,
)

from .reference import attention_inputs, dense_head_norms, dense_row_propagation, dense_token_transformation


def _operator_arguments() -> dict[str, tuple[object, ...]]:
    one, many = attention_inputs(17, 16, torch.float32), attention_inputs(9, 16, torch.float32, num_rows=3)
    tokens = torch.randn(2, 17, 24)
    return {
        "row_propagation": (one.query, one.key, None, None, one.logsumexp, one.rows, None, None, one.scale, "p", "auto"),
        "row_propagation_weighted": (
            many.query, many.key, many.value, many.grad_out, many.logsumexp, many.rows, many.head_weights, many.token_weights,
            many.scale, "p_relu_g", "torch",
        ),
        "l1_head_norms": (one.value, one.grad_out, "auto"),
        "token_transformation": (tokens, torch.randn(2, 17, 24), True, True, 1.0, "auto"),
        "attention_token_transformation": (tokens, one.value, one.query, torch.randn(3, 16, 16), True, False, 2.0, "auto"),
    }  # fmt: skip


@pytest.mark.parametrize("name", _operator_arguments())
def test_operators_pass_opcheck(name: str) -> None:
    operator = getattr(torch.ops.vitexplain, name.removesuffix("_weighted"))
    torch.library.opcheck(operator.default, _operator_arguments()[name])


@pytest.mark.parametrize("name", _operator_arguments())
def test_operators_compile_without_a_graph_break(name: str) -> None:
    operator = getattr(torch.ops.vitexplain, name.removesuffix("_weighted"))
    arguments = _operator_arguments()[name]
    compiled = torch.compile(lambda *values: operator(*values) + 1, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), operator(*arguments) + 1)


def test_float64_inputs_are_computed_in_float64() -> None:
    inputs = attention_inputs(65, 48, torch.float64, num_rows=2)
    for phi in ("p", "p_relu_g"):
        actual = row_propagation(inputs.query, inputs.key, inputs.logsumexp.double(), inputs.rows, **inputs.keywords(phi, True))
        exact = dense_row_propagation(inputs, phi, True, torch.float64)
        assert actual.dtype == torch.float64
        # the reference makes its own logsumexp; ours is given, rounded to float32 by the factory where it says so
        assert float((actual - exact).abs().max() / exact.abs().max()) < 1e-6
    for norm in ("l1", "l2"):
        exact = dense_head_norms(inputs.value, inputs.grad_out, norm, torch.float64)
        torch.testing.assert_close(head_norms(inputs.value, inputs.grad_out, norm=norm), exact, rtol=1e-12, atol=0)
    tokens, moved = torch.randn(2, 2, 65, 40, dtype=torch.float64).unbind(0)
    exact = dense_token_transformation(tokens, moved, True, True, 1.0, torch.float64)
    torch.testing.assert_close(token_transformation(tokens, moved), exact, rtol=1e-12, atol=0)


def test_rows_of_the_attention_map_sum_to_one() -> None:
    inputs = attention_inputs(197, 64, torch.float32, num_rows=197)
    rows = torch.eye(197).expand(2, -1, -1)
    actual = row_propagation(inputs.query, inputs.key, inputs.logsumexp, rows, scale=inputs.scale)
    torch.testing.assert_close(actual.sum(-1), torch.ones(2, 197), rtol=0, atol=1e-5)


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
    "unknown phi": (lambda i: _propagate(i, phi="g"), "unknown phi 'g': expected one of p, p_relu_g"),
    "key of another width": (lambda i: _propagate(i, key=i.key[..., :8]), r"key: expected shape \(B=2, H=3, n=17, dh=16\), received"),
    "logsumexp of another length": (lambda i: _propagate(i, logsumexp=i.logsumexp[..., :4]), r"logsumexp: expected shape \(B=2, H=3, m=17\)"),
    "rows without a batch": (lambda i: _propagate(i, rows=i.rows[0]), r"rows: expected shape \(B=2, K, m=17\), received \(1, 17\)"),
    "key of another dtype": (lambda i: _propagate(i, key=i.key.double()), "key: expected dtype torch.float32"),
    "key on another device": (lambda i: _propagate(i, key=i.key.to("meta")), "key: expected device cpu"),
    "no gradient": (lambda i: _propagate(i, phi="p_relu_g"), "expected value and grad_out, received None"),
    "head weights of another shape": (lambda i: _propagate(i, head_weights=torch.ones(2, 4)), r"head_weights: expected shape \(B=2, H=3\)"),
    "unknown backend": (lambda i: _propagate(i, backend="cuda"), "unknown backend 'cuda': expected one of auto, triton, torch"),
    "unknown norm": (lambda i: head_norms(i.value, i.grad_out, norm="l0"), "unknown norm 'l0'"),
    "transformed of another width": (lambda i: token_transformation(i.key[0], i.key[0, :, :, :4]), "transformed: expected shape"),
    "output weight of another width": (lambda i: attention_token_transformation(torch.ones(2, 17, 9), i.value, torch.ones(9, 40)), r"output_weight: expected shape \(d=9, 48\), received \(9, 40\)"),
}  # fmt: skip


def _propagate(inputs, **changes):
    arguments = {"query": inputs.query, "key": inputs.key, "logsumexp": inputs.logsumexp, "rows": inputs.rows}
    return row_propagation(**{**arguments, "scale": inputs.scale, **changes})


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
