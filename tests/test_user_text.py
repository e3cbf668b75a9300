"""Every text file of a user is read in one way, whatever the system or the editor that wrote it."""

import codecs
import gzip
import json

import pytest

from antlm_fast import user_text
from antlm_fast.data.tokenizer import Tokenizer, TokenizerConfig, train_tokenizer
from antlm_fast.evaluation.minimal_pairs import load_pairs
from antlm_fast.models.pretrained import read_settings
from antlm_fast.recipes import get_recipe
from antlm_fast.report.run_record import _json_lines
from antlm_fast.training.settings import read_config_file
from antlm_fast.types import InputError
from antlm_fast.user_text import read_lines, read_text

MARK = codecs.BOM_UTF8
ENCODINGS = ["UTF-16LE", "UTF-16BE", "UTF-32LE", "UTF-32BE"]


@pytest.mark.parametrize("chunk_bytes", [1, 2, 3, 7, 1 << 16])
def test_lines_and_letters_that_chunks_cut_are_whole(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(user_text, "_CHUNK_BYTES", chunk_bytes)
    path = tmp_path / "a.txt"
    path.write_bytes("é\r\n\r\n日\u2028本\rd\n\x0b \U0001f600\n\n".encode())
    lines = ["é", "", "日\u2028本", "d", "\x0b \U0001f600", ""]
    assert list(read_lines(path, "file")) == lines
    assert read_text(path, "file") == "\n".join(lines) + "\n"
    path.write_bytes(b"a\n" + "é".encode()[:1])
    with pytest.raises(InputError, match=r"^file must be UTF-8; got .*a.txt, byte 2 is 0xc3$"):
        read_text(path, "file")
    path.write_bytes(b"\xc3\xa9bcdefgh\xc3(")
    with pytest.raises(InputError, match=r"byte 9 is 0xc3$"):
        read_text(path, "file")


def test_a_mark_is_dropped_once_and_only_at_the_beginning(tmp_path):
    for content, expected in (
        (MARK, ""),
        (MARK + b"a\n", "a\n"),
        (MARK + MARK + b"a", "\ufeffa"),
        (b"a" + MARK, "a\ufeff"),
    ):
        for path, data in ((tmp_path / "a", content), (tmp_path / "a.GZ", gzip.compress(content))):
            path.write_bytes(data)
            assert read_text(path, "file") == expected


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("marked", [False, True], ids=["no mark", "mark"])
@pytest.mark.parametrize("text", ["The boy sees the dog.\n", "Собака видит его, и он её видит.\n"])
def test_utf_16_and_utf_32_are_refused_by_name(tmp_path, encoding, marked, text):
    path = tmp_path / "a.txt"
    path.write_bytes(("\ufeff" * marked + text * 3).encode(encoding))
    with pytest.raises(InputError, match=rf"got .*a.txt, byte \d+ is 0x.. \(it looks like {encoding}; iconv -f "):
        list(read_lines(path, "corpus file"))


def test_a_zero_byte_far_in_is_refused_where_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(MARK + b"x" * 70_000 + b"\0y")
    with pytest.raises(InputError, match=r"^file must be UTF-8; got .*a.txt, byte 70003 is 0x00$"):
        read_text(path, "file")


def test_files_with_a_byte_order_mark_are_read_as_those_without(tmp_path):
    def written(name, text):
        (tmp_path / name).write_bytes(MARK + text.encode())
        return tmp_path / name

    pair = json.dumps({"sentence_good": "a b", "sentence_bad": "b a", "UID": "x"})
    assert [pair.uid for pair in load_pairs(str(written("pairs.jsonl", pair + "\r" + pair)))] == ["x", "x"]
    demo = get_recipe("demo")
    assert read_config_file(written("c.toml", "seed = 5\r\n[data]\ntrain = 'x'\n"), start=demo).seed == 5
    assert read_config_file(written("c.json", '{"seed": 6}'), start=demo).seed == 6
    assert read_settings(written("config.json", '{"model_type": "llama"}')) == {"model_type": "llama"}
    assert _json_lines(written("metrics.jsonl", '{"step": 1}\n{"st')) == [{"step": 1}]
    tokenizer = train_tokenizer(["the cat sat"], TokenizerConfig(vocab_size=300))
    tokenizer.save(tmp_path / "plain.json")
    loaded = Tokenizer.load(written("tokenizer.json", (tmp_path / "plain.json").read_text(encoding="utf-8")))
    assert loaded.fingerprint == tokenizer.fingerprint


def test_gzipped_pairs_have_the_uid_of_their_name_and_hidden_files_are_no_pairs(tmp_path):
    pair = json.dumps({"sentence_good": "a b", "sentence_bad": "b a"}).encode()
    (tmp_path / "one.jsonl.gz").write_bytes(gzip.compress(pair))
    (tmp_path / "two.JSONL").write_bytes(pair)
    (tmp_path / "._two.jsonl").write_bytes(b"\0\5\x16\7")
    assert [pair.uid for pair in load_pairs(str(tmp_path))] == ["one", "two"]
