"""The two kinds of tokenizer that are trained here, as `tokenizers.Tokenizer` objects."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

BPE_SPECIALS = ("<pad>", "<s>", "</s>")
WORD_PIECE_SPECIALS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[PAR]", "[TAB]")


def train_byte_level_bpe(batches: Iterator[list[str]], vocab_size: int, min_frequency: int) -> Any:
    """BabyLlama's: NFKC, a space before the first word, `<s> text </s>` (arXiv 2308.02019, code)."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.NFKC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(BPE_SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    backend.train_from_iterator(batches, trainer)
    backend.decoder = decoders.ByteLevel()
    begin, end = (backend.token_to_id(token) for token in ("<s>", "</s>"))
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=[("<s>", begin), ("</s>", end)]
    )
    return backend


def train_word_piece(batches: Iterator[list[str]], vocab_size: int, min_frequency: int) -> Any:
    """LTG-BERT's: word pieces over byte-level words, digits singly, `[CLS] text [SEP]` (arXiv 2303.09859, code)."""
    from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from tokenizers import Tokenizer as Backend

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    # As specials the 256 continuations have fixed ids: left to the trainer, their order, and with it every tie
    # between two merges, follows a randomly seeded hash table, and those that the corpus lacks would be unknown.
    continuations = [f"##{byte}" for byte in alphabet]
    # Digits singly, with the space before them; "#" singly, so that "##" can only be the continuation mark; and no
    # word or gap of more than 64 characters, because the search for pieces is quadratic in the word's length.
    cuts = pre_tokenizers.Split(Regex(r" ?\p{Nd}|#|[^\s\p{Nd}#]{64}|\s{64}"), behavior="isolated")

    def assemble(model: Any) -> Any:
        backend = Backend(model)
        backend.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Prepend(" ")])
        backend.pre_tokenizer = pre_tokenizers.Sequence([cuts, pre_tokenizers.ByteLevel(add_prefix_space=False)])
        return backend

    learner = assemble(models.WordPiece(unk_token="[UNK]"))
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[*WORD_PIECE_SPECIALS, *continuations],
        initial_alphabet=alphabet,
        continuing_subword_prefix="##",
        show_progress=sys.stderr.isatty(),
    )
    learner.train_from_iterator(batches, trainer)
    pieces = learner.get_vocab()
    backend = assemble(models.WordPiece(vocab=pieces, unk_token="[UNK]", max_input_chars_per_word=512))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in WORD_PIECE_SPECIALS])
    mark = decoders.Replace(Regex(r"^##"), "")
    backend.decoder = decoders.Sequence([mark, decoders.ByteLevel()])
    first, last = pieces["[CLS]"], pieces["[SEP]"]
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", first), ("[SEP]", last)]
    )
    return backend
