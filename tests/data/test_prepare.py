"""A corpus is tokenized once, whatever asks for it again, and anew when anything that decides the ids changes."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tokenizers")

from antlm_fast.data import prepare as prepare_module
from antlm_fast.data.corpus import DataConfig, documents
from antlm_fast.data.prepare import default_cache_dir, prepare
from antlm_fast.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from antlm_fast.types import InputError

LINES = [f"The cat number {number} sat on mat number {number * 7 % 31}." for number in range(200)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(LINES, TokenizerConfig(vocab_size=300))


@pytest.fixture
def config(tmp_path: Path) -> DataConfig:
    (tmp_path / "corpus.train").write_text("\n".join(LINES))
    return DataConfig(
        train=str(tmp_path / "corpus.train"), validation_share=0.1, cache_dir=str(tmp_path / "cache"), row_tokens=16
    )


def encoded_batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The size of each batch that is tokenized from here on."""
    sizes: list[int] = []
    real = Tokenizer.encode_batch

    def counted(self: Tokenizer, texts: list[str]) -> list[list[int]]:
        sizes.append(len(texts))
        return real(self, texts)

    monkeypatch.setattr(Tokenizer, "encode_batch", counted)
    return sizes


@pytest.mark.parametrize(("split", "count"), [("train", 180), ("validation", 20)])
def test_store_holds_the_encoded_documents(config: DataConfig, tokenizer: Tokenizer, split: str, count: int) -> None:
    store = prepare(config, tokenizer, split)
    texts = list(documents(config, split))
    assert store.num_documents == len(texts) == count
    expected = [index for ids in tokenizer.encode_batch(texts) for index in ids]
    assert store.tokens.tolist() == expected
    assert store.tokenizer_fingerprint == tokenizer.fingerprint
    assert store.vocab_size == tokenizer.vocab_size
    assert store.source.startswith(f"{config.train}, ")


def test_second_call_reuses_the_store(
    config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = encoded_batches(monkeypatch)
    first = prepare(config, tokenizer, "train")
    assert sizes == [180]
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == f"preparing train data: {config.train}, without the held-out documents"
    assert lines[1].startswith(f"prepared train data: 180 documents, {first.num_tokens:,} tokens, ")
    assert len(lines) == 2
    second = prepare(config, tokenizer, "train")
    assert sizes == [180]
    assert capsys.readouterr().err == ""
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert np.array_equal(second.tokens, first.tokens)


def test_any_change_gives_another_store(config: DataConfig, tokenizer: Tokenizer) -> None:
    other = train_tokenizer(LINES[:100], TokenizerConfig(vocab_size=300))
    stores = [prepare(config, tokenizer, "train"), prepare(config, tokenizer, "validation")]
    stores += [prepare(config, other, "train")]
    path = Path(config.train)
    path.write_text(path.read_text().replace("mat", "hat", 1))
    stores += [prepare(config, tokenizer, "train")]
    assert len({store.fingerprint for store in stores}) == 4
    assert len({store.folder for store in stores}) == 4
    assert tokenizer.decode(stores[3].tokens[: stores[3].document_starts[1]]) == " " + LINES[0].replace("mat", "hat", 1)


def test_preparing_streams(config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more than one batch of documents is ahead of the ids that are written."""
    monkeypatch.setattr(prepare_module, "_DOCUMENTS_PER_BATCH", 10)
    read = 0

    class CountingSource:
        def documents(self, note: object) -> Iterator[str]:
            nonlocal read
            for line in LINES:
                read += 1
                yield line

    ahead = []
    for written, _ in enumerate(prepare_module._encoded(CountingSource(), tokenizer, "train")):  # type: ignore[arg-type]
        ahead.append(read - written)
    assert len(ahead) == 200
    assert max(ahead) == 10


def test_batches_are_bounded_in_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_CHARS_PER_BATCH", 100)
    texts = ["x" * 40] * 7 + ["y" * 1000] * 2
    batches = list(prepare_module._batches(iter(texts)))
    assert [len(batch) for batch in batches] == [3, 3, 2, 1]
    assert [text for batch in batches for text in batch] == texts


def test_failed_preparation_leaves_nothing(config: DataConfig, tokenizer: Tokenizer) -> None:
    path = Path(config.train)
    path.write_bytes(path.read_bytes() + b"\n\xff")
    with pytest.raises(InputError, match=r"corpus file must be UTF-8; got .*corpus.train, byte \d+ is 0xff"):
        prepare(config, tokenizer, "train")
    assert list(Path(str(config.cache_dir)).iterdir()) == []


def test_damaged_cache_is_named(config: DataConfig, tokenizer: Tokenizer) -> None:
    store = prepare(config, tokenizer, "train")
    os.truncate(store.folder / "tokens.bin", 4)
    with pytest.raises(
        InputError, match=r"is damaged: tokens.bin must have .*; delete .*train-[0-9a-f]{24} and prepare"
    ):
        prepare(config, tokenizer, "train")


def test_old_remains_of_killed_writers_are_removed(config: DataConfig, tokenizer: Tokenizer) -> None:
    folder = prepare(config, tokenizer, "train").folder
    folder.rename(folder.with_name("aside"))
    old, young = (folder.with_name(f".{folder.name}.{name}.partial") for name in ("00000000", "11111111"))
    for path in (old, young):
        path.mkdir()
        (path / "tokens.bin").write_bytes(b"half")
    os.utime(old / "tokens.bin", (0, 0))
    prepare(config, tokenizer, "train")
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([young.name, "aside", folder.name])


def test_cache_folder_of_the_caller_the_config_and_the_user(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert prepare(config, tokenizer, "train").folder.parent == tmp_path / "cache"
    assert prepare(config, tokenizer, "train", cache_dir=tmp_path / "mine").folder.parent == tmp_path / "mine"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    plain = DataConfig(train=config.train)
    assert prepare(plain, tokenizer, "train").folder.parent == tmp_path / "xdg" / "antlm-fast"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", value)
        assert default_cache_dir() == tmp_path / "home" / ".cache" / "antlm-fast"


@pytest.fixture
def homeless(monkeypatch: pytest.MonkeyPatch) -> None:
    """HOME is not set, and the user has no entry, as in a container with a user number of one's own."""

    def unknown(_: object) -> None:
        raise KeyError("getpwuid(): uid not found")

    for variable in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    for name in ("getpwuid", "getpwnam"):
        monkeypatch.setattr(f"pwd.{name}", unknown)


def test_a_user_without_a_home_folder_gets_a_traceback(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, homeless: None
) -> None:
    assert prepare(config, tokenizer, "train").folder.parent == tmp_path / "cache"
    plain = replace(config, cache_dir=None)
    rule = "data.cache_dir must be given where the user has no home folder; choose one by --set data.cache_dir=FOLDER"
    with pytest.raises(InputError, match=f"^{rule}, or set XDG_CACHE_HOME$"):
        prepare(plain, tokenizer, "train")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare(plain, tokenizer, "train").folder.parent == tmp_path / "xdg" / "antlm-fast"
    for name in ("cache_dir", "train", "validation"):
        rule = f"data.{name} must begin with a home folder that is known \\(set HOME\\); got '~/text'"
        with pytest.raises(InputError, match=rule):
            prepare(replace(config, **{name: "~/text"}), tokenizer, "validation" if name == "validation" else "train")


def test_a_home_folder_that_cannot_be_written_names_no_way_out(
    config: DataConfig, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """HOME=/ or /nonexistent, as users of services have it; nothing is tokenized before."""
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setattr(Tokenizer, "encode_batch", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    ways = "choose one by --set data.cache_dir=FOLDER, or set XDG_CACHE_HOME$"
    with pytest.raises(InputError, match=rf"got .*file/antlm-fast \(Not a directory\); {ways}"):
        prepare(replace(config, cache_dir=None), tokenizer, "train")
    monkeypatch.setattr("os.access", lambda path, mode: False)
    with pytest.raises(InputError, match=rf"got .*cache \(Permission denied\); {ways}"):
        prepare(config, tokenizer, "train")


def test_a_terminal_gets_a_bar(config: DataConfig, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    prepare(config, tokenizer, "train")
    assert "preparing train data: 0.00 tokens" in terminal.getvalue()
    assert terminal.getvalue().splitlines()[-1].startswith("prepared train data: 180 documents, ")
