"""The launch table, recorded launches, and the choice between one backward pass and two."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from vitexplain.kernels import interpreting, row_propagation
from vitexplain.kernels.attention_backward import choose
from vitexplain.kernels.launch_table import TableRow, TileConfig, looked_up, read_table, write_table

from .reference import attention_inputs

WIDTHS = (16, 32, 64, 128, 256)
HEAD_DIMS = {
    **dict.fromkeys(("single_row", "single_row_few", "many_rows", "many_rows_few", "attention_backward"), WIDTHS),
    **dict.fromkeys(("attention_relevance", "contribution_map", "attention_token_transformation", "l2_head_norms"), WIDTHS),
    "token_transformation": (128,),
}
PRECISIONS = ("half", "tf32", "ieee")
needs_triton = pytest.mark.skipif(
    interpreting(), reason="launches are recorded of compiled kernels, which the interpreter has not"
)


@pytest.mark.parametrize("architecture", ["80", "89", "90", "100", "120", "gfx942", "any"])
def test_the_table_serves_every_kernel_on_every_architecture(architecture: str) -> None:
    for kernel, head_dims in HEAD_DIMS.items():
        for precision in PRECISIONS:
            for head_dim in head_dims:
                for num_tokens in (1, 197, 16385):
                    config = looked_up(kernel, architecture, precision, head_dim, num_tokens)
                    assert min(config.block_m, config.block_n) >= 16
    with pytest.raises(LookupError, match="no row for single_row, 90, half, head width 48, 197 tokens"):
        looked_up("single_row", "90", "half", 48, 197)


def test_a_row_serves_up_to_its_number_of_tokens(tmp_path, monkeypatch) -> None:
    def row(architecture: str, tokens: str, block_m: int) -> TableRow:
        return TableRow("single_row", architecture, "half", "64", tokens, str(block_m), "64", "4", "2", "0", "a test")

    rows = [row("90", "any", 128), row("90", "300", 32), row("any", "any", 16)]
    write_table(rows, tmp_path / "table.csv")
    assert read_table(tmp_path / "table.csv") == [rows[1], rows[0], rows[2]], "sorted by the number of tokens"
    monkeypatch.setattr("vitexplain.kernels.launch_table.read_table", lambda: rows)
    for cached in ("_index", "looked_up"):
        monkeypatch.setattr(f"vitexplain.kernels.launch_table.{cached}", getattr(_module(), cached).__wrapped__)
    found = [_module().looked_up("single_row", *where).block_m for where in (
        ("90", "half", 64, 300), ("90", "half", 64, 301), ("80", "half", 64, 1),
    )]  # fmt: skip
    assert found == [32, 128, 16]


def _module():
    import vitexplain.kernels.launch_table as module

    return module


@needs_triton
def test_recorded_launches_run_nothing_and_say_what_would_run() -> None:
    pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")
    from vitexplain.kernels.launch import forced_config, recorded_launches
    from vitexplain.kernels.row_propagation.triton_kernel import launch_rows

    inputs = attention_inputs(33, 64, torch.float16)
    with recorded_launches("90") as variants, forced_config(TileConfig(64, 32, 8, 3, 168)):
        launch_rows(
            inputs.query, inputs.key, None, None, inputs.logsumexp, inputs.rows, None, None, None, inputs.scale, 1.0, 0.0, "p"
        )
    (variant,) = variants
    types, constants = dict(variant.types), dict(variant.constants)
    assert variant.kernel == "single_row_kernel"
    assert (variant.num_warps, variant.num_stages, variant.max_registers) == (8, 3, 168)
    assert (types["query"], types["logsumexp"], types["num_keys"], types["scale_log2"]) == ("*fp16", "*fp32", "i32", "fp32")
    assert constants["value"] is None
    assert (constants["BLOCK_M"], constants["BLOCK_N"], constants["PHI"]) == (64, 32, "p")
    assert "stride_query_head" in variant.divisible
    assert "num_keys" not in variant.divisible


@pytest.mark.interpreter
def test_offsets_beyond_two_to_the_31_elements(backend, monkeypatch) -> None:
    """Heads a billion elements apart, in memory that is reserved but hardly touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    small = attention_inputs(17, 16, torch.float16, batch=1)
    stride = 1_100_000_000
    storage = torch.empty(2 * stride + 17 * 16, dtype=torch.float16)
    expected = row_propagation(*small.layer, small.rows, backend=backend, **small.keywords("p_relu_g", True))
    for name in ("query", "key", "value", "grad_out"):
        view = storage.as_strided(small.query.shape, (3 * stride, stride, 16, 1))
        apart = dataclasses.replace(small, **{name: view.copy_(getattr(small, name))})
        actual = row_propagation(*apart.layer, apart.rows, backend=backend, **apart.keywords("p_relu_g", True))
        assert torch.equal(actual, expected), name


def test_the_nearest_measured_length_decides(monkeypatch) -> None:
    def decision(tokens: int, one: float, dtype: str = "bfloat16") -> choose.Decision:
        return choose.Decision("cpu", dtype, "64", str(tokens), "24", str(one), "2.0", "1.0", "a device", "versions")

    rows = [decision(197, 3.5), decision(1025, 2.5), decision(1025, 9.0, "float32")]
    monkeypatch.setattr(choose, "read_decisions", lambda: rows)
    monkeypatch.setattr(choose, "_decided", choose._decided.__wrapped__)
    query = torch.empty(1, 1, 1, 48, dtype=torch.bfloat16)
    assert [choose.one_pass_is_faster(query, n) for n in (16, 400, 500, 4097)] == [False, False, True, True]
    assert not choose.one_pass_is_faster(query.float(), 1025)
    assert not choose.one_pass_is_faster(query.half(), 1025), "nothing was measured: the library's backward"
    assert not choose.one_pass_is_faster(torch.empty(1, 1, 1, 128, dtype=torch.bfloat16), 1025)


def test_a_choice_can_be_forced_and_an_unknown_one_is_refused() -> None:
    query = torch.empty(1, 1, 1, 64)
    with choose.forced(choose.ONE_PASS):
        assert choose.one_pass_is_faster(query, 197)
        with choose.forced(choose.TWO_PASSES):
            assert not choose.one_pass_is_faster(query, 197)
        assert choose.one_pass_is_faster(query, 197)
    with pytest.raises(ValueError, match="choice: expected 'one pass' or 'two passes', received 'three'"), choose.forced("three"):
        pass


def test_the_committed_decisions_can_be_read() -> None:
    for row in choose.read_decisions():
        assert row.faster in (choose.ONE_PASS, choose.TWO_PASSES)
