"""How fast batches come: rows read from the token store, objectives applied to them, text made into ids.

All on the CPU, in one process, without worker processes: what a training step has to wait for at most. A step of
BabyLlama-58M on 2,048 tokens takes about a second on two cores, so what is below some milliseconds does not matter.
"""

from __future__ import annotations

import functools
import itertools
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from harness import Bench, Call, Provider, Row

from antlm_fast.data.builtin import corpus
from antlm_fast.data.rows import Rows
from antlm_fast.data.token_store import TokenStore
from antlm_fast.objectives import MaskingConfig, make_batch
from antlm_fast.objectives.masking import STRATEGIES
from antlm_fast.types import Objective, Vocabulary

VOCAB_SIZE, ROWS, ROW_TOKENS = 16001, 16, 128
VOCABULARY = Vocabulary(
    size=VOCAB_SIZE,
    mask_id=VOCAB_SIZE - 1,
    special_ids=(0, 1, 2, VOCAB_SIZE - 1),
    word_start=np.arange(VOCAB_SIZE) % 2 == 0,
)


def data_suite(bench: Bench) -> Iterator[list[Row]]:
    with tempfile.TemporaryDirectory() as folder:
        store = _store(Path(folder, "store"), bench.sizes.documents)
        rounds = max(bench.sizes.rounds, 5)
        title = f"{ROWS} rows of {ROW_TOKENS} tokens"
        yield bench.measure("data", f"batches, {title}", list(_batches(store)), rounds=rounds, warmup=3)
        yield bench.measure("data", "tokenizers, built-in corpus", list(_tokenizers(bench)), rounds=min(rounds, 5))


def _store(folder: Path, num_tokens: int) -> TokenStore:
    generator = np.random.default_rng(0)
    lengths = itertools.takewhile(lambda pair: pair[1] <= num_tokens, _lengths(generator))
    documents = (generator.integers(3, VOCAB_SIZE - 1, size=length) for length, _ in lengths)
    return TokenStore.write(
        documents,
        folder,
        vocab_size=VOCAB_SIZE,
        fingerprint="benchmark",
        tokenizer_fingerprint="benchmark",
        source="random ids",
    )


def _lengths(generator: np.random.Generator) -> Iterator[tuple[int, int]]:
    """Lengths of documents, 5 to about 200 tokens, and their sum so far."""
    total = 0
    while True:
        length = int(generator.geometric(1 / 40)) + 4
        total += length
        yield length, total


def _batches(store: TokenStore) -> Iterator[Provider]:
    """Each call makes the next batch of an epoch, whose order is shuffled: nothing is read twice in a row."""
    for mode in ("stream", "packed"):
        rows = Rows(store, mode=mode, row_tokens=ROW_TOKENS, seed=0)
        yield _provider("rows alone", mode, functools.partial(_reading, rows))
    rows = Rows(store, mode="stream", row_tokens=ROW_TOKENS, seed=0)
    yield _provider("objective", "CLM", functools.partial(_making, rows, 0.0, MaskingConfig()))
    for strategy in STRATEGIES:
        masking = MaskingConfig(strategy=strategy)  # type: ignore[arg-type]
        yield _provider("objective", f"MLM, {strategy}", functools.partial(_making, rows, 1.0, masking))
    yield _provider("objective", "mix, half MLM", functools.partial(_making, rows, 0.5, MaskingConfig()))
    yield _provider("objective", "HF DataCollatorForLanguageModeling", functools.partial(_collating, rows))


def _provider(case: str, name: str, prepare: functools.partial[Call]) -> Provider:
    return Provider(case=case, name=name, prepare=prepare, amount=ROWS * ROW_TOKENS, unit="tokens/s")


def _places(rows: Rows) -> Iterator[tuple[int, int, int]]:
    if rows.rows_per_epoch < ROWS:
        raise ValueError(f"the corpus must have {ROWS} rows; got {rows.rows_per_epoch}")
    for epoch in itertools.count():
        for start in range(0, rows.rows_per_epoch - ROWS + 1, ROWS):
            yield epoch, start, start + ROWS


def _reading(rows: Rows) -> Call:
    places = _places(rows)
    return lambda: rows.read(*next(places))


def _making(rows: Rows, share: float, masking: MaskingConfig) -> Call:
    places, numbers = _places(rows), itertools.count()

    def call() -> None:
        batch = make_batch(
            rows.read(*next(places)),
            masked_share=share,
            masked_objective=Objective.MLM,
            visibility=None,
            masking=masking,
            vocabulary=VOCABULARY,
            rate=0.15,
            key=(0, next(numbers)),
        )
        assert batch.num_tokens == ROWS * ROW_TOKENS

    return call


def _collating(rows: Rows) -> Call:
    """transformers' collator for MLM, one of its forms that needs no tokenizer's special-token look-up per row."""
    from tokenizers import Tokenizer, models
    from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast

    names = {f"t{number}": number for number in range(VOCAB_SIZE - 1)} | {"<mask>": VOCAB_SIZE - 1}
    backend = Tokenizer(models.WordLevel(names, unk_token="t0"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, mask_token="<mask>", pad_token="t1")
    collator, places = DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15), _places(rows)

    def call() -> None:
        ids = rows.read(*next(places)).ids.reshape(ROWS, ROW_TOKENS)
        batch = collator([{"input_ids": row} for row in ids])
        assert batch["input_ids"].numel() == ROWS * ROW_TOKENS

    return call


def _tokenizers(bench: Bench) -> Iterator[Provider]:
    words = max(bench.sizes.documents // 20, 500)
    for kind in ("byte_level_bpe", "word_piece"):
        for case in ("encode", "train"):
            prepare = functools.partial(_training if case == "train" else _encoding, kind, words)
            yield Provider(case=case, name=kind, prepare=prepare, amount=words, unit="words/s")


def _training(kind: str, words: int) -> Call:
    from antlm_fast.data.tokenizer import TokenizerConfig, train_tokenizer

    texts = list(corpus.documents(words))
    return lambda: train_tokenizer(texts, TokenizerConfig(kind=kind, vocab_size=1000))


def _encoding(kind: str, words: int) -> Call:
    from antlm_fast.data.tokenizer import TokenizerConfig, train_tokenizer

    texts = list(corpus.documents(words))
    tokenizer = train_tokenizer(texts[: max(len(texts) // 10, 1)], TokenizerConfig(kind=kind, vocab_size=1000))
    return lambda: tokenizer.encode_batch(texts)
