"""Held-out loss against a full softmax; conversions by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from antlm_fast.evaluation.perplexity import bits_per_byte, mean_losses, perplexity
from antlm_fast.models import GptBert, GptBertConfig, LanguageModel, LtgBert, LtgBertConfig
from antlm_fast.models.baby_llama import BabyLlama, BabyLlamaConfig
from antlm_fast.types import InputError, Objective, PackedBatch

VOCAB = 11


@pytest.fixture(scope="module")
def model() -> BabyLlama:
    torch.manual_seed(3)
    config = BabyLlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.4,
    )
    return BabyLlama(config)


def batch(lengths: list[int], prefixes: list[int], labelled: dict[Objective, list[int]], seed: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(seed)
    ends = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    return PackedBatch(
        input_ids=torch.randint(VOCAB, (sum(lengths),), generator=generator),
        cu_seqlens=ends,
        max_seqlen=max(lengths),
        prefix_len=torch.tensor(prefixes, dtype=torch.int32),
        labelled={objective: torch.tensor(rows, dtype=torch.int64) for objective, rows in labelled.items()},
        targets={
            objective: torch.randint(VOCAB, (len(rows),), generator=generator) for objective, rows in labelled.items()
        },
    )


def batches() -> list[PackedBatch]:
    return [
        batch([4, 6], [0, 6], {Objective.CLM: [0, 1, 2], Objective.MLM: [5, 9]}, seed=1),
        batch([3], [0], {Objective.CLM: [0], Objective.MLM: []}, seed=2),
        batch([5], [5], {Objective.MLM: [4]}, seed=3),
    ]


def naive_losses(model: LanguageModel) -> dict[Objective, float]:
    values: dict[Objective, list[float]] = {Objective.CLM: [], Objective.MLM: []}
    for packed in batches():
        logits = model(
            packed.input_ids, prefix_len=packed.prefix_len, cu_seqlens=packed.cu_seqlens, max_seqlen=packed.max_seqlen
        )
        log_p = torch.log_softmax(logits.double(), dim=-1)
        for objective, rows in packed.labelled.items():
            values[objective] += [
                -float(log_p[row, target])
                for row, target in zip(rows.tolist(), packed.targets[objective].tolist(), strict=True)
            ]
    return {objective: sum(nll) / len(nll) for objective, nll in values.items()}


def test_every_labelled_token_counts_the_same(model: BabyLlama) -> None:
    got = mean_losses(model, batches())
    with torch.no_grad():
        expected = naive_losses(model)
    assert list(got) == [Objective.CLM, Objective.MLM]
    assert got[Objective.CLM] == pytest.approx(expected[Objective.CLM], abs=1e-5)
    assert got[Objective.MLM] == pytest.approx(expected[Objective.MLM], abs=1e-5)


@pytest.mark.parametrize(
    ("model_class", "config_class"), [(LtgBert, LtgBertConfig), (GptBert, GptBertConfig)], ids=["ltg_bert", "gpt_bert"]
)
def test_a_head_of_its_own_is_read_in_full_and_without_dropout(model_class: Any, config_class: Any) -> None:
    torch.manual_seed(4)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    made = model_class(config_class(vocab_size=VOCAB, **sizes))
    with torch.no_grad():
        made.head.bias.copy_(torch.linspace(-2, 2, VOCAB))
    made.train()
    got = mean_losses(made, batches())
    made.eval()
    with torch.no_grad():
        expected = naive_losses(made)
    assert got == {objective: pytest.approx(loss, abs=1e-5) for objective, loss in expected.items()}


def test_bfloat16_is_close_and_the_training_mode_comes_back(model: BabyLlama) -> None:
    model.train()
    exact, rounded = mean_losses(model, batches()), mean_losses(model, iter(batches()), "bfloat16")
    assert model.training is True
    for objective in exact:
        assert rounded[objective] == pytest.approx(exact[objective], rel=0.05)
    assert rounded != exact


def test_batches_without_a_label_are_refused(model: BabyLlama) -> None:
    with pytest.raises(InputError, match="batches must label at least one token; got none"):
        mean_losses(model, [batch([3], [0], {Objective.CLM: []}, seed=0)])
    with pytest.raises(InputError, match="precision must be 'float32' or 'bfloat16'; got 'fp8'"):
        mean_losses(model, batches(), "fp8")


def test_perplexity_of_a_uniform_guess_is_the_vocabulary() -> None:
    assert perplexity(math.log(16000)) == pytest.approx(16000)
    assert perplexity(0.0) == 1.0
    assert perplexity(1e6) == math.inf


def test_bits_per_byte_by_hand() -> None:
    # 100 tokens of 3 bits each over 400 bytes
    assert bits_per_byte(3 * math.log(2), num_tokens=100, num_bytes=400) == pytest.approx(0.75)
    with pytest.raises(InputError, match="num_bytes must be at least 1; got 0"):
        bits_per_byte(1.0, num_tokens=1, num_bytes=0)
