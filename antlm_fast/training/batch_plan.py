"""What rows a step reads, as a pure function of the step: how many, how long, from which epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from antlm_fast.types import InputError


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes of a step, and how they grow over the run; `BatchPlan` has the exact rule.

    Args:
        rows_per_step: rows of data.row_tokens in one optimizer step; without ramps the last step of an epoch takes
            what is left.
        rows_per_micro_batch: rows of data.row_tokens in one forward and backward, fewer where rows are longer; their
            gradients add up to the step's, each labelled token weighing the same. None takes the whole step at once.
        length_ramp: "LENGTH@SHARE" texts, such as ("256@0.7", "512@0.9"): from that share of the run's steps on,
            rows are that many tokens long, and a step has fewer of them, so that its tokens stay. Empty: all rows
            have data.row_tokens.
        ramp_from: rows per step grow linearly over the run from this share of rows_per_step to all of it; epochs
            are then counted by the mean size of a step, so that n epochs still read each token n times on the whole.
            None: all steps are equal.
    """

    rows_per_step: int = 32
    rows_per_micro_batch: int | None = None
    length_ramp: tuple[str, ...] = ()
    ramp_from: float | None = None

    def __post_init__(self) -> None:
        if self.rows_per_step < 1:
            raise InputError(f"batch.rows_per_step must be at least 1; got {self.rows_per_step}")
        if self.rows_per_micro_batch is not None and self.rows_per_micro_batch < 1:
            raise InputError(f"batch.rows_per_micro_batch must be at least 1, or none; got {self.rows_per_micro_batch}")
        if self.ramp_from is not None and not 0 < self.ramp_from <= 1:
            raise InputError(f"batch.ramp_from must be above 0 and at most 1, or none; got {self.ramp_from}")
        if self.rows_per_step * self.first_share < 1:
            raise InputError(
                f"batch.ramp_from must leave the first step a row, at least 1 / batch.rows_per_step "
                f"({self.rows_per_step}); got {self.ramp_from}"
            )
        stages = self.stages
        for earlier, later in pairwise(stages):
            if earlier[0] >= later[0] or earlier[1] >= later[1]:
                raise InputError(
                    f"batch.length_ramp must have growing lengths at growing shares; got {list(self.length_ramp)}"
                )

    @property
    def first_share(self) -> Fraction:
        """The first step's size as a share of the last's."""
        return Fraction(str(1 if self.ramp_from is None else self.ramp_from))

    @property
    def stages(self) -> tuple[tuple[int, Fraction], ...]:
        """(row_tokens, share of the run's steps from which on) of each entry of length_ramp."""
        return tuple(map(_stage, self.length_ramp))

    @property
    def micro_rows(self) -> int:
        return min(self.rows_per_micro_batch or self.rows_per_step, self.rows_per_step)

    def check_lengths(self, first_row_tokens: int, longest: int) -> None:
        """Raises InputError unless rows grow from data.row_tokens, fit the model, and every step has one."""
        if first_row_tokens > longest:
            raise InputError(
                f"data.row_tokens must be at most model.max_position_embeddings ({longest}); got {first_row_tokens}"
            )
        for row_tokens, share in self.stages:
            if row_tokens <= first_row_tokens:
                raise InputError(
                    f"batch.length_ramp must have lengths above data.row_tokens ({first_row_tokens}); got {row_tokens}"
                )
            if row_tokens > longest:
                raise InputError(
                    f"batch.length_ramp must have lengths of at most model.max_position_embeddings ({longest}); "
                    f"got {row_tokens}"
                )
            # the ramps leave a step its fewest rows of this length where the stage begins
            at_least = math.ceil(row_tokens / (first_row_tokens * self._size_at(share)))
            if self.rows_per_step < at_least:
                raise InputError(
                    f"batch.rows_per_step must be at least {at_least}, so that a step has a row of {row_tokens} tokens "
                    f"(batch.length_ramp); got {self.rows_per_step}"
                )

    def _size_at(self, share: Fraction) -> Fraction:
        """A step's size after that share of the run, as a share of the largest."""
        begin = self.first_share
        return begin + (1 - begin) * share


@dataclass(frozen=True, kw_only=True)
class RowSpan:
    """Rows start .. stop - 1 of an epoch's order, each row_tokens long."""

    row_tokens: int
    epoch: int
    start: int
    stop: int


class BatchPlan:
    """Which rows each step of a run reads.

    Without ramps, epoch and place in it are divmod(step, steps_per_epoch), and place p reads rows
    p * rows_per_step .. (p + 1) * rows_per_step - 1, the last one what is left.

    Length: a stage "LENGTH@SHARE" begins at step ceil(SHARE * total_steps). Its R rows an epoch are spread evenly
    over the epoch's S steps: place p reads rows floor(p R / S) .. floor((p + 1) R / S) - 1. So each row is read once
    an epoch, a step has about as many tokens as before, and the epochs keep their steps. In the epoch that is cut by
    a stage's beginning, the two parts come from two cuts of the same text: each place reads its share of it, but a
    token may be met in both parts or in none.

    Batch ramp from a share f: an epoch is S = ceil(R / (rows_per_step (1 + f) / 2)) steps, R rows of data.row_tokens.
    After s of N steps u(s) = (f s + (1 - f) s^2 / (2 N)) / (S (1 + f) / 2) epochs have been read, and step s reads
    rows floor(u(s) R_s) .. floor(u(s + 1) R_s) - 1, counted through the epochs one after another, R_s the rows of an
    epoch at that step's length. So a run of whole epochs reads exactly that many, a step crosses from one epoch into
    the next where it must, and what a schedule calls an epoch is S steps, early ones reading less.

    A step always has a row: where these rules leave it none (fewer rows than steps), it reads the next one again.
    All of it is integer arithmetic.

    Args:
        config: the sizes.
        rows_per_epoch: rows in an epoch for data.row_tokens and each length of the ramp, data.row_tokens first.
        total_steps: of the run.
    """

    def __init__(self, config: BatchConfig, rows_per_epoch: Mapping[int, int], total_steps: int) -> None:
        self._config = config
        self._rows_per_epoch = dict(rows_per_epoch)
        self._total_steps = total_steps
        self._first_row_tokens = next(iter(self._rows_per_epoch))
        self.steps_per_epoch = steps_per_epoch(config, self._rows_per_epoch[self._first_row_tokens])
        self._starts = [(math.ceil(share * total_steps), row_tokens) for row_tokens, share in config.stages]

    def row_tokens(self, step: int) -> int:
        """How long the rows of a step are."""
        begun = [row_tokens for first_step, row_tokens in self._starts if first_step <= step]
        return begun[-1] if begun else self._first_row_tokens

    def spans(self, step: int) -> Iterator[RowSpan]:
        """The rows of a step, in order; more than one span where it crosses from one epoch into the next."""
        row_tokens = self.row_tokens(step)
        rows = self._rows_per_epoch[row_tokens]
        start, stop = self._bounds(step, row_tokens, rows)
        while start < stop:
            epoch, first = divmod(start, rows)
            count = min(stop - start, rows - first)
            yield RowSpan(row_tokens=row_tokens, epoch=epoch, start=first, stop=first + count)
            start += count

    def micro_batches(self, step: int) -> Iterator[RowSpan]:
        """The spans of a step, cut at the size of a micro-batch: as many tokens, whatever the rows' length."""
        for span in self.spans(step):
            size = span.stop - span.start
            if self._config.rows_per_micro_batch is not None:
                size = max(self._config.micro_rows * self._first_row_tokens // span.row_tokens, 1)
            for start in range(span.start, span.stop, size):
                yield RowSpan(
                    row_tokens=span.row_tokens, epoch=span.epoch, start=start, stop=min(start + size, span.stop)
                )

    def _bounds(self, step: int, row_tokens: int, rows: int) -> tuple[int, int]:
        """The first row of a step and the first it no longer reads, counted through all epochs."""
        if self._config.ramp_from is not None:
            start, stop = (int(self._epochs_read(done) * rows) for done in (step, step + 1))
            return start, max(stop, start + 1)
        epoch, place = divmod(step, self.steps_per_epoch)
        if row_tokens == self._first_row_tokens:
            size = self._config.rows_per_step
            start, stop = place * size, min((place + 1) * size, rows)
        else:
            start, stop = (position * rows // self.steps_per_epoch for position in (place, place + 1))
            stop = max(stop, start + 1)
        return epoch * rows + start, epoch * rows + stop

    def _epochs_read(self, steps: int) -> Fraction:
        begin = self._config.first_share
        grown = begin * steps + (1 - begin) * Fraction(steps * steps, 2 * self._total_steps)
        return grown / (self.steps_per_epoch * (1 + begin) / 2)


def steps_per_epoch(config: BatchConfig, rows_per_epoch: int) -> int:
    """Steps in an epoch of that many rows of data.row_tokens."""
    mean_rows = config.rows_per_step * (1 + config.first_share) / 2
    return math.ceil(rows_per_epoch / mean_rows)


def _stage(text: str) -> tuple[int, Fraction]:
    length, at, share = text.partition("@")
    try:
        row_tokens, from_share = int(length), Fraction(share)
    except (ValueError, ZeroDivisionError):
        row_tokens, from_share = 0, Fraction(0)
    if not at or row_tokens < 2 or not 0 <= from_share <= 1:
        raise InputError(
            f"batch.length_ramp must be LENGTH@SHARE texts, such as 512@0.9, with a length of at least 2 and a share "
            f"from 0 to 1; got {text!r}"
        )
    return row_tokens, from_share
