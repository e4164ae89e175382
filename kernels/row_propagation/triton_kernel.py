"""``row_propagation`` in Triton: tiles of P and G are made in registers, weighed, and reduced at once.

One running row: a program owns a block of keys, keeps its keys and values in place, and walks over heads and query
blocks. Tiles are keys × queries, so that the sum over queries stays within a few lanes of a warp. Where key blocks alone
do not fill the device, heads are split over programs, whose partial sums are added in a fixed order; split all the way,
the same kernel leaves every head's own row, and the L1 norm of its gradient.

Many rows: a program owns a block of keys and a block of rows; heads are averaged inside the tile before the tile is
multiplied, so that the long product is done once and not once per head.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch, tile_config
from ..launch_table import TileConfig
from ..phi import WITH_MAP
from ..triton_common import (
    KERNEL_LOG2_E,
    LENGTHS,
    LOG2_E,
    SMALLEST_PRODUCT,
    averaged_tile,
    check_dtype,
    check_value_width,
    dot_precision,
    float32_product_precision,
    load_head,
    mask_kind,
    mask_pointer,
    mask_tile,
    padded_head_dim,
    probabilities,
    splits_to_fill,
    strides,
    weighed,
    with_unit_last_stride,
)


@triton.jit(do_not_specialize=[*LENGTHS, "num_queries", "num_keys", "num_heads_per_split"])
def single_row_kernel(
    query, key, value, grad_out, logsumexp, mask, rows, head_weights, token_weights, out, norms,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    stride_logsumexp_batch, stride_logsumexp_head,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_rows_batch,
    num_heads, num_queries, num_keys, num_heads_per_split, scale_log2, factor, residual,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    PHI: tl.constexpr, USE_MAP: tl.constexpr, USE_GRAD: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (key blocks, head splits, B); ``out`` (B, splits, n), ``norms`` (B, splits, key blocks) or None."""
    i_n, i_split, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < num_keys
    b_out = tl.zeros((BLOCK_N,), dtype=tl.float32)
    b_norm = tl.zeros((BLOCK_N,), dtype=tl.float32)
    p_rows = rows + i_b * stride_rows_batch
    first_head = i_split * num_heads_per_split
    for head in range(first_head, tl.minimum(first_head + num_heads_per_split, num_heads)):
        i_h = tl.cast(head, tl.int64)
        if USE_MAP:
            p_logsumexp = logsumexp + i_b * stride_logsumexp_batch + i_h * stride_logsumexp_head
            p_query = query + i_b * stride_query_batch + i_h * stride_query_head
            p_key = key + i_b * stride_key_batch + i_h * stride_key_head
            b_key = load_head(p_key, stride_key_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        if USE_GRAD:
            p_grad_out = grad_out + i_b * stride_grad_batch + i_h * stride_grad_head
            p_value = value + i_b * stride_value_batch + i_h * stride_value_head
            b_value = load_head(p_value, stride_value_token, o_n, m_n, HEAD_DIM, BLOCK_D)  # (BLOCK_N, BLOCK_D)
        b_head = tl.zeros((BLOCK_N,), dtype=tl.float32)
        for start in range(0, num_queries, BLOCK_M):
            o_m = start + tl.arange(0, BLOCK_M)
            m_m = o_m < num_queries
            b_map = tl.zeros((BLOCK_N, BLOCK_M), dtype=tl.float32)
            b_grad = b_map
            if USE_MAP:
                b_query = load_head(p_query, stride_query_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
                b_lse = tl.load(p_logsumexp + o_m, mask=m_m, other=float("inf")).to(tl.float32) * KERNEL_LOG2_E
                b_scores = tl.dot(b_key, tl.trans(b_query), input_precision=PRECISION) * scale_log2  # (BLOCK_N, BLOCK_M)
                if MASK != "none":
                    p_mask = mask + i_b * stride_mask_batch + i_h * stride_mask_head
                    b_scores += mask_tile(p_mask, stride_mask_key, stride_mask_query, o_n, o_m, m_n, m_m, MASK)
                b_map = probabilities(b_scores, b_lse[None, :], MASK)
            if USE_GRAD:
                b_grad_out = load_head(p_grad_out, stride_grad_token, o_m, m_m, HEAD_DIM, BLOCK_D)  # (BLOCK_M, BLOCK_D)
                b_grad = tl.dot(b_value, tl.trans(b_grad_out), input_precision=PRECISION)  # (BLOCK_N, BLOCK_M)
            if norms is not None:
                b_norm += tl.sum(tl.abs(b_grad), axis=1)
            b_rows = tl.load(p_rows + o_m, mask=m_m, other=0.0)  # (BLOCK_M,)
            b_head += tl.sum(weighed(b_map, b_grad, PHI) * b_rows[None, :], axis=1)
        i_bh = i_b * num_heads + i_h
        if token_weights is not None:
            b_head *= tl.load(token_weights + i_bh * num_keys + o_n, mask=m_n, other=0.0)
        if head_weights is not None:
            b_head *= tl.load(head_weights + i_bh)
        b_out += b_head
    b_out *= factor
    if i_split == 0:
        b_out += residual * tl.load(p_rows + o_n, mask=o_n < tl.minimum(num_queries, num_keys), other=0.0)
    i_out = i_b * tl.num_programs(1) + i_split
    tl.store(out + i_out * num_keys + o_n, b_out, mask=m_n)
    if norms is not None:
        tl.store(norms + i_out * tl.num_programs(0) + i_n, tl.sum(b_norm, axis=0))


@triton.jit(do_not_specialize=[*LENGTHS, "num_queries", "num_keys", "num_rows", "stride_rows_row"])
def many_rows_kernel(
    query, key, value, grad_out, logsumexp, mask, rows, head_weights, token_weights, out,
    stride_query_batch, stride_query_head, stride_query_token,
    stride_key_batch, stride_key_head, stride_key_token,
    stride_value_batch, stride_value_head, stride_value_token,
    stride_grad_batch, stride_grad_head, stride_grad_token,
    stride_logsumexp_batch, stride_logsumexp_head,
    stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
    stride_rows_batch, stride_rows_row,
    num_heads, num_queries, num_keys, num_rows, scale_log2, factor, residual,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    PHI: tl.constexpr, USE_MAP: tl.constexpr, USE_GRAD: tl.constexpr, MASK: tl.constexpr,
    PRECISION: tl.constexpr, ROWS_PRECISION: tl.constexpr,
):  # fmt: skip
    """grid (key blocks, row blocks, B); ``rows`` (B, K, m), ``out`` (B, K, n)."""
    i_n, i_k, i_b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = i_k * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n, m_k = o_n < num_keys, o_k < num_rows
    p_rows = rows + i_b * stride_rows_batch
    b_out = tl.zeros((BLOCK_K, BLOCK_N), dtype=tl.float32)
    for start in range(0, num_queries, BLOCK_M):
        o_m = start + tl.arange(0, BLOCK_M)
        m_m = o_m < num_queries
        b_update = averaged_tile(
            query, key, value, grad_out, logsumexp, mask, head_weights, token_weights,
            stride_query_batch, stride_query_head, stride_query_token,
            stride_key_batch, stride_key_head, stride_key_token,
            stride_value_batch, stride_value_head, stride_value_token,
            stride_grad_batch, stride_grad_head, stride_grad_token,
            stride_logsumexp_batch, stride_logsumexp_head,
            stride_mask_batch, stride_mask_head, stride_mask_query, stride_mask_key,
            i_b, o_m, m_m, o_n, m_n, num_heads, num_keys, scale_log2,
            HEAD_DIM, BLOCK_D, BLOCK_M, BLOCK_N, PHI, USE_MAP, USE_GRAD, MASK, PRECISION,
        )  # fmt: skip
        p_tile = p_rows + o_k.to(tl.int64)[:, None] * stride_rows_row + o_m[None, :]
        b_rows = tl.load(p_tile, mask=m_k[:, None] & m_m[None, :], other=0.0)  # (BLOCK_K, BLOCK_M)
        b_out += tl.dot(b_rows, b_update, input_precision=ROWS_PRECISION)
    p_tile = p_rows + o_k.to(tl.int64)[:, None] * stride_rows_row + o_n[None, :]
    m_residual = m_k[:, None] & (o_n < tl.minimum(num_queries, num_keys))[None, :]
    b_out = b_out * factor + residual * tl.load(p_tile, mask=m_residual, other=0.0)
    p_out = out + (i_b * num_rows + o_k.to(tl.int64)[:, None]) * num_keys + o_n[None, :]
    tl.store(p_out, b_out, mask=m_k[:, None] & m_n[None, :])


def launch_rows(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    grad_out: Tensor | None,
    logsumexp: Tensor | None,
    rows: Tensor,
    head_weights: Tensor | None,
    token_weights: Tensor | None,
    mask: Tensor | None,
    scale: float,
    factor: float,
    residual: float,
    phi: str,
) -> Tensor:
    """See ``row_propagation``; ``rows`` (B, K, m) gives (B, K, n) float32."""
    inputs = _Inputs(query, key, value, grad_out, logsumexp, rows, head_weights, token_weights, mask, scale, phi)
    factor = factor / inputs.heads if head_weights is None else factor
    if rows.shape[1] == 1:
        out, _ = _single_row(inputs, factor, residual, by_head=False, norms=False)
        return out if out.shape[1] == 1 else out.sum(1, keepdim=True)
    config = inputs.config("many_rows")
    block_k = min(64, max(SMALLEST_PRODUCT, triton.next_power_of_2(inputs.num_rows)))
    out = torch.empty(inputs.batch, inputs.num_rows, inputs.num_keys, dtype=torch.float32, device=rows.device)
    grid = (triton.cdiv(inputs.num_keys, config.block_n), triton.cdiv(inputs.num_rows, block_k), inputs.batch)
    arguments = (
        *inputs.pointers(), out, *inputs.strides(), *inputs.rows.stride()[:2],
        inputs.heads, inputs.num_queries, inputs.num_keys, inputs.num_rows, float(scale * LOG2_E), float(factor), float(residual),
    )  # fmt: skip
    constants = {**inputs.constants(config), "BLOCK_K": block_k, "ROWS_PRECISION": float32_product_precision(inputs.source)}
    launch(many_rows_kernel, grid, arguments, constants, config)
    return out


def launch_by_head(
    query: Tensor | None,
    key: Tensor | None,
    value: Tensor | None,
    grad_out: Tensor | None,
    logsumexp: Tensor | None,
    rows: Tensor,
    mask: Tensor | None,
    scale: float,
    phi: str,
    norms: bool,
) -> tuple[Tensor, Tensor]:
    """See ``row_propagation_by_head``: (B, H, n) and (B, H) float32; the latter is empty where no norms are asked for."""
    inputs = _Inputs(query, key, value, grad_out, logsumexp, rows.unsqueeze(1), None, None, mask, scale, phi)
    return _single_row(inputs, 1.0, 0.0, by_head=True, norms=norms)


class _Inputs:
    """The arguments that both kernels share, made ready for them."""

    def __init__(self, query, key, value, grad_out, logsumexp, rows, head_weights, token_weights, mask, scale, phi) -> None:
        self.source = query if phi in WITH_MAP else value  # whose element type and device decide
        check_dtype(self.source)
        self.batch, self.heads, _, self.head_dim = self.source.shape
        self.num_keys = (key if phi in WITH_MAP else value).shape[2]
        self.num_rows, self.num_queries = rows.shape[1:]
        self.phi, self.scale = phi, scale
        if phi in WITH_MAP and value is not None:
            check_value_width(self.head_dim, value)
        self.query, self.key, self.value, self.grad_out = map(with_unit_last_stride, (query, key, value, grad_out))
        self.logsumexp = with_unit_last_stride(None if logsumexp is None else logsumexp.float())
        self.rows = with_unit_last_stride(rows.float())
        self.head_weights = None if head_weights is None else head_weights.float().contiguous()
        self.token_weights = None if token_weights is None else token_weights.float().contiguous()
        self.mask = mask

    def config(self, kernel: str) -> TileConfig:
        """From the launch table; a handful of query rows (a class-token head's last block) has rows of its own there."""
        name = f"{kernel}_few" if self.num_queries <= SMALLEST_PRODUCT else kernel
        return tile_config(name, self.source, padded_head_dim(self.head_dim), self.num_keys)

    def pointers(self) -> tuple[Tensor | None, ...]:
        """In the kernels' order."""
        return (
            self.query, self.key, self.value, self.grad_out, self.logsumexp, mask_pointer(self.mask), self.rows,
            self.head_weights, self.token_weights,
        )  # fmt: skip

    def strides(self) -> tuple[int, ...]:
        """In the kernels' order, without those of the rows."""
        heads = [strides(tensor, 3) for tensor in (self.query, self.key, self.value, self.grad_out)]
        return (*sum(heads, ()), *strides(self.logsumexp, 2), *strides(self.mask, 4))

    def constants(self, config: TileConfig) -> dict[str, object]:
        """Compile-time values that both kernels take."""
        return {
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded_head_dim(self.head_dim),
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "PHI": self.phi,
            "USE_MAP": self.phi in WITH_MAP,
            "USE_GRAD": self.value is not None,
            "MASK": mask_kind(self.mask),
            "PRECISION": dot_precision(self.source.dtype),
        }


def _single_row(inputs: _Inputs, factor: float, residual: float, *, by_head: bool, norms: bool) -> tuple[Tensor, Tensor]:
    """Partial rows (B, splits, n) to be added, and the norms (B, splits)."""
    config = inputs.config("single_row")
    key_blocks = triton.cdiv(inputs.num_keys, config.block_n)
    device, heads = inputs.rows.device, inputs.heads
    wanted = heads if by_head else splits_to_fill(heads, key_blocks * inputs.batch, device)
    per_split = triton.cdiv(heads, wanted)
    splits = triton.cdiv(heads, per_split)
    out = torch.empty(inputs.batch, splits, inputs.num_keys, dtype=torch.float32, device=device)
    partial_norms = torch.empty(inputs.batch, splits, key_blocks, dtype=torch.float32, device=device) if norms else None
    arguments = (
        *inputs.pointers(), out, partial_norms, *inputs.strides(), inputs.rows.stride(0),
        heads, inputs.num_queries, inputs.num_keys, per_split, float(inputs.scale * LOG2_E), float(factor), float(residual),
    )  # fmt: skip
    launch(single_row_kernel, (key_blocks, splits, inputs.batch), arguments, inputs.constants(config), config)
    return out, out.new_empty(0) if partial_norms is None else partial_norms.sum(-1)
