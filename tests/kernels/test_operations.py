"""Every operation against float64, by tiled torch and, with TRITON_INTERPRET=1, by its Triton kernel."""

from __future__ import annotations

import dataclasses
import importlib
import itertools
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

from vitexplain.kernels import (
    PHIS,
    add_token_transformation,
    attention_backward,
    attention_token_transformation,
    contribution_map,
    head_norms,
    interpreting,
    relevance_backward,
    relevance_rows,
    row_propagation,
    row_propagation_by_head,
    token_transformation,
)
from vitexplain.kernels.launch import forced_config
from vitexplain.kernels.launch_table import TileConfig

from .conftest import DTYPES
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

pytestmark = pytest.mark.interpreter

LENGTHS = [1, 16, 17, 197, 198, 257]
LONG = [577, 1025, 1370]  # one image
HEAD_DIMS = [16, 32, 48, 72, 80, 88, 128, 256]
SHAPES = [*((n, 64) for n in LENGTHS), *((33, dh) for dh in HEAD_DIMS), *((n, 64) for n in LONG)]
# The interpreter takes seconds for a long sequence. Two lengths of which each has all kinds of tiles, and every type: 1025 has
# a last block of one key, as 257 has it.
SHAPES_AND_DTYPES = [
    (n, head_dim, dtype)
    for n, head_dim in SHAPES
    for dtype in DTYPES
    if not interpreting() or n not in LONG or n == 577 or (n, dtype) == (1370, torch.float32)
]
SWITCHES = list(itertools.product((True, False), repeat=2))
# Weighings, masks and weights are chosen apart from each other: every two of them meet, and not every three.
WEIGHINGS = [(mask, phi, (i + j) % 2 == 0) for i, mask in enumerate(MASKS) for j, phi in enumerate(PHIS)]


@pytest.fixture
def shape_of_tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """The interpreter's time goes with the number of tiles: large ones for long sequences."""
    n = request.node.callspec.params.get("n", 0)
    config = TileConfig(128, 256, 4, 1) if n in LONG else TileConfig(64, 128, 4, 1) if n >= 130 else None
    with forced_config(config) if config and interpreting() else nullcontext():
        yield


def _inputs(n: int, head_dim: int, dtype: torch.dtype, **options: object) -> AttentionInputs:
    few = {"batch": 1, "heads": 2} if n in LONG else {}
    return attention_inputs(n, head_dim, dtype, **few, **options)


@pytest.mark.usefixtures("shape_of_tiles")
@pytest.mark.parametrize(("n", "head_dim", "dtype"), SHAPES_AND_DTYPES, ids=str)
def test_row_propagation_of_one_row(backend, n: int, head_dim: int, dtype: torch.dtype) -> None:
    inputs = _inputs(n, head_dim, dtype)
    for phi, weighted in (("p", False), ("p_relu_g", True)):
        actual = row_propagation(*inputs.layer, inputs.rows, backend=backend, **inputs.keywords(phi, weighted))
        exact, plain = (dense_row_propagation(inputs, phi, weighted, kind) for kind in (torch.float64, dtype))
        assert_within_error_budget(actual, exact, plain, dtype)


@pytest.mark.parametrize(("mask", "phi", "weighted"), WEIGHINGS)
@pytest.mark.parametrize("num_rows", [1, 5])
def test_row_propagation_with_every_weighing_and_mask(backend, num_rows: int, mask: str, phi: str, weighted: bool) -> None:
    for dtype in DTYPES:
        inputs = attention_inputs(37, 32, dtype, num_rows=num_rows, mask=mask)
        keywords = inputs.keywords(phi, weighted)
        actual = row_propagation(*inputs.layer, inputs.rows, backend=backend, factor=0.5, residual=0.25, **keywords)
        exact, plain = (
            0.5 * dense_row_propagation(inputs, phi, weighted, kind) + 0.25 * inputs.rows for kind in (torch.float64, dtype)
        )
        assert_within_error_budget(actual, exact, plain, dtype)


@pytest.mark.parametrize("phi", ["p", "p_relu_g"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "num_rows", "num_queries"), [(40, 40, None), (33, 1, 1), (65, 2, 3), (17, 33, 2), (70, 90, None)])
def test_row_propagation_of_many_rows_and_of_leading_queries(
    backend, n: int, num_rows: int, num_queries, dtype, phi: str
) -> None:
    inputs = attention_inputs(n, 48, dtype, num_rows=num_rows, num_queries=num_queries)
    actual = row_propagation(*inputs.layer, inputs.rows, backend=backend, residual=1.0, **inputs.keywords(phi, weighted=True))
    exact, plain = (dense_row_propagation(inputs, phi, True, kind) for kind in (torch.float64, dtype))
    for expected in (exact, plain):
        expected[..., : inputs.rows.shape[-1]] += inputs.rows
    assert_within_error_budget(actual, exact, plain, dtype)


@pytest.mark.usefixtures("shape_of_tiles")
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "num_queries", "mask"), [(17, None, "none"), (70, None, "boolean"), (65, 2, "none")])
def test_rows_and_norms_of_every_head(backend, n: int, num_queries, mask: str, dtype: torch.dtype, phi: str) -> None:
    inputs = attention_inputs(n, 48, dtype, num_queries=num_queries, mask=mask)
    rows = inputs.rows[:, 0]
    gradient = {"value": inputs.value, "grad_out": inputs.grad_out}
    keywords = {"phi": phi, "scale": inputs.scale, "mask": inputs.mask, "backend": backend, **gradient}
    moved, norms = row_propagation_by_head(*inputs.layer, rows, norms=True, **keywords)
    exact, plain = (torch.einsum("bi,bhij->bhj", rows.to(m.dtype), m) for m in _maps(inputs, phi, dtype))
    assert_within_error_budget(moved, exact, plain, dtype)
    exact, plain = (dense_head_norms(inputs.value, inputs.grad_out, "l1", kind) for kind in (torch.float64, dtype))
    assert_within_error_budget(norms, exact, plain, dtype)
    without, nothing = row_propagation_by_head(*inputs.layer, rows, **keywords)
    assert torch.equal(without, moved)
    assert nothing.numel() == 0


def _maps(inputs: AttentionInputs, phi: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    return dense_maps(inputs, phi, torch.float64), dense_maps(inputs, phi, dtype)


@pytest.mark.usefixtures("shape_of_tiles")
@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("n", "head_dim", "num_queries"), [(1, 64, None), (17, 80, None), (65, 48, None), (197, 64, None), (65, 64, 1)]
)
def test_head_norms(backend, n: int, head_dim: int, num_queries, dtype: torch.dtype, norm: str) -> None:
    inputs = attention_inputs(n, head_dim, dtype, num_queries=num_queries)
    actual = head_norms(inputs.value, inputs.grad_out, norm=norm, backend=backend)
    exact, plain = (dense_head_norms(inputs.value, inputs.grad_out, norm, kind) for kind in (torch.float64, dtype))
    assert_within_error_budget(actual, exact, plain, dtype)


@pytest.mark.usefixtures("shape_of_tiles")
@pytest.mark.parametrize(("n", "head_dim", "dtype"), SHAPES_AND_DTYPES, ids=str)
def test_attention_backward_beside_the_row(backend, n: int, head_dim: int, dtype: torch.dtype) -> None:
    _check_backward(_inputs(n, head_dim, dtype), "p_relu_g", False, dtype, backend)


@pytest.mark.usefixtures("shape_of_tiles")
@pytest.mark.parametrize("phi", PHIS)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_backward_with_every_weighing_and_mask(backend, mask: str, phi: str) -> None:
    meeting = MASKS.index(mask) + list(PHIS).index(phi)  # under the interpreter every type meets every mask, and every weighing
    for dtype in (DTYPES[meeting % len(DTYPES)],) if interpreting() else DTYPES:
        _check_backward(attention_inputs(70, 32, dtype, mask=mask), phi, True, dtype, backend)


def _check_backward(inputs: AttentionInputs, phi: str, norms: bool, dtype: torch.dtype, backend: str) -> None:
    rows = inputs.rows[:, 0]
    *gradients, moved, sums = attention_backward(
        inputs.query, inputs.key, inputs.value, inputs.out, inputs.grad_out, inputs.logsumexp, rows,
        phi=phi, scale=inputs.scale, mask=inputs.mask, norms=norms, backend=backend,
    )  # fmt: skip
    expected = dense_backward(inputs, torch.float64)
    largest = max(float(exact.abs().max()) for exact in expected)  # with one key, dq and dk are exactly zero
    for actual, exact, plain in zip(gradients, expected, dense_backward(inputs, dtype), strict=True):
        assert actual.dtype == dtype
        assert_within_error_budget(actual, exact, plain, dtype, largest)
    exact, plain = (torch.einsum("bi,bhij->bhj", rows.to(m.dtype), m) for m in _maps(inputs, phi, dtype))
    assert_within_error_budget(moved, exact, plain, dtype)
    if norms:
        exact, plain = (dense_head_norms(inputs.value, inputs.grad_out, "l1", kind) for kind in (torch.float64, dtype))
        assert_within_error_budget(sums, exact, plain, dtype)
    else:
        assert sums.numel() == 0


WHOLE_AND_ONE_QUERY = [None, 1]


@pytest.mark.parametrize("row", ["no row", "row", "row of the gradient"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_queries", WHOLE_AND_ONE_QUERY)
@pytest.mark.parametrize(("n", "head_dim"), [*((n, 64) for n in (1, 17, 33, 65)), *((33, dh) for dh in (16, 24, 128))])
def test_relevance_beside_the_row(backend, n: int, head_dim: int, num_queries, dtype: torch.dtype, row: str) -> None:
    inputs = attention_inputs(n, head_dim, dtype, num_queries=num_queries, whole_numbers=True)
    _check_relevance(inputs, row, dtype, backend)


@pytest.mark.usefixtures("shape_of_tiles")
@pytest.mark.parametrize("n", [197, 577])
def test_relevance_of_long_sequences(backend, n: int) -> None:
    _check_relevance(_inputs(n, 64, torch.float32, whole_numbers=True), "row of the gradient", torch.float32, backend)


@pytest.mark.parametrize("row", ["no row", "row", "row of the gradient"])
@pytest.mark.parametrize("num_queries", WHOLE_AND_ONE_QUERY)
@pytest.mark.parametrize("mask", MASKS)
def test_relevance_with_every_mask(backend, mask: str, num_queries, row: str) -> None:
    for dtype in DTYPES:
        inputs = attention_inputs(33, 24, dtype, num_queries=num_queries, mask=mask, whole_numbers=True)
        _check_relevance(inputs, row, dtype, backend)


def _relevance_row(inputs: AttentionInputs, row: str) -> dict[str, torch.Tensor]:
    rows = {} if row == "no row" else {"rows": inputs.rows[:, 0]}
    return {**rows, "grad_out": inputs.grad_out} if row == "row of the gradient" else rows


def _relevance(inputs: AttentionInputs, row: str, backend: str) -> tuple[torch.Tensor, ...]:
    return relevance_backward(
        inputs.query, inputs.key, inputs.value, inputs.ratio, inputs.logsumexp,
        **_relevance_row(inputs, row), scale=inputs.scale, mask=inputs.mask, backend=backend,
    )  # fmt: skip


def _check_relevance(inputs: AttentionInputs, row: str, dtype: torch.dtype, backend: str) -> None:
    *relevance, moved = _relevance(inputs, row, backend)
    gradient = row == "row of the gradient"
    *exact, exact_row = dense_relevance(inputs, gradient, torch.float64)
    *plain, plain_row = dense_relevance(inputs, gradient, dtype)
    for tensors in zip(relevance, exact, plain, strict=True):
        assert tensors[0].dtype == dtype
        assert_within_error_budget(*tensors, dtype)
    if row == "no row":
        assert moved.numel() == 0
        return
    assert_within_error_budget(moved, exact_row, plain_row, dtype)
    alone = relevance_rows(
        inputs.query, inputs.key, inputs.value, inputs.ratio, inputs.logsumexp,
        **_relevance_row(inputs, row), scale=inputs.scale, mask=inputs.mask, backend=backend,
    )  # fmt: skip
    assert torch.equal(alone, moved)


def test_no_relevance_is_made_of_nothing(backend) -> None:
    """Queries and keys with a product of 0 have no share of the map's relevance; a query of zeros has none at all."""
    inputs = attention_inputs(33, 16, torch.float32, whole_numbers=True)
    products = inputs.query @ inputs.key.transpose(-1, -2)
    assert (products == 0).sum() > 100
    inputs.query[:, :, 5] = 0
    inputs.logsumexp[:, :, 5] = torch.tensor(33.0).log()
    _check_relevance(inputs, "row", torch.float32, backend)
    *relevance, _ = _relevance(inputs, "row", backend)
    assert (relevance[0][:, :, 5] == 0).all()
    nothing = dataclasses.replace(inputs, query=torch.zeros_like(inputs.query))
    *relevance, _ = _relevance(nothing, "no row", backend)
    assert all((tensor == 0).all() for tensor in relevance[:2])
    assert (relevance[2] != 0).any()


def test_a_product_that_the_stabilizer_would_cancel_is_divided_by_the_stabilizer(backend) -> None:
    inputs = attention_inputs(1, 16, torch.float32)
    query, key = torch.zeros_like(inputs.query), torch.zeros_like(inputs.key)
    query[..., 3], key[..., 3] = 1.0, -1e-9
    alone = dataclasses.replace(inputs, query=query, key=key, logsumexp=torch.zeros_like(inputs.logsumexp))
    *relevance, _ = _relevance(alone, "no row", backend)
    expected = -0.25 * (inputs.ratio * inputs.value).sum(-1)
    for tensor in relevance[:2]:
        torch.testing.assert_close(tensor[..., 3], expected)


@pytest.mark.parametrize("masked", [-torch.inf, torch.finfo(torch.float32).min], ids=["-inf", "finfo.min"])
@pytest.mark.parametrize("mask", ["boolean", "padding"])
def test_relevance_of_keys_that_are_masked_by_adding(backend, mask: str, masked: float) -> None:
    inputs = attention_inputs(33, 24, torch.float32, mask=mask)
    added = dataclasses.replace(inputs, mask=torch.zeros(inputs.mask.shape).masked_fill(~inputs.mask, masked))
    results = (_relevance(each, "row of the gradient", backend) for each in (inputs, added))
    for expected, actual in zip(*results, strict=True):
        assert torch.isfinite(actual).all()
        torch.testing.assert_close(actual, expected)


@pytest.mark.skipif(not interpreting(), reason="how work is split over programs is the Triton kernels' affair")
@pytest.mark.parametrize("splits", [1, 3])
def test_however_work_is_split_over_programs(monkeypatch, splits: int) -> None:
    """A device's size decides it: one program may walk over all key blocks, heads or tokens, or several share them."""
    for module in ("attention_backward", "attention_relevance", "head_norms", "row_propagation"):
        kernel = importlib.import_module(f"vitexplain.kernels.{module}.triton_kernel")
        monkeypatch.setattr(kernel, "splits_to_fill", lambda largest, *_: min(largest, splits))
    for dtype in DTYPES:
        inputs = attention_inputs(100, 48, dtype)
        with forced_config(TileConfig(32, 32, 4, 1)):
            _check_backward(inputs, "p_relu_g", True, dtype, "triton")
            whole = attention_inputs(100, 48, dtype, whole_numbers=True)
            _check_relevance(whole, "row of the gradient", dtype, "triton")
            rows = row_propagation(*inputs.layer, inputs.rows, residual=1.0, backend="triton", **inputs.keywords("p", True))
            norms = head_norms(inputs.value, inputs.grad_out, norm="l2", backend="triton")
        exact, plain = (dense_row_propagation(inputs, "p", True, kind) + inputs.rows for kind in (torch.float64, dtype))
        assert_within_error_budget(rows, exact, plain, dtype)
        exact, plain = (dense_head_norms(inputs.value, inputs.grad_out, "l2", kind) for kind in (torch.float64, dtype))
        assert_within_error_budget(norms, exact, plain, dtype)


@pytest.mark.usefixtures("shape_of_tiles")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "head_dim"), [*((n, 64) for n in (1, 16, 17, 65, 130, 577)), *((33, dh) for dh in HEAD_DIMS)])
def test_contribution_map(backend, n: int, head_dim: int, dtype: torch.dtype) -> None:
    _check_map(_inputs(n, head_dim, dtype), "p_relu_g", True, dtype, backend)


@pytest.mark.parametrize(("mask", "phi", "weighted"), WEIGHINGS)
def test_contribution_map_with_every_weighing_and_mask(backend, mask: str, phi: str, weighted: bool) -> None:
    for dtype in DTYPES:
        _check_map(attention_inputs(37, 32, dtype, mask=mask), phi, weighted, dtype, backend)


def _check_map(inputs: AttentionInputs, phi: str, weighted: bool, dtype: torch.dtype, backend: str) -> None:
    batch, _, n, _ = inputs.query.shape
    generator = torch.Generator().manual_seed(n)
    contribution = torch.rand(batch, n, n, generator=generator)
    factors = inputs.row_factors if weighted else None
    actual = contribution_map(
        *inputs.layer, contribution, row_factors=factors, factor=0.5, residual=0.75, backend=backend,
        **inputs.keywords(phi, weighted),
    )  # fmt: skip

    def dense(kind: torch.dtype) -> torch.Tensor:
        update = 0.5 * dense_update(inputs, phi, weighted, kind)
        composed = (update + 0.75 * torch.eye(n, dtype=update.dtype)) @ contribution.to(update.dtype)
        return composed if factors is None else factors.to(update.dtype).unsqueeze(-1) * composed

    assert_within_error_budget(actual, dense(torch.float64), dense(dtype), dtype)


@pytest.mark.parametrize(("length", "necc"), SWITCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "width"), [(1, 48), (17, 192), (65, 100), (197, 384), (1370, 64)])
def test_token_transformation(backend, n: int, width: int, dtype: torch.dtype, length: bool, necc: bool) -> None:
    generator = torch.Generator().manual_seed(n)
    tokens, branch, moved = torch.randn(3, 2, n, width, generator=generator).to(dtype).unbind(0)
    switches = {"length": length, "necc": necc, "necc_scale": float(n), "backend": backend}
    summed, beside = add_token_transformation(tokens, branch, moved, **switches)
    assert torch.equal(summed, tokens + branch)
    for entering, actual in ((tokens, token_transformation(tokens, moved, **switches)), (summed, beside)):
        exact, plain = (dense_token_transformation(entering, moved, length, necc, n, kind) for kind in (torch.float64, dtype))
        assert_within_error_budget(actual, exact, plain, dtype)


@pytest.mark.parametrize(("length", "necc"), SWITCHES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "head_dim"), [(1, 64), (17, 48), (65, 80), (197, 64), (33, 256), (577, 32)])
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
    """Results are made inside larger buffers of sentinels, which must survive, beside the same results."""
    inputs = attention_inputs(33, 48, torch.float32, num_rows=3)
    tokens = torch.randn(3, 2, 33, 40).unbind(0)
    weight = torch.randn(40, 3 * 48)

    def everything() -> list[torch.Tensor]:
        keywords = {"phi": "p_relu_g", "scale": inputs.scale, "backend": backend}
        gradient = {"value": inputs.value, "grad_out": inputs.grad_out}
        one = inputs.rows[:, 0]
        return [
            row_propagation(*inputs.layer, inputs.rows, **gradient, **keywords),
            row_propagation(*inputs.layer, inputs.rows[:, :1], **gradient, **keywords),
            *row_propagation_by_head(*inputs.layer, one, norms=True, **gradient, **keywords),
            head_norms(inputs.value, inputs.grad_out, backend=backend),
            contribution_map(*inputs.layer, torch.eye(33).expand(2, -1, -1), **gradient, **keywords),
            *attention_backward(
                inputs.query, inputs.key, inputs.value, inputs.out, inputs.grad_out, inputs.logsumexp, one, norms=True, **keywords
            ),
            *_relevance(inputs, "row of the gradient", backend),
            *_relevance(inputs, "no row", backend),
            *add_token_transformation(*tokens, backend=backend),
            attention_token_transformation(tokens[0], inputs.value, weight, backend=backend),
        ]

    real_empty, guarded = torch.empty, []

    def empty_with_guards(*shape, **options) -> torch.Tensor:
        shape = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
        numel = int(torch.Size(shape).numel())
        buffer = torch.full((numel + 128,), 12345.0, dtype=options.get("dtype"), device=options.get("device"))
        guarded.append((buffer, numel))
        return buffer[64 : 64 + numel].view(shape)

    expected = everything()
    monkeypatch.setattr(torch, "empty", empty_with_guards)
    actual = everything()
    monkeypatch.setattr(torch, "empty", real_empty)
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))
    assert guarded or backend == "torch"
    for buffer, numel in guarded:
        assert (buffer[:64] == 12345).all()
        assert (buffer[64 + numel :] == 12345).all()


@pytest.mark.parametrize("shape", ["class_token_n17", "mean_pooling"])
@pytest.mark.parametrize("passes", ["one pass", "two passes"])
def test_a_whole_explanation_by_every_method(backend, shape: str, passes: str) -> None:
    import vitexplain
    from vitexplain.kernels.attention_backward.choose import forced

    from ..conftest import METHODS as methods
    from ..conftest import MODEL_SHAPES, all_tokens, build_model, images_for, relative_error

    model = build_model(**MODEL_SHAPES[shape])
    images = images_for(model, 2)
    with forced(passes):
        ours = vitexplain.explain(model, images, method=methods, backend=backend)
    dense = vitexplain.explain(model, images, method=methods, backend="dense")
    for name in methods:
        assert relative_error(all_tokens(ours[name]), all_tokens(dense[name])) <= 1e-5, name


def test_all_rows_of_every_chain(backend) -> None:
    import vitexplain

    from ..conftest import MODEL_SHAPES, build_model, images_for, relative_error

    model = build_model(**MODEL_SHAPES["class_token_n17"])
    images = images_for(model, 2)
    methods = [info.name for info in vitexplain.methods() if info.all_rows]
    ours = vitexplain.explain(model, images, method=methods, rows="all", backend=backend)
    dense = vitexplain.explain(model, images, method=methods, rows="all", backend="dense")
    for name in methods:
        assert relative_error(ours[name].contribution, dense[name].contribution) <= 1e-5, name


@pytest.mark.skipif(interpreting(), reason="how tiles are summed is tiled torch's affair")
def test_many_small_shares_reach_a_token_that_has_kept_its_weight() -> None:
    """Each tile's share is about a rounding of what token 0 holds: added one by one, in float32, they would be lost."""
    n, heads = 16384, 6
    nothing = torch.zeros(1, heads, n, 8)
    logsumexp = torch.full((1, heads, n), float(torch.tensor(n).log()))
    rows = torch.full((1, 1, n), 0.5 / (n - 1))
    rows[..., 0] = 0.5
    moved = row_propagation(nothing, nothing, logsumexp, rows, phi="p", scale=1.0, factor=0.5, residual=0.5, backend="torch")
    exact = 0.5 * rows.double() + 0.5 * rows.double().sum() / n
    assert float(((moved.double() - exact) / exact).abs().max()) < 2e-6
