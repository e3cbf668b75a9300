"""BabyLlama (arXiv 2308.02019): the Llama body, with visibility as data instead of a class.

Parameter names are those of Hugging Face's LlamaForCausalLM, so a state dict moves both ways. Tokens are packed:
one axis of total_tokens, sequences told apart by cu_seqlens, no padding anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from antlm_fast.kernels.attention import attention_varlen
from antlm_fast.models.language_model import LanguageModel, Packing, check_architecture


@dataclass(frozen=True, kw_only=True)
class BabyLlamaConfig:
    """Sizes of a BabyLlama; fields as in Hugging Face's LlamaConfig. The defaults are BabyLlama-58M (2308.02019)."""

    architecture: Literal["baby_llama"] = "baby_llama"
    vocab_size: int = 16000
    hidden_size: int = 512
    intermediate_size: int = 1024
    num_hidden_layers: int = 16
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None  # None: as many as num_attention_heads
    max_position_embeddings: int = 1024
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self) -> None:
        check_architecture(self)
        for name in (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1; got {getattr(self, name)}")
        for name in ("rope_theta", "rms_norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name} must be above 0; got {getattr(self, name)}")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(
                "hidden_size must be a multiple of 2 * num_attention_heads (rotary embedding turns pairs); "
                f"got hidden_size {self.hidden_size}, num_attention_heads {self.num_attention_heads}"
            )
        if self.num_key_value_heads is not None and (
            self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads
        ):
            raise ValueError(
                f"num_key_value_heads must divide num_attention_heads ({self.num_attention_heads}); "
                f"got {self.num_key_value_heads}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def kv_heads(self) -> int:
        return self.num_key_value_heads or self.num_attention_heads


_Rotary = tuple[Tensor, Tensor]  # cos and sin, each float32 (total_tokens, 1, head_dim)


class BabyLlama(LanguageModel):
    """A Llama-layout transformer.

    x <- x + Attention(RMSNorm(x)); x <- x + W_down(silu(W_gate y) * (W_up y)) with y = RMSNorm(x); RMSNorm; head.

    Source: BabyLlama, arXiv 2308.02019 (sizes); layout of LlamaForCausalLM (names).
    """

    config: BabyLlamaConfig

    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.model = _Body(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.apply(self._initialise)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight

    def _initialise(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            nn.init.normal_(module.weight, std=self.config.initializer_range)

    @property
    def head_weight(self) -> Tensor:
        return self.lm_head.weight

    def encode(self, tokens: Tensor, packing: Packing, rows: Tensor | None) -> Tensor:
        hidden: Tensor = self.model(tokens, packing)
        return hidden if rows is None else hidden.index_select(0, rows)


class _Body(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor, packing: Packing) -> Tensor:
        positions = packing.positions(torch.arange(tokens.numel(), device=tokens.device))
        rotary = _rotary_tables(positions, self.config)
        x = self.embed_tokens(tokens)  # (total_tokens, hidden_size)
        for layer in self.layers:
            x = layer(x, packing, rotary)
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _SwiGLU(config)

    def forward(self, x: Tensor, packing: Packing, rotary: _Rotary) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), packing, rotary)
        return x + self.mlp(self.post_attention_layernorm(x))


class _Attention(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_size = config.kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, packing: Packing, rotary: _Rotary) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # (total_tokens, heads, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cu_seqlens, max_seqlen = packing.cu_seqlens, packing.max_seqlen
        out = attention_varlen(
            _rotate(q, rotary),
            _rotate(k, rotary),
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            causal=packing.causal,
            prefix_len=packing.prefix_len,
            impl=packing.impl,
        )
        return self.o_proj(out.flatten(-2))


class _SwiGLU(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def _rotary_tables(positions: Tensor, config: BabyLlamaConfig) -> _Rotary:
    """cos and sin of position * theta^(-2i / head_dim), float32 (total_tokens, 1, head_dim)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, rotary: _Rotary) -> Tensor:
    """Rotary embedding: the two halves of head_dim are the two coordinates that turn. Keeps x's dtype."""
    cos, sin = (table.to(x.dtype) for table in rotary)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
