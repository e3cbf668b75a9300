"""Stock models of transformers at our models' sizes, all with is_causal as their own argument, none patched.

What differs from the model they stand beside, at the same hidden size, layers, heads, vocabulary and batch:

Llama       nothing: our BabyLlama's weights are loaded, logits and gradients are the same.
GPT-2       learned positions, LayerNorm with biases, biases everywhere, an ungated feed-forward of 1.5 times the width
            (the same number of weights in its matrices as a gated one); dropout off, as BabyLlama has none.
BERT        learned positions and token types, post-norm, an ungated feed-forward of 1.5 times the width, dropout 0.1 as
            LTG-BERT; its attention is plain, without relative terms.
ModernBERT  RoPE instead of relative buckets, local windows of 128 in two layers of three, no dropout: less attention
            work than LTG-BERT; the same gated feed-forward.
All compute the logits of every position, as their `forward` does, and take the loss in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

FAMILIES = ("llama", "gpt2", "bert", "modernbert")


def build(family: str, config: Any, attention: str) -> nn.Module:
    """A new model of the family at the sizes of our config, from torch's generator.

    Args:
        attention: "eager", "sdpa" or what else transformers offers.
    """
    import transformers

    sizes = {
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "attn_implementation": attention,
    }
    layers = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
    }
    ungated = config.intermediate_size * 3 // 2
    if family == "llama":
        values = {name: value for name, value in asdict(config).items() if name != "architecture"}
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        values |= {"num_key_value_heads": config.kv_heads, "rope_parameters": rope, "use_cache": False}
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**values, attn_implementation=attention))
    if family == "gpt2":
        gpt2 = transformers.GPT2Config(
            vocab_size=config.vocab_size,
            n_positions=config.max_position_embeddings,
            n_embd=config.hidden_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_inner=ungated,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
            bos_token_id=0,
            eos_token_id=0,
            tie_word_embeddings=False,
            use_cache=False,
            attn_implementation=attention,
        )
        return transformers.GPT2LMHeadModel(gpt2)
    if family == "bert":
        bert = transformers.BertConfig(
            **sizes,
            **layers,
            intermediate_size=ungated,
            hidden_dropout_prob=config.hidden_dropout,
            attention_probs_dropout_prob=config.attention_dropout,
        )
        return transformers.BertForMaskedLM(bert)
    special = {f"{name}_token_id": number for number, name in enumerate(("pad", "bos", "eos", "cls", "sep"))}
    modern = transformers.ModernBertConfig(**sizes, **layers, intermediate_size=config.intermediate_size, **special)
    return transformers.ModernBertForMaskedLM(modern)


def loss(model: Callable[..., Any], ids: Tensor, targets: Tensor, *, causal: bool) -> Tensor:
    """ids (batch, seqlen); targets (batch * seqlen,), -100 where there is no label."""
    logits = model(ids, is_causal=causal).logits.flatten(0, 1)
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)


@torch.no_grad()
def assert_visibility(model: nn.Module, ids: Tensor, *, causal: bool) -> None:
    """That the last token reaches earlier positions where it may, and nowhere else.

    Raises:
        AssertionError: the model took is_causal and did something else.
    """
    changed = ids.clone()
    changed[:, -1] = (changed[:, -1] + 1) % int(ids.max())
    before, after = (model(each, is_causal=causal).logits[:, :-1] for each in (ids, changed))
    moved = float((before - after).abs().max() / before.abs().max())
    if causal and moved > 0:
        raise AssertionError(f"is_causal=True leaks: changing the last token moves earlier logits by {moved:.1e}")
    if not causal and moved == 0:
        raise AssertionError("is_causal=False changes nothing: earlier logits do not depend on the last token")
