"""Log-probability of whole sentences: read causally, one mask at a time, or as masked next-token prediction.

Sequences of equal length are scored together, so a batch is dense and nothing is ever padded. Masked copies are made
batch by batch, and only the positions that are read leave the last layer and go through the head.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.models import LanguageModel
from antlm_fast.types import InputError, Vocabulary

SECONDS_BETWEEN_LINES = 20.0


class SentenceTokenizer(Protocol):
    """What scoring needs of a tokenizer; `antlm_fast.data.tokenizer.Tokenizer` has it."""

    @property
    def vocabulary(self) -> Vocabulary: ...

    def encode_batch(self, texts: list[str]) -> list[list[int]]: ...


@dataclass(frozen=True)
class ReadOut:
    """How a sentence's tokens are predicted.

    Args:
        causal: the past alone is seen and nothing is hidden; otherwise everything is seen but the token itself.
        shift: token k is read at position k - shift.
    """

    causal: bool
    shift: int


READ_OUTS = {
    "causal": ReadOut(causal=True, shift=1),
    "masked": ReadOut(causal=False, shift=0),
    "mntp": ReadOut(causal=False, shift=1),
}


@dataclass(frozen=True)
class SentenceScores:
    """Scores of sentences, in the order they were given.

    Args:
        sums: float64 (n,), sum of the log-probabilities (natural logarithm) of the scored tokens.
        num_tokens: int64 (n,), how many tokens were scored; at least 1.
    """

    sums: NDArray[np.float64]
    num_tokens: NDArray[np.int64]

    @property
    def means(self) -> NDArray[np.float64]:
        return self.sums / self.num_tokens


@dataclass(frozen=True)
class _Group:
    """All distinct sequences of one length."""

    ids: NDArray[np.int64]  # (num_sequences, length)
    slots: NDArray[np.int64]  # (num_sequences,) where each sequence's score goes
    rows: NDArray[np.int64]  # (num_scored,) ascending: which sequence each scored token is in
    positions: NDArray[np.int64]  # (num_scored,) where in that sequence


@torch.no_grad()
def score_sentences(
    model: LanguageModel,
    tokenizer: SentenceTokenizer,
    sentences: Sequence[str],
    read_out: str,
    *,
    precision: str = "float32",
    batch_tokens: int = 4096,
    progress: bool = True,
) -> SentenceScores:
    """How probable each sentence is.

    score = sum_k log p(token k | what the read-out lets it see), over the text's tokens. The tokens of the
    tokenizer's own template (<s>, [CLS] and every other special id) are context and are never scored.

    * "causal": token k is read at k - 1 and sees the tokens before it.
    * "masked": token k is hidden and read at k; one copy of the sentence per token (pseudo-log-likelihood).
    * "mntp": token k is hidden and read at k - 1.

    A token at position 0 has nothing to be read from under "causal" and "mntp", so it is not scored there: where the
    template starts with a special token, that is no text token; where it does not, the first text token is left out.

    Args:
        model: any model of this package.
        tokenizer: encodes with its own template.
        sentences: texts, repeats allowed: each distinct one is computed once.
        read_out: "causal", "masked" or "mntp".
        precision: "float32" (the parameters' own dtype) or "bfloat16" (torch.autocast).
        batch_tokens: tokens of one forward, masked copies included.
        progress: report on stderr: a bar on a terminal, a plain line now and then elsewhere.

    Returns:
        SentenceScores; log-probabilities are accumulated in float64.

    Raises:
        InputError: a sentence is longer than the model takes, or has no token to score; a score is not finite.

    Source: pseudo-log-likelihood, Salazar et al. 2020, equation 1; MNTP, arXiv 2410.24159.
    """
    if read_out not in READ_OUTS:
        raise InputError(f"read_out must be one of {', '.join(map(repr, READ_OUTS))}; got {read_out!r}")
    if batch_tokens < 1:
        raise InputError(f"batch_tokens must be at least 1; got {batch_tokens}")
    how = READ_OUTS[read_out]
    vocabulary = tokenizer.vocabulary
    slot_of_sentence, sequences = _distinct(tokenizer.encode_batch(list(sentences)))
    first_scored = how.shift  # a shifted read-out has no position to read token 0 from
    _check_sequences(sequences, sentences, slot_of_sentence, vocabulary, first_scored, read_out, model)

    sums = np.zeros(len(sequences), dtype=np.float64)
    counts = np.zeros(len(sequences), dtype=np.int64)
    groups = [_group(sequences, slots, vocabulary, first_scored) for slots in _by_length(sequences)]
    device = model.head_weight.device
    total = sum(group.positions.size for group in groups)
    with evaluating(model, device, precision), _progress(total, f"{read_out} scores", progress) as report:
        for group in groups:
            np.add.at(counts, group.slots[group.rows], 1)
            for copies, owner, rows, positions in _batches(group, how, vocabulary.mask_id, batch_tokens):
                nll = _token_nll(model, copies, rows, positions, group.ids[owner, positions], how, device)
                np.add.at(sums, group.slots[owner], -nll)
                report(positions.size)
    if not np.isfinite(sums).all():
        worst = sentences[int(np.flatnonzero(~np.isfinite(sums[slot_of_sentence]))[0])]
        raise InputError(f"model must give finite log-probabilities; got {read_out!r} not finite for {worst!r}")
    return SentenceScores(sums=sums[slot_of_sentence], num_tokens=counts[slot_of_sentence])


@contextmanager
def evaluating(model: nn.Module, device: torch.device, precision: str) -> Iterator[None]:
    """Evaluation mode and autocast inside; the model's training mode is put back behind it.

    Raises:
        InputError: `precision` is neither "float32" nor "bfloat16".
    """
    if precision not in ("float32", "bfloat16"):
        raise InputError(f"precision must be 'float32' or 'bfloat16'; got {precision!r}")
    was_training = model.training
    model.eval()
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
            yield
    finally:
        model.train(was_training)


def _distinct(encoded: Iterable[list[int]]) -> tuple[NDArray[np.int64], list[tuple[int, ...]]]:
    """(for each sentence the slot of its token sequence, the distinct sequences)."""
    slots: dict[tuple[int, ...], int] = {}
    slot_of_sentence = [slots.setdefault(tuple(ids), len(slots)) for ids in encoded]
    return np.asarray(slot_of_sentence, dtype=np.int64), list(slots)


def _check_sequences(
    sequences: list[tuple[int, ...]],
    sentences: Sequence[str],
    slot_of_sentence: NDArray[np.int64],
    vocabulary: Vocabulary,
    first_scored: int,
    read_out: str,
    model: LanguageModel,
) -> None:
    special = frozenset(vocabulary.special_ids)
    longest = model.config.max_position_embeddings
    for slot, sequence in enumerate(sequences):
        if len(sequence) > longest:
            text = sentences[int(np.flatnonzero(slot_of_sentence == slot)[0])]
            raise InputError(
                f"sentence must be at most {longest} tokens long (the model's max_position_embeddings); "
                f"got {len(sequence)} tokens: {_shortened(text)}"
            )
        if all(token in special for token in sequence[first_scored:]):
            text = sentences[int(np.flatnonzero(slot_of_sentence == slot)[0])]
            raise InputError(f"sentence must have a token that {read_out!r} can score; got {_shortened(text)}")


def _shortened(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")


def _by_length(sequences: list[tuple[int, ...]]) -> list[NDArray[np.int64]]:
    """Slots of the sequences of each length, longest first: too large a batch shows at once, not at the end."""
    by_length: dict[int, list[int]] = defaultdict(list)
    for slot, sequence in enumerate(sequences):
        by_length[len(sequence)].append(slot)
    return [np.asarray(by_length[length], dtype=np.int64) for length in sorted(by_length, reverse=True)]


def _group(
    sequences: list[tuple[int, ...]], slots: NDArray[np.int64], vocabulary: Vocabulary, first_scored: int
) -> _Group:
    ids = np.asarray([sequences[slot] for slot in slots], dtype=np.int64)
    scored = ~np.isin(ids, vocabulary.special_ids)
    scored[:, :first_scored] = False
    rows, positions = np.nonzero(scored)
    return _Group(ids=ids, slots=slots, rows=rows, positions=positions)


_Batch = tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]


def _batches(group: _Group, how: ReadOut, mask_id: int, batch_tokens: int) -> Iterator[_Batch]:
    """Yields (copies, owner, rows, positions): the token ids to run, and for each scored token the group's sequence
    it belongs to, the row of `copies` it is read in and its position there."""
    num_sequences, length = group.ids.shape
    per_batch = max(1, batch_tokens // length)
    if how.causal:
        for start in range(0, num_sequences, per_batch):
            inside = slice(*np.searchsorted(group.rows, (start, start + per_batch)))
            owner = group.rows[inside]
            yield group.ids[start : start + per_batch], owner, owner - start, group.positions[inside]
        return
    for start in range(0, group.positions.size, per_batch):
        owner, positions = group.rows[start : start + per_batch], group.positions[start : start + per_batch]
        copies, rows = group.ids[owner], np.arange(owner.size)
        copies[rows, positions] = mask_id
        yield copies, owner, rows, positions


def _token_nll(
    model: LanguageModel,
    copies: NDArray[np.int64],
    rows: NDArray[np.int64],
    positions: NDArray[np.int64],
    targets: NDArray[np.int64],
    how: ReadOut,
    device: torch.device,
) -> NDArray[np.float64]:
    num_sequences, length = copies.shape
    # ascending: a sequence's tokens are in order, and so are the sequences
    read_at = torch.from_numpy(rows * length + positions - how.shift).to(device)
    hidden = model.hidden_states(
        torch.from_numpy(copies.reshape(-1)).to(device),
        cu_seqlens=torch.arange(num_sequences + 1, dtype=torch.int32, device=device) * length,
        max_seqlen=length,
        causal=how.causal,
        rows=read_at,
    )
    nll: Tensor = linear_cross_entropy(
        model.head_features(hidden),
        model.head_weight,
        torch.from_numpy(targets).to(device),
        bias=model.head_bias,
        reduction="none",
    )
    return nll.double().cpu().numpy()


class _Report(Protocol):
    def __call__(self, done: int, /) -> object: ...


@contextmanager
def _progress(total: int, what: str, wanted: bool) -> Iterator[_Report]:
    """Yields a function that is told how many tokens were scored since it was last called."""
    if not wanted:
        yield lambda done: None
    elif sys.stderr.isatty():
        from tqdm import tqdm  # an optional extra; without a terminal it is not needed

        with tqdm(total=total, desc=what, unit="tok", unit_scale=True) as bar:
            yield bar.update
    else:
        done_so_far, started, last_line = 0, time.monotonic(), time.monotonic()

        def line(done: int) -> None:
            nonlocal done_so_far, last_line
            done_so_far += done
            now = time.monotonic()
            if now - last_line >= SECONDS_BETWEEN_LINES:
                last_line = now
                left = (now - started) * (total / done_so_far - 1)
                percent = math.floor(100 * done_so_far / total)
                print(f"{what}: {done_so_far:,} of {total:,} tokens ({percent} %), {left:.0f} s left", file=sys.stderr)

        yield line
