"""The C++ product that gives a linear layer's weight its gradient, called with tensors."""

from __future__ import annotations

import torch

from antlm_fast.kernels.native.library import Library, library, unavailable_reason


def no_tiles_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Why `weight_gradient` cannot serve tensors of a device and dtype, or None."""
    if dtype != torch.bfloat16:
        return f"the C++ weight gradient multiplies bfloat16, not {str(dtype).removeprefix('torch.')}"
    reason = unavailable_reason(device_type, dtype)
    if reason is not None:
        return reason
    if library().instruction_set != "amx":
        return "the C++ weight gradient needs a processor with AMX"
    return None


def weight_gradient(
    dy: torch.Tensor,
    x: torch.Tensor,
    *,
    dtype: torch.dtype = torch.bfloat16,
    out: torch.Tensor | None = None,
    add: bool = False,
    column_sums: torch.Tensor | None = None,
    kernels: Library | None = None,
) -> torch.Tensor:
    """dy^T @ x, where `no_tiles_reason` is None.

    Args:
        dy, x: bfloat16, (rows, out_rows) and (rows, columns), with any strides.
        dtype: of the result, bfloat16 or float32, where `out` is not given.
        out: (out_rows, columns), bfloat16 or float32, each row in one piece; None makes it.
        add: add to `out` instead of replacing it.
        column_sums: float32 (out_rows,), in one piece: receives the sums of dy's columns, the bias's gradient.

    Returns:
        `out`. Sums are accumulated in float32 and rounded once.

    Determinism: the number of threads does not matter.
    """
    dy, x = _rows_in_one_piece(dy), _rows_in_one_piece(x)
    if out is None:
        out = dy.new_empty((dy.shape[1], x.shape[1]), dtype=dtype)
    sizes = (dy.shape[0], dy.shape[1], x.shape[1], dy.stride(0), x.stride(0), out.stride(0))
    (kernels or library()).call("weight_gradient", dy, x, out, column_sums, *sizes, out.dtype == torch.bfloat16, add)
    return out


def _rows_in_one_piece(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 and x.stride(0) >= x.shape[1] else x.contiguous()
