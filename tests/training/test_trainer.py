"""The training loop: what each setting does to the weights, and that failures lose nothing."""

import errno
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.rows import Rows
from antlm_fast.data.token_store import TokenStore
from antlm_fast.models import BabyLlama, BabyLlamaConfig
from antlm_fast.objectives import MaskingConfig
from antlm_fast.training import trainer as trainer_module
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.config import (
    CheckpointConfig,
    EvaluationConfig,
    LoggingConfig,
    LossConfig,
    TrainConfig,
)
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.optimizer import OptimizerConfig
from antlm_fast.training.trainer import Trainer
from antlm_fast.types import InputError, Vocabulary

SIZE = 60
VOCABULARY = Vocabulary(size=SIZE, mask_id=3, special_ids=(0, 1, 2, 3), word_start=np.ones(SIZE, dtype=bool))
CONFIG = TrainConfig(
    name="test",
    data=DataConfig(row_tokens=12),
    schedule="6s_CLM+6s_MLM",
    precision="float32",
    device="cpu",
    model=BabyLlamaConfig(
        vocab_size=SIZE,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=16,
    ),
    batch=BatchConfig(rows_per_step=8),
    optimizer=OptimizerConfig(lr=1e-2),
    lr_schedule=LrScheduleConfig(warmup_steps=2),
    evaluation=EvaluationConfig(every_steps=4, validation_rows=4),
    checkpoint=CheckpointConfig(every_steps=4),
    logging=LoggingConfig(every_steps=3),
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """Sixty documents of counting: the next token can be learnt, and so can a hidden one."""
    documents = [[1, *((4 + start + np.arange(11)) % 50 + 5).tolist(), 2] for start in range(60)]
    return TokenStore.write(
        documents,
        tmp_path_factory.mktemp("store") / "tokens",
        vocab_size=SIZE,
        fingerprint="f",
        tokenizer_fingerprint="t",
        source="test",
    )


def make(store, folder, **changes):
    config = replace(CONFIG, **changes)
    torch.manual_seed(config.seed)
    model = BabyLlama(config.model)
    folder.mkdir(exist_ok=True)
    train_rows = Rows(store, mode="stream", row_tokens=12, seed=config.seed, short_share=config.data.short_share)
    validation_rows = Rows(store, mode="stream", row_tokens=12, seed=config.seed, shuffle=False)
    return Trainer(config, model, VOCABULARY, train_rows, validation_rows, folder)


def train(store, folder, *, resume=False, **changes):
    made = make(store, folder, **changes)
    made.run(resume=resume)
    return made


def weights(made):
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


def records(folder, kind):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def plain(store, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plain")
    return train(store, folder), folder


def test_the_same_config_gives_the_same_bits(store, plain, tmp_path):
    made, folder = plain
    again = train(store, tmp_path / "again")
    assert torch.equal(weights(made), weights(again))
    assert (folder / "metrics.jsonl").read_bytes() == (tmp_path / "again" / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"schedule": "6s_CLM+6s_MNTP"},
        {"schedule": "6s_CLM+6s_MLM@causal"},
        {"schedule": "6s_CLM+6s_MIX(0.5)"},
        {"schedule": "6s_CLM@full+6s_MLM"},
        {"precision": "bfloat16"},
        {"masking": MaskingConfig(strategy="span")},
        {"masking": MaskingConfig(strategy="span-uniform")},
        {"masking": MaskingConfig(rate=0.3)},
        {"masking": MaskingConfig(final_rate=0.5)},
        {"masking": MaskingConfig(mask_share=0.5)},
        {"masking": MaskingConfig(random_share=0.2)},
        {"batch": BatchConfig(rows_per_step=7)},
        {"loss": LossConfig(z_loss=0.1)},
        {"loss": LossConfig(label_smoothing=0.1)},
        {"optimizer": OptimizerConfig(lr=2e-2)},
        {"optimizer": OptimizerConfig(lr=1e-2, beta1=0.8)},
        {"optimizer": OptimizerConfig(lr=1e-2, beta2=0.9)},
        {"optimizer": OptimizerConfig(lr=1e-2, eps=1e-2)},
        {"optimizer": OptimizerConfig(lr=1e-2, weight_decay=0.5)},
        {"optimizer": OptimizerConfig(lr=1e-2, clip_norm=0.01)},
        {"optimizer": OptimizerConfig(lr=1e-2, reset_on_switch=True)},
        {"optimizer": OptimizerConfig(lr=1e-2, kind="lamb")},
        {"optimizer": OptimizerConfig(lr=1e-2, decay_embeddings=False)},
        {"batch": BatchConfig(rows_per_step=8, length_ramp=("16@0.5",))},
        {"batch": BatchConfig(rows_per_step=8, ramp_from=0.5)},
        {"data": DataConfig(row_tokens=12, short_share=0.5)},
        {"lr_schedule": LrScheduleConfig(warmup_steps=5)},
        {"lr_schedule": LrScheduleConfig(warmup_steps=0, warmup_share=0.5)},
        {"lr_schedule": LrScheduleConfig(warmup_steps=2, span="phase")},
        {"lr_schedule": LrScheduleConfig(warmup_steps=2, final_share=0.5)},
    ],
    ids=str,
)
def test_every_setting_reaches_the_weights(store, plain, tmp_path, changes):
    changed = train(store, tmp_path / "changed", **changes)
    assert torch.isfinite(weights(changed)).all()
    assert not torch.equal(weights(plain[0]), weights(changed))


@pytest.mark.parametrize(
    "changes",
    [
        {"evaluation": EvaluationConfig(every_steps=1, validation_rows=2)},
        {"checkpoint": CheckpointConfig(every_steps=1, keep=1)},
        {"checkpoint": CheckpointConfig(every_steps=4, keep_phase_ends=False)},
        {"logging": LoggingConfig(every_steps=1)},
        {"optimizer": OptimizerConfig(lr=1e-2, ema_decay=0.9)},
    ],
    ids=str,
)
def test_watching_a_run_does_not_change_it(store, plain, tmp_path, changes):
    assert torch.equal(weights(plain[0]), weights(train(store, tmp_path / "watched", **changes)))


def test_accumulated_micro_batches_add_up_to_the_step(store, tmp_path):
    """In one CLM step nothing is random: the gradient of 8 rows is that of 3 + 3 + 2 rows, however labels fall."""
    gradients = []
    for micro in (None, 3):
        made = make(store, tmp_path / f"micro_{micro}", batch=BatchConfig(rows_per_step=8, rows_per_micro_batch=micro))
        made.model.double()
        made._step(0)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in made.model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_both_losses_fall_in_their_phases(store, tmp_path):
    folder = tmp_path / "long"
    train(store, folder, schedule="60s_CLM+120s_MLM", evaluation=EvaluationConfig(every_steps=60, validation_rows=8))
    start, after_clm, *_, end = [record["loss"] for record in records(folder, "validation")]
    assert start["CLM"] == pytest.approx(math.log(SIZE), abs=0.3)
    assert after_clm["CLM"] < start["CLM"] - 0.8
    assert end["MLM"] < after_clm["MLM"] - 0.8


def test_metrics_tell_phase_rate_and_tokens(plain):
    _, folder = plain
    lines = records(folder, "train")
    assert [(line["step"], line["phase"]) for line in lines] == [(3, 0), (6, 0), (9, 1), (12, 1)]
    assert [line["mask_rate"] for line in lines] == [None, None, 0.15, 0.15]
    assert [line["tokens"] for line in lines] == [3 * 8 * 12, 6 * 8 * 12, 9 * 8 * 12 - 7 * 12, 12 * 8 * 12 - 7 * 12]
    assert [list(line["loss"]) for line in lines] == [["CLM"], ["CLM"], ["MLM"], ["MLM"]]
    validations = records(folder, "validation")
    assert [line["step"] for line in validations] == [0, 4, 6, 8, 12]
    assert all(set(line["loss"]) == {"CLM", "MLM"} for line in validations)
    assert records(folder, "run")[0]["phases"][1] == {
        "name": "6s_MLM",
        "objective": "MLM",
        "first_step": 6,
        "end_step": 12,
    }


def test_a_mix_reports_each_objective_and_mntp_is_validated_too(store, tmp_path):
    train(store, tmp_path / "mix", schedule="12s_MIX(0.5,MNTP)")
    assert all(set(line["loss"]) == {"CLM", "MNTP"} for line in records(tmp_path / "mix", "train"))
    assert set(records(tmp_path / "mix", "validation")[-1]["loss"]) == {"CLM", "MLM", "MNTP"}


def test_a_length_that_does_not_fit_the_schedule_is_refused(store, tmp_path):
    with pytest.raises(InputError, match="steps must equal the sum of the schedule; got steps 12"):
        make(store, tmp_path / "wrong", schedule="1_CLM+2s_MLM", steps=12)


def test_settings_of_lamb_and_of_embeddings_reach_it_too(store, tmp_path):
    """eps, weight decay and the embeddings' exemption change LAMB's weights as they change AdamW's."""
    found = [
        weights(train(store, tmp_path / f"lamb_{number}", optimizer=OptimizerConfig(kind="lamb", lr=1e-2, **changes)))
        for number, changes in enumerate(
            [{}, {"eps": 1e-2}, {"weight_decay": 0.5}, {"decay_embeddings": False}, {"beta1": 0.5}, {"beta2": 0.5}]
        )
    ]
    assert all(torch.isfinite(each).all() for each in found)
    assert all(not torch.equal(found[0], other) for other in found[1:])


def test_validation_and_the_finished_model_are_the_averages(store, plain, tmp_path):
    made = train(store, tmp_path / "average", optimizer=OptimizerConfig(lr=1e-2, ema_decay=0.8))
    own = weights(made).clone()
    with made.judged_weights():
        averaged = weights(made).clone()
    assert torch.equal(weights(made), own)
    expected = torch.cat([tensor.flatten() for tensor in made.average.tensors.values()])
    assert torch.equal(averaged, expected)
    assert not torch.equal(averaged, own)
    with plain[0].judged_weights():  # without an average it is the weights themselves
        assert torch.equal(weights(plain[0]), own)
    losses = [record["loss"] for record in records(tmp_path / "average", "validation")]
    assert losses[0] == records(plain[1], "validation")[0]["loss"]
    assert losses[-1] != records(plain[1], "validation")[-1]["loss"]
    # by hand: the average of the weights after each step of the same run
    again = make(store, tmp_path / "by_hand")
    average = weights(again).clone()
    for step in range(12):
        again._step(step)
        average = 0.8 * average + 0.2 * weights(again)
    torch.testing.assert_close(averaged, average, rtol=1e-5, atol=1e-7)


def test_rows_grow_and_the_tokens_of_a_step_stay(store, tmp_path):
    made = make(store, tmp_path / "ramp", batch=BatchConfig(rows_per_step=8, length_ramp=("16@0.5",)))
    shapes = [[(batch.num_tokens, batch.max_seqlen) for batch in made._train_batches(step)] for step in (0, 5, 6, 11)]
    assert shapes == [[(96, 12)], [(96, 12)], [(80, 16)], [(96, 16)]]
    assert made.rows[16].rows_per_epoch == 780 // 16


def test_a_corpus_too_small_for_the_long_rows_is_refused(store, tmp_path):
    long = replace(CONFIG.model, max_position_embeddings=1024)
    with pytest.raises(InputError, match="batch.length_ramp: row_tokens must be at most the 780 tokens"):
        make(store, tmp_path / "long", model=long, batch=BatchConfig(rows_per_step=100, length_ramp=("1000@0.5",)))


def test_a_run_that_diverges_stops_before_it_saves(store, tmp_path):
    made = make(store, tmp_path / "diverged")
    step = made._step

    def breaks_at_five(number):
        if number == 5:
            with torch.no_grad():
                made.model.lm_head.weight.fill_(math.inf)
        return step(number)

    made._step = breaks_at_five
    with pytest.raises(InputError, match="training diverged by step 6: the gradient's norm is nan; lower optimizer.lr"):
        made.run(resume=False)
    assert [path.name for path in made.checkpoints.iterdir()] == ["step_00000004"]


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_can_go_on(store, plain, tmp_path, monkeypatch):
    folder = tmp_path / "full"
    write, written = trainer_module.save_checkpoint, []

    def disk_fills_up(*arguments, **keywords):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(folder))
        written.append(write(*arguments, **keywords))
        return written[-1]

    monkeypatch.setattr(trainer_module, "save_checkpoint", disk_fills_up)
    with pytest.raises(InputError, match=r"No space left on device.*step_00000004 is intact: make room, then resume"):
        train(store, folder)
    monkeypatch.setattr(trainer_module, "save_checkpoint", write)
    resumed = train(store, folder, resume=True)
    assert torch.equal(weights(plain[0]), weights(resumed))
    assert (folder / "metrics.jsonl").read_bytes() == (plain[1] / "metrics.jsonl").read_bytes()


@pytest.mark.parametrize(("keep_phase_ends", "expected"), [(True, [6, 14, 16, 18]), (False, [12, 16, 18])])
def test_the_end_of_a_phase_is_no_checkpoint_or_is_soon_dropped(store, tmp_path, keep_phase_ends, expected):
    """No multiple of checkpoint.every_steps, and not among the newest at the end."""
    checkpoints = CheckpointConfig(every_steps=4, keep=2 if keep_phase_ends else 3, keep_phase_ends=keep_phase_ends)
    made = train(store, tmp_path / "run", schedule="6s_CLM+8s_MLM+4s_CLM", checkpoint=checkpoints)
    assert sorted(int(path.name.removeprefix("step_")) for path in made.checkpoints.iterdir()) == expected


def test_tensorboard_is_written_when_asked_for(store, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(store, tmp_path / "board", logging=LoggingConfig(every_steps=3, tensorboard=True))
    events = EventAccumulator(str(tmp_path / "board" / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("validation/loss_CLM")}
    expected = {line["step"]: line["loss"]["CLM"] for line in records(tmp_path / "board", "validation")}
    assert losses == pytest.approx(expected, rel=1e-6)
    assert {"lr", "grad_norm", "mask_rate", "train/loss_MLM"} <= set(events.Tags()["scalars"])
