"""Every kernel variant that explanations launch compiles on a machine without a GPU, within its budget."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="needs triton, which this platform has no wheel for")

from vitexplain.kernels import interpreting
from vitexplain.kernels.aot.budgets import violations
from vitexplain.kernels.aot.compile import build_image, shipped_variants

pytestmark = pytest.mark.skipif(interpreting(), reason="interpreting and compiling cannot share a process")

KERNELS = (
    "single_row", "many_rows", "attention_backward", "contribution_map", "l2_head_norms", "delta", "normalise",
    "^token_transformation", "attention_token_transformation",
)  # fmt: skip
# The build compiles everything for every architecture; here all of bfloat16, and of the others one architecture each.
COMBINATIONS = [
    *((architecture, "bfloat16", 64) for architecture in ("80", "89", "90", "100", "gfx942")),
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
    for number, variant in enumerate(variants):
        image = build_image(variant, architecture, tmp_path, f"{number}")
        assert list(violations(image, architecture)) == [], (variant, image.registers, image.instructions)


def test_no_kernel_is_left_out() -> None:
    for variant in shipped_variants("90", ["bfloat16"], [64]):
        assert any(variant.kernel.startswith(kernel.removeprefix("^")) for kernel in KERNELS), variant.kernel
