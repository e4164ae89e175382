"""Every kernel variant compiles for four architectures on a machine without a GPU, within its resources."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from vitexplain.kernels import interpreting
from vitexplain.kernels.head_norms.triton_kernel import l1_head_norms_kernel
from vitexplain.kernels.row_propagation.triton_kernel import BLOCK_ROWS, many_rows_kernel, single_row_kernel
from vitexplain.kernels.token_transformation.attention_kernel import (
    BLOCK_COLUMNS,
    BLOCK_WIDTH,
    attention_token_transformation_kernel,
)
from vitexplain.kernels.token_transformation.common import BLOCK_TOKENS, ROWWISE_STAGES
from vitexplain.kernels.token_transformation.token_kernel import token_transformation_kernel
from vitexplain.kernels.triton_common import dot_precision, padded_head_dim, tile_config

# Shared memory a block can have, in bytes (CUDA programming guide, technical specifications per compute capability).
SHARED_MEMORY = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
TYPE_NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}
IN_INPUT_PRECISION = {"query", "key", "value", "grad_out", "tokens", "transformed", "projection"}
KERNELS = {
    "single_row": single_row_kernel,
    "many_rows": many_rows_kernel,
    "l1_head_norms": l1_head_norms_kernel,
    "token_transformation": token_transformation_kernel,
    "attention_token_transformation": attention_token_transformation_kernel,
}
WITHOUT_PRODUCTS = {"token_transformation"}


def _constants(name: str, dtype: torch.dtype, head_dim: int, weighted: bool) -> dict[str, object]:
    config, precision = tile_config(dtype, padded_head_dim(head_dim)), dot_precision(dtype)
    block_d = padded_head_dim(head_dim)
    tiles = {
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_M": config.block_m,
        "BLOCK_N": config.block_n,
        "PRECISION": precision,
    }
    flags = {"USE_GRAD": weighted, "USE_HEAD_WEIGHTS": weighted, "USE_TOKEN_WEIGHTS": weighted}
    rows = {"BLOCK_T": BLOCK_TOKENS, "BLOCK_W": BLOCK_WIDTH, "LENGTH": weighted, "NECC": weighted}
    return {
        "single_row": {**tiles, **flags},
        "many_rows": {**tiles, **flags, "BLOCK_K": BLOCK_ROWS},
        "l1_head_norms": tiles,
        "token_transformation": rows,
        "attention_token_transformation": {
            **rows, "HEAD_DIM": head_dim, "BLOCK_D": block_d, "PRECISION": precision, "SPLIT_GRAM": dtype != torch.float32,
            "BLOCK_C": min(BLOCK_COLUMNS, block_d),
        },
    }[name]  # fmt: skip


def _compile(name: str, dtype: torch.dtype, head_dim: int, weighted: bool, architecture: int):
    kernel, constants = KERNELS[name], _constants(name, dtype, head_dim, weighted)

    def argument_type(argument: str) -> str:
        if argument in constants:
            return "constexpr"
        if argument == "scale_log2":
            return "fp32"
        if argument.startswith(("stride_", "num_", "heads_", "width")):
            return "i32"
        return "*" + (TYPE_NAMES[dtype] if argument in IN_INPUT_PRECISION else "fp32")

    signature = {argument: argument_type(argument) for argument in kernel.arg_names}
    positions = {(kernel.arg_names.index(argument),): value for argument, value in constants.items()}
    config = tile_config(dtype, padded_head_dim(head_dim))
    rowwise = "transformation" in name
    options = {"num_warps": 4 if rowwise else config.num_warps, "num_stages": ROWWISE_STAGES if rowwise else config.num_stages}
    return triton.compile(ASTSource(kernel, signature, positions), target=GPUTarget("cuda", architecture, 32), options=options)


VARIANTS = [
    *((name, dtype, 64, True) for name in KERNELS for dtype in TYPE_NAMES),
    *((name, torch.bfloat16, 80, True) for name in ("single_row", "many_rows", "attention_token_transformation")),
    *((name, torch.bfloat16, 64, False) for name in ("single_row", "many_rows", "token_transformation")),
    *((name, torch.bfloat16, 256, True) for name in ("single_row", "attention_token_transformation")),
]


@pytest.mark.skipif(interpreting(), reason="interpreting and compiling cannot share a process")
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize(("name", "dtype", "head_dim", "weighted"), VARIANTS)
def test_a_kernel_compiles_within_the_architectures_resources(
    name: str, dtype: torch.dtype, head_dim: int, weighted: bool, architecture: int
) -> None:
    compiled = _compile(name, dtype, head_dim, weighted, architecture)
    assert compiled.asm["cubin"]
    assert compiled.metadata.shared <= SHARED_MEMORY[architecture]
    if dtype != torch.float32 and name not in WITHOUT_PRODUCTS:
        assert any(instruction in compiled.asm["ptx"] for instruction in ("mma.sync", "wgmma", "tcgen05")), "no tensor cores"
