"""The user's text as the command line takes it: moved between two runs, beside its own runs, under odd names."""

import json
import shutil
from pathlib import Path

import pytest

from antlm_fast.cli import main
from antlm_fast.pipeline import stored_config

TEXT = "".join(f"The boy sees dog {number % 7}.\n\n" for number in range(300))
SMALL = [
    "model.hidden_size=16",
    "model.intermediate_size=16",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "tokenizer.vocab_size=280",
    "schedule=2s_CLM",
    "evaluation.every_steps=2",
    "evaluation.validation_rows=2",
    "evaluation.minimal_pairs=none",
    "data.row_tokens=16",
    "data.validation_share=0.1",
    "lr_schedule.warmup_steps=0",
]


def begin(output, *more):
    words = [word for setting in SMALL for word in ("--set", setting)]
    return main(["train", "--recipe", "demo", *words, "--output", str(output), *map(str, more)])


def again(output, *more):
    return main(["train", "--resume", "--output", str(output), *map(str, more)])


def last_line(capsys):
    return capsys.readouterr().err.splitlines()[-1]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def moved(tmp_path, capsys):
    """A finished run, whose text has since been moved from old/ to new/."""
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a.txt").write_text(TEXT)
    (tmp_path / "old.dev").write_text(TEXT[:2000])
    folder = tmp_path / "run"
    assert begin(folder, "--data", tmp_path / "old", "--set", f"data.validation={tmp_path / 'old.dev'}") == 0
    (tmp_path / "old").rename(tmp_path / "new")
    (tmp_path / "new" / "a.txt").rename(tmp_path / "new" / "b.txt")
    (tmp_path / "old.dev").rename(tmp_path / "new.dev")
    shutil.rmtree(folder / "checkpoints")  # resuming has something to do
    capsys.readouterr()
    return folder


def test_a_run_whose_data_are_gone_goes_on_from_what_was_prepared(moved, tmp_path, capsys):
    before = (moved / "metrics.jsonl").read_bytes()
    assert again(moved) == 0
    told = capsys.readouterr().err
    note = (
        f"got {tmp_path / 'old'}, which does not exist; what was prepared from it is in {tmp_path / 'cache'}/antlm-fast"
    )
    assert f"{note} and is taken" in told
    assert (moved / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("recipe", [[], ["--recipe", "demo"]], ids=["folder", "recipe"])
def test_a_run_whose_data_were_moved_goes_on_with_their_new_place(moved, tmp_path, cache, capsys, recipe):
    before = (moved / "metrics.jsonl").read_bytes()
    shutil.rmtree(cache)
    assert again(moved, *recipe) == 2
    assert f"{tmp_path / 'old'}, which does not exist; what was prepared from it is not in {cache}" in last_line(capsys)
    assert again(moved, *recipe, "--data", tmp_path / "new") == 2
    assert last_line(capsys).endswith(
        f"is not in {cache}/antlm-fast either: give --data PATH, or --set data.validation=PATH"
    )
    place = ["--data", tmp_path / "new", "--set", f"data.validation={tmp_path / 'new.dev'}"]
    assert again(moved, *recipe, *place) == 0
    assert (moved / "metrics.jsonl").read_bytes() == before


def test_another_text_is_refused_before_it_is_tokenized(moved, tmp_path, capsys):
    (tmp_path / "new" / "b.txt").write_text(TEXT + "One more.")
    assert again(moved, "--data", tmp_path / "new") == 2
    told = capsys.readouterr().err.splitlines()
    fingerprint = json.loads((moved / "config.json").read_text())["data"]["train"]["fingerprint"]
    assert "data must be what the run began with; got other train text in " in told[-1]
    assert told[-1].endswith(f"instead of {fingerprint[:12]}")
    assert not any("preparing" in line for line in told)
    assert again(moved, "--set", "data.validation_share=0.2") == 2  # the path alone is free
    assert "data.validation_share must stay what the run" in last_line(capsys)


def test_an_emptied_folder_is_data_that_are_gone(moved, tmp_path, capsys):
    (tmp_path / "old").mkdir()
    assert again(moved) == 0
    assert "which has none; what was prepared from it is in" in capsys.readouterr().err


def test_runs_beside_their_data_are_no_data(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    monkeypatch.chdir(folder)
    assert begin("runs/demo", "--data", ".") == 0
    capsys.readouterr()
    assert again("runs/demo") == 0
    assert begin("runs/second", "--data", ".") == 0
    first, second = (json.loads((folder / "runs" / name / "config.json").read_text()) for name in ("demo", "second"))
    assert first["data"] == second["data"]
    assert main(["eval", "runs/demo", "--text", "runs/demo"]) == 2
    assert last_line(capsys) == "antlm-fast: corpus must be text; got runs/demo, which is the folder of a run"


@pytest.mark.parametrize("name", ["none", "null", "data ", " data"])
def test_data_may_have_any_name(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    Path(name).mkdir()
    (tmp_path / name / "a.txt").write_bytes(b"\xff")
    assert begin("run", "--data", name) == 2
    assert "a.txt, byte 0 is 0xff" in last_line(capsys)


def test_missing_data_come_before_the_tokenizer_is_trained(tmp_path, capsys):
    for more in ([], ["--data", str(tmp_path / "nowhere")], ["--set", "data.validation=nowhere"]):
        data = more if more[:1] != ["--set"] else ["--data", "builtin", *more]
        assert main(["train", "--recipe", "babyllama", "--output", str(tmp_path / "run"), *data]) == 2
        told = capsys.readouterr().err
        assert "tokenizer" not in told
        assert ("data.train must be given" if not more else "nowhere, which does not exist") in told


def test_one_line_that_is_a_whole_corpus_is_trained_on(tmp_path, capsys):
    path = tmp_path / "a.txt"
    path.write_text("The boy sees the dog. " * 30_000)  # 660,000 characters
    assert begin(tmp_path / "run", "--data", path) == 2
    assert last_line(capsys) == (
        "antlm-fast: data.validation_share must leave a document for training and one for validation; got 0.1 of 3 "
        f"documents in {path}; name a text for it (data.validation), or hold out more (data.validation_share=0.34)"
    )
    assert begin(tmp_path / "run", "--data", path, "--set", "data.validation_share=0.34") == 0
    assert "note: documents of more than 262,144 characters, cut at blanks: 1" in capsys.readouterr().err


def test_options_given_twice_are_refused_and_lists_are_not(tmp_path, capsys):
    for words, message in (
        (["eval", "run", "--pairs", "a", "--pairs", "b"], "argument --pairs: must be given once; got 'a' and 'b'"),
        (["train", "--data", "a", "--data=b"], "argument --data: must be given once; got 'a' and 'b'"),
        (["generate", "run", "--seed", "1", "--seed", "1"], "argument --seed: must be given once; got '1' and '1'"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert capsys.readouterr().err.splitlines()[-1].endswith(message)
    twice = ["--set", "seed=1", "--set", "epochs=2"]
    assert main(["train", "--recipe", "babyllama", *twice, "--output", str(tmp_path / "run")]) == 2
    assert "epochs must equal" in last_line(capsys)


def test_a_prompt_with_a_byte_order_mark_is_one_without(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    assert begin(tmp_path / "run", "--data", tmp_path / "a.txt") == 0
    spoken = []
    for mark in ("", "\ufeff"):
        capsys.readouterr()
        assert main(["generate", str(tmp_path / "run"), "--prompt", f"{mark}The boy", "--max-new-tokens", "4"]) == 0
        assert main(["fill", str(tmp_path / "run"), f"{mark}The <mask> sees."]) == 0
        spoken.append(capsys.readouterr().out)
    assert spoken[0] == spoken[1]
    assert stored_config(tmp_path / "run").data.train == str(tmp_path / "a.txt")
