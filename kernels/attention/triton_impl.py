"""Fused attention in Triton, as custom ops: forward, delta, dQ, dK/dV.

Sequences are packed; a dense batch is a view of packed rows. No value of a flag or a length is read on the host, so a
call neither waits for the device nor compiles anew when a flag changes, and a CUDA graph that holds it replays with the
flags' values of the moment. The ops are opaque to torch.compile.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from antlm_fast.kernels.attention.triton_backward import delta_kernel, dkdv_kernel, dq_kernel
from antlm_fast.kernels.attention.triton_forward import forward_kernel
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


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    prefix_len: int | torch.Tensor,
    *,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Dense attention; arguments as in api.attention, with one prefix length for all (int) or for each sequence."""
    batch, len_q, heads, _ = q.shape
    len_k = k.shape[1]
    rows = max(batch * len_q, batch * len_k)
    if rows >= 2**31:
        raise ValueError(f"q and k must have fewer than 2**31 rows; got {rows}")
    counts = torch.arange(batch + 1, dtype=torch.int32, device=q.device)
    out, lse = _attention(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        counts * len_q,
        counts * len_k,
        len_q,
        len_k,
        prefix_len,
        softmax_scale,
        dropout_p,
        dropout_seed,
        return_lse,
        slack=False,
    )
    return out.view(q.shape), None if lse is None else lse.view(heads, batch, len_q).transpose(0, 1).contiguous()


def attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    prefix_len: int | torch.Tensor,
    *,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Packed attention; arguments as in api.attention_varlen, with one prefix length for all (int) or for each."""
    return _attention(
        q,
        k,
        v,
        cu_seqlens_q.contiguous(),
        cu_seqlens_k.contiguous(),
        max_seqlen_q,
        max_seqlen_k,
        prefix_len,
        softmax_scale,
        dropout_p,
        dropout_seed,
        return_lse,
        slack=True,
    )


def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    max_q: int,
    max_k: int,
    prefix_len: int | torch.Tensor,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
    *,
    slack: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if isinstance(prefix_len, int):
        prefix_len = torch.full((1,), prefix_len, dtype=torch.int32, device=q.device).expand(cu_q.numel() - 1)
    if softmax_scale < 0:  # the kernels scale the maximum, not the scores, which keeps the order only upwards
        q, softmax_scale = -q, -softmax_scale
    out, log2_sums = forward_op(
        q, k, v, cu_q, cu_k, prefix_len, dropout_seed, softmax_scale, dropout_p, max_q, max_k, slack
    )
    if not return_lse:
        return out, None
    lse = log2_sums.detach() / log2_scale(1.0)
    return out, lse.masked_fill(torch.isposinf(lse), -torch.inf)


@torch.library.custom_op("antlm_fast::attention_forward", mutates_args=())
def forward_op(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: torch.Tensor,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    max_q: int,
    max_k: int,
    slack: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out, log2 of the softmax's denominators (heads, total_q): +inf where a row sees no key)."""
    out, log2_sums = _new_forward(q)
    call = _Call(q, k, v, cu_q, cu_k, prefix_len, dropout_seed, softmax_scale, dropout_p, max_q, max_k, slack)
    call.forward(out, log2_sums).run(q.device)
    return out, log2_sums


@forward_op.register_fake
def _(q, k, v, *rest):  # type: ignore[no-untyped-def]
    return _new_forward(q)


def _new_forward(q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty((q.shape[1], q.shape[0]), dtype=torch.float32)


@torch.library.custom_op("antlm_fast::attention_delta", mutates_args=())
def delta_op(out: torch.Tensor, d_out: torch.Tensor) -> torch.Tensor:
    """float32 (heads, total_q): each row's product of output and upstream gradient."""
    delta = _new_delta(out)
    delta_launch(out, d_out, delta, arch_of(out.device)).run(out.device)
    return delta


@delta_op.register_fake
def _(out, d_out):  # type: ignore[no-untyped-def]
    return _new_delta(out)


def _new_delta(out: torch.Tensor) -> torch.Tensor:
    return out.new_empty((out.shape[1], out.shape[0]), dtype=torch.float32)


@torch.library.custom_op("antlm_fast::attention_backward_q", mutates_args=())
def backward_q_op(
    d_out: torch.Tensor,
    log2_sums: torch.Tensor,
    delta: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: torch.Tensor,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    max_q: int,
    max_k: int,
    slack: bool,
) -> torch.Tensor:
    """The gradient of q."""
    dq = q.new_empty(q.shape)
    call = _Call(q, k, v, cu_q, cu_k, prefix_len, dropout_seed, softmax_scale, dropout_p, max_q, max_k, slack)
    call.dq(d_out, log2_sums, delta, dq).run(q.device)
    return dq


@backward_q_op.register_fake
def _(d_out, log2_sums, delta, q, *rest):  # type: ignore[no-untyped-def]
    return q.new_empty(q.shape)


@torch.library.custom_op("antlm_fast::attention_backward_kv", mutates_args=())
def backward_kv_op(
    d_out: torch.Tensor,
    log2_sums: torch.Tensor,
    delta: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cu_q: torch.Tensor,
    cu_k: torch.Tensor,
    prefix_len: torch.Tensor,
    dropout_seed: torch.Tensor | None,
    softmax_scale: float,
    dropout_p: float,
    max_q: int,
    max_k: int,
    slack: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of k and v."""
    dk, dv = k.new_empty(k.shape), v.new_empty(v.shape)
    call = _Call(q, k, v, cu_q, cu_k, prefix_len, dropout_seed, softmax_scale, dropout_p, max_q, max_k, slack)
    call.dkdv(d_out, log2_sums, delta, dk, dv).run(q.device)
    return dk, dv


@backward_kv_op.register_fake
def _(d_out, log2_sums, delta, q, k, v, *rest):  # type: ignore[no-untyped-def]
    return k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    q, k, v, cu_q, cu_k, prefix_len, dropout_seed, *ctx.settings = inputs
    ctx.save_for_backward(q, k, v, cu_q, cu_k, prefix_len, dropout_seed, *output)


def _backward(ctx, d_out, _):  # type: ignore[no-untyped-def]
    *call, out, log2_sums = ctx.saved_tensors
    d_out = d_out.contiguous()
    arguments = (d_out, log2_sums, delta_op(out, d_out), *call, *ctx.settings)
    wants_q, wants_k, wants_v = ctx.needs_input_grad[:3]
    dq = backward_q_op(*arguments) if wants_q else None
    dk, dv = backward_kv_op(*arguments) if wants_k or wants_v else (None, None)
    return dq, dk, dv, *[None] * 9


forward_op.register_autograd(_backward, setup_context=_save)


def offline_launches(
    arch: str, dtype: torch.dtype, head_dim: int, heads: int, kv_heads: int, *, dropout: bool, kind: str
) -> list[Launch]:
    """The four kernels as a training step on that architecture launches them, on tensors without memory.

    Args:
        arch: a row of the table of tiles, such as "sm_90".
        dtype: float16, bfloat16 or float32.
        head_dim, heads, kv_heads: the model's.
        dropout: whether attention probabilities are dropped.
        kind: what launch.kind_of would answer on the device: "half", "tf32" or "ieee".
    """
    with torch.device("meta"):
        q, kv = (torch.empty(4096, n, head_dim, dtype=dtype) for n in (heads, kv_heads))
        sums, starts = torch.empty(heads, 4096), torch.empty(9, dtype=torch.int32)
        seed = torch.empty((), dtype=torch.int64) if dropout else None
        call = _Call(
            q, kv, kv, starts, starts, starts[:8], seed, head_dim**-0.5, 0.1 * dropout, 512, 512, True, arch, kind
        )
        return [
            call.forward(q, sums),
            delta_launch(q, q, sums, arch),
            call.dq(q, sums, sums, q),
            call.dkdv(q, sums, sums, kv, kv),
        ]


def delta_launch(out: torch.Tensor, d_out: torch.Tensor, delta: torch.Tensor, arch: str) -> Launch:
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
    tile = tile_for("delta", arch, head_dim)
    return Launch(delta_kernel, lambda tile: -(-total // tile.block_m) * heads, arguments, tile)


def tile_for(use: str, arch: str, head_dim: int) -> Tile:
    """The tile that the table gives a kernel: "delta", or "forward", "dq", "dkdv" with the kind of its numbers.

    With " dropout" at the end it is the row for dropout, where the table has one.
    """
    uses = read_tiles(TILES)[arch]
    sizes = uses.get(use) or uses[use.removesuffix(" dropout")]
    return sizes[str(padded_head_dim(head_dim))]


class _Call:
    """What the kernels of one attention call share; on the meta device it describes a call without data."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_q: torch.Tensor,
        cu_k: torch.Tensor,
        prefix_len: torch.Tensor,
        dropout_seed: torch.Tensor | None,
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
        self.max_q, self.max_k = max_q, max_k
        self.sequences = cu_q.numel() - 1 + slack  # the slack's programs are those of one more sequence
        self.softmax_scale = softmax_scale
        self.arch, self.kind = arch or arch_of(q.device), kind or kind_of(q.dtype)
        # a loop's offsets within a sequence are 32 bits wide where that is enough, a tile past its end included
        furthest = (max(max_q, max_k) + 256) * max(q.stride(0), k.stride(0), v.stride(0), self.heads * self.head_dim)
        self.arguments: dict[str, Any] = {
            "q_ptr": q,
            "k_ptr": k,
            "v_ptr": v,
            "cu_seqlens_q_ptr": cu_q,
            "cu_seqlens_k_ptr": cu_k,
            "prefix_len_ptr": prefix_len,
            "dropout_seed_ptr": dropout_seed,
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
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded_head_dim(self.head_dim),
            "DROPOUT": dropout_seed is not None,
            "PRECISION": "ieee" if self.kind == "ieee" else "tf32",
            "WIDE": furthest >= 2**31,
        }

    def forward(self, out: torch.Tensor, log2_sums: torch.Tensor) -> Launch:
        arguments = {**self.arguments, "out_ptr": out, "log2_sums_ptr": log2_sums, "max_seqlen_q": self.max_q}
        return Launch(forward_kernel, self._row_tiles, arguments, self._tile("forward"))

    def dq(self, d_out: torch.Tensor, log2_sums: torch.Tensor, delta: torch.Tensor, dq: torch.Tensor) -> Launch:
        arguments = {**self._backward(d_out, log2_sums, delta), "dq_ptr": dq, "max_seqlen_q": self.max_q}
        return Launch(dq_kernel, self._row_tiles, arguments, self._tile("dq"))

    def dkdv(
        self, d_out: torch.Tensor, log2_sums: torch.Tensor, delta: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor
    ) -> Launch:
        arguments = {
            **self._backward(d_out, log2_sums, delta),
            "dk_ptr": dk,
            "dv_ptr": dv,
            "total_k": self.total_k,
            "max_seqlen_k": self.max_k,
        }
        return Launch(dkdv_kernel, self._key_tiles, arguments, self._tile("dkdv"))

    def _backward(self, d_out: torch.Tensor, log2_sums: torch.Tensor, delta: torch.Tensor) -> dict[str, Any]:
        tensors = {"d_out_ptr": d_out, "log2_sums_ptr": log2_sums, "delta_ptr": delta}
        return {**self.arguments, **tensors, "softmax_scale": self.softmax_scale}

    def _row_tiles(self, tile: Tile) -> int:
        return max(-(-self.max_q // tile.block_m), 1) * self.heads * self.sequences

    def _key_tiles(self, tile: Tile) -> int:
        return max(-(-self.max_k // tile.block_n), 1) * self.kv_heads * self.sequences

    def _tile(self, kernel: str) -> Tile:
        dropout = " dropout" if self.arguments["DROPOUT"] else ""
        return tile_for(f"{kernel} {self.kind}{dropout}", self.arch, self.head_dim)
