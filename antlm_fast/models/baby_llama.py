"""BabyLlama (arXiv 2308.02019): the Llama body, with visibility as data instead of a class.

Parameter names are those of Hugging Face's LlamaForCausalLM, so a state dict moves both ways. Tokens are packed:
one axis of total_tokens, sequences told apart by cu_seqlens, no padding anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from antlm_fast.kernels.attention import attention_varlen
from antlm_fast.kernels.disentangled_attention import disentangled_attention_varlen
from antlm_fast.kernels.fused_layers import gated_unit, rotary, rotary_qkv
from antlm_fast.models.language_model import LanguageModel, Packing, check_architecture
from antlm_fast.models.layer_parts import (
    Linear,
    Pending,
    WantedRows,
    continued,
    joint_product,
    wanted_rows,
)


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

    With `rows`, the last layer computes output projection and feed-forward for them alone, and queries too where key
    heads are not shared.

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
        hidden: Tensor = self.model(tokens, packing, rows)
        return hidden


class _Body(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor, packing: Packing, rows: Tensor | None) -> Tensor:
        positions = packing.positions(torch.arange(tokens.numel(), device=tokens.device))
        rotary = _rotary_tables(positions, self.config)
        wanted = WantedRows.of(rows, packing)
        x, pending = self.embed_tokens(tokens), None  # (total_tokens, hidden_size)
        for layer in self.layers[:-1]:
            x, pending = layer(x, pending, packing, rotary, None)
        x, pending = self.layers[-1](x, pending, packing, rotary, wanted)
        _, hidden = pending.added_and_normed(x, self.norm, packing.layer_impl)
        return hidden


class _Layer(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _SwiGLU(config)

    def forward(
        self, x: Tensor, pending: Pending | None, packing: Packing, rotary: _Rotary, wanted: WantedRows | None
    ) -> tuple[Tensor, Pending]:
        """(residual stream, what is still to be added to it); with wanted, both at those rows alone."""
        impl = packing.layer_impl
        x, y = continued(x, pending, self.input_layernorm, impl)
        attended = Pending(self.self_attn(y, packing, rotary, wanted))
        x, y = attended.added_and_normed(wanted_rows(x, wanted), self.post_attention_layernorm, impl)
        return x, Pending(self.mlp(y, impl))


class _Attention(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.num_attention_heads, config.kv_heads, config.head_dim
        kv_size = config.kv_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, y: Tensor, packing: Packing, rotary_tables: _Rotary, wanted: WantedRows | None) -> Tensor:
        """(n, hidden_size) of y (total_tokens, hidden_size)"""
        # queries of some rows alone want a key head for each of their heads
        if wanted is None or self.heads != self.kv_heads:
            out = wanted_rows(self._of_all_rows(y, packing, rotary_tables), wanted)
        else:
            out = self._of_wanted_rows(y, packing, rotary_tables, wanted)
        return self.o_proj(out.flatten(-2), packing.layer_impl)

    def _of_all_rows(self, y: Tensor, packing: Packing, rotary_tables: _Rotary) -> Tensor:
        impl, (cos, sin) = packing.layer_impl, rotary_tables
        joint = joint_product(y, (self.q_proj, self.k_proj, self.v_proj), impl).unflatten(-1, (-1, self.head_dim))
        q, k, v = rotary_qkv(joint, cos, sin, heads=self.heads, kv_heads=self.kv_heads, overwrite=True, impl=impl)
        cu_seqlens, max_seqlen = packing.cu_seqlens, packing.max_seqlen
        return attention_varlen(
            q,
            k,
            v,
            cu_seqlens,
            cu_seqlens,
            max_seqlen,
            max_seqlen,
            causal=packing.causal,
            prefix_len=packing.prefix_len,
            impl=packing.impl,
        )

    def _of_wanted_rows(self, y: Tensor, packing: Packing, rotary_tables: _Rotary, wanted: WantedRows) -> Tensor:
        """Disentangled attention without its tables is attention that knows where its queries stand."""
        impl, (cos, sin) = packing.layer_impl, rotary_tables
        q = self.q_proj(wanted_rows(y, wanted), impl).unflatten(-1, (-1, self.head_dim))
        q = rotary(q, wanted_rows(cos, wanted), wanted_rows(sin, wanted), impl=impl)
        joint = joint_product(y, (self.k_proj, self.v_proj), impl).unflatten(-1, (-1, self.head_dim))
        _, k, v = rotary_qkv(joint, cos, sin, heads=0, kv_heads=self.kv_heads, overwrite=True, impl=impl)
        return disentangled_attention_varlen(
            q,
            k,
            v,
            None,
            None,
            wanted.cu_seqlens,
            packing.cu_seqlens,
            packing.max_seqlen,
            packing.max_seqlen,
            causal=packing.causal,
            prefix_len=packing.prefix_len,
            positions_q=wanted.positions,
            impl=packing.impl,
        )


class _SwiGLU(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, y: Tensor, impl: str) -> Tensor:
        joint = joint_product(y, (self.gate_proj, self.up_proj), impl)
        return self.down_proj(gated_unit(joint, activation="silu", gate_first=True, impl=impl), impl)


def _rotary_tables(positions: Tensor, config: BabyLlamaConfig) -> _Rotary:
    """cos and sin of position * theta^(-2i / head_dim), float32 (total_tokens, 1, head_dim)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()
