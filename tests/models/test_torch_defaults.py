"""A training step is the same whatever torch's default dtype is, and models of another dtype train too."""

from __future__ import annotations

import pytest
import torch

from antlm_fast.models import BabyLlama, BabyLlamaConfig
from antlm_fast.types import Objective, PackedBatch

BF16 = torch.bfloat16


def batch(tokens: torch.Tensor) -> PackedBatch:
    labelled = torch.tensor([1, 4, 7])
    return PackedBatch(
        input_ids=tokens.flatten(),
        cu_seqlens=torch.arange(tokens.shape[0] + 1, dtype=torch.int32) * tokens.shape[1],
        max_seqlen=tokens.shape[1],
        prefix_len=torch.full((tokens.shape[0],), 2**31 - 1, dtype=torch.int32),
        labelled={Objective.MLM: labelled},
        targets={Objective.MLM: labelled + 3},
    )


def gradients(model: torch.nn.Module, data: PackedBatch) -> dict[str, torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(5)
    with torch.autocast("cpu", BF16):
        (loss,) = model.loss_sums(data).values()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.fixture(params=["baby_llama", "ltg_bert", "gpt_bert"])
def make(request, tiny):
    """A model in torch's default dtype of the moment."""
    if request.param != "baby_llama":
        return lambda: tiny(request.param, dtype=torch.get_default_dtype())
    sizes = {"hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2}
    return lambda: BabyLlama(BabyLlamaConfig(vocab_size=31, max_position_embeddings=20, **sizes))


@pytest.mark.parametrize("dtype", [torch.float64, BF16], ids=str)
def test_a_step_under_another_default_dtype_has_the_same_gradients(make, tokens, dtype, default_dtype):
    model, data = make(), batch(tokens(2, 6))
    wanted = gradients(model, data)
    with default_dtype(dtype):
        found = gradients(model, data)
    assert len(wanted) == len(list(model.parameters()))
    for name, expected in wanted.items():
        assert found[name].dtype == expected.dtype
        assert torch.equal(found[name], expected), name


def test_a_model_built_under_a_bfloat16_default_trains_as_its_float32_copy_does(make, tokens, default_dtype):
    data = batch(tokens(2, 6))
    with default_dtype(BF16):
        model = make()
        found = gradients(model, data)
    assert {x.dtype for x in found.values()} == {BF16}
    for name, expected in gradients(model.float(), data).items():
        assert torch.cosine_similarity(found[name].float().flatten(), expected.flatten(), dim=0) > 0.98, name
