"""Text to token ids and back: training, loading and saving of a tokenizer, and what the objectives must know of it."""

from __future__ import annotations

import hashlib
import json
import os
import re
import secrets
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from antlm_fast.data.exported_tokenizer import differences, exported_form, num_end_ids, restored_form
from antlm_fast.data.tokenizer_training import (
    BPE_SPECIALS,
    WORD_PIECE_SPECIALS,
    train_byte_level_bpe,
    train_word_piece,
)
from antlm_fast.types import InputError, Vocabulary
from antlm_fast.user_text import read_text

KINDS = ("byte_level_bpe", "word_piece")
# Every byte is in the vocabulary, so nothing is unknown; a word piece needs each byte also as a continuation.
MINIMUM_VOCAB_SIZE = {"byte_level_bpe": len(BPE_SPECIALS) + 256, "word_piece": len(WORD_PIECE_SPECIALS) + 512}
# space, newline, tab and carriage return as the byte-level alphabet spells them
BYTE_LEVEL_SPACES = ("Ġ", "Ċ", "ĉ", "č")
# The names under which a Hugging Face tokenizer wants to know its special tokens, and what they are called in files.
ROLES = {
    "bos_token": ("<s>", "[CLS]", "<bos>", "[BOS]", "<|begin_of_text|>", "<|endoftext|>"),
    "eos_token": ("</s>", "[SEP]", "<eos>", "[EOS]", "<|end_of_text|>", "<|endoftext|>"),
    "cls_token": ("[CLS]",),
    "sep_token": ("[SEP]",),
    "pad_token": ("<pad>", "[PAD]"),
    "unk_token": ("<unk>", "[UNK]"),
}
# where tokenizer_config.json keeps what an exported tokenizer.json differs in from the one of training
TRAINING_FORM = "antlm_fast_training_form"
_TEXTS_PER_BATCH = 1000
# learning takes time that grows with the square of a word, and there are texts without a blank
_UNBROKEN = re.compile(r"\S{1000}")


@dataclass(frozen=True)
class TokenizerConfig:
    """How the tokenizer is made.

    Args:
        kind: "byte_level_bpe" (BabyLlama, arXiv 2308.02019) or "word_piece" (LTG-BERT, arXiv 2303.09859).
        vocab_size: tokens to learn, specials included. byte_level_bpe gets one mask token after them (16000 + 1);
            word_piece counts its [MASK] inside.
        min_frequency: a pair seen less often is never merged.
        path: an existing tokenizer.json (or the folder that holds it); nothing is trained and the rest is ignored.
    """

    kind: str = "byte_level_bpe"
    vocab_size: int = 16000
    min_frequency: int = 2
    path: str | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"kind must be one of {', '.join(KINDS)}; got {self.kind!r}")
        least = MINIMUM_VOCAB_SIZE[self.kind]
        if isinstance(self.vocab_size, bool) or not isinstance(self.vocab_size, int) or self.vocab_size < least:
            raise InputError(
                f"vocab_size must be an integer of at least {least} (specials and bytes); got {self.vocab_size!r}"
            )
        if isinstance(self.min_frequency, bool) or not isinstance(self.min_frequency, int) or self.min_frequency < 1:
            raise InputError(f"min_frequency must be an integer of at least 1; got {self.min_frequency!r}")


class Tokenizer:
    """A `tokenizers.Tokenizer` that surely has a mask token, and never reads a special token out of plain text.

    Encoding applies the file's own template (`<s> text </s>`, `[CLS] text [SEP]`, or nothing where it has none) and
    never cuts or pads, whatever the file says.

    Args:
        backend: a `tokenizers.Tokenizer`; `<mask>` is appended to it if it has no mask token.
    """

    def __init__(self, backend: Any) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.mask_token: str = _find_mask_token(backend) or _append_mask_token(backend)
        self.mask_id: int = backend.token_to_id(self.mask_token)
        # A literal "<s>" in a corpus is text (it is an HTML tag), not the beginning of a document.
        backend.encode_special_tokens = True
        self._backend = backend
        self._tokens: dict[str, int] = backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(self._tokens.values()) + 1
        specials = {index for index, token in backend.get_added_tokens_decoder().items() if token.special}
        # ids that no token has must never be drawn either
        holes = set(range(self.vocab_size)).difference(self._tokens.values())
        self.special_id_set: frozenset[int] = frozenset(specials | holes | {self.mask_id})
        self._json: str = backend.to_str(pretty=True)
        canonical = json.dumps(json.loads(self._json), sort_keys=True, ensure_ascii=False)
        self.fingerprint: str = hashlib.sha256(canonical.encode()).hexdigest()

    @property
    def vocabulary(self) -> Vocabulary:
        """Sizes, special ids and word beginnings, for the objectives."""
        return Vocabulary(
            size=self.vocab_size,
            mask_id=self.mask_id,
            special_ids=tuple(sorted(self.special_id_set)),
            word_start=_word_starts(self._tokens, json.loads(self._json), self.vocab_size, self.special_id_set),
        )

    def encode(self, text: str) -> list[int]:
        """The ids of a text, the template's special tokens included."""
        ids: list[int] = self._backend.encode(text).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of each text, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(list(texts))]

    def encode_beginning(self, text: str) -> list[int]:
        """The ids of a text that is to be continued: the template without the special tokens at its end."""
        ids = self.encode(text)
        return ids[: max(len(ids) - self._num_end_ids, 1)]

    @property
    def document_end(self) -> list[int]:
        """What data preparation puts after a document, so that it does not run into the next: the end token, if there
        is one and the file's template puts nothing after a text."""
        end = self.role_ids.get("eos_token_id")
        return [] if end is None or self._num_end_ids else [end]

    def encode_with_masks(self, text: str) -> list[int]:
        """The ids of a text in which the mask token, where it is written out, hides a token.

        A blank before a written mask belongs to the hidden token, as it would to a word. These are the ids that the
        tokenizer gives which is exported for masks, unless other special tokens are written out: those are text here.
        """
        ids: list[int] = self._mask_backend.encode(text).ids
        return ids

    @cached_property
    def _num_end_ids(self) -> int:
        return num_end_ids(json.loads(self._json)["post_processor"])

    @cached_property
    def _mask_backend(self) -> Any:
        """The tokenizer that is exported for masks, reading no special token out of text but the mask."""
        form = exported_form(json.loads(self._json), self.mask_token, self.mask_id, ends=True, special=False)
        backend = _import_tokenizers().Tokenizer.from_str(json.dumps(form))
        backend.encode_special_tokens = True
        return backend

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids. The space that the trained kinds put before the first word is kept, so that the
        decodings of two parts, one after the other, are the decoding of the whole."""
        text: str = self._backend.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)
        return text

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's own spelling of each id."""
        return [self._backend.id_to_token(int(index)) for index in ids]

    def save(self, path: str | Path) -> None:
        """Write tokenizer.json; the file appears whole or not at all."""
        _write_text(Path(path), self._json)

    @property
    def role_ids(self) -> dict[str, int]:
        """bos_token_id, eos_token_id and so on, as far as there is such a token; mask_token_id always."""
        return {f"{role}_id": self._tokens[token] for role, token in self._role_tokens().items()}

    def save_pretrained_files(
        self, folder: str | Path, *, model_max_length: int | None = None, causal: bool = False
    ) -> None:
        """Write tokenizer.json and tokenizer_config.json as Hugging Face's `PreTrainedTokenizerFast` reads them.

        Theirs encodes as `encode_with_masks` does. `load` of the folder gives this tokenizer again, also after they
        saved it.

        Args:
            model_max_length: the model's longest sequence, in tokens; None leaves texts as long as they are.
            causal: for a model that continues texts: theirs adds the template's beginning and no end, as
                `encode_beginning` does, and has no mask token, so that a fill-mask pipeline refuses it.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        description = json.loads(self._json)
        exported = exported_form(description, self.mask_token, self.mask_id, ends=not causal)
        settings: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # the default names token_type_ids too, which decoder classes refuse
            "model_input_names": ["input_ids", "attention_mask"],
        }
        if model_max_length is not None:
            settings["model_max_length"] = model_max_length
        settings |= self._role_tokens()
        if causal:
            del settings["mask_token"]
        else:  # spelled out: of a name alone they make a token that is not normalized
            flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": True, "special": True}
            settings["mask_token"] = {"__type": "AddedToken", "content": self.mask_token} | flags
        settings[TRAINING_FORM] = differences(description, self.mask_token)
        for name, document in (("tokenizer.json", exported), ("tokenizer_config.json", settings)):
            _write_text(folder / name, json.dumps(document, indent=2, ensure_ascii=False) + "\n")

    def _role_tokens(self) -> dict[str, str]:
        present = {role: next((name for name in names if name in self._tokens), None) for role, names in ROLES.items()}
        return {role: token for role, token in present.items() if token is not None} | {"mask_token": self.mask_token}

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a tokenizer.json, or the folder that holds one; an exported one as it was in training.

        Raises:
            InputError: it is missing, not JSON, or not a tokenizer.
        """
        library = _import_tokenizers()
        path = Path(path)
        if path.is_dir():
            path = path / "tokenizer.json"
        if not path.is_file():
            raise InputError(f"tokenizer must be a tokenizer.json file; got {path}, which does not exist")
        description = _read_json(path)
        beside = path.with_name("tokenizer_config.json")
        settings = _read_json(beside) if path.name == "tokenizer.json" and beside.is_file() else {}
        try:
            if isinstance(settings, dict) and TRAINING_FORM in settings:
                description = restored_form(description, settings[TRAINING_FORM])
            backend = library.Tokenizer.from_str(json.dumps(description))
        except Exception as error:  # the library raises bare Exception
            raise InputError(
                f"tokenizer must be a file of the tokenizers library; got {path}, which is not one: {error}"
            ) from error
        if not backend.get_vocab_size(with_added_tokens=True):
            raise InputError(f"tokenizer must have a vocabulary; got {path}, which has no token")
        return cls(backend)


def train_tokenizer(texts: Iterable[str], config: TokenizerConfig) -> Tokenizer:
    """Learn a vocabulary from texts, which are read once and never held together; or load `config.path`.

    The same texts and config give the same tokenizer, whatever the number of cores.

    Raises:
        InputError: there is no text, or `config.path` cannot be loaded.
    """
    if config.path is not None:
        return Tokenizer.load(config.path)
    _import_tokenizers()
    iterator = iter(texts)
    first = next(iterator, None)
    if first is None:
        raise InputError("texts must hold at least one document to train a tokenizer on; got none")

    def batches() -> Iterator[list[str]]:
        yield [_UNBROKEN.sub(r"\g<0> ", first)]
        while batch := list(islice(iterator, _TEXTS_PER_BATCH)):
            yield [_UNBROKEN.sub(r"\g<0> ", text) for text in batch]

    train = train_byte_level_bpe if config.kind == "byte_level_bpe" else train_word_piece
    return Tokenizer(train(batches(), config.vocab_size, config.min_frequency))


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_text(path, "tokenizer"))
    except json.JSONDecodeError as error:
        raise InputError(f"tokenizer must be a JSON file; got {path}, which is not JSON: {error}") from error


def _find_mask_token(backend: Any) -> str | None:
    for token in ("<mask>", "[MASK]"):
        if backend.token_to_id(token) is not None:
            return token
    added = backend.get_added_tokens_decoder()
    names = [added[index].content for index in sorted(added) if added[index].special]
    return next((name for name in names if "mask" in name.lower()), None)


def _append_mask_token(backend: Any) -> str:
    from tokenizers import AddedToken

    backend.add_special_tokens([AddedToken("<mask>", special=True, normalized=False)])
    return "<mask>"


def _word_starts(
    tokens: dict[str, int], description: dict[str, Any], size: int, specials: frozenset[int]
) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """bool (size,): the token begins a word. Read from the kind of tokenizer that the JSON describes."""
    model = description["model"]
    parts = _component_types(description.get("pre_tokenizer")) | _component_types(description.get("decoder"))
    if "ByteLevel" in parts:
        begins = {index for token, index in tokens.items() if token.startswith(BYTE_LEVEL_SPACES)}
    elif model.get("type") == "WordPiece":
        prefix = model.get("continuing_subword_prefix", "##")
        begins = {index for token, index in tokens.items() if not token.startswith(prefix)}
    elif any(token.startswith("▁") for token in tokens):
        begins = {index for token, index in tokens.items() if token.startswith("▁")}
    else:  # whole words, nothing marks a continuation
        begins = set(tokens.values())
    word_start = np.zeros(size, dtype=np.bool_)
    word_start[sorted(begins | specials)] = True
    return word_start


def _component_types(component: dict[str, Any] | None) -> set[str]:
    """The types of a pre-tokenizer or decoder and of everything in it, if it is a sequence."""
    if component is None:
        return set()
    inner = [*component.get("pretokenizers", []), *component.get("decoders", [])]
    return {component["type"]}.union(*(_component_types(part) for part in inner))


def _write_text(path: Path, text: str) -> None:
    """Write a file by way of a temporary sibling, so that a reader sees the old file or the whole new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _import_tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise InputError("the tokenizer needs tokenizers: pip install '.[train]' in antlm_fast's checkout") from error
    return tokenizers
