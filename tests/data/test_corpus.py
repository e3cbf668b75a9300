"""Which files a split reads, what a document is, who is held out, and what is said about files that are wrong."""

from __future__ import annotations

import gzip
import json
import os
import sys
import types
from collections.abc import Iterator
from fractions import Fraction
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest

from antlm_fast.data import text_files
from antlm_fast.data.corpus import DataConfig, documents, is_held_out, open_source
from antlm_fast.types import InputError


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path: Path, split: str = "train", **settings: Any) -> list[str]:
    # nothing held out, unless a test is about that
    return list(documents(DataConfig(train=str(path), **({"validation_share": 0.0} | settings)), split))


@pytest.mark.parametrize("suffix", ["", ".gz"])
@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.txt", "one\nstill one\n\n \ntwo\n", ["one\nstill one", "two"]),
        ("a.txt", "\ufeffone\r\nstill one\r\n\r\ntwo", ["one\nstill one", "two"]),
        ("a.train", "one \n\n  two\nthree", ["one", "two", "three"]),
        ("a.test", "given by name\nit is read\n", ["given by name", "it is read"]),
        ("a.jsonl", '{"text": "one\\ntwo"}\n\n{"text": " "}\n{"text": "three"}\n', ["one\ntwo", "three"]),
        ("noending", "plain\n\ntext\n", ["plain", "text"]),
    ],
)
def test_documents_of_a_file(tmp_path: Path, name: str, suffix: str, content: str, expected: list[str]) -> None:
    assert read(write(tmp_path / (name + suffix), content)) == expected


@pytest.mark.parametrize(
    ("unit", "expected"),
    [
        ("auto", ["one\ntwo", "three"]),
        ("paragraph", ["one\ntwo", "three"]),
        ("line", ["one", "two", "three"]),
        ("file", ["one\ntwo\n\nthree"]),
    ],
)
def test_document_units(tmp_path: Path, unit: str, expected: list[str]) -> None:
    assert read(write(tmp_path / "a.txt", "one\ntwo\n\nthree\n"), documents=unit) == expected


def test_text_field(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"text": "no", "story": "yes"}\n')
    assert read(path, text_field="story") == ["yes"]


def test_paragraph_without_blank_lines_is_cut_at_a_line(tmp_path: Path) -> None:
    line = "x" * 99
    texts = read(write(tmp_path / "a.txt", f"{line}\n" * 1000))
    assert len(texts) == 1000 // 83 + 1  # the 83rd line of 99 characters is the first to pass 8192
    assert "\n".join(texts) == "\n".join([line] * 1000)


def test_folder_is_read_sorted_and_recursive(tmp_path: Path) -> None:
    write(tmp_path / "b" / "one.txt", "b/one")
    write(tmp_path / "a.txt", "a")
    write(tmp_path / "b" / "a.jsonl.gz", '{"text": "b/a"}')
    write(tmp_path / "c.csv", "not read")
    write(tmp_path / ".hidden.txt", "not read")
    write(tmp_path / "c.test", "not read")
    assert read(tmp_path) == ["a", "b/a", "b/one"]


def test_babylm_folder_has_its_validation(tmp_path: Path) -> None:
    write(tmp_path / "train" / "cbt.train", "t1\nt2\n")
    write(tmp_path / "dev" / "cbt.dev.gz", "v1\nv2\n")
    write(tmp_path / "test" / "cbt.test", "x1\nx2\n")
    assert read(tmp_path, "train", validation_share=0.5) == ["t1", "t2"]
    assert read(tmp_path, "validation", validation_share=0.5) == ["v1", "v2"]
    assert read(tmp_path / "dev", "train") == ["v1", "v2"]


def test_explicit_validation(tmp_path: Path) -> None:
    train = write(tmp_path / "a.txt", "t")
    held = tmp_path / "held"
    write(held / "a.train", "no")
    write(held / "b.dev", "v")
    assert read(train, "train", validation=str(held), validation_share=0.5) == ["t"]
    assert read(train, "validation", validation=str(held)) == ["v"]
    (held / "b.dev").unlink()
    assert read(train, "validation", validation=str(held)) == ["no"]


@pytest.mark.parametrize("share", [0.5, 0.3, 0.1, 0.02, 0.013, 0.001])
def test_held_out_share_is_exact_and_splits_are_disjoint(share: float) -> None:
    ratio = Fraction(share).limit_denominator(1_000_000)
    held = [is_held_out(index, *ratio.as_integer_ratio()) for index in range(20_000)]
    assert abs(sum(held) - 20_000 * share) <= 1
    # one in every block, so never two blocks without one, and not at a fixed period
    places = [index for index, value in enumerate(held) if value]
    gaps = {after - before for before, after in pairwise(places)}
    assert max(gaps) < 2 / share + 1
    assert len(gaps) > 1


def test_held_out_documents_do_not_depend_on_the_files(tmp_path: Path) -> None:
    lines = [f"document {number}" for number in range(300)]
    write(tmp_path / "one" / "a.train", "\n".join(lines))
    for part in range(3):
        write(tmp_path / "three" / f"{part}.train", "\n".join(lines[100 * part : 100 * part + 100]))
    for folder in ("one", "three"):
        kept = read(tmp_path / folder, "train", validation_share=0.05)
        held = read(tmp_path / folder, "validation", validation_share=0.05)
        assert len(held) == 15
        assert sorted(kept + held) == sorted(lines)
    assert read(tmp_path / "one", "validation", validation_share=0.05) == held


def test_reading_streams(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first document is given after the first line is read, not after the last."""
    lines_read = 0
    real = text_files.read_lines

    def counted(path: Path, kind: str) -> Iterator[str]:
        nonlocal lines_read
        for line in real(path, kind):
            lines_read += 1
            yield line

    monkeypatch.setattr(text_files, "read_lines", counted)
    path = write(tmp_path / "a.train", "line\n" * 1000)
    assert list(islice(documents(DataConfig(train=str(path), validation_share=0.0), "train"), 3)) == ["line"] * 3
    assert lines_read == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"", r"corpus file must hold text; got .*a.txt, which is empty$"),
        ("a.txt", b" \n\n", "which is empty"),
        ("a.txt.gz", b"", "which is empty"),
        ("a.txt", b"good\nb\xe9d\n", r"corpus file must be UTF-8; got .*a.txt, byte 6 is 0xe9$"),
        ("a.txt", b"\xef\xbb\xbfb\xe9d\n", r"a.txt, byte 4 is 0xe9$"),
        ("a.train", "text".encode("utf-16"), r"a.train, byte 0 is 0xff \(it looks like UTF-16LE; "),
        (
            "a.jsonl",
            '{"text": "a"}\n{"text": "b"\n',
            r"one JSON object a line; got .*a.jsonl, line 2: Expecting ',' del",
        ),
        ("a.jsonl", '{"text": "a"}\n["b"]\n', r"one JSON object a line; got .*a.jsonl, line 2: a list$"),
        ("a.jsonl", "[" * 100_000, r"one JSON object a line; got .*a.jsonl, line 1: "),
        (
            "a.jsonl",
            '\n{"b": 1, "a": 2}',
            r"data.text_field .* must name a field .*; got 'text' for .*a.jsonl, line 2: a, b$",
        ),
        (
            "a.jsonl",
            '{"text": 3}',
            r"data.text_field .* must name a text; got 'text' for .*a.jsonl, line 1: a int$",
        ),
        ("a.jsonl", '{"text": "\\ud800"}', r"corpus file must hold valid Unicode; got .*a.jsonl, line 1: "),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(InputError, match=message) as caught:
        read(path)
    assert "\n" not in str(caught.value)


def test_truncated_and_false_gzip(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt.gz", os.urandom(1000).hex() * 20)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"corpus file must be whole; got .*a.txt.gz, whose gzip data ends too early"):
        read(path)
    path.write_bytes(b"plain text")
    with pytest.raises(InputError, match=r"corpus file must be gzip data; got .*a.txt.gz: "):
        read(path)


def test_missing_paths_and_folders_without_files(tmp_path: Path) -> None:
    message = "corpus must be a file, a folder, 'builtin' or 'hf:NAME'; got .*nowhere, which does not exist"
    with pytest.raises(InputError, match=message):
        read(tmp_path / "nowhere")
    with pytest.raises(InputError, match=message):
        read(tmp_path, "validation", validation=str(tmp_path / "nowhere"))
    write(tmp_path / "a.csv", "a")
    write(tmp_path / "a.test", "a")
    with pytest.raises(InputError, match=r"files that end in .txt, .train, .dev, .jsonl \(or these with .gz\); got .*"):
        read(tmp_path)


def test_a_pipe_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="which is not a regular file"):
        read(tmp_path / "pipe")


def test_too_few_documents_to_hold_out(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", "one document")
    parts: dict[str, list[str] | str] = {}
    for split in ("train", "validation"):
        try:
            parts[split] = read(path, split, validation_share=0.02)
        except InputError as error:
            parts[split] = str(error)
    texts = [part for part in parts.values() if isinstance(part, list)]
    errors = [part for part in parts.values() if isinstance(part, str)]
    assert texts == [["one document"]]
    assert len(errors) == 1
    assert "got 0.02 of 1 documents in" in errors[0]


def test_no_validation_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="data.validation must be given or data.validation_share above 0; got"):
        read(write(tmp_path / "a.txt", "text"), "validation", validation_share=0)


def test_builtin_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def fake(num_words: int, seed: int = 0) -> Iterator[str]:
        return (f"seed {seed} document {number}" for number in range(num_words // 4))

    module = types.ModuleType("antlm_fast.data.builtin.corpus")
    module.documents = fake  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    config = DataConfig(builtin_words=400)
    kept, held = list(documents(config, "train")), list(documents(config, "validation"))
    assert (len(kept), len(held)) == (98, 2)
    assert set(kept).isdisjoint(held)
    own = list(documents(DataConfig(validation="builtin", builtin_words=400), "validation"))
    assert own == [f"seed 1 document {number}" for number in range(10)]


def test_real_builtin_corpus_is_a_corpus() -> None:
    config = DataConfig(builtin_words=2000)
    words = sum(len(text.split()) for split in ("train", "validation") for text in documents(config, split))
    assert 2000 <= words < 2200


def fake_datasets(monkeypatch: pytest.MonkeyPatch, rows: list[dict[str, Any]] | Exception) -> list[Any]:
    calls: list[Any] = []

    def load_dataset(*args: Any, **options: Any) -> list[dict[str, Any]]:
        calls.append((args, options))
        if isinstance(rows, Exception):
            raise rows
        return rows

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return calls


@pytest.mark.parametrize(
    ("name", "arguments", "split"),
    [
        ("hf:owner/name", ("owner/name", None), "train"),
        ("hf:owner/name:config", ("owner/name", "config"), "train"),
        ("hf:owner/name::test", ("owner/name", None), "test"),
        ("hf:owner/name:config:test", ("owner/name", "config"), "test"),
    ],
)
def test_hugging_face_dataset(
    monkeypatch: pytest.MonkeyPatch, name: str, arguments: tuple[str, str | None], split: str
) -> None:
    calls = fake_datasets(monkeypatch, [{"text": "one"}, {"text": ""}, {"text": "two"}])
    assert list(documents(DataConfig(train=name, validation_share=0), "train")) == ["one", "two"]
    assert calls == [(arguments, {"split": split, "streaming": True})]


def test_hugging_face_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(name: str, rows: list[dict[str, Any]] | Exception, message: str) -> None:
        fake_datasets(monkeypatch, rows)
        with pytest.raises(InputError, match=message):
            list(documents(DataConfig(train=name), "train"))

    fails("hf:a", ConnectionError("offline"), "dataset must be one that can be loaded; got hf:a: offline")
    fails("hf:a", [{"text": "x"}, {"body": "y"}], r"text_field .* must name a text; got 'text' for hf:a, row 1: body")
    fails("hf:a", [], "corpus must hold at least one document; got none in hf:a")
    fails("hf:a:b:c:d", [], r"dataset must be hf:NAME\[:CONFIG\]\[:SPLIT\]; got hf:a:b:c:d")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match=r"needs the package datasets \(pip install datasets\); got hf:a"):
        list(documents(DataConfig(train="hf:a"), "train"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"train": ""}, "train must be a text that is not empty; got ''"),
        ({"train": 3}, "train must be a text that is not empty; got 3"),
        ({"validation": ""}, "validation must be a text that is not empty; got ''"),
        ({"validation_share": 0.6}, r"validation_share must lie in 0 .. 0.5; got 0.6"),
        ({"validation_share": float("nan")}, r"validation_share must lie in 0 .. 0.5; got nan"),
        ({"validation_share": "0.1"}, r"validation_share must lie in 0 .. 0.5; got '0.1'"),
        ({"documents": "sentence"}, "documents must be one of auto, line, paragraph, file; got 'sentence'"),
        ({"row_mode": "padded"}, "row_mode must be one of stream, packed; got 'padded'"),
        ({"row_tokens": 1}, "row_tokens must be an integer of at least 2; got 1"),
        ({"row_tokens": True}, "row_tokens must be an integer of at least 2; got True"),
        ({"builtin_words": 0}, "builtin_words must be an integer of at least 1; got 0"),
    ],
)
def test_config_is_checked(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        DataConfig(**settings)


def test_contents_follow_the_bytes_and_the_way_of_reading(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "x.txt", "one\n\ntwo")

    def contents(name: Path = path.parent, **settings: Any) -> str:
        return json.dumps(open_source(DataConfig(train=str(name), **settings), "train").contents(), sort_keys=True)

    before = contents()
    assert contents() == before
    assert contents(row_tokens=7, cache_dir="elsewhere") == before  # rows are cut later
    assert contents(path) == before  # one file is a folder of one file
    different = {contents(documents="line"), contents(text_field="t"), contents(validation_share=0.1)}
    write(tmp_path / "a" / "x.txt", "one\n\ntwO")
    different.add(contents())
    before = contents()
    path.rename(tmp_path / "a" / "y.txt")  # of a name only the ending decides anything
    assert contents() == before
    (tmp_path / "a" / "y.txt").rename(tmp_path / "a" / "y.train")
    different.add(contents())
    assert len(different) == 5
    # the same files elsewhere are the same corpus
    before = contents()
    (tmp_path / "a").rename(tmp_path / "moved")
    assert contents(tmp_path / "moved") == before


def test_split_is_checked() -> None:
    with pytest.raises(ValueError, match="split must be one of train, validation; got 'test'"):
        open_source(DataConfig(), "test")


def test_a_corpus_that_is_still_to_be_given_says_how():
    with pytest.raises(InputError, match=r"data.train must be given \(--data PATH"):
        open_source(DataConfig(train=None), "train")
