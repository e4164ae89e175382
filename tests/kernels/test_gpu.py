"""What only a GPU can show: the kernels in their own precision, at real sizes."""

from __future__ import annotations

import pytest
import torch

import vitexplain
from vitexplain.kernels import attention_token_transformation, head_norms, row_propagation, token_transformation
from vitexplain.testing import DenseReference

from ..conftest import MODEL_SHAPES, build_model, images_for, rms_error
from .reference import (
    assert_within_error_budget,
    attention_inputs,
    dense_head_norms,
    dense_row_propagation,
    dense_token_transformation,
)

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

LENGTHS = [1, 16, 17, 197, 198, 257, 577, 1025, 1370]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("phi", ["p", "p_relu_g"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [32, 48, 64, 80, 128])
@pytest.mark.parametrize("n", LENGTHS)
def test_row_propagation_is_within_the_error_budget_and_repeats(n: int, head_dim: int, dtype: torch.dtype, phi: str) -> None:
    for num_rows in (1, 3):
        inputs = attention_inputs(n, head_dim, dtype, num_rows=num_rows, device="cuda")
        keywords = inputs.keywords(phi, weighted=True)
        first, second = (
            row_propagation(inputs.query, inputs.key, inputs.logsumexp, inputs.rows, backend="triton", **keywords)
            for _ in range(2)
        )
        assert torch.equal(first, second)
        exact = dense_row_propagation(inputs, phi, True, torch.float64)
        assert_within_error_budget(first, exact, dense_row_propagation(inputs, phi, True, dtype), dtype)


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
@pytest.mark.parametrize("shape", MODEL_SHAPES)
def test_explanations_on_the_gpu_are_within_the_error_budget(shape: str, dtype: torch.dtype) -> None:
    model = build_model(**MODEL_SHAPES[shape]).to("cuda", dtype)
    images = images_for(model, 4).to("cuda", dtype)
    methods = [info.name for info in vitexplain.methods()]
    reference = DenseReference(model, images)
    plain = DenseReference(model, images, dtype=dtype)
    target = reference.logits.argmax(-1)
    ours = vitexplain.explain(model, images, target=target, method=methods)
    prefix = model.num_prefix_tokens
    for name in methods:
        exact = reference.explain(name, target)
        values = torch.cat([ours[name].prefix_values, ours[name].maps.flatten(1)], -1)
        eager = rms_error(plain.explain(name, target), exact)
        assert values.shape[1] == prefix + model.patch_embed.num_patches
        assert rms_error(values, exact) <= 2 * eager + 4 * torch.finfo(dtype).eps, name
