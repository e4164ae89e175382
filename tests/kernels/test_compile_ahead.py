"""Every kernel variant that explanations launch compiles on a machine without a GPU, within its budget."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")

from vitexplain.kernels import interpreting
from vitexplain.kernels.aot.budgets import violations
from vitexplain.kernels.aot.compile import build_image, compile_variant, shipped_variants
from vitexplain.kernels.attention_backward.triton_kernel import launch_backward
from vitexplain.kernels.attention_relevance.triton_kernel import launch_backward as launch_relevance
from vitexplain.kernels.attention_relevance.triton_kernel import launch_rows as launch_relevance_rows
from vitexplain.kernels.contribution_map.triton_kernel import launch_map
from vitexplain.kernels.launch import KernelVariant, recorded_launches
from vitexplain.kernels.row_propagation.triton_kernel import launch_rows
from vitexplain.kernels.shipped_variants import ShippedInputs

pytestmark = pytest.mark.skipif(interpreting(), reason="interpreting and compiling cannot share a process")

KERNELS = (
    "single_row", "many_rows", "attention_backward", "attention_relevance", "contribution_map", "l2_head_norms", "delta",
    "normalise", "^token_transformation", "attention_token_transformation",
)  # fmt: skip
# ``make aot`` compiles everything for every architecture. Here it is everything of the architecture that figures are made on, and
# elsewhere, of each kernel, tile and weighing, the variants that are given most tensors: what the others are not given costs
# registers and shared memory, and is left out of the same code.
EVERYTHING = ("90", "bfloat16", 64)
COMBINATIONS = [
    EVERYTHING,
    *((architecture, "bfloat16", 64) for architecture in ("80", "89", "100", "gfx942")),
    ("90", "float32", 64),
    ("80", "float16", 80),
]


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(("architecture", "dtype", "head_dim"), COMBINATIONS)
def test_every_shipped_variant_compiles_within_its_budget(
    tmp_path, architecture: str, dtype: str, head_dim: int, kernel: str
) -> None:
    variants = shipped_variants(architecture, [dtype], [head_dim], kernel)
    assert variants
    if (architecture, dtype, head_dim) != EVERYTHING:
        variants = heaviest(variants)
    # sm_89 has the instructions of sm_80 and less shared memory: what both are given is compiled once, and held to both budgets
    others = (
        set(shipped_variants({"80": "89", "89": "80"}[architecture], [dtype], [head_dim])) if architecture[0] == "8" else set()
    )
    for number, variant in enumerate(variants):
        if architecture == "89" and variant in others:
            continue
        image = build_image(variant, architecture, tmp_path, f"{number}")
        for held in (architecture, "89") if variant in others else (architecture,):
            assert list(violations(image, held)) == [], (held, variant, image.registers, image.instructions)


def heaviest(variants: list[KernelVariant]) -> list[KernelVariant]:
    """Without those that are given only some of the tensors of another one, and are like it in all else."""
    return [variant for variant in variants if not any(_is_part(variant, other) for other in variants)]


def _is_part(variant: KernelVariant, other: KernelVariant) -> bool:
    same = (_alike(each) for each in (variant, other))
    return next(same) == next(same) and {name for name, _ in variant.types} < {name for name, _ in other.types}


def _alike(variant: KernelVariant) -> tuple[object, ...]:
    constants = tuple(pair for pair in variant.constants if pair[1] is not None)
    return variant.kernel, constants, variant.num_warps, variant.num_stages, variant.max_registers


def test_every_tile_and_weighing_has_its_heaviest_variant() -> None:
    variants = shipped_variants("80", ["bfloat16"], [64])
    kept = heaviest(variants)
    assert len(kept) < len(variants)
    assert set(map(_alike, kept)) == set(map(_alike, variants))
    for variant in set(variants) - set(kept):
        assert any(_is_part(variant, other) for other in kept), variant


def test_no_kernel_is_left_out() -> None:
    for variant in shipped_variants("90", ["bfloat16"], [64]):
        assert any(variant.kernel.startswith(kernel.removeprefix("^")) for kernel in KERNELS), variant.kernel


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize(
    ("phi", "mask_dtype"),
    [("p_g", torch.bool), ("p", torch.bfloat16), ("p_relu_g", torch.float32), ("relu_g", None), ("abs_g", None)],
    ids=str,
)
def test_masks_and_other_weighings_compile_when_they_are_met(phi: str, mask_dtype, architecture: str) -> None:
    """They are not shipped; Triton compiles them at their first launch."""
    inputs = ShippedInputs(torch.bfloat16, 64, 197)
    mask = None if mask_dtype is None else torch.empty(2, 1, 197, 197, dtype=mask_dtype, device="meta").expand(-1, 4, -1, -1)
    layer = inputs.query, inputs.key, inputs.value, inputs.grad_out, inputs.logsumexp
    rows, contribution = inputs.logsumexp, torch.empty(2, 197, 197, device="meta")
    with recorded_launches(architecture) as variants:
        for running in (rows, rows[:, :1]):
            launch_rows(*layer, running, None, None, mask, 0.125, 1.0, 0.0, phi)
        launch_map(*layer, contribution, None, None, None, mask, 0.125, 1.0, 1.0, phi)
        launch_backward(*layer[:3], inputs.out, *layer[3:], rows[:, 0], mask, 0.125, phi, True)
    for variant in variants:
        assert compile_variant(variant, architecture).asm["cubin"]


@pytest.mark.parametrize("architecture", ["80", "90"])
@pytest.mark.parametrize("mask_dtype", [torch.bool, torch.float32], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_relevance_with_masks_and_of_half_types_compiles_when_met(dtype: torch.dtype, mask_dtype, architecture: str) -> None:
    inputs = ShippedInputs(dtype, 64, 197)
    mask = torch.empty(2, 1, 197, 197, dtype=mask_dtype, device="meta").expand(-1, 4, -1, -1)
    layer = inputs.query, inputs.key, inputs.value, inputs.out, inputs.logsumexp
    with recorded_launches(architecture) as variants:
        for launch_one in (launch_relevance, launch_relevance_rows):
            launch_one(*layer, inputs.logsumexp[:, 0], inputs.grad_out, mask, inputs.scale)
    for variant in variants:
        assert compile_variant(variant, architecture).asm["cubin"]
