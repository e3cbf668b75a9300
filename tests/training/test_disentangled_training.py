"""LTG-BERT and GPT-BERT in the loop: resumed exactly with dropout, ramps and averages; a mix on one device."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.rows import Rows
from antlm_fast.data.token_store import TokenStore
from antlm_fast.models import GptBertConfig, LtgBertConfig, build_model, language_model
from antlm_fast.objectives import MaskingConfig
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.checkpoint import latest_checkpoint
from antlm_fast.training.config import CheckpointConfig, EvaluationConfig, LoggingConfig, LossConfig, TrainConfig
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.optimizer import OptimizerConfig
from antlm_fast.training.trainer import Trainer, dropout_seed
from antlm_fast.types import Vocabulary

SIZE = 60
VOCABULARY = Vocabulary(size=SIZE, mask_id=3, special_ids=(0, 1, 2, 3), word_start=np.ones(SIZE, dtype=bool))
SIZES = {
    "vocab_size": SIZE,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
    "position_bucket_size": 8,
}
LTG_BERT = TrainConfig(
    name="ltg",
    data=DataConfig(row_tokens=12, short_share=0.3),
    schedule="4s_CLM+8s_MLM+4s_CLM",
    precision="float32",
    device="cpu",
    model=LtgBertConfig(**SIZES),
    masking=MaskingConfig(strategy="span"),
    batch=BatchConfig(rows_per_step=8, rows_per_micro_batch=5, length_ramp=("24@0.7",)),
    optimizer=OptimizerConfig(kind="lamb", lr=1e-2, decay_embeddings=False, clip_norm=2.0),
    lr_schedule=LrScheduleConfig(warmup_steps=0, warmup_share=0.2, final_share=0.1),
    evaluation=EvaluationConfig(every_steps=5, validation_rows=4),
    checkpoint=CheckpointConfig(every_steps=3, keep=100),
    logging=LoggingConfig(every_steps=4),
)
GPT_BERT = replace(
    LTG_BERT,
    name="gpt",
    schedule="16s_MIX(0.75,MNTP)",
    model=GptBertConfig(**SIZES),
    masking=MaskingConfig(strategy="span-uniform", rate=0.3, final_rate=0.15),
    batch=BatchConfig(rows_per_step=12, rows_per_micro_batch=7, length_ramp=("18@0.4", "24@0.7"), ramp_from=0.25),
    loss=LossConfig(z_loss=1e-4),
    optimizer=OptimizerConfig(kind="lamb", lr=1e-2, decay_embeddings=False, clip_norm=2.0, ema_decay=0.9),
)
CONFIGS = {"ltg_bert": LTG_BERT, "gpt_bert": GPT_BERT}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    documents = [[1, *((4 + start + np.arange(11)) % 50 + 5).tolist(), 2] for start in range(40)]
    folder = tmp_path_factory.mktemp("store") / "tokens"
    return TokenStore.write(documents, folder, vocab_size=SIZE, fingerprint="f", source="test")


def make(store, folder, config):
    torch.manual_seed(config.seed)
    model = build_model(config.model)
    folder.mkdir(exist_ok=True)
    train_rows = Rows(store, mode="stream", row_tokens=12, seed=0, short_share=config.data.short_share)
    return Trainer(config, model, VOCABULARY, train_rows, Rows(store, mode="stream", row_tokens=12, seed=0), folder)


def train(store, folder, config, *, resume=False):
    made = make(store, folder, config)
    torch.manual_seed(1000 + len(folder.name))  # whatever the generator holds, a run does not look at it
    made.run(resume=resume)
    return made


def weights(made):
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


def lines(folder, kind):
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module", params=CONFIGS)
def whole(request, store, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    return CONFIGS[request.param], train(store, folder, CONFIGS[request.param]), folder


@pytest.mark.parametrize("stopped_at", [3, 9, 12])
def test_resumed_from_any_checkpoint_it_ends_the_same(store, whole, tmp_path, stopped_at):
    config, made, folder = whole
    again = tmp_path / "again"
    shutil.copytree(folder / "checkpoints" / f"step_{stopped_at:08d}", again / "checkpoints" / f"step_{stopped_at:08d}")
    shutil.copy(folder / "metrics.jsonl", again)
    resumed = train(store, again, config, resume=True)
    assert torch.equal(weights(made), weights(resumed))
    assert (folder / "metrics.jsonl").read_bytes() == (again / "metrics.jsonl").read_bytes()
    ends = [latest_checkpoint(path / "checkpoints") for path in (folder, again)]
    names = {path.name for path in ends[0].iterdir()}
    average = {"average.safetensors"} if config.optimizer.ema_decay else set()
    assert names == {"model.safetensors", "optimizer.safetensors", "state.json"} | average
    assert all((ends[0] / name).read_bytes() == (ends[1] / name).read_bytes() for name in names)


def test_looking_at_a_run_does_not_change_its_dropout(store, whole, tmp_path):
    config, made, _ = whole
    watched = replace(config, evaluation=EvaluationConfig(every_steps=1, validation_rows=9))
    assert torch.equal(weights(made), weights(train(store, tmp_path / "watched", watched)))


def test_settings_of_these_models_reach_the_weights(store, whole, tmp_path):
    config, made, _ = whole
    for number, changes in enumerate(
        [
            {"model": replace(config.model, hidden_dropout=0.2)},
            {"model": replace(config.model, attention_dropout=0.2)},
            {"model": replace(config.model, position_bucket_size=4)},
            {"loss": replace(config.loss, last_layer_rows=False)},
            {"loss": replace(config.loss, z_loss=0.1)},
            {"batch": replace(config.batch, length_ramp=("24@0.5",))},
            {"seed": 1},
        ]
    ):
        changed = train(store, tmp_path / str(number), replace(config, **changes))
        assert torch.isfinite(weights(changed)).all()
        assert not torch.equal(weights(made), weights(changed)), changes


def test_without_dropout_the_last_layers_rows_change_nothing(store, whole, tmp_path):
    config, _, _ = whole
    still = replace(config, model=replace(config.model, hidden_dropout=0.0, attention_dropout=0.0))
    still = replace(still, schedule="3s_MLM", masking=MaskingConfig(rate=0.2))
    gradients = []
    for all_rows in (False, True):
        made = make(store, tmp_path / str(all_rows), replace(still, loss=LossConfig(last_layer_rows=not all_rows)))
        made.model.double()
        made._step(0)
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in made.model.parameters()]))
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-9, atol=1e-12)


def test_a_mix_on_one_device_is_one_call_of_the_model(store, tmp_path, monkeypatch):
    """CLM and MNTP sequences stand side by side in each batch; each has its own loss, and both are reported."""
    config = replace(GPT_BERT, batch=BatchConfig(rows_per_step=8), schedule="60s_MIX(0.5,MNTP)")
    calls = []
    hidden_states = language_model.LanguageModel.hidden_states

    def counted(self, *arguments, **keywords):
        calls.append((self.training, keywords["prefix_len"].tolist()))
        return hidden_states(self, *arguments, **keywords)

    monkeypatch.setattr(language_model.LanguageModel, "hidden_states", counted)
    train(store, tmp_path / "mix", config)
    training = [prefixes for is_training, prefixes in calls if is_training]
    assert len(training) == 60
    assert all(any(prefixes) and not all(prefixes) for prefixes in training)
    found = lines(tmp_path / "mix", "train")
    assert all(set(line["loss"]) == {"CLM", "MNTP"} for line in found)
    assert [line["mask_rate"] for line in found][-1] == pytest.approx(0.15, abs=1e-9)
    assert all(found[-1]["loss"][name] < found[0]["loss"][name] - 0.3 for name in ("CLM", "MNTP"))


def test_tokens_and_lengths_follow_the_ramps(whole):
    config, made, folder = whole
    lengths = [max(batch.max_seqlen for batch in made._train_batches(step)) for step in range(16)]
    tokens = [sum(batch.num_tokens for batch in made._train_batches(step)) for step in range(16)]
    assert lines(folder, "train")[-1]["tokens"] == sum(tokens)
    assert made.plan.row_tokens(0) == 12
    assert made.plan.row_tokens(15) == max(lengths) == 24
    if config.batch.ramp_from:
        assert tokens[0] < tokens[8] < tokens[15] <= 12 * 12 + 24
    else:
        assert abs(tokens[15] - tokens[0]) <= 24


def test_dropout_is_seeded_by_the_place_in_the_run_alone():
    keys = [(seed, step, micro, rank) for seed in (0, 1) for step in range(20) for micro in range(4) for rank in (0, 1)]
    seeds = [dropout_seed(*key) for key in keys]
    assert len(set(seeds)) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert seeds == [dropout_seed(*key) for key in keys]
