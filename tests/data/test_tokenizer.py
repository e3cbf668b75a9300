"""Training, loading and saving tokenizers, and the vocabulary that objectives read from them."""

from __future__ import annotations

import builtins
import json
import subprocess
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from antlm_fast.data.tokenizer import KINDS, TRAINING_FORM, Tokenizer, TokenizerConfig, train_tokenizer
from antlm_fast.types import InputError

tokenizers = pytest.importorskip("tokenizers")

TEXTS = [
    "The cat sat on the mat, and the dogs ran after it.",
    "The dog's bowl held 1234 biscuits; the cat's held none.",
    "Running dogs run, walking cats walk, and nobody waited for the others.",
    "She said: “déjà vu”, twice, in 1999 and in 2024.",
] * 5
STRANGE = [
    "The cat 1234 ## #12 dog's",
    "## starts with the continuation mark ##x x##y",
    "literal <s> </s> <pad> <mask> [MASK] [CLS] [UNK] are text",
    "two  spaces\nnew\tline\r\n end ",
    "日本語 ☃ é ß ﬁ ① \u200d \U0001f600",
    "x" * 1000 + " " * 200 + "y",
    "\x00\x01\x7f",
    "0123456789" * 20,
]
SIZES = {"byte_level_bpe": 320, "word_piece": 600}


def trained(kind: str) -> Tokenizer:
    return train_tokenizer(iter(TEXTS), TokenizerConfig(kind, SIZES[kind]))


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return trained(request.param)


def test_byte_level_bpe_gets_one_mask_token_after_its_vocabulary() -> None:
    tokenizer = trained("byte_level_bpe")
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.mask_token) == (321, 320, "<mask>")
    assert tokenizer.tokens([0, 1, 2, 320]) == ["<pad>", "<s>", "</s>", "<mask>"]
    assert tokenizer.vocabulary.special_ids == (0, 1, 2, 320)


def test_word_piece_counts_its_mask_inside() -> None:
    tokenizer = trained("word_piece")
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.mask_token) == (600, 4, "[MASK]")
    assert tokenizer.tokens(range(7)) == ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]", "[PAR]", "[TAB]"]
    assert tokenizer.vocabulary.special_ids == tuple(range(7))


def test_templates() -> None:
    bpe, pieces = trained("byte_level_bpe"), trained("word_piece")
    assert bpe.tokens(bpe.encode("the cat")) == ["<s>", "Ġthe", "Ġcat", "</s>"]
    assert pieces.tokens(pieces.encode("the cat")) == ["[CLS]", "Ġthe", "Ġcat", "[SEP]"]
    assert pieces.tokens(pieces.encode("")) == ["[CLS]", "[SEP]"]
    assert bpe.tokens(bpe.encode("")) == ["<s>", "</s>"]


def test_word_piece_splits_digits_singly() -> None:
    tokenizer = train_tokenizer(["in 1999 and 1999"] * 50, TokenizerConfig("word_piece", 600))
    assert tokenizer.tokens(tokenizer.encode("in 1999 and 19.99")) == (
        ["[CLS]", "Ġin", "Ġ1", "9", "9", "9", "Ġand", "Ġ1", "9", ".", "9", "9", "[SEP]"]
    )


@pytest.mark.parametrize("text", STRANGE)
def test_nothing_is_unknown_and_decoding_gives_the_text_back(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.special_id_set.isdisjoint(ids[1:-1])
    assert tokenizer.decode(ids) == " " + unicodedata.normalize("NFKC", text)


def test_decoded_parts_join(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the cats waited for the dogs")
    assert tokenizer.decode(ids[:6]) + tokenizer.decode(ids[6:]) == " the cats waited for the dogs"


def test_decoding_shows_special_tokens_on_request() -> None:
    tokenizer = trained("byte_level_bpe")
    assert tokenizer.decode(np.asarray(tokenizer.encode("the cat")), skip_special_tokens=False) == "<s> the cat</s>"


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode_batch(TEXTS + STRANGE) == [tokenizer.encode(text) for text in TEXTS + STRANGE]


def test_words_begin_at_the_space_marker(tokenizer: Tokenizer) -> None:
    vocabulary = tokenizer.vocabulary
    names = tokenizer.tokens(range(tokenizer.vocab_size))
    for index, name in enumerate(names):
        expected = name[0] in "ĠĊĉč" or index in tokenizer.special_id_set
        assert vocabulary.word_start[index] == expected, name
    ids = tokenizer.encode("the walking cats, waited")
    assert vocabulary.word_start[ids].sum() == 2 + 4  # both template tokens, four words


@pytest.mark.parametrize("kind", KINDS)
def test_training_in_another_process_gives_the_same_tokenizer(kind: str) -> None:
    # hash tables of the library are seeded per process
    program = (
        "from antlm_fast.data.tokenizer import *\n"
        f"print(train_tokenizer({TEXTS!r}, TokenizerConfig({kind!r}, {SIZES[kind]})).fingerprint)"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.strip()
    assert found == trained(kind).fingerprint


def test_training_streams_its_texts() -> None:
    """The texts are pulled a batch at a time, and the first one is not lost."""
    pulled = 0

    def texts() -> Iterator[str]:
        nonlocal pulled
        yield "first first first"
        for _ in range(5000):
            pulled += 1
            yield "then the others"

    tokenizer = train_tokenizer(texts(), TokenizerConfig(vocab_size=300))
    assert pulled == 5000
    assert len(tokenizer.encode("first")) == 3


def test_errors_of_the_texts_come_through() -> None:
    def texts() -> Iterator[str]:
        yield "one"
        raise InputError("corpus file must be UTF-8; got it, byte 3 is 0xff")

    with pytest.raises(InputError, match="byte 3 is 0xff"):
        train_tokenizer(texts(), TokenizerConfig(vocab_size=300))


def test_no_text() -> None:
    with pytest.raises(InputError, match=r"^texts must hold at least one document to train a tokenizer on; got none$"):
        train_tokenizer([], TokenizerConfig())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "unigram"}, "kind must be one of byte_level_bpe, word_piece; got 'unigram'"),
        ({"vocab_size": 258}, r"vocab_size must be an integer of at least 259 \(specials and bytes\); got 258"),
        ({"kind": "word_piece", "vocab_size": 518}, "vocab_size must be an integer of at least 519"),
        ({"vocab_size": 16e3}, "vocab_size must be an integer of at least 259 .*; got 16000.0"),
        ({"min_frequency": 0}, "min_frequency must be an integer of at least 1; got 0"),
    ],
)
def test_config_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        TokenizerConfig(**settings)


@pytest.mark.parametrize("kind", KINDS)
def test_smallest_vocabulary_holds_every_byte(kind: str) -> None:
    size = {"byte_level_bpe": 259, "word_piece": 519}[kind]
    tokenizer = train_tokenizer(TEXTS, TokenizerConfig(kind, size))
    assert tokenizer.decode(tokenizer.encode("any Ünicode ☃")) == " any Ünicode ☃"
    assert tokenizer.vocab_size == size + (kind == "byte_level_bpe")


def test_save_and_load(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = train_tokenizer([], TokenizerConfig(path=str(path)))
        assert loaded.fingerprint == tokenizer.fingerprint
        assert loaded.vocab_size == tokenizer.vocab_size
        assert loaded.encode_batch(STRANGE) == tokenizer.encode_batch(STRANGE)
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.json"]


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("antlm_fast.data.tokenizer.os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        trained("byte_level_bpe").save(path)
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("tokenizer.json", "old")]


def test_load_errors(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"tokenizer must be a tokenizer.json file; got .*, which does not exist"):
        Tokenizer.load(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("{not json")
    with pytest.raises(InputError, match=r"tokenizer must be a JSON file; got .*tokenizer.json, which is not JSON: "):
        Tokenizer.load(path)
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(InputError, match="tokenizer must be UTF-8; got .*tokenizer.json, byte 7 is 0xff"):
        Tokenizer.load(path)
    path.write_text('{"model": {"type": "Nothing"}}')
    with pytest.raises(InputError, match=r"tokenizer must be a file of the tokenizers library; got .*tokenizer.json"):
        Tokenizer.load(path)
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(path))
    with pytest.raises(InputError, match=r"tokenizer must have a vocabulary; got .*, which has no token"):
        Tokenizer.load(path)


def existing(path: Path, vocab: dict[str, int], *, specials: tuple[str, ...] = (), **parts: Any) -> Tokenizer:
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens(list(specials))
    for name, part in parts.items():
        setattr(backend, name, part)
    backend.save(str(path))
    return Tokenizer.load(path)


@pytest.mark.parametrize(
    ("specials", "mask_token", "mask_id"),
    [
        (("[PAD]", "[MASK]"), "[MASK]", 3),
        (("<mask>", "<extra_mask_0>"), "<mask>", 2),
        (("<|Mask|>", "[PAD]"), "<|Mask|>", 2),
        (("[PAD]",), "<mask>", 3),
        ((), "<mask>", 2),
    ],
)
def test_mask_token_of_an_existing_tokenizer(
    tmp_path: Path, specials: tuple[str, ...], mask_token: str, mask_id: int
) -> None:
    tokenizer = existing(tmp_path / "t.json", {"[UNK]": 0, "mask": 1}, specials=specials)
    assert (tokenizer.mask_token, tokenizer.mask_id) == (mask_token, mask_id)
    assert tokenizer.mask_id in tokenizer.vocabulary.special_ids


def test_mask_token_that_is_an_ordinary_token_becomes_special(tmp_path: Path) -> None:
    tokenizer = existing(tmp_path / "t.json", {"[UNK]": 0, "<mask>": 1, "word": 2})
    assert tokenizer.vocabulary.special_ids == (1,)
    assert tokenizer.vocabulary.word_start.tolist() == [True, True, True]
    assert tokenizer.encode_with_masks("word <mask> word") == [2, 1, 2]
    tokenizer.save_pretrained_files(tmp_path / "model")
    loaded = Tokenizer.load(tmp_path / "model")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.encode_with_masks("word<mask>") == [2, 1]


def test_ids_without_a_token_are_never_drawn(tmp_path: Path) -> None:
    tokenizer = existing(tmp_path / "t.json", {"[UNK]": 0, "a": 1, "b": 5}, specials=("[MASK]",))
    # the library gives added tokens the next free number, counted in tokens
    size = tokenizer.vocabulary.size
    assert size == 6
    assert {2, 4} <= set(tokenizer.vocabulary.special_ids)
    assert tokenizer.vocabulary.word_start.shape == (size,)


def test_no_template_adds_nothing_and_truncation_and_padding_are_off(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel({"[UNK]": 0, "a": 1, "[PAD]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.enable_truncation(2)
    backend.enable_padding(pad_id=2, pad_token="[PAD]", length=8)
    backend.save(str(path))
    assert Tokenizer.load(path).encode_batch(["a a a a", "a"]) == [[1, 1, 1, 1], [1]]


def test_word_starts_of_other_kinds(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    backend.decoder = tokenizers.decoders.WordPiece()
    backend.add_special_tokens(["[MASK]"])
    backend.save(str(path))
    assert Tokenizer.load(path).vocabulary.word_start.tolist() == [True, True, False, True]

    backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("<unk>", 0.0), ("▁a", -1.0), ("b", -1.5)], unk_id=0))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
    backend.decoder = tokenizers.decoders.Sequence([tokenizers.decoders.Metaspace(), tokenizers.decoders.Fuse()])
    backend.save(str(path))
    assert Tokenizer.load(path).vocabulary.word_start.tolist() == [False, True, False, True]


def test_fingerprint_ignores_the_file_layout(tmp_path: Path) -> None:
    tokenizer = trained("byte_level_bpe")
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    path.write_text(json.dumps(json.loads(path.read_text()), sort_keys=True))
    assert Tokenizer.load(path).fingerprint == tokenizer.fingerprint
    assert len(tokenizer.fingerprint) == 64
    assert trained("word_piece").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        (
            "byte_level_bpe",
            {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "mask_token": "<mask>", "unk_token": None},
        ),
        (
            "word_piece",
            {"bos_token": "[CLS]", "eos_token": "[SEP]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
            | {"pad_token": "[PAD]", "mask_token": "[MASK]", "unk_token": "[UNK]"},
        ),
    ],
)
def test_transformers_loads_the_saved_files(kind: str, roles: dict[str, str | None], tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(kind)
    tokenizer.save_pretrained_files(tmp_path / "model")
    for loader in (transformers.PreTrainedTokenizerFast, transformers.AutoTokenizer):
        theirs = loader.from_pretrained(tmp_path / "model")
        assert len(theirs) == tokenizer.vocab_size
        assert {role: getattr(theirs, role) for role in roles} == roles
        assert theirs.mask_token_id == tokenizer.mask_id
        for text in TEXTS[:4]:
            encoded = theirs(text)
            assert sorted(encoded) == ["attention_mask", "input_ids"]
            assert encoded["input_ids"] == tokenizer.encode(text)
            assert theirs.decode(encoded["input_ids"], skip_special_tokens=True) == tokenizer.decode(
                tokenizer.encode(text)
            )


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_for_a_causal_model_does_not_end(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(kind)
    tokenizer.save_pretrained_files(tmp_path, causal=True)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS[:4]:
        assert theirs(text)["input_ids"] == tokenizer.encode_beginning(text) == tokenizer.encode(text)[:-1]
    assert theirs.mask_token is None
    pair = theirs("the", "cat")["input_ids"]  # two texts are set against each other, and end
    assert [pair[0], pair[-1]] == [theirs.bos_token_id, theirs.eos_token_id]


MASKED = [
    "The <mask> stands",
    "The <mask>.",
    "<mask>",
    "  <mask>   <mask> stands",
    "The <mask>s sat, the<mask>",
    "a\n<mask>\nb",
    "(<mask>) 12<mask>34",
    "<mask><mask>, déjà ﬁ <mask>",
    "\tthe cat",
]


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_puts_no_stray_blank_beside_a_mask(kind: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(kind)
    tokenizer.save_pretrained_files(tmp_path)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for text in MASKED:
        text = text.replace("<mask>", tokenizer.mask_token)
        assert theirs(text)["input_ids"] == tokenizer.encode_with_masks(text), text
    words = theirs.convert_ids_to_tokens(theirs(f"The {theirs.mask_token} cat.")["input_ids"])
    assert words[-4:] == [theirs.mask_token, *tokenizer.tokens(tokenizer.encode("The cat.")[-3:])]


def test_transformers_cuts_to_the_length_of_the_model(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = trained("byte_level_bpe")
    tokenizer.save_pretrained_files(tmp_path, model_max_length=7)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[0], truncation=True)["input_ids"] == [*tokenizer.encode(TEXTS[0])[:6], theirs.eos_token_id]


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_tokenizer_is_read_as_it_was_in_training(kind: str, tmp_path: Path) -> None:
    """Whole template included, or every score of the exported model would be another."""
    transformers = pytest.importorskip("transformers")
    tokenizer = trained(kind)
    tokenizer.save_pretrained_files(tmp_path / "model", causal=True)
    transformers.AutoTokenizer.from_pretrained(tmp_path / "model").save_pretrained(tmp_path / "again")
    Tokenizer.load(tmp_path / "again").save_pretrained_files(tmp_path / "ours")
    for folder in ("model", "again", "ours"):
        loaded = Tokenizer.load(tmp_path / folder)
        assert loaded.encode_batch(STRANGE) == tokenizer.encode_batch(STRANGE)
        assert loaded.fingerprint == Tokenizer.load(tmp_path / folder / "tokenizer.json").fingerprint
        assert loaded.fingerprint == tokenizer.fingerprint


def test_a_damaged_training_form_is_one_line(tmp_path: Path) -> None:
    trained("byte_level_bpe").save_pretrained_files(tmp_path)
    config = tmp_path / "tokenizer_config.json"
    settings = json.loads(config.read_text())
    for form in ({}, None, [1], settings[TRAINING_FORM] | {"normalizer": {"type": "Nothing"}}):
        config.write_text(json.dumps(settings | {TRAINING_FORM: form}))
        with pytest.raises(InputError, match=r"tokenizer must be a file of the tokenizers library; got .*tokenizer"):
            Tokenizer.load(tmp_path)
    config.write_text("{")
    with pytest.raises(InputError, match=r"tokenizer must be a JSON file; got .*tokenizer_config.json, which is not"):
        Tokenizer.load(tmp_path)


def foreign(name: str) -> Any:
    """Tokenizers that put a blank before the first word, or a template around it, in other ways than ours do."""
    pieces = {token: i for i, token in enumerate(["[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", ".", "##s", "s"])}
    sentence = [("<unk>", 0.0), ("▁", -2.0), ("▁the", -1.0), ("▁cat", -1.5), ("cat", -3.0), ("s", -4.0), (".", -4.0)]
    normalizers, pre_tokenizers = tokenizers.normalizers, tokenizers.pre_tokenizers
    if name.startswith("metaspace"):
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram(sentence, unk_id=0))
        if name == "metaspace":
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        else:
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        return backend
    backend = tokenizers.Tokenizer(tokenizers.models.WordPiece(pieces, unk_token="[UNK]"))
    backend.add_special_tokens(["[UNK]", "[CLS]", "[SEP]", "[MASK]"])
    backend.normalizer = normalizers.BertNormalizer(lowercase=True)
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    processors = tokenizers.processors
    backend.post_processor = {
        "bert": processors.BertProcessing(("[SEP]", 2), ("[CLS]", 1)),
        "roberta": processors.RobertaProcessing(("[SEP]", 2), ("[CLS]", 1)),
        "sequence": processors.Sequence(
            [
                processors.ByteLevel(),
                processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A $B [SEP]", [("[CLS]", 1), ("[SEP]", 2)]),
            ]
        ),
    }[name]
    return backend


@pytest.mark.parametrize(
    ("name", "begin", "end"),
    [
        ("metaspace", [], []),
        ("metaspace as normalizer", [], []),
        ("bert", ["[CLS]"], ["[SEP]"]),
        ("roberta", ["[CLS]"], ["[SEP]"]),
        ("sequence", ["[CLS]"], ["[SEP]"]),
    ],
)
def test_tokenizers_of_others_take_masks_and_leave_prompts_open(
    name: str, begin: list[str], end: list[str], tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = Tokenizer(foreign(name))
    mask, space = tokenizer.mask_token, "" if begin else "▁"
    text = f"the {mask}s cat {mask}."
    ids = tokenizer.encode_with_masks(text)
    assert tokenizer.tokens(ids) == [*begin, f"{space}the", mask, "s", f"{space}cat", mask, ".", *end]
    assert tokenizer.encode_with_masks("the cat.") == tokenizer.encode("the cat.")
    assert tokenizer.tokens(tokenizer.encode_beginning("the cat")) == [*begin, f"{space}the", f"{space}cat"]
    for causal, expected in ((False, ids), (True, ids[: len(ids) - len(end)])):
        tokenizer.save_pretrained_files(tmp_path, causal=causal)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert theirs(text)["input_ids"] == expected
        assert theirs("cat", "the")["input_ids"] == tokenizer._backend.encode("cat", "the").ids
        assert Tokenizer.load(tmp_path).fingerprint == tokenizer.fingerprint


def test_a_text_that_ends_with_an_unknown_word_keeps_it_when_continued() -> None:
    tokenizer = Tokenizer(foreign("bert"))
    assert tokenizer.tokens(tokenizer.encode_beginning("the zebra")) == ["[CLS]", "the", "[UNK]"]


def test_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def without_tokenizers(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "tokenizers":
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_tokenizers)
    with pytest.raises(InputError, match=r"needs tokenizers: pip install '.\[train\]' in antlm_fast's checkout"):
        train_tokenizer(["text"], TokenizerConfig())


@pytest.mark.parametrize("kind", ["byte_level_bpe", "word_piece"])
def test_written_masks_hide_tokens_and_leave_the_rest_as_it_is(kind):
    tokenizer = train_tokenizer(["the cat sat on the mat ."] * 50, TokenizerConfig(kind=kind, vocab_size=600))
    whole = tokenizer.encode("the cat sat on the mat.")
    ids = tokenizer.encode_with_masks(f"the {tokenizer.mask_token} sat on the {tokenizer.mask_token}.")
    words = tokenizer.tokens(whole)
    expected = [
        tokenizer.mask_id if word.strip("Ġ") in ("cat", "mat") else id for word, id in zip(words, whole, strict=True)
    ]
    assert ids == expected
    assert tokenizer.encode_with_masks("the cat sat") == tokenizer.encode("the cat sat")
    assert tokenizer.encode_with_masks(tokenizer.mask_token) == [whole[0], tokenizer.mask_id, whole[-1]]
    end = tokenizer.tokens([whole[-1]])[0]  # another special token that is written out is text
    assert tokenizer.encode_with_masks(f"the {end} sat {tokenizer.mask_token}").count(whole[-1]) == 1


@pytest.mark.parametrize("kind", ["byte_level_bpe", "word_piece"])
def test_a_beginning_has_the_template_before_it_and_not_behind_it(kind):
    tokenizer = train_tokenizer(["the cat sat"] * 50, TokenizerConfig(kind=kind, vocab_size=600))
    assert tokenizer.encode_beginning("the cat") == tokenizer.encode("the cat")[:-1]
    assert tokenizer.encode_beginning("") == tokenizer.encode("")[:1]


def test_roles_name_the_special_tokens():
    tokenizer = train_tokenizer(["the cat sat"], TokenizerConfig(vocab_size=300))
    expected = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": tokenizer.mask_id}
    assert tokenizer.role_ids == expected
