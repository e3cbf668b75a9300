"""When a run keeps copies of its weights: where the package alone writes weights; and the numbers never change."""

import contextlib
import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.rows import Rows
from antlm_fast.data.token_store import TokenStore
from antlm_fast.kernels.native.library import unavailable_reason
from antlm_fast.kernels.working_copies import destination, working_copy
from antlm_fast.models import BabyLlama, BabyLlamaConfig
from antlm_fast.training import trainer as trainer_module
from antlm_fast.training.batch_plan import BatchConfig
from antlm_fast.training.config import EvaluationConfig, TrainConfig
from antlm_fast.training.kept_copies import copies_kept
from antlm_fast.training.lr_schedule import LrScheduleConfig
from antlm_fast.training.native_optimizer import NativeAdamW, NativeLamb
from antlm_fast.training.optimizer import OptimizerConfig, begin_step, build_optimizer, clipped_step
from antlm_fast.training.trainer import Trainer
from antlm_fast.types import Vocabulary

REASON = unavailable_reason("cpu", torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

SIZE = 60
VOCABULARY = Vocabulary(size=SIZE, mask_id=3, special_ids=(0, 1, 2, 3), word_start=np.ones(SIZE, dtype=bool))
MODEL = BabyLlamaConfig(
    vocab_size=SIZE, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
)
CONFIG = TrainConfig(
    name="test",
    data=DataConfig(row_tokens=12),
    schedule="4s_CLM+4s_MLM",
    precision="bfloat16",
    device="cpu",
    model=MODEL,
    batch=BatchConfig(rows_per_step=4, rows_per_micro_batch=2),
    optimizer=OptimizerConfig(lr=1e-2, ema_decay=0.5),
    lr_schedule=LrScheduleConfig(warmup_steps=2),
    evaluation=EvaluationConfig(every_steps=2, validation_rows=2),
)


def clamp(weight):
    weight.data.clamp_(-0.02, 0.02)


def prune(weight):
    weight.data.mul_(torch.arange(weight.numel()).view(weight.shape) % 3 > 0)


def zero_a_row(weight):
    weight.data[5].zero_()


def zero_by_numpy(weight):
    weight.detach().numpy()[5] = 0


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
@pytest.mark.parametrize("write", [clamp, prune, zero_a_row, zero_by_numpy])
def test_weights_written_after_each_step_of_a_loop_are_multiplied_as_they_are(write, kind):
    """A twin that was never multiplied by says what is right."""
    torch.manual_seed(0)
    model = BabyLlama(MODEL)
    optimizer = build_optimizer(model, OptimizerConfig(kind=kind, lr=1e-2))
    assert isinstance(optimizer, NativeAdamW | NativeLamb)
    ids = torch.arange(5, 37).view(2, 16)

    def hidden(model):
        with torch.autocast("cpu", torch.bfloat16):
            return model.hidden_states(ids, causal=True)

    for _ in range(3):
        before = hidden(model)
        begin_step(model, optimizer, num_micro_batches=1, precision="bfloat16")
        before.float().square().sum().backward()
        clipped_step(model, optimizer, 1.0)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                write(module.weight)
        found = hidden(model)
        assert torch.equal(found, hidden(copy.deepcopy(model)))
        assert not torch.equal(found, before)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    documents = [[1, *((4 + start + np.arange(11)) % 50 + 5).tolist(), 2] for start in range(20)]
    folder = tmp_path_factory.mktemp("store") / "tokens"
    names = {"fingerprint": "f", "tokenizer_fingerprint": "t", "source": "test"}
    return TokenStore.write(documents, folder, vocab_size=SIZE, **names)


class ZeroesARowAfterAStep(Trainer):
    def _step(self, step):
        found = super()._step(step)
        zero_a_row(self.model.lm_head.weight)
        return found


def zero_in_a_forward(trainer):
    trainer.model.register_forward_pre_hook(lambda module, _: zero_a_row(module.lm_head.weight))
    layer = trainer.model.model.layers[0]
    layer.register_forward_pre_hook(lambda *_: zero_a_row(layer.mlp.down_proj.weight))


def zero_after_the_optimizer(trainer):
    trainer.optimizer.register_step_post_hook(lambda *_: zero_a_row(trainer.model.lm_head.weight))


def zero_with_a_gradient(trainer):
    weight = trainer.model.lm_head.weight
    weight.register_hook(lambda gradient: zero_a_row(weight) or gradient)


def zero_by_another_method(trainer):
    method = trainer.model.loss_sums

    def loss_sums(*arguments, **keywords):
        zero_a_row(trainer.model.lm_head.weight)
        return method(*arguments, **keywords)

    trainer.model.loss_sums = loss_sums


USERS_CODE = {
    "a forward hook": zero_in_a_forward,
    "an optimizer's hook": zero_after_the_optimizer,
    "a gradient's hook": zero_with_a_gradient,
    "a replaced method": zero_by_another_method,
}


def run(store, folder, change=None, kind=Trainer):
    """The weights and the log of a run, and whether copies were kept in its last step."""
    torch.manual_seed(0)
    folder.mkdir()
    rows = [Rows(store, mode="stream", row_tokens=12, seed=0, shuffle=shuffle) for shuffle in (True, False)]
    trainer = kind(CONFIG, BabyLlama(MODEL), VOCABULARY, *rows, folder)
    if change is not None:
        change(trainer)
    trainer.run(resume=False)
    return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])


@pytest.fixture
def kept(monkeypatch):
    """Whether copies were kept, step by step."""
    found = []

    def step(model, *arguments):
        found.append(destination(model.lm_head.weight) is not None)
        return clipped_step(model, *arguments)

    monkeypatch.setattr(trainer_module, "clipped_step", step)
    return found


def cast_always(monkeypatch):
    monkeypatch.setattr(trainer_module, "copies_kept", lambda *_: contextlib.nullcontext())


def test_a_run_keeps_copies_and_its_numbers_are_those_of_casts(store, tmp_path, kept, monkeypatch):
    """With two micro-batches a step, validations of the averaged weights in between, and a change of objective."""
    weights = run(store, tmp_path / "kept")
    cast_always(monkeypatch)
    assert torch.equal(run(store, tmp_path / "cast"), weights)
    assert kept == [True] * 8 + [False] * 8
    logs = [(tmp_path / name / "metrics.jsonl").read_bytes() for name in ("kept", "cast")]
    assert logs[0] == logs[1]


@pytest.mark.parametrize("code", USERS_CODE)
def test_a_run_with_code_of_the_users_has_the_numbers_of_casts(code, store, tmp_path, kept, monkeypatch):
    weights = run(store, tmp_path / "kept", USERS_CODE[code])
    cast_always(monkeypatch)
    assert torch.equal(run(store, tmp_path / "cast", USERS_CODE[code]), weights)
    assert not any(kept)


def test_a_trainer_of_the_users_has_the_numbers_of_casts(store, tmp_path, kept, monkeypatch):
    weights = run(store, tmp_path / "kept", kind=ZeroesARowAfterAStep)
    cast_always(monkeypatch)
    assert torch.equal(run(store, tmp_path / "cast", kind=ZeroesARowAfterAStep), weights)
    assert not any(kept)


class Scaled(nn.Linear):
    pass


def exchange_a_layer(model):
    model.model.layers[0].mlp.down_proj = Scaled(16, 16, bias=False)


def put_on_numpys_memory(model):
    model.lm_head.weight.data = torch.from_numpy(np.ones((SIZE, 16), dtype=np.float32))


def tie_by_data(model):
    """Two parameters of one memory: each counts what is written through itself alone."""
    model.lm_head.weight.data = model.model.embed_tokens.weight.data


@pytest.mark.parametrize(
    "change",
    [
        lambda model: model.lm_head.weight.share_memory_(),
        put_on_numpys_memory,
        exchange_a_layer,
        tie_by_data,
        lambda model: model.lm_head.weight.register_post_accumulate_grad_hook(lambda _: None),
        lambda model: model.model.norm.register_full_backward_hook(lambda *_: None),
        lambda model: model.register_state_dict_post_hook(lambda *_: None),
    ],
)
def test_nothing_is_kept_where_others_may_write(change):
    torch.manual_seed(0)
    model = BabyLlama(MODEL)
    optimizer = build_optimizer(model, OptimizerConfig())
    weight = model.model.embed_tokens.weight
    for kept in (True, False):
        with copies_kept(model, optimizer):
            working_copy(weight, torch.bfloat16)
            assert (destination(weight) is not None) == kept
        change(model)


def test_nothing_is_kept_while_every_module_has_a_hook():
    model = BabyLlama(MODEL)
    optimizer = build_optimizer(model, OptimizerConfig())
    for register in (nn.modules.module.register_module_forward_hook, register_optimizer_step_pre_hook):
        hook = register(lambda *_: None)
        with copies_kept(model, optimizer):
            working_copy(model.lm_head.weight, torch.bfloat16)
            assert destination(model.lm_head.weight) is None
        hook.remove()


def test_nothing_is_kept_beside_an_optimizer_of_torchs():
    """Its fused steps write weights that count no change."""
    model = BabyLlama(MODEL)
    with copies_kept(model, build_optimizer(model, OptimizerConfig(), impl="torch")):
        working_copy(model.lm_head.weight, torch.bfloat16)
        assert destination(model.lm_head.weight) is None


def test_nothing_is_kept_for_an_optimizer_of_other_tensors():
    torch.manual_seed(0)
    model = BabyLlama(MODEL)
    weight = model.model.embed_tokens.weight
    optimizer = build_optimizer(model, OptimizerConfig())
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
    with copies_kept(model, optimizer):
        working_copy(weight, torch.bfloat16)
        assert destination(weight) is None
