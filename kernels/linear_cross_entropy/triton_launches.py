"""How a call of linear cross-entropy becomes launches of its kernels: arguments, programs, tiles.

The same description is launched on a device, or compiled for one that is not there (tensors on the meta device).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from antlm_fast.kernels.linear_cross_entropy.triton_kernels import d_logits_kernel, forward_kernel
from antlm_fast.kernels.triton_support.launch import Launch, Tile, arch_of, kind_of, read_tiles

TILES = Path(__file__).with_name("tiles.json")

# programs that the forward wants, where rows alone are too few: some waves of a large GPU. The same for every device,
# as the number of splits decides how sums are rounded
_PROGRAMS = 512
# a split's classes are a multiple of it, and it of every tile
_SPLIT_COLS = 256
# rows of d_logits begin at 16 numbers: the stores and the library's products need not care what the vocabulary is
_PADDING = 16
_GROUP = 8


def offline_launches(
    arch: str,
    dtype: torch.dtype,
    hidden_size: int,
    vocab_size: int,
    *,
    kind: str,
    biased: bool = False,
    softcap: bool = False,
    smoothed: bool = False,
    counted: bool = True,
) -> list[Launch]:
    """The two kernels as a training step on that architecture launches them, on tensors without memory.

    Args:
        arch: a row of the table of tiles, such as "sm_90".
        dtype: of the products: float16, bfloat16 or float32.
        hidden_size, vocab_size: the model's.
        kind: what launch.kind_of would answer on the device: "half", "tf32" or "ieee".
        biased, softcap, smoothed: whether the head has a bias, a softcap, the loss label smoothing.
        counted: whether a mask tells which rows count, as on CUDA it does.
    """

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    rows = 4096
    call = LinearCrossEntropyLaunches(
        empty(rows, hidden_size),
        empty(vocab_size, hidden_size),
        empty(vocab_size) if biased else None,
        empty(rows, dtype=torch.int64),
        empty(rows, dtype=torch.bool) if counted else None,
        30.0 if softcap else None,
        arch,
        kind,
    )
    per_row = empty(rows, dtype=torch.float32)
    return [
        call.forward(call.new_partials(smoothed)),
        call.d_logits(slice(0, rows), per_row, per_row, call.new_d_logits(rows), 0.0, 0.1 * smoothed),
    ]


def tile_for(use: str, arch: str) -> Tile:
    """The tile that the table gives a kernel: "forward" or "d_logits" with the kind of its numbers."""
    return read_tiles(TILES)[arch][use][str(block_k(use.split()[-1]))]


def block_k(kind: str) -> int:
    """How deep one step of a product is: 128 bytes of a row."""
    return 64 if kind == "half" else 32


class LinearCrossEntropyLaunches:
    """The launches of one call, and what its kernels share.

    Args:
        hidden, weight, bias: of one dtype, the compute dtype.
        targets, counts, softcap: as of the custom ops.
        arch, kind: as of offline_launches; None asks the device.
    """

    def __init__(
        self,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        counts: torch.Tensor | None,
        softcap: float | None,
        arch: str | None = None,
        kind: str | None = None,
    ) -> None:
        self.hidden, self.weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, weight))
        self.targets = targets.contiguous()
        self.counts = None if counts is None else counts.contiguous().view(torch.uint8)
        self.arch, self.kind = arch or arch_of(hidden.device), kind or kind_of(hidden.dtype)
        self.rows, self.vocab_size = hidden.shape[0], weight.shape[0]
        self.arguments: dict[str, Any] = {
            "weight_ptr": self.weight,
            "bias_ptr": None if bias is None else bias.contiguous(),
            "stride_h": self.hidden.stride(0),
            "stride_w": self.weight.stride(0),
            "softcap": softcap or 1.0,
            "inverse_cap": 1.0 / (softcap or 1.0),
            "vocab_size": self.vocab_size,
            "hidden_size": hidden.shape[1],
            "BLOCK_K": block_k(self.kind),
            "GROUP": _GROUP,
            "EVEN": hidden.shape[1] % block_k(self.kind) == 0,
            "BIASED": bias is not None,
            "COUNTED": counts is not None,
            "CAPPED": softcap is not None,
            "PRECISION": "ieee" if self.kind == "ieee" else "tf32",
        }
        # how the vocabulary is shared among programs: whole units, as few as give enough programs
        row_tiles = max(1, -(-self.rows // self._tile("forward").block_m))
        units = -(-self.vocab_size // _SPLIT_COLS)
        wanted = max(1, min(units, _PROGRAMS // row_tiles))
        self.split_cols = -(-units // wanted) * _SPLIT_COLS
        self.num_splits = -(-self.vocab_size // self.split_cols)

    def new_partials(self, smoothed: bool) -> torch.Tensor:
        """Room for what the forward's programs leave: 3 planes, or 4, of (splits, rows)."""
        return self.hidden.new_empty((4 if smoothed else 3, self.num_splits, self.rows), dtype=torch.float32)

    def new_d_logits(self, rows: int) -> torch.Tensor:
        """Room for the gradient by the logits of some rows, padding included."""
        return self.hidden.new_empty((rows, -(-self.vocab_size // _PADDING) * _PADDING))

    def chunks(self, workspace_mib: int) -> list[slice]:
        """The rows, as many at a time as the workspace holds logits of; chunks begin at rows that are aligned."""
        row_bytes = self.hidden.element_size() * -(-self.vocab_size // _PADDING) * _PADDING
        step = max(1, workspace_mib * 2**20 // row_bytes)
        unit = 128 if step >= 128 else 16 if step >= 16 else 1
        step = step // unit * unit
        return [slice(start, min(start + step, self.rows)) for start in range(0, self.rows, step)]

    def forward(self, partials: torch.Tensor) -> Launch:
        arguments = {
            **self.arguments,
            "hidden_ptr": self.hidden,
            "targets_ptr": self.targets,
            "counts_ptr": self.counts,
            "partials_ptr": partials,
            "num_rows": self.rows,
            "split_cols": self.split_cols,
            "num_splits": self.num_splits,
            "SMOOTHED": partials.shape[0] == 4,
        }
        programs = lambda tile: -(-self.rows // tile.block_m) * self.num_splits  # noqa: E731
        return Launch(forward_kernel, programs, arguments, self._tile("forward"))

    def d_logits(
        self,
        chunk: slice,
        lse: torch.Tensor,
        upstream: torch.Tensor,
        d_logits: torch.Tensor,
        z_loss: float,
        label_smoothing: float,
    ) -> Launch:
        """The gradient by a chunk's logits, into `d_logits`; lse and upstream are of all rows."""
        rows, padded = d_logits.shape
        arguments = {
            **self.arguments,
            "hidden_ptr": self.hidden[chunk],
            "targets_ptr": self.targets[chunk],
            "counts_ptr": None if self.counts is None else self.counts[chunk],
            "lse_ptr": lse[chunk],
            "upstream_ptr": upstream[chunk],
            "d_logits_ptr": d_logits,
            "stride_u": upstream.stride(0),
            "stride_d": padded,
            "twice_z_loss": 2.0 * z_loss,
            "share": label_smoothing / self.vocab_size,
            "certain": 1.0 - label_smoothing,
            "num_rows": rows,
        }
        programs = lambda tile: -(-rows // tile.block_m) * -(-padded // tile.block_n)  # noqa: E731
        return Launch(d_logits_kernel, programs, arguments, self._tile("d_logits"))

    def _tile(self, kernel: str) -> Tile:
        return tile_for(f"{kernel} {self.kind}", self.arch)
