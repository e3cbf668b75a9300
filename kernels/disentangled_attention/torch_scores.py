"""One dense block of disentangled attention: matrix products around a softmax, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from antlm_fast.kernels.attention.torch_plan import Block
from antlm_fast.kernels.disentangled_attention.torch_layout import Places
from antlm_fast.kernels.disentangled_attention.torch_relative import Scratch, Terms, Tile
from antlm_fast.kernels.philox import keep_mask
from antlm_fast.kernels.tracing import first_order

# scores formed at a time on the CPU: what stays in cache
_TILE_KIB = 2048
# query rows of one head formed at a time where scores are not kept
_LONG_ROWS = 256
# scores of one head and sequence formed at a time elsewhere, where scores are not kept
_DEVICE_SCORES = 2**18


@dataclass(frozen=True)
class Call:
    """What a block's run needs beside tensors with gradients.

    Args:
        block: which keys each query sees.
        places: where the queries are among the keys.
        max_position, softmax_scale, dropout_p, dropout_seed: as in the api; no seed, no dropout.
        return_lse: also give lse.
        keep: whether the backward gets the probabilities; else it forms them again, in tiles of query rows.
        on_host: tensors may be read.
    """

    block: Block
    places: Places
    max_position: int
    softmax_scale: float
    dropout_p: float
    dropout_seed: torch.Tensor | None
    return_lse: bool
    keep: bool
    on_host: bool


def run_block(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    q_rel: torch.Tensor | None,
    k_rel: torch.Tensor | None,
    call: Call,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """out (num_seqs * len_q, heads, head_dim) and, if asked for, lse (heads, num_seqs * len_q).

    Args:
        q, k, v: (num_seqs * len, heads, head_dim).
        q_rel, k_rel: (2 B - 1, heads, head_dim) or None.
        call: the rest.
    """
    trains = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, q_rel, k_rel))
    return _Disentangled.apply(q, k, v, q_rel, k_rel, call, trains)


class _Disentangled(torch.autograd.Function):
    """Inside, tensors are (heads, num_seqs, len, head_dim): all rows of a head meet its tables in one product."""

    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_rel: torch.Tensor | None,
        k_rel: torch.Tensor | None,
        call: Call,
        trains: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        block = call.block
        q, k, v = (_by_head(x, block.num_seqs, n) for x, n in ((q, block.len_q), (k, block.len_k), (v, block.len_k)))
        q_rel, k_rel = _table_by_head(q_rel), _table_by_head(k_rel)
        run = _Run(q, k, v, q_rel, k_rel, call)
        out, lse, probabilities, kept = run.forward(call.keep and trains)
        if trains:
            ctx.save_for_backward(q, k, v, q_rel, k_rel, probabilities, kept)
            ctx.call = call
        if lse is not None:
            lse = lse.flatten(1)
            ctx.mark_non_differentiable(lse)
        return _by_row(out), lse

    @staticmethod
    @first_order("disentangled_attention")
    def backward(ctx: Any, d_out: torch.Tensor, _: Any) -> Any:
        q, k, v, q_rel, k_rel, probabilities, kept = ctx.saved_tensors
        call = ctx.call
        with torch.autocast(q.device.type, enabled=False):
            d_out = _by_head(d_out, call.block.num_seqs, call.block.len_q)
            run = _Run(q, k, v, q_rel, k_rel, call)
            return *run.backward(d_out, probabilities, kept), None, None


class _Run:
    """One pass over the tiles of a block."""

    def __init__(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        q_rel: torch.Tensor | None,
        k_rel: torch.Tensor | None,
        call: Call,
    ) -> None:
        self.q, self.k, self.v, self.call, self.block = q, k, v, call, call.block
        self.scratch = Scratch(q)
        self.terms = Terms(
            q_rel,
            k_rel,
            call.max_position,
            call.block.len_q,
            call.block.len_k,
            call.places,
            call.softmax_scale,
            self.scratch,
        )
        self.is_empty = not (q.shape[1] and call.block.len_q and call.block.len_k)
        self.kept_scale = 1.0 / (1.0 - call.dropout_p)
        self._bias_of: tuple[slice, slice, int] | None = None
        self._bias: torch.Tensor | None = None

    def forward(self, keep: bool) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
        """out, lse if asked for, and to keep the probabilities before dropout, and its mask."""
        q, v, call = self.q, self.v, self.call
        out = torch.zeros_like(q) if self.is_empty else torch.empty_like(q)
        lse = kept = None
        if call.return_lse:
            accumulated = torch.promote_types(q.dtype, torch.float32)
            lse = torch.full(q.shape[:3], -torch.inf, dtype=accumulated, device=q.device)
        probabilities = q.new_empty(*q.shape[:3], self.block.len_k) if keep else None
        if probabilities is not None and call.dropout_seed is not None:
            kept = torch.empty(probabilities.shape, dtype=torch.bool, device=q.device)
        for tile in self.tiles():
            own = (tile.heads, tile.seqs, tile.rows)
            p = self.probabilities(tile, None if probabilities is None else probabilities[own], lse)
            if call.dropout_seed is not None:
                mask = self.mask(tile)
                if kept is not None:
                    kept[own] = mask
                p = torch.mul(p, self.as_numbers(mask), out=self.scratch.take("dropped", *p.shape))
            _put(out[own], p, v[tile.heads, tile.seqs, : tile.stop], self.kept_scale)
        return out, lse, probabilities, kept

    def backward(
        self, d_out: torch.Tensor, probabilities: torch.Tensor | None, kept: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        """The gradients of q, k, v, q_rel and k_rel, in their shapes outside."""
        q, k, v, call, terms = self.q, self.k, self.v, self.call, self.terms
        # over tiles of rows sums are formed, and rounded once
        summing = not call.keep
        dtype = torch.promote_types(q.dtype, torch.float32) if summing else q.dtype
        make = torch.zeros_like if summing or self.is_empty else torch.empty_like
        d_q, d_k, d_v = make(q), make(k, dtype=dtype), make(v, dtype=dtype)
        d_by_row = d_by_key = None
        if terms.k_rel is not None:
            d_by_row = make(q[..., :1].expand(*q.shape[:3], terms.k_rel.shape[1]))
        if terms.q_rel is not None:
            d_by_key = make(k[..., :1].expand(*k.shape[:3], terms.q_rel.shape[1]), dtype=dtype)
        for tile in self.tiles():
            own, keys = (tile.heads, tile.seqs, tile.rows), (tile.heads, tile.seqs, slice(0, tile.stop))
            p, g = self.probabilities(tile, None, None) if probabilities is None else probabilities[own], d_out[own]
            d_p, d_s = (self.scratch.take(name, *p.shape) for name in ("d_p", "d_s"))
            numbers, dropped = None, p
            if call.dropout_seed is not None:
                numbers = self.as_numbers(self.mask(tile) if kept is None else kept[own])
                dropped = torch.mul(p, numbers, out=d_s)  # free until later
            _put(d_v[keys], dropped.mT, g, self.kept_scale, summing)
            _put(d_p, g, v[keys].mT, self.kept_scale)
            if numbers is not None:
                d_p.mul_(numbers)
            # one pass with float32 sums; what autograd itself runs for a softmax
            torch.ops.aten._softmax_backward_data.out(d_p, p, -1, p.dtype, grad_input=d_s)
            _put(d_q[own], d_s, k[keys], call.softmax_scale)
            _put(d_k[keys], d_s.mT, q[own], call.softmax_scale, summing)
            terms.fold(
                d_s,
                tile,
                None if d_by_row is None else d_by_row[own],
                None if d_by_key is None else d_by_key[keys],
                summing,
            )
        d_k, d_v = d_k.to(k.dtype), d_v.to(v.dtype)
        d_k_rel = self._through_table(d_by_row, q, terms.k_rel, d_q)
        d_q_rel = self._through_table(d_by_key, k, terms.q_rel, d_k)
        return _by_row(d_q), _by_row(d_k), _by_row(d_v), d_q_rel, d_k_rel

    def tiles(self) -> Iterator[Tile]:
        heads, num_seqs = self.q.shape[:2]
        len_q, len_k = self.block.len_q, self.block.len_k
        if self.is_empty:
            return
        size = _TILE_KIB * 2**10 // self.q.element_size()
        if self.call.keep:
            # whole score matrices; of few rows, as many as a key's products with a table
            rows = len_q if self.call.places.positions is None else max(len_q, 2 * self.terms.width)
            count = max(1, size // (rows * len_k)) if self.call.on_host else heads * num_seqs
            seqs, some_heads, rows = min(count, num_seqs), max(1, count // num_seqs), len_q
        elif self.call.on_host:
            seqs, rows = 1, min(len_q, _LONG_ROWS)
            some_heads = max(1, size // (rows * len_k))
        else:
            seqs, some_heads, rows = num_seqs, heads, min(len_q, max(16, _DEVICE_SCORES // len_k))
        for in_seqs in _runs(num_seqs, seqs):
            # the last rows see most: scratch memory is made once, at its largest
            for in_rows in reversed([*_runs(len_q, rows)]):
                stop = self._stop(in_seqs, in_rows)
                for in_heads in _runs(heads, some_heads):
                    yield Tile(in_heads, in_seqs, in_rows, stop)

    def probabilities(self, tile: Tile, out: torch.Tensor | None, lse: torch.Tensor | None) -> torch.Tensor:
        """(heads, num_seqs, rows, stop), into `out` if given; the tile's lse into `lse`."""
        q, k = self.q[tile.heads, tile.seqs, tile.rows], self.k[tile.heads, tile.seqs, : tile.stop]
        shape = (*q.shape[:3], tile.stop)
        s = self.scratch.take("scores", *shape)
        _put(s, q, k.mT, self.call.softmax_scale, self.terms.add_to(s, q, k, tile))
        limits = self._limits(tile)
        if limits is not None:
            # adding 0 or -inf is several times faster than filling by a mask
            s.add_(self._visibility(limits, tile))
        p = self.scratch.take("probabilities", *shape) if out is None else out
        torch.softmax(s, -1, out=p)
        if limits is not None and self.block.unseen:
            p.mul_((limits > 0).to(p.dtype)[..., None])
        if lse is not None:
            found = torch.logsumexp(s.to(lse.dtype), -1)
            if limits is not None:
                found = found.masked_fill(limits <= 0, -torch.inf)
            lse[tile.heads, tile.seqs, tile.rows] = found
        return p

    def mask(self, tile: Tile) -> torch.Tensor:
        """What dropout keeps of a tile: bool (heads, num_seqs, rows, stop)."""
        assert self.call.dropout_seed is not None
        heads = torch.arange(tile.heads.start, tile.heads.stop, device=self.q.device)[:, None, None]
        rows = self.call.places.mask_rows[tile.seqs, tile.rows]
        return keep_mask(self.call.dropout_seed, heads, rows, tile.stop, self.call.dropout_p)

    def as_numbers(self, mask: torch.Tensor) -> torch.Tensor:
        """0 and 1 in q's dtype; from bytes, since bools are converted one at a time."""
        return self.scratch.take("mask", *mask.shape).copy_(mask.view(torch.uint8))

    def _through_table(
        self, d_products: torch.Tensor | None, x: torch.Tensor, table: torch.Tensor | None, d_x: torch.Tensor
    ) -> torch.Tensor | None:
        """The table's gradient; what x gets through it is added to d_x."""
        if d_products is None or table is None:
            return None
        scale = self.call.softmax_scale
        d_products, x, d_x = (y.to(table.dtype).flatten(1, 2) for y in (d_products, x, d_x))
        torch.baddbmm(d_x, d_products, table, alpha=scale, out=d_x)
        return (d_products.mT @ x).mul_(scale)[:, :-1].transpose(0, 1)

    def _stop(self, seqs: slice, rows: slice) -> int:
        """How many keys some of the rows see; all of them where limits cannot be read."""
        limits = self.block.limits
        if limits is None or not self.call.on_host or self.call.keep:
            return self.block.len_k
        limits = limits[seqs if limits.shape[0] > 1 else slice(None), rows]
        return max(1, int(limits.max()))

    def _limits(self, tile: Tile) -> torch.Tensor | None:
        """(1 or num_seqs, rows); None: the rows see all keys of the tile."""
        limits = self.block.limits
        if limits is None:
            return None
        limits = limits[tile.seqs if limits.shape[0] > 1 else slice(None), tile.rows]
        return None if self.call.on_host and int(limits.min()) >= tile.stop else limits

    def _visibility(self, limits: torch.Tensor, tile: Tile) -> torch.Tensor:
        """(1 or num_seqs, rows, stop): 0 where a key is seen, else -inf; all 0 for a row that sees nothing."""
        wanted = (tile.seqs, tile.rows, tile.stop)
        if self._bias is None or self._bias_of != wanted:
            limits = limits.masked_fill(limits <= 0, tile.stop)
            visible = torch.arange(tile.stop, device=limits.device) < limits[..., None]
            zero = torch.zeros((), dtype=self.q.dtype, device=limits.device)
            self._bias, self._bias_of = torch.where(visible, zero, float("-inf")), wanted
        return self._bias


def _by_head(x: torch.Tensor, num_seqs: int, length: int) -> torch.Tensor:
    return x.unflatten(0, (num_seqs, length)).permute(2, 0, 1, 3).contiguous()


def _by_row(x: torch.Tensor) -> torch.Tensor:
    """The way back, as a view."""
    return x.flatten(1, 2).transpose(0, 1)


def _table_by_head(table: torch.Tensor | None) -> torch.Tensor | None:
    """(2 B - 1, heads, head_dim) -> (heads, 2 B, head_dim): an even number of rows, the last of them 0."""
    if table is None:
        return None
    return torch.nn.functional.pad(table.transpose(0, 1), (0, 0, 0, 1))


def _put(into: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float = 1.0, beta: float = 0.0) -> None:
    """into = scale * a @ b + beta * into, over (heads, num_seqs, ..); a sum is made in into's dtype."""
    a, b = a.flatten(0, 1), b.flatten(0, 1)
    if into.is_contiguous() and into.dtype == a.dtype:
        out = into.view(-1, *into.shape[2:])
        torch.baddbmm(out, a, b, beta=beta, alpha=scale, out=out)
        return
    product = torch.bmm(a, b).mul_(scale).view(into.shape)
    into.add_(product) if beta else into.copy_(product)


def _runs(total: int, step: int) -> Iterator[slice]:
    for start in range(0, total, step):
        yield slice(start, min(start + step, total))
