"""The products around native_impl's pass: oneDNN's through torch, and for the parameters' gradients the library's own.

Rows of logits begin at multiples of _PADDING numbers: oneDNN writes rows that begin at odd places at half of its speed.
The padding of d_logits is 0, since oneDNN's tiles multiply some of a left factor's padding by 0, and NaN would stay.
"""

from __future__ import annotations

import torch
from torch import Tensor

from antlm_fast.kernels.native import weight_gradient as tiles
from antlm_fast.kernels.native.library import library

_PADDING = 32
# of many rows, so many logits at a time are projected a sixth faster than all; of few, a part is no faster
_PROJECTED_COLUMNS, _MANY_ROWS = 4096, 1024


def padded(size: int) -> int:
    """The length of a row in memory that is to hold `size` numbers."""
    return -(-size // _PADDING) * _PADDING


def project(hidden: Tensor, weight: Tensor, logits: Tensor) -> None:
    """logits = hidden @ weight^T."""
    vocab = weight.shape[0]
    step = _PROJECTED_COLUMNS if hidden.shape[0] >= _MANY_ROWS else vocab
    for start in range(0, vocab, step):
        columns = slice(start, start + step)
        torch.mm(hidden, weight[columns].t(), out=logits[:, columns])


def parameter_gradients(
    hidden: Tensor,
    d_logits: Tensor,
    of_rows: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    *,
    add: bool,
) -> None:
    """d_weight = d_logits^T @ hidden, or with `add` +=; d_bias += of_rows^T @ d_logits.

    Args:
        hidden: (rows, hidden_size) of d_logits' dtype, of_rows multiplied in.
        of_rows: float32 (rows,); None is 1 for each.
        d_weight: (vocab, hidden_size), float32 or d_logits' dtype; float32 with `add`.
        d_bias: float32 (vocab,).
    """
    if d_weight is not None and tiles.no_tiles_reason("cpu", d_logits.dtype) is None:
        # the product reads all of d_logits anyway, so sums of its columns cost nothing more
        sums = torch.empty_like(d_bias) if d_bias is not None and of_rows is None else None
        tiles.weight_gradient(d_logits, hidden, out=d_weight, add=add, column_sums=sums)
        if d_bias is not None and sums is not None:
            d_bias += sums
            return
    elif d_weight is not None:
        _product(d_logits.t(), hidden, d_weight, add=add)
    if d_bias is not None:
        is_bf16 = d_logits.dtype == torch.bfloat16
        sizes = (*d_logits.shape, d_logits.stride(0))
        library().call("cross_entropy_column_sums", d_logits, of_rows, d_bias, *sizes, is_bf16)


def _product(a: Tensor, b: Tensor, out: Tensor, *, add: bool) -> None:
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, beta=int(add), out=out)
    elif add:
        out += a @ b
    else:
        out.copy_(a @ b)
