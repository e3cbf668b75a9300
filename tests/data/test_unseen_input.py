"""Nothing is read that the user cannot see to be text, and nothing that is text is left out without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from antlm_fast.data.corpus import DataConfig, check_splits, documents, open_source
from antlm_fast.data.prepare import prepare
from antlm_fast.data.text_files import LONGEST_DOCUMENT_CHARS, cut
from antlm_fast.data.tokenizer import Tokenizer
from antlm_fast.types import InputError

tokenizers = pytest.importorskip("tokenizers")


def write(path: Path, content: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode())
    return path


def read(path: Path, split: str = "train", **settings: Any) -> list[str]:
    return list(documents(DataConfig(train=str(path), **({"validation_share": 0.0} | settings)), split))


def word_level(*parts: str) -> Tokenizer:
    """A tokenizer of three words, an end and a mask; the template has these parts, or there is none."""
    words = ["[UNK]", "one", "two", "three", "<s>", "</s>", "<mask>"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.add_special_tokens([*words[4:], "[UNK]"])
    if parts:
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single=" ".join(parts), special_tokens=[("<s>", 4), ("</s>", 5)]
        )
    return Tokenizer(backend)


def test_hidden_folders_are_not_trained_on(tmp_path: Path) -> None:
    root = tmp_path / ".data"  # what the user names is read, hidden or not
    write(root / "a.txt", "a")
    for hidden in (".git/x.txt", ".ipynb_checkpoints/a.txt", "b/.cache/deep/x.jsonl", ".x.txt"):
        write(root / hidden, "hidden")
    assert read(root) == ["a"]


def test_linked_folders_are_read_once_and_loops_end(tmp_path: Path) -> None:
    write(tmp_path / "elsewhere" / "deep" / "x.txt", "linked")
    root = tmp_path / "data"
    write(root / "a.txt", "a")
    write(root / "folder" / "b.txt", "b")
    (root / "link").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (root / "again").symlink_to(root / "folder", target_is_directory=True)
    (root / "folder" / "up").symlink_to(root, target_is_directory=True)
    (root / "file.txt").symlink_to(tmp_path / "elsewhere" / "deep" / "x.txt")
    assert read(root) == ["a", "b", "linked", "linked"]
    (root / "file.txt").unlink()
    (root / "file.txt").symlink_to(tmp_path / "gone.txt")
    with pytest.raises(InputError, match=r"files that can be read; got .*file.txt, which is a link to nothing$"):
        read(root)


def test_endings_in_capitals_are_read(tmp_path: Path) -> None:
    write(tmp_path / "A.TXT", "a\n\nb")
    write(tmp_path / "B.JSONL", '{"text": "c"}')
    write(tmp_path / "C.Train", "d\ne")
    assert read(tmp_path) == ["a", "b", "c", "d", "e"]
    write(tmp_path / "D.DEV", "f")
    assert read(tmp_path, "validation") == ["f"]


def test_old_line_ends_end_lines(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.txt", "one\rstill\r\rtwo")) == ["one\nstill", "two"]
    assert read(write(tmp_path / "a.train", "one\rtwo\r\nthree\n")) == ["one", "two", "three"]


def test_utf_16_without_a_mark_is_not_trained_on(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes("One sentence.\n\nTwo.\n".encode("utf-16-le"))
    with pytest.raises(InputError, match=r"corpus file must be UTF-8; got .*a.txt, byte 1 is 0x00 \(it looks like UTF"):
        read(path)


def test_json_arrays_and_tables_are_not_read_as_plain_text(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"one JSON object a line; got .*a.json, line 1: a list$"):
        read(write(tmp_path / "a.json", '[{"text": "one"}]'))
    with pytest.raises(InputError, match=r"one JSON object a line; got .*a.json, line 1: Expecting "):
        read(write(tmp_path / "a.json", '{\n"text": "one"\n}'))
    assert read(write(tmp_path / "a.json", '{"text": "one"}\n{"text": "two"}')) == ["one", "two"]
    for name in ("a.csv", "a.TSV", "a.xml", "a.html", "a.ipynb", "a.rtf"):
        with pytest.raises(InputError, match=rf"corpus file must be plain text or JSONL .*; got .*{name}$"):
            read(write(tmp_path / name, "one,two"))
    assert read(write(tmp_path / "a.md", "one")) == ["one"]


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ((), [1, 5, 2, 3, 5]),
        (("<s>", "$A"), [4, 1, 5, 4, 2, 3, 5]),
        (("<s>", "$A", "</s>"), [4, 1, 5, 4, 2, 3, 5]),
        (("$A", "<s>"), [1, 4, 2, 3, 4]),
    ],
    ids=["none", "beginning", "both", "end"],
)
def test_documents_do_not_run_together_where_a_tokenizer_has_no_template(
    tmp_path: Path, template: tuple[str, ...], expected: list[int]
) -> None:
    config = DataConfig(
        train=str(write(tmp_path / "a.txt", "one\n\ntwo three")),
        validation_share=0.0,
        cache_dir=str(tmp_path / "cache"),
    )
    assert prepare(config, word_level(*template), "train").tokens.tolist() == expected


def test_documents_that_nothing_can_part_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = Tokenizer(tokenizers.Tokenizer(tokenizers.models.WordLevel({"one": 0}, unk_token="one")))
    config = DataConfig(train=str(write(tmp_path / "a.txt")), validation_share=0.0, cache_dir=str(tmp_path / "cache"))
    prepare(config, tokenizer, "train")
    told = capsys.readouterr().err.splitlines()[-1]
    assert told == "note: the tokenizer has no template and no end token, so documents run together"


def test_an_empty_file_ends_no_folder_and_what_is_not_read_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "data"
    write(root / "a.txt", "one\n\ntwo\n\nthree")
    for number in range(7):
        write(root / f"empty_{number}.txt", "\n " * number)
    for name in ("b.csv", "c.csv", "d.test", "LICENSE"):
        write(root / name)
    assert read(root) == ["one", "two", "three"]
    config = DataConfig(train=str(root), validation_share=0.5, cache_dir=str(tmp_path / "cache"))
    for split in ("train", "validation"):
        prepare(config, word_level(), split)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note")]
    names = ", ".join(str(root / f"empty_{number}.txt") for number in range(5))
    assert notes == [
        f"note: not read in {root}: 2 .csv, 1 without an ending, 1 .test",
        f"note: left out because they are empty: {names} and 2 more",
    ]
    (root / "a.txt").unlink()
    with pytest.raises(InputError, match="corpus must hold at least one document; got none in "):
        read(root)


def test_folders_of_runs_are_never_data(tmp_path: Path) -> None:
    write(tmp_path / "a.txt", "a")
    for run in ("runs/demo", "runs/more/other"):
        write(tmp_path / run / "config.json", "{}")
        write(tmp_path / run / "metrics.jsonl", '{"step": 1}')
        write(tmp_path / run / "notes" / "b.txt", "of the run")
    before = open_source(DataConfig(train=str(tmp_path)), "train").contents()
    assert read(tmp_path) == ["a"]
    write(tmp_path / "runs" / "demo" / "metrics.jsonl", '{"step": 1}\n{"step": 2}')
    assert open_source(DataConfig(train=str(tmp_path)), "train").contents() == before
    assert open_source(DataConfig(train=str(tmp_path)), "train").what_is_not_read() == "2 run"
    with pytest.raises(InputError, match=r"corpus must be text; got .*demo, which is the folder of a run$"):
        read(tmp_path / "runs" / "demo")


def test_a_document_without_end_is_cut_at_blanks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = "word " * 110_000  # 550,000 characters
    parts = read(write(tmp_path / "a.txt", line))
    assert [len(part) for part in parts] == [262_144 // 5 * 5 - 1] * 2 + [550_000 - 2 * (262_144 // 5 * 5) - 1]
    assert " ".join(parts) == line.strip()
    for name, content in (("a.jsonl", json.dumps({"text": line})), ("a.train", line)):
        assert len(read(write(tmp_path / name, content))) == 3
    assert len(read(tmp_path / "a.txt", documents="file")) == 3
    assert list(cut("x" * (LONGEST_DOCUMENT_CHARS + 1))) == ["x" * LONGEST_DOCUMENT_CHARS, "x"]
    assert list(cut(" whole ")) == [" whole "]
    source = open_source(DataConfig(train=str(tmp_path / "a.txt"), validation_share=0.0), "train")
    notes: list[str] = []
    assert len(list(source.documents(notes.append))) == 3
    assert notes == ["documents of more than 262,144 characters, cut at blanks: 1"]


@pytest.mark.parametrize(
    ("content", "count", "ways"),
    [
        ("one", 1, "name a text for it (data.validation)"),
        ("one\nstill one", 1, "name a text for it (data.validation), or make documents smaller (data.documents=line)"),
        (
            "one\n\ntwo\n\nthree",
            3,
            "name a text for it (data.validation), or hold out more (data.validation_share=0.34)",
        ),
    ],
    ids=["line", "lines", "paragraphs"],
)
def test_too_few_documents_are_told_before_anything_is_tokenized(
    tmp_path: Path, content: str, count: int, ways: str
) -> None:
    path = write(tmp_path / "a.txt", content)
    with pytest.raises(InputError) as caught:
        check_splits(DataConfig(train=str(path)))
    rule = "data.validation_share must leave a document for training and one for validation"
    assert str(caught.value) == f"{rule}; got 0.02 of {count} documents in {path}; {ways}"
    if count > 1:
        check_splits(DataConfig(train=str(path), validation_share=0.34))
