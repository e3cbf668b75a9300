"""The command line as a user meets it: the main way through, and one clear line for every mistake."""

import fcntl
import gzip
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from antlm_fast.cli import main
from antlm_fast.kernels.native import library as native
from antlm_fast.kernels.triton_support.availability import unavailable_reason

ROOT = Path(__file__).parents[1]
SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=32",
    "model.num_hidden_layers=1",
    "model.num_attention_heads=2",
    "tokenizer.vocab_size=400",
    "schedule=6s_CLM+6s_MLM",
    "evaluation.every_steps=6",
    "evaluation.validation_rows=8",
    "data.builtin_words=4000",
    "lr_schedule.warmup_steps=2",
]


def settings(*more):
    return [word for setting in (*SMALL, *more) for word in ("--set", setting)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def run(cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "demo"
    arguments = ["train", "--recipe", "demo", "--output", str(folder)]
    assert main([*arguments, *settings("evaluation.minimal_pairs=none")]) == 0
    return folder


def fails(capsys, *arguments):
    """Runs a command that must fail with one line on stderr, and returns the line."""
    capsys.readouterr()
    assert main([str(argument) for argument in arguments]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("antlm-fast: ")
    assert "Traceback" not in last
    return last


def train_fails(capsys, tmp_path, *arguments):
    return fails(capsys, "train", "--output", tmp_path / "never", *arguments)


def test_a_run_folder_holds_what_the_readme_says(run):
    names = {path.name for path in run.iterdir()}
    expected = {"config.json", "tokenizer.json", "metrics.jsonl", "throughput.jsonl", "checkpoints", "model"}
    assert expected | {"report.html", "loss.png"} <= names
    model = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (run / "model").iterdir()} == model | {"README.md", "masked"}
    assert {path.name for path in (run / "model" / "masked").iterdir()} == model
    config = json.loads((run / "config.json").read_text())
    assert (
        config["config"]["model"]["vocab_size"] == json.loads((run / "model" / "config.json").read_text())["vocab_size"]
    )
    assert config["data"]["train"]["num_tokens"] > 4000
    assert len(config["data"]["train"]["fingerprint"]) == 64
    assert {"torch", "python", "threads"} <= set(config["versions"])


def test_what_a_run_writes_may_be_read_by_whom_the_umask_lets(run, cache, tmp_path):
    (tmp_path / "file").touch()
    files = [path for folder in (run, cache) for path in folder.rglob("*") if path.is_file()]
    assert {"model.safetensors", "optimizer.safetensors", "report.html"} <= {path.name for path in files}
    assert {path.stat().st_mode for path in files} == {(tmp_path / "file").stat().st_mode}


def test_the_card_of_the_model_loads_it_as_it_says(run, monkeypatch, capsys):
    pytest.importorskip("transformers")
    card = (run / "model" / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert len(blocks) == 2
    monkeypatch.chdir(run / "model")
    for block in blocks:
        exec(block, {})
    printed = capsys.readouterr().out
    assert "generated_text" in printed
    assert "token_str" in printed


def test_eval_scores_pairs_and_text(run, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    lines = [
        {"sentence_good": f"The boy sees {n} dogs.", "sentence_bad": f"The boy see {n} dogs.", "UID": "a"}
        for n in range(5)
    ]
    pairs.write_text("\n".join(json.dumps(line) for line in lines))
    text = tmp_path / "held.jsonl"
    text.write_text('{"body": "The boy sees the dog."}\n{"body": "The girls run."}\n')
    output = tmp_path / "numbers.json"
    arguments = [
        "--pairs",
        pairs,
        "--text",
        text,
        "--text-field",
        "body",
        "--read-out",
        "causal",
        "--read-out",
        "mntp",
        "--output",
        output,
    ]
    assert main(["eval", str(run), *map(str, arguments)]) == 0
    numbers = json.loads(output.read_text())
    assert numbers["minimal_pairs"]["num_pairs"] == 5
    assert set(numbers["minimal_pairs"]["read_outs"]) == {"causal", "mntp"}
    assert set(numbers["text"]["objectives"]) == {"CLM", "MLM", "MNTP"}
    assert numbers["text"]["objectives"]["CLM"]["perplexity"] > 1
    assert "overall" in capsys.readouterr().out


def test_generate_and_fill_speak(run, capsys):
    assert main(["generate", str(run), "--prompt", "The boy", "--max-new-tokens", "8"]) == 0
    first = capsys.readouterr().out
    assert first.startswith("The boy")
    assert main(["generate", str(run), "--prompt", "The boy", "--max-new-tokens", "8"]) == 0
    assert capsys.readouterr().out == first  # the seed decides
    assert main(["fill", str(run), "The <mask> sees the <mask>.", "--top-k", "3"]) == 0
    answers = capsys.readouterr().out.splitlines()
    assert [answer.split(":")[0] for answer in answers] == ["mask 1", "mask 2"]
    assert len(answers[0].split(": ")[1].split("  ")) == 3


def test_text_that_an_ascii_terminal_cannot_show_is_a_traceback(run, tmp_path, monkeypatch):
    """PYTHONIOENCODING=ascii, or a locale without UTF-8."""
    pair = {"sentence_good": "The boy sees.", "sentence_bad": "The boy see.", "UID": "r\u00e9gime"}
    (tmp_path / "pairs.jsonl").write_text(json.dumps(pair))
    shown = {
        ("generate", run, "--prompt", "Zo\u00eb\u2019s", "--max-new-tokens", "1"): b"Zo\\xeb\\u2019s",
        ("fill", run, "Zo\u00eb <mask>", "--top-k", "300"): b"\\u",
        ("eval", run, "--pairs", tmp_path / "pairs.jsonl"): b"r\\xe9gime",
        ("export", run, "--output", tmp_path / "mod\u00e8le"): b"mod\\xe8le: baby_llama",
    }
    for arguments, part in shown.items():
        terminal = io.BytesIO()
        monkeypatch.setattr("sys.stdout", io.TextIOWrapper(terminal, encoding="ascii"))
        assert main([str(argument) for argument in arguments]) == 0
        sys.stdout.flush()
        assert part in terminal.getvalue()


def test_there_is_no_version(capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    with pytest.raises(SystemExit) as caught:
        main(["--version"])
    assert (caught.value.code, capsys.readouterr().out) == (0, f"antlm-fast {version}\n")


def test_without_matplotlib_the_run_ends_in_a_traceback(run, tmp_path, capsys, monkeypatch):
    folder = shutil.copytree(run, tmp_path / "run")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    line = fails(capsys, "train", "--resume", "--output", folder)
    assert line.endswith("antlm-fast: the report needs matplotlib: pip install '.[train]' in antlm_fast's checkout")


def test_a_checkpoint_is_no_model(run, tmp_path, capsys, monkeypatch):
    """The last one says what the run's model says, the end of the first phase something else; each can be exported."""
    first, last = (run / "checkpoints" / f"step_{step:08d}" for step in (6, 12))
    text = tmp_path / "held.txt"
    text.write_text("The boy sees the dog.")
    told = {}
    for model in (run, last, first):
        for name, *more in (["eval", "--text", text], ["generate", "--prompt", "The"], ["fill", "The <mask> sees."]):
            capsys.readouterr()
            assert main([name, str(model), *map(str, more)]) == 0
            told[model, name] = capsys.readouterr().out
    assert all(told[run, name] == told[last, name] != told[first, name] for name in ("eval", "fill"))
    assert told[run, "generate"] == told[last, "generate"]
    monkeypatch.chdir(first)
    assert main(["export", ".", "--output", str(tmp_path / "exported")]) == 0
    assert "exported: baby_llama, 0.03M parameters" in capsys.readouterr().out
    assert main(["eval", str(tmp_path / "exported"), "--text", str(text)]) == 0
    assert capsys.readouterr().out == told[first, "eval"]
    assert "output must be a folder that does not exist" in fails(capsys, "export", first, "--output", tmp_path)
    given = f"{first.parent}: it holds checkpoints: give one, such as {last}"
    assert fails(capsys, "generate", first.parent) == f"antlm-fast: no model in {given}"
    shutil.copytree(run / "checkpoints", tmp_path / "begun" / "checkpoints")
    resumable = f"resume it, or give the checkpoint {tmp_path}/begun/checkpoints/step_00000012"
    assert fails(capsys, "generate", tmp_path / "begun").endswith(f"its training is not finished: {resumable}")
    alone = shutil.copytree(first, tmp_path / "some" / "place" / "step_00000006")
    assert f"checkpoint {alone} must lie in checkpoints/ of its run" in fails(capsys, "generate", alone)
    (alone / "state.json").unlink()
    assert fails(capsys, "generate", alone).endswith("it holds no config.json")


def test_recipes_and_doctor_tell_what_there_is(capsys, monkeypatch):
    assert main(["recipes", "list"]) == 0
    listed = capsys.readouterr().out
    assert [line.split()[0] for line in listed.splitlines()] == [
        "demo",
        "demo-ltgbert",
        "demo-gptbert",
        "babyllama",
        "babyllama-mlm",
        "antlm-babyllama",
        "antlm-babyllama-8-8-8",
        "ltgbert",
        "ltgbert-clm",
        "antlm-ltgbert",
        "antlm-ltgbert-xs",
        "gptbert",
        "antlm-gptbert",
    ]
    assert "4_CLM+16_MLM+4_CLM" in listed
    # names and schedules have columns of their own, wide enough for the longest
    assert len({line.index("  " + line.split("  ")[-1].strip()) for line in listed.splitlines()}) == 1
    assert main(["recipes", "show", "antlm-babyllama"]) == 0
    shown = capsys.readouterr().out
    assert "arXiv 2412.03275" in shown
    assert "weight_decay=0.1,  # the same" in shown  # and the recipes it is made from
    assert "optimizer.lr=0.00025" in shown
    assert 'model.architecture="baby_llama"' in shown
    assert main(["recipes", "show", "gptbert"]) == 0
    shown = capsys.readouterr().out
    assert "weight_decay=0.1" in shown
    assert 'batch.length_ramp=["256@0.7", "512@0.9"]' in shown
    assert "model.position_bucket_size=32" in shown
    assert "rope_theta" not in shown
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["doctor"]) == 0
    told = capsys.readouterr().out
    reason = unavailable_reason("cpu")
    assert reason is not None
    assert told.count(f"  triton     {reason}\n") == 4  # three of attention, linear_cross_entropy
    assert "fused attention and loss on GPUs (extra: gpu)" in told
    # four ops that Triton has too, six fused layers; the mixed linear layer's C++ part wants AMX
    counts = {name: told.count(f"  {name:11}serves, and auto takes it") for name in ("native", "torch")}
    built = native.unavailable_reason("cpu", torch.bfloat16) is None
    linear = "native" if built and native.library().instruction_set == "amx" else "torch"
    wanted = {"native": 10, "torch": 0} if built else {"native": 0, "torch": 10}
    assert counts == wanted | {linear: wanted[linear] + 1}


def test_a_run_that_exists_is_never_overwritten(run, capsys):
    before = (run / "metrics.jsonl").read_bytes()
    arguments = ["train", "--recipe", "demo", *settings("evaluation.minimal_pairs=none"), "--output", run]
    assert "holds a run already; resume it, or choose another --output" in fails(capsys, *arguments)
    changed = fails(capsys, *arguments, "--set", "optimizer.lr=5e-3", "--resume")
    assert "optimizer.lr must stay what the run" in changed
    assert "got 0.005" in changed
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_can_be_resumed_by_its_folder_alone(run):
    before = (run / "metrics.jsonl").read_bytes()
    assert main(["train", "--resume", "--output", str(run)]) == 0
    assert (run / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_keeps_its_settings_and_takes_those_that_are_free(run, cache, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    again = ["train", "--recipe", "demo", "--resume", "--output", str(folder)]
    assert main(again) == 0  # the settings of the first call need not be said again
    assert main([*again, "--set", "checkpoint.keep=1", "--set", "evaluation.minimal_pairs=none"]) == 0
    assert "schedule must stay what the run" in fails(capsys, *again, "--set", "schedule=1s_CLM")
    assert "--recipe must be the run's" in fails(
        capsys, "train", "--recipe", "babyllama", "--resume", "--output", folder
    )


def test_a_store_made_from_a_copy_of_the_text_serves_the_run(tmp_path, monkeypatch):
    """The same bytes elsewhere share a store; a run must not be bound to the place its store was first made from."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        (tmp_path / place / "text.txt").write_text("The boy sees the dog.\n\n" * 400)
    more = ["--set", "data.validation_share=0.1", "--set", "data.row_tokens=16"]
    for place in ("one", "two"):
        data = ["--data", str(tmp_path / place / "text.txt"), *more]
        arguments = [
            "train",
            "--recipe",
            "antlm-babyllama",
            *settings(),
            *data,
            "--output",
            str(tmp_path / f"run_{place}"),
        ]
        assert main(arguments) == 0
    source = json.loads((tmp_path / "run_two" / "config.json").read_text())["data"]["train"]["source"]
    assert source.startswith(str(tmp_path / "two"))
    shutil.rmtree(tmp_path / "cache")
    assert main(["train", "--resume", "--output", str(tmp_path / "run_two")]) == 0


def test_two_processes_never_train_in_one_folder(run, capsys):
    with (run / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "must have one process at a time" in fails(capsys, "train", "--resume", "--output", run)


def test_torchrun_is_told_that_another_trains(cache, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = train_fails(capsys, tmp_path, "--recipe", "demo")
    assert "training must have one process, on one device; got WORLD_SIZE=2, as torchrun sets it" in line
    assert not (tmp_path / "never").exists()


def test_two_processes_begun_at_once_in_a_new_folder_are_told_apart(cache, tmp_path):
    """The folder is held from the first moment, not only when the tokenizer is trained and config.json written."""
    command = [sys.executable, "-m", "antlm_fast.cli", "train", "--recipe", "demo", "--output", str(tmp_path / "new")]
    command += settings("evaluation.minimal_pairs=none")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    both = [
        subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for _ in range(2)
    ]
    messages = [process.communicate()[1] for process in both]
    assert sorted(process.returncode for process in both) == [0, 2]
    refused = messages[[process.returncode for process in both].index(2)]
    assert "must have one process at a time" in refused
    assert "tokenizer" not in refused  # it had not begun to work
    assert (tmp_path / "new" / "model" / "model.safetensors").exists()


def test_a_folder_that_is_held_before_it_has_a_config_is_refused_and_left_alone(cache, tmp_path, capsys):
    folder = tmp_path / "held"
    folder.mkdir()
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "must have one process at a time" in fails(capsys, "train", "--recipe", "demo", "--output", folder)
    assert [path.name for path in folder.iterdir()] == [".lock"]


def test_a_run_that_cannot_begin_leaves_the_folder_as_it_was(cache, tmp_path, capsys):
    missing = ["--recipe", "demo", "--set", "data.train=nothing.txt"]
    fails(capsys, "train", *missing, "--output", tmp_path / "a" / "b" / "c")
    assert not (tmp_path / "a").exists()
    (tmp_path / "empty").mkdir()
    fails(capsys, "train", *missing, "--output", tmp_path / "empty")
    assert list((tmp_path / "empty").iterdir()) == []
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    assert "must be new or empty" in fails(capsys, "train", "--recipe", "demo", "--output", tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("recipe", ["demo-ltgbert", "demo-gptbert"])
def test_other_models_go_the_whole_way(cache, tmp_path, capsys, recipe):
    """Train, stop, resume, evaluate and fill with the recipe's own optimizer, ramps and masks, in small sizes."""
    folder = tmp_path / "run"
    small = [setting for setting in SMALL if "warmup" not in setting and "schedule" not in setting]
    more = ["tokenizer.vocab_size=600", "schedule=6s_CLM+6s_MNTP", "evaluation.minimal_pairs=none"]
    more += ["checkpoint.keep=9", "optimizer.ema_decay=0.5", "batch.rows_per_step=8"]
    words = [word for setting in (*small, *more) for word in ("--set", setting)]
    assert main(["train", "--recipe", recipe, *words, "--output", str(folder)]) == 0
    before = (folder / "metrics.jsonl").read_bytes()
    model = (folder / "model" / "model.safetensors").read_bytes()
    average, own = (
        load_file(folder / "checkpoints" / "step_00000012" / f"{name}.safetensors") for name in ("average", "model")
    )
    published = load_file(folder / "model" / "model.safetensors")
    shared = set(average) & set(published)
    assert shared
    assert all(torch.equal(published[name], average[name]) for name in shared)
    assert any(not torch.equal(published[name], own[name]) for name in shared)
    exported = tmp_path / "exported"
    assert main(["export", str(folder / "checkpoints" / "step_00000012"), "--output", str(exported)]) == 0
    files = {path.relative_to(exported) for path in exported.rglob("*") if path.is_file()}
    of_run = {path.relative_to(folder / "model") for path in (folder / "model").rglob("*") if path.is_file()}
    assert files == of_run - {Path("README.md")}  # the card is the run's
    assert all((exported / name).read_bytes() == (folder / "model" / name).read_bytes() for name in files)
    shutil.rmtree(folder / "checkpoints" / "step_00000012")
    assert main(["train", "--recipe", recipe, "--resume", "--output", str(folder)]) == 0
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert (folder / "model" / "model.safetensors").read_bytes() == model
    wrong = ["--set", "model.architecture=baby_llama", "--resume", "--output", folder]
    assert "model.architecture must stay what the run" in fails(capsys, "train", "--recipe", recipe, *wrong)
    text = tmp_path / "held.txt"
    text.write_text("The boy sees the dog.")
    assert main(["eval", str(folder), "--text", str(text), "--read-out", "mntp"]) == 0
    mask = "[MASK]" if recipe == "demo-ltgbert" else "<mask>"
    assert main(["fill", str(folder), f"The {mask} sleeps."]) == 0


def test_what_only_the_end_needs_is_checked_at_the_beginning(cache, tmp_path, capsys, monkeypatch):
    missing = train_fails(capsys, tmp_path, "--recipe", "demo", "--set", "evaluation.minimal_pairs=nothing.jsonl")
    assert "nothing.jsonl" in missing
    monkeypatch.setattr("antlm_fast.training.metrics.find_spec", lambda name: None)
    board = train_fails(capsys, tmp_path, "--recipe", "demo", "--set", "logging.tensorboard=true")
    assert "pip install tensorboard" in board
    assert not (tmp_path / "never").exists()


def test_a_disk_that_fills_up_with_the_finished_model_is_one_line(run, tmp_path, capsys, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(run, folder)

    def full(*_, **__):
        raise SafetensorError("No space left on device (os error 28)")

    monkeypatch.setattr("antlm_fast.models.pretrained.save_file", full)
    assert "No space left on device" in fails(capsys, "train", "--resume", "--output", folder)
    assert not (folder / ".writing_model").exists()
    assert (folder / "model" / "model.safetensors").exists()


def test_data_that_changed_under_a_run_is_noticed(cache, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The boy sees the dog.\n\n" * 400)
    folder = tmp_path / "run"
    data = ["--data", text, "--set", "data.validation_share=0.1", "--set", "data.row_tokens=16"]
    arguments = ["train", "--recipe", "antlm-babyllama", *settings(), *data, "--output", folder]
    assert main([str(argument) for argument in arguments]) == 0
    text.write_text("The girl sees the dog.\n\n" * 400)
    assert "data must be what the run" in fails(capsys, *arguments, "--resume")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "missing.txt"),
        ("empty.txt", b"", "empty.txt"),
        ("latin.txt", b"na\xefve caf\xe9\n", "latin.txt"),
        ("bad.jsonl", b'{"text": "a good line"}\n{"text": \n', "bad.jsonl"),
        ("keyless.jsonl", b'{"content": "x"}\n', "keyless.jsonl"),
        ("cut.txt.gz", gzip.compress(b"words and words " * 500, mtime=0)[:-9], "cut.txt.gz"),
        ("tiny.txt", b"One.\n\nTwo.\n\nThree.\n", "data.row_tokens must be at most the"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_data_is_one_line_and_leaves_nothing_behind(cache, tmp_path, capsys, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    data = ["--data", path, "--set", "data.validation_share=0.4"]
    line = train_fails(capsys, tmp_path, "--recipe", "antlm-babyllama", *data)
    assert message in line
    if name == "bad.jsonl":
        assert ":2" in line or "line 2" in line
    if name == "latin.txt":
        assert "UTF-8" in line
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--recipe", "demmo"], "recipe must be a known name; got 'demmo', the nearest are demo"),
        (["--recipe", "demo", "--set", "optimizer.lrr=1"], "setting 'optimizer.lrr' must be a known name"),
        (["--recipe", "demo", "--set", "epochs=5"], "epochs must equal the sum of the schedule; got epochs 5"),
        (["--recipe", "demo", "--set", "schedule=4_CML"], "got 'CML' in '4_CML'"),
        (["--recipe", "antlm-babyllama"], "data.train must be given (--data PATH"),
        (["--recipe", "demo", "--config", "x.toml"], "one at a time; got both"),
        (["--config", "nothing.toml"], "config file nothing.toml does not exist"),
        ([], "--recipe or --config must be given"),
        (["--recipe", "demo", "--set", "device=cuda:9"], "device must be one that torch can use"),
        (["--recipe", "demo", "--set", "tokenizer.path=none.json"], "none.json"),
        (["--recipe", "demo", "--set", "seed=99999999999999999999"], "seed must be at least 0 and below 2^63"),
        (["--recipe", "demo", "--set", "seed=" + "9" * 400], "seed must be a"),
        (
            ["--recipe", "demo", "--set", "model.initializer_range=-1"],
            "model.initializer_range must be above 0; got -1.0",
        ),
        (["--recipe", "demo", "--data", ""], "data.train must be a text that is not empty"),
        (["--recipe", "demo", "--data", "\udcff"], "data must be text in the terminal's encoding"),
    ],
)
def test_bad_arguments_are_one_line(cache, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in train_fails(capsys, tmp_path, *arguments)
    assert not (tmp_path / "never").exists()


def test_a_folder_without_a_model_says_so(tmp_path, capsys):
    assert "no model in" in fails(capsys, "generate", tmp_path)
    assert "--pairs or --text must be given" in fails(capsys, "eval", tmp_path)


def test_a_vocabulary_that_does_not_match_the_model_is_named(run, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(run / "model", folder)
    document = json.loads((folder / "tokenizer.json").read_text())
    document["added_tokens"].append(document["added_tokens"][0] | {"id": 10**4, "content": "<more>"})
    (folder / "tokenizer.json").write_text(json.dumps(document))
    line = fails(capsys, "generate", folder)
    assert "tokenizer.json must have the model's vocabulary of" in line


def test_malformed_pairs_name_their_line(run, tmp_path, capsys):
    pairs = tmp_path / "pairs.jsonl"
    for bad in ("{oops}", '{"sentence_good": "a", "sentence_bad": "\\ud800"}'):
        pairs.write_text('{"sentence_good": "a", "sentence_bad": "b"}\n' + bad + "\n")
        line = fails(capsys, "eval", run, "--pairs", pairs)
        assert "pairs.jsonl" in line
        assert "2" in line.split("pairs.jsonl")[1]


def test_a_reader_that_goes_away_is_no_error():
    command = f"{sys.executable} -m antlm_fast.cli recipes show demo | head -1"
    done = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.startswith('"""The demo')
    assert done.stderr == ""


def test_plain_lines_where_there_is_no_terminal(cache, tmp_path):
    command = [sys.executable, "-m", "antlm_fast.cli", "train", "--recipe", "demo", "--output", str(tmp_path / "run")]
    done = subprocess.run(
        [*command, *settings("evaluation.minimal_pairs=none")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert "phase 1/2 6s_CLM begins at step 0" in done.stderr
    assert "validation CLM" in done.stderr
    assert "\r" not in done.stderr
