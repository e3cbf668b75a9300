"""How an attention call becomes launches of its kernels: arguments, programs, tiles.

The same description is launched on a device, or compiled for one that is not there (tensors on the meta device).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from antlm_fast.kernels.attention.triton_dkdv import dkdv_kernel
from antlm_fast.kernels.attention.triton_dq import delta_kernel, dq_kernel
from antlm_fast.kernels.attention.triton_forward import forward_kernel
from antlm_fast.kernels.attention.triton_tables import RelativeTerms, padded_table_rows
from antlm_fast.kernels.philox import drop_threshold
from antlm_fast.kernels.triton_support.launch import (
    Launch,
    Tile,
    arch_of,
    kind_of,
    log2_scale,
    padded_head_dim,
    read_tiles,
)

TILES = Path(__file__).with_name("tiles.json")


def offline_launches(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    kv_heads: int,
    *,
    dropout: bool,
    kind: str,
    bucket_size: int | None = None,
) -> list[Launch]:
    """The four kernels as a training step on that architecture launches them, on tensors without memory.

    Args:
        arch: a row of the table of tiles, such as "sm_90".
        dtype: float16, bfloat16 or float32.
        head_dim, heads, kv_heads: the model's.
        dropout: whether attention probabilities are dropped.
        kind: what launch.kind_of would answer on the device: "half", "tf32" or "ieee".
        bucket_size: of disentangled attention with both of its terms; None is plain attention.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    q, kv = (empty(4096, n, head_dim) for n in (heads, kv_heads))
    sums, starts = empty(heads, 4096, dtype=torch.float32), empty(9, dtype=torch.int32)
    seed = empty(dtype=torch.int64) if dropout else None
    term = relative = None
    if bucket_size is not None:
        rows = padded_table_rows(bucket_size)
        term = empty(heads, 4096, rows)
        relative = RelativeTerms(term, term, *(empty(n, dtype=torch.int32) for n in (2049, 2049, rows)))
    call = AttentionLaunches(
        q, kv, kv, starts, starts, starts[:8], seed, relative, head_dim**-0.5, 0.1 * dropout, 512, 512, True,
        arch, kind,
    )  # fmt: skip
    return [
        call.forward(q, sums),
        delta_launch(q, q, sums, arch),
        call.dq(q, sums, sums, q, term),
        call.dkdv(q, sums, sums, kv, kv, term),
    ]


def delta_launch(out: torch.Tensor, d_out: torch.Tensor, delta: torch.Tensor, arch: str | None = None) -> Launch:
    total, heads, head_dim = out.shape
    block_d = padded_head_dim(head_dim)
    arguments = {
        "out_ptr": out.contiguous(),
        "d_out_ptr": d_out.contiguous(),
        "delta_ptr": delta,
        "heads": heads,
        "total_q": total,
        "HEAD_DIM": head_dim,
        "BLOCK_D": block_d,
    }
    tile = tile_for("delta", arch or arch_of(out.device), head_dim)
    return Launch(delta_kernel, lambda tile: -(-total // tile.block_m) * heads, arguments, tile)


def tile_for(use: str, arch: str, head_dim: int) -> Tile:
    """The tile that the table gives a kernel: "delta", or "forward", "dq", "dkdv" with the kind of its numbers.

    With " relative", " dropout" or both at the end it is the row for relative terms, for dropout; an option that the
    table has no row for at this head size leaves one stage less, for it takes shared memory too.
    """
    uses, size = read_tiles(TILES)[arch], str(padded_head_dim(head_dim))
    without = 0
    while use.count(" ") > 1 and size not in uses.get(use, {}):
        use, without = use.rpartition(" ")[0], without + 1
    tile = uses[use][size]
    return replace(tile, num_stages=max(tile.num_stages - without, 1))


class AttentionLaunches:
    """The launches of one attention call, and what its kernels share. Arguments as of the custom ops."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        prefix_len: torch.Tensor,
        dropout_seed: torch.Tensor | None,
        relative: RelativeTerms | None,
        softmax_scale: float,
        dropout_p: float,
        max_q: int,
        max_k: int,
        slack: bool,
        arch: str | None = None,
        kind: str | None = None,
    ) -> None:
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        self.total_q, self.heads, self.head_dim = q.shape
        self.total_k, self.kv_heads, _ = k.shape
        # a caller may name any bound; none is larger than the rows there are
        self.max_q, self.max_k = max_q, max_k = min(max_q, self.total_q), min(max_k, self.total_k)
        self.sequences = cu_q.numel() - 1 + slack  # the slack's programs are those of one more sequence
        self.softmax_scale = softmax_scale
        self.relative = relative
        self.arch, self.kind = arch or arch_of(q.device), kind or kind_of(q.dtype)
        # a loop's offsets within a sequence are 32 bits wide where that is enough, a tile past its end included
        strides = [q.stride(0), k.stride(0), v.stride(0), self.heads * self.head_dim]
        strides += [relative.table_rows] if relative else []
        furthest = (max(max_q, max_k) + 256) * max(strides)
        self.arguments: dict[str, Any] = {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "cu_seqlens_q_ptr": cu_q,
            "cu_seqlens_k_ptr": cu_k,
            "prefix_len_ptr": prefix_len,
            "dropout_seed_ptr": dropout_seed,
            "c2p_ptr": relative and relative.c2p,
            "p2c_ptr": relative and relative.p2c,
            "buckets_ptr": relative and relative.mirrored,
            "stride_qt": q.stride(0),
            "stride_qh": q.stride(1),
            "stride_kt": k.stride(0),
            "stride_kh": k.stride(1),
            "stride_vt": v.stride(0),
            "stride_vh": v.stride(1),
            "stride_prefix": prefix_len.stride(0),
            "scale_log2": log2_scale(softmax_scale),
            "drop_below": drop_threshold(dropout_p) - 2**31,
            "inverse_keep": 1.0 / (1.0 - dropout_p),
            "num_seqs": cu_q.numel() - 1,
            "heads": self.heads,
            "group": self.heads // self.kv_heads,
            "total_q": self.total_q,
            "total_k": relative and self.total_k,
            "reach": relative and relative.reach,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded_head_dim(self.head_dim),
            "TABLE_ROWS": relative.table_rows if relative else 0,
            "DROPOUT": dropout_seed is not None,
            "PRECISION": "tf32" if self.kind == "tf32" else "ieee",  # 16-bit products know no difference
            "WIDE": furthest >= 2**31,
        }

    def forward(self, out: torch.Tensor, log2_sums: torch.Tensor) -> Launch:
        arguments = {**self.arguments, "out_ptr": out, "log2_sums_ptr": log2_sums, "max_seqlen_q": self.max_q}
        return Launch(forward_kernel, self._row_tiles, arguments, self._tile("forward"))

    def dq(
        self,
        d_out: torch.Tensor,
        log2_sums: torch.Tensor,
        delta: torch.Tensor,
        dq: torch.Tensor,
        dc2p: torch.Tensor | None = None,
    ) -> Launch:
        arguments = {
            **self._backward(d_out, log2_sums, delta),
            "dq_ptr": dq,
            "dc2p_ptr": dc2p,
            "max_seqlen_q": self.max_q,
        }
        return Launch(dq_kernel, self._row_tiles, arguments, self._tile("dq"))

    def dkdv(
        self,
        d_out: torch.Tensor,
        log2_sums: torch.Tensor,
        delta: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
        dp2c: torch.Tensor | None = None,
    ) -> Launch:
        arguments = {
            **self._backward(d_out, log2_sums, delta),
            "dk_ptr": dk,
            "dv_ptr": dv,
            "dp2c_ptr": dp2c,
            "buckets_ptr": self.relative and self.relative.buckets,
            "total_k": self.total_k,
            "max_seqlen_k": self.max_k,
        }
        return Launch(dkdv_kernel, self._key_tiles, arguments, self._tile("dkdv"))

    def _backward(self, d_out: torch.Tensor, log2_sums: torch.Tensor, delta: torch.Tensor) -> dict[str, Any]:
        return {
            **self.arguments,
            "d_out_ptr": d_out.contiguous(),
            "log2_sums_ptr": log2_sums,
            "delta_ptr": delta,
            "run_starts_ptr": self.relative and self.relative.run_starts,
            "softmax_scale": self.softmax_scale,
        }

    def _row_tiles(self, tile: Tile) -> int:
        return max(-(-self.max_q // tile.block_m), 1) * self.heads * self.sequences

    def _key_tiles(self, tile: Tile) -> int:
        return max(-(-self.max_k // tile.block_n), 1) * self.kv_heads * self.sequences

    def _tile(self, kernel: str) -> Tile:
        options = f"{' relative' if self.relative else ''}{' dropout' if self.arguments['DROPOUT'] else ''}"
        tile = tile_for(f"{kernel} {self.kind}{options}", self.arch, self.head_dim)
        # the table's are for 32 buckets; dq holds a number for each row and column of c2p, dkdv for each of p2c
        times = max(self.relative.table_rows // 64, 1) if self.relative else 1
        if kernel == "dq":
            tile = replace(tile, block_m=max(tile.block_m // times, 16))
        if kernel == "dkdv":
            tile = replace(tile, block_n=max(tile.block_n // times, 16))
        return tile
