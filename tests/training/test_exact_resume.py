"""A run killed at any moment and resumed ends bit for bit like one that never was."""

import hashlib
import json
import multiprocessing
import random
import signal
import time

import pytest

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.tokenizer import TokenizerConfig
from antlm_fast.models import BabyLlamaConfig
from antlm_fast.pipeline import train
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    TrainConfig,
)
from antlm_fast.training.lr_schedule import LrScheduleConfig

KILLS = 8
# a server that has imported everything forks each run: a start costs milliseconds
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["antlm_fast.pipeline", "matplotlib.pyplot"])


def tiny(cache_dir):
    """Three phases, two micro-batches a step; training lines, evaluations and checkpoints never fall together."""
    return TrainConfig(
        name="tiny",
        schedule="11s_CLM+9s_MLM+8s_MIX(0.5)",
        device="cpu",
        model=BabyLlamaConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=32
        ),
        tokenizer=TokenizerConfig(vocab_size=320),
        data=DataConfig(builtin_words=3000, row_tokens=24, validation_share=0.1, cache_dir=str(cache_dir)),
        batch=BatchConfig(rows_per_step=8, rows_per_micro_batch=5),
        lr_schedule=LrScheduleConfig(warmup_steps=5),
        evaluation=EvaluationConfig(every_steps=5, validation_rows=10),
        checkpoint=CheckpointConfig(every_steps=3),
        logging=LoggingConfig(every_steps=4),
    )


def end_state(folder):
    """Digests of everything a run must repeat exactly: weights, moments, metrics, the finished model."""
    model = [path for path in sorted(folder.glob("model/**/*")) if path.is_file()]
    paths = [folder / "metrics.jsonl", *sorted(folder.glob("checkpoints/step_*/*")), *model]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def num_metrics(folder):
    metrics = folder / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else -1


def start(config, folder):
    process = SERVER.Process(target=train, args=(config, folder), kwargs={"resume": True})
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    root = tmp_path_factory.mktemp("resume")
    config = tiny(root / "cache")
    start(config, root / "warm").join()  # fills the token cache, starts the server
    begun = time.monotonic()
    process = start(config, root / "whole")
    process.join()
    assert process.exitcode == 0
    return config, root, end_state(root / "whole"), time.monotonic() - begun


def test_the_end_state_holds_what_it_should(uninterrupted):
    _, root, state, _ = uninterrupted
    assert state == end_state(root / "warm")
    names = {"metrics.jsonl", "checkpoints/step_00000028/optimizer.safetensors", "model/model.safetensors"}
    assert names <= set(state)
    records = [json.loads(line) for line in (root / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records if record["kind"] == "train"] == [4, 8, 11, 12, 16, 20, 24, 28]
    validations = [record for record in records if record["kind"] == "validation"]
    assert [record["step"] for record in validations] == [0, 5, 10, 11, 15, 20, 25, 28]
    assert all(set(record["loss"]) == {"CLM", "MLM"} for record in validations)


def test_killed_at_random_moments(uninterrupted):
    config, root, expected, _ = uninterrupted
    moments = random.Random(5)
    stopped_at = []
    num_lines = num_metrics(root / "whole")
    for number in range(KILLS):
        folder = root / f"killed_{number}"
        process = start(config, folder)
        # by what the run has written, so that a busy machine changes nothing; -1 is before it has begun
        wanted = moments.randrange(-1, num_lines)
        while process.is_alive() and num_metrics(folder) < wanted:
            time.sleep(0.002)
        process.join(moments.uniform(0.0, 0.05))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            stopped_at.append(num_metrics(folder))
        resumed = start(config, folder)
        resumed.join()
        assert resumed.exitcode == 0
        assert end_state(folder) == expected, f"run {number}, killed after {stopped_at[-1]} lines of metrics"
    # the moments must have been real ones, in different places of the run
    assert len(stopped_at) >= KILLS // 2
    assert len(set(stopped_at)) >= 4


def test_killed_again_and_again(uninterrupted):
    config, root, expected, seconds = uninterrupted
    moments = random.Random(6)
    folder = root / "killed_often"
    for _ in range(6):
        process = start(config, folder)
        process.join(moments.uniform(0.3, 0.7) * seconds)
        process.kill()
        process.join()
    start(config, folder).join()
    assert end_state(folder) == expected


def test_a_scheduler_that_ends_the_process_with_sigterm_gets_143_and_a_checkpoint(uninterrupted):
    config, root, expected, _ = uninterrupted
    folder = root / "terminated"
    process = start(config, folder)
    while process.is_alive() and num_metrics(folder) < 4:  # the run, two validations and a training line
        time.sleep(0.002)
    process.terminate()
    process.join()
    assert process.exitcode == 128 + signal.SIGTERM
    assert list(folder.glob("checkpoints/step_*"))
    start(config, folder).join()
    assert end_state(folder) == expected


def test_a_finished_run_stays_as_it_is(uninterrupted):
    config, root, expected, _ = uninterrupted
    process = start(config, root / "warm")
    process.join()
    assert process.exitcode == 0
    assert end_state(root / "warm") == expected
