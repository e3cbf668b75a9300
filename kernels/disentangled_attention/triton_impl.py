"""Disentangled attention in Triton: attention's kernels with relative terms, which are products made before them.

The terms take (heads, tokens, table rows) numbers each, so memory is linear in the length. As in attention, no value of
a flag, a length or a position is read on the host.

Queries of some rows alone (positions_q) are put at their places among zeros and all rows computed: exact, and no faster
than all of them. What is saved by asking for some rows is the work around attention.
"""

from __future__ import annotations

import torch

from antlm_fast.kernels.attention.triton_impl import attend
from antlm_fast.kernels.attention.triton_tables import padded_table_rows
from antlm_fast.kernels.tracing import first_order


def disentangled_attention_varlen(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    prefix_len: int | torch.Tensor,
    positions_q: torch.Tensor | None,
    *,
    max_position: int,
    softmax_scale: float,
    dropout_p: float,
    dropout_seed: torch.Tensor | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Arguments as in api.disentangled_attention_varlen, with one prefix length for all (int) or for each sequence."""
    cu_q, cu_k = cu_seqlens_q.contiguous(), cu_seqlens_k.contiguous()
    places = None
    if positions_q is not None:
        if k.shape[0] == 0:  # every row is slack
            no_sums = q.detach().new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=torch.float32)
            return q.masked_fill(torch.ones_like(q, dtype=torch.bool), 0.0), no_sums if return_lse else None
        places = _places(positions_q, cu_q, cu_k, k.shape[0])
        q = q.new_zeros(k.shape[0] + 1, *q.shape[1:]).index_copy(0, places, q)[:-1]
        cu_q, max_seqlen_q = cu_k, max_seqlen_k
    table = q_rel if k_rel is None else k_rel
    out, lse = attend(
        q,
        k,
        v,
        cu_q,
        cu_k,
        max_seqlen_q,
        max_seqlen_k,
        prefix_len,
        softmax_scale,
        dropout_p,
        dropout_seed,
        return_lse,
        slack=True,
        c2p=None if k_rel is None else relative_products_op(q, k_rel, cu_q),
        p2c=None if q_rel is None else relative_products_op(k, q_rel, cu_k),
        bucket_size=0 if table is None else (table.shape[0] + 1) // 2,
        max_position=max_position,
    )
    if places is None:
        return out, lse
    slack = places == k.shape[0]
    places = places.masked_fill(slack, 0)
    out = out.index_select(0, places).masked_fill(slack[:, None, None], 0.0)
    return out, None if lse is None else lse.index_select(1, places).masked_fill(slack, -torch.inf)


def _places(positions_q: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor, total_k: int) -> torch.Tensor:
    """int64 (total_q,): each query's row among the keys; total_k for a slack row."""
    rows = torch.arange(positions_q.numel(), dtype=cu_q.dtype, device=cu_q.device)
    seq = torch.searchsorted(cu_q, rows, right=True) - 1
    # the slack's rows come after the last sequence, and cu_k's last entry is read for them
    return torch.where(rows < cu_q[-1], cu_k[seq] + positions_q, total_k).long()


@torch.library.custom_op("antlm_fast::relative_products", mutates_args=())
def relative_products_op(x: torch.Tensor, table: torch.Tensor, cu: torch.Tensor) -> torch.Tensor:
    """(heads, total, table rows, padded): each row of x times each row of the table; the padding's columns are 0.

    Args:
        x: (total, heads, head_dim).
        table: (2 B - 1, heads, head_dim).
        cu: int32 (num_seqs + 1,): rows from cu[-1] on are slack, whose products mean nothing.
    """
    return torch.bmm(x.transpose(0, 1), _padded(table).transpose(1, 2))


@relative_products_op.register_fake
def _(x, table, cu):  # type: ignore[no-untyped-def]
    rows = int(table.shape[0])  # one size of table is one graph
    return x.new_empty(x.shape[1], x.shape[0], padded_table_rows((rows + 1) // 2))


@torch.library.custom_op("antlm_fast::relative_products_backward", mutates_args=())
def relative_products_backward_op(
    d_products: torch.Tensor, x: torch.Tensor, table: torch.Tensor, cu: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The gradients of x and table, from one of the products that is 0 in the slack rows."""
    d_x = x.new_empty(x.shape)
    with torch.autocast(x.device.type, enabled=False):
        torch.bmm(d_products, _padded(table), out=d_x.transpose(0, 1))
        # anything may stand in the slack rows of x, NaN as well
        slack = torch.arange(x.shape[0], dtype=cu.dtype, device=x.device) >= cu[-1]
        d_table = torch.bmm(d_products.transpose(1, 2), x.masked_fill(slack[:, None, None], 0.0).transpose(0, 1))
    return d_x, d_table[:, : table.shape[0]].transpose(0, 1).contiguous()


@relative_products_backward_op.register_fake
def _(d_products, x, table, cu):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), table.new_empty(table.shape)


def _padded(table: torch.Tensor) -> torch.Tensor:
    """(heads, table rows, padded, head_dim)."""
    rows = padded_table_rows((table.shape[0] + 1) // 2)
    return torch.nn.functional.pad(table.transpose(0, 1), (0, 0, 0, rows - table.shape[0]))


def _save(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs)


def _backward(ctx, d_products):  # type: ignore[no-untyped-def]
    return *relative_products_backward_op(d_products, *ctx.saved_tensors), None


relative_products_op.register_autograd(first_order("disentangled_attention")(_backward), setup_context=_save)
