"""A run that is told to stop or to save: nothing is lost, it says what it saved, and resuming it is exact."""

import io
import os
import signal
import threading
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from antlm_fast import pipeline
from antlm_fast.cli import main
from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.tokenizer import TokenizerConfig
from antlm_fast.models import BabyLlamaConfig
from antlm_fast.training import checkpoint as checkpoint_module
from antlm_fast.training import trainer as trainer_module
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.config import CheckpointConfig, EvaluationConfig, LoggingConfig, TrainConfig
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.optimizer import OptimizerConfig
from antlm_fast.training.trainer import Trainer

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
EXIT_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(autouse=True)
def handlers_are_given_back(monkeypatch):
    monkeypatch.setattr(pipeline, "write_report", lambda folder: [])
    # nohup, and a shell's `&`, start a process that ignores some of them, and so would its children
    usual = [signal.default_int_handler, *[signal.SIG_DFL] * 3]
    before = [signal.signal(number, handler) for number, handler in zip(SIGNALS, usual, strict=True)]
    yield
    assert [signal.getsignal(number) for number in SIGNALS] == usual
    for number, handler in zip(SIGNALS, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Twelve steps, an average of the weights, validations at 5, 6, 10 and 12, checkpoints at phases' ends alone."""
    cache = tmp_path_factory.mktemp("cache")
    return TrainConfig(
        name="tiny",
        schedule="6s_CLM+6s_MLM",
        device="cpu",
        model=BabyLlamaConfig(
            hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=32
        ),
        tokenizer=TokenizerConfig(vocab_size=300),
        data=DataConfig(builtin_words=2000, row_tokens=16, validation_share=0.1, cache_dir=str(cache)),
        batch=BatchConfig(rows_per_step=4, rows_per_micro_batch=3),
        optimizer=OptimizerConfig(ema_decay=0.5),
        lr_schedule=LrScheduleConfig(warmup_steps=2),
        evaluation=EvaluationConfig(every_steps=5, validation_rows=8),
        checkpoint=CheckpointConfig(every_steps=1000),
        logging=LoggingConfig(every_steps=4),
    )


@pytest.fixture(scope="module")
def whole(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipeline, "write_report", lambda folder: [])
        pipeline.train(config, folder)
    return folder


def contents(folder):
    """What must be the same bytes in every run: metrics, the last checkpoint, the model."""
    paths = [folder / "metrics.jsonl", *folder.glob("checkpoints/step_00000012/*"), *folder.glob("model/**/*")]
    return {path.relative_to(folder): path.read_bytes() for path in paths if path.is_file()}


def steps(folder):
    return sorted(int(path.name.removeprefix("step_")) for path in (folder / "checkpoints").glob("step_*"))


def on_call(monkeypatch, owner, name, number, *received):
    """Signals that arrive while a function runs for the `number`th time, after it has done its work."""
    original, calls = getattr(owner, name), []

    def called(*arguments, **keywords):
        result = original(*arguments, **keywords)
        calls.append(None)
        if len(calls) == number:
            for each in received:
                signal.raise_signal(each)
        return result

    monkeypatch.setattr(owner, name, called)


def stopped(config, folder, number=signal.SIGTERM, **how):
    expected = KeyboardInterrupt if number is signal.SIGINT else SystemExit
    with pytest.raises(expected) as caught:
        pipeline.train(config, folder, **how)
    if expected is SystemExit:
        assert caught.value.code == EXIT_CODES[number]
    return caught.value


@pytest.mark.parametrize("number", EXIT_CODES, ids=lambda number: number.name)
def test_a_signal_loses_the_steps_since_the_last_checkpoint(config, whole, tmp_path, monkeypatch, capsys, number):
    """It came in the third step of twelve; what the next training line has gathered goes on too."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, Trainer, "_step", 3, number)
        stopped(config, folder, number)
    saved = folder / "checkpoints" / "step_00000003"
    line = f"{number.name}: stopped; {saved} is saved, --resume goes on from there"
    assert capsys.readouterr().err.splitlines()[-1] == f"antlm-fast: {line}"
    assert steps(folder) == [3]
    assert not (folder / "model").exists()
    pipeline.train(None, folder, resume=True)
    assert contents(folder) == contents(whole)


def test_the_command_line_says_so_in_one_line_and_has_the_exit_code(config, tmp_path, monkeypatch, capsys):
    settings = [
        "data.builtin_words=2000",
        "tokenizer.vocab_size=300",
        "schedule=9s_CLM",
        "evaluation.minimal_pairs=none",
    ]
    settings += ["model.hidden_size=16", "evaluation.validation_rows=1", f"data.cache_dir={config.data.cache_dir}"]
    for number, code in EXIT_CODES.items():
        folder = tmp_path / number.name
        arguments = [word for setting in settings for word in ("--set", setting)]
        with monkeypatch.context() as patch:
            on_call(patch, Trainer, "_step", 2, number)
            assert main(["train", "--recipe", "demo", "--output", str(folder), *arguments]) == code
        told = [line for line in capsys.readouterr().err.splitlines() if line.startswith("antlm-fast: ")]
        saved = folder / "checkpoints" / "step_00000002"
        assert told == [f"antlm-fast: {number.name}: stopped; {saved} is saved, --resume goes on from there"]


def test_sigusr1_ends_the_process_instead_of_saving(config, whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    on_call(monkeypatch, Trainer, "_step", 2, signal.SIGUSR1)
    pipeline.train(config, folder)
    assert f"SIGUSR1: saved {folder}/checkpoints/step_00000002\n" in capsys.readouterr().err
    assert contents(folder) == contents(whole)


def test_sigusr1_before_the_first_step_saves_as_soon_as_there_is_something(config, tmp_path, monkeypatch, capsys):
    on_call(monkeypatch, pipeline, "prepare", 1, signal.SIGUSR1)
    pipeline.train(config, tmp_path / "run")
    assert "step_00000001\n" in capsys.readouterr().err


@pytest.mark.parametrize(("validation", "step"), [(2, 5), (3, 6), (5, 12)])
def test_a_validation_that_a_signal_cut_is_done_when_the_run_goes_on(
    config, whole, tmp_path, monkeypatch, validation, step
):
    """Nobody waits for its end. It is begun again first, also where it belongs to a phase's or to the run's end."""
    folder = tmp_path / "run"
    read = []

    def cut(model, batches, precision):
        read.append(None)
        if len(read) == validation:
            next(batches)
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError(f"it goes on with {next(batches)}")
        return measure(model, batches, precision)

    measure = trainer_module.mean_losses
    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "mean_losses", cut)
        stopped(config, folder)
    assert steps(folder)[-1] == step
    own = load_file(folder / "checkpoints" / f"step_{step:08d}" / "model.safetensors")
    average = load_file(folder / "checkpoints" / f"step_{step:08d}" / "average.safetensors")
    assert any(not torch.equal(own[name], average[name]) for name in own)  # the model had its own weights back
    with monkeypatch.context() as patch:  # and stopped again, in the same validation
        read[:] = [None] * (validation - 1)
        patch.setattr(trainer_module, "mean_losses", cut)
        stopped(config, folder, resume=True)
    pipeline.train(None, folder, resume=True)
    assert contents(folder) == contents(whole)


def test_a_signal_in_the_first_validation_leaves_nothing_to_go_on_from(config, whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, Trainer, "_run_record", 1, signal.SIGTERM)
        stopped(config, folder)
    assert capsys.readouterr().err.splitlines()[-1] == "antlm-fast: SIGTERM: stopped; nothing was trained yet"
    pipeline.train(config, folder, resume=True)
    assert contents(folder) == contents(whole)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_while_data_are_prepared_leaves_nothing_behind(config, tmp_path, monkeypatch, capsys, number):
    fresh = replace(config, data=replace(config.data, cache_dir=str(tmp_path / "cache"), builtin_words=2500))
    on_call(monkeypatch, pipeline.Tokenizer, "encode_batch", 1, number)
    stopped(fresh, tmp_path / "run", number)
    assert capsys.readouterr().err.splitlines()[-1] == f"antlm-fast: {number.name}: stopped; nothing was trained yet"
    assert list((tmp_path / "cache").iterdir()) == []
    assert not (tmp_path / "run").exists()


def test_a_signal_while_a_checkpoint_is_written_waits_for_it(config, whole, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, checkpoint_module, "write_safetensors", 2, signal.SIGTERM)
        stopped(config, folder)
    assert steps(folder) == [6]
    pipeline.train(None, folder, resume=True)
    assert contents(folder) == contents(whole)


def test_a_signal_after_the_last_step_leaves_a_run_that_can_be_finished(config, whole, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, pipeline, "save_pretrained", 1, signal.SIGTERM)
        stopped(config, folder)
    assert "step_00000012 is saved" in capsys.readouterr().err
    assert not (folder / "model").exists()
    pipeline.train(None, folder, resume=True)
    assert contents(folder) == contents(whole)


def test_a_second_signal_stops_at_once(config, whole, tmp_path, monkeypatch, capfd):
    """The first waits for the end of the step; the second finds the handler that was there before."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        on_call(patch, trainer_module, "clipped_step", 8, signal.SIGINT, signal.SIGINT)
        stopped(config, folder, signal.SIGINT)
    told = capfd.readouterr().err
    assert "antlm-fast: stops after this step and saves; Ctrl-C again stops at once\n" in told
    assert told.splitlines()[-1].endswith("step_00000006 is saved, --resume goes on from there")
    assert steps(folder) == [6]
    pipeline.train(None, folder, resume=True)
    assert contents(folder) == contents(whole)


def test_handlers_of_the_caller_are_replaced_while_it_trains_and_ignored_signals_stay_ignored(
    config, tmp_path, monkeypatch
):
    received = []
    own = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        on_call(monkeypatch, Trainer, "_step", 2, signal.SIGHUP)
        on_call(monkeypatch, Trainer, "_save", 1, signal.SIGTERM, signal.SIGTERM)  # the second is the caller's
        stopped(config, tmp_path / "run")
        assert steps(tmp_path / "run") == [6]
        assert received == [signal.SIGTERM]
        signal.raise_signal(signal.SIGTERM)
        assert len(received) == 2
    finally:
        signal.signal(signal.SIGTERM, own)
        signal.signal(signal.SIGHUP, ignored)


def test_no_handler_is_installed_outside_of_the_main_thread(config, whole, tmp_path, monkeypatch):
    seen = []
    step = Trainer._step
    monkeypatch.setattr(Trainer, "_step", lambda self, number: seen.append(handlers()) or step(self, number))

    def handlers():
        return [signal.getsignal(number) for number in SIGNALS]

    before = handlers()
    thread = threading.Thread(target=pipeline.train, args=(config, tmp_path / "run"))
    thread.start()
    thread.join()
    assert seen == [before] * 12
    assert contents(tmp_path / "run") == contents(whole)


def test_a_run_whose_messages_nobody_reads_any_more_still_saves(config, tmp_path, monkeypatch):
    """Ctrl-C on `antlm-fast train 2>&1 | tee log` ends tee too."""
    reader, writer = os.pipe()
    os.close(reader)
    folder = tmp_path / "run"
    monkeypatch.setattr("antlm_fast.training.progress.LINE_SECONDS", 0.0)
    on_call(monkeypatch, Trainer, "_step", 5, signal.SIGINT)
    with os.fdopen(writer, "wb", buffering=0) as raw, monkeypatch.context() as patch:
        gone = io.TextIOWrapper(raw, write_through=True)
        with pytest.raises(BrokenPipeError):
            gone.write("anything")
        patch.setattr("sys.stderr", gone)
        stopped(config, folder, signal.SIGINT)
        gone.detach()
    assert steps(folder) == [5]


@pytest.mark.parametrize(("keep_phase_ends", "notes"), [(True, 1), (False, 0)])
def test_many_phases_fill_the_disk_without_a_word(config, tmp_path, monkeypatch, capsys, keep_phase_ends, notes):
    monkeypatch.setattr(Trainer, "run", lambda self, **keywords: None)
    checkpoint = CheckpointConfig(keep_phase_ends=keep_phase_ends)
    pipeline.train(replace(config, schedule="6*(1s_CLM+1s_MLM)", checkpoint=checkpoint), tmp_path / "run")
    line = "note: the checkpoints of 12 phases' ends are kept, about 0.0 GB in all"
    assert capsys.readouterr().err.count(line) == notes
