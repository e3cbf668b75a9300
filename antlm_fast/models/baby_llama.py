"""BabyLlama (arXiv 2308.02019): the Llama body, with visibility as data instead of a class.

Parameter names are those of Hugging Face's LlamaForCausalLM, so a state dict moves both ways. Tokens are packed:
one axis of total_tokens, sequences told apart by cu_seqlens, no padding anywhere.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from antlm_fast.kernels.attention import attention_varlen
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.types import Objective, PackedBatch


@dataclass(frozen=True, kw_only=True)
class BabyLlamaConfig:
    """Sizes of a BabyLlama; fields as in Hugging Face's LlamaConfig. The defaults are BabyLlama-58M (2308.02019)."""

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


@dataclass(frozen=True, kw_only=True)
class _Packing:
    """What every layer needs to know of the packed tokens; made once per forward."""

    cu_seqlens: Tensor  # int32 (num_seqs + 1,)
    max_seqlen: int
    causal: bool | Tensor | None  # exactly one of causal and prefix_len
    prefix_len: Tensor | None
    cos: Tensor  # (total_tokens, 1, head_dim)
    sin: Tensor
    impl: str


class BabyLlama(nn.Module):
    """A Llama-layout transformer whose every forward says what each sequence may see.

    x <- x + Attention(RMSNorm(x)); x <- x + W_down(silu(W_gate y) * (W_up y)) with y = RMSNorm(x); RMSNorm; head.

    Source: BabyLlama, arXiv 2308.02019 (sizes); layout of LlamaForCausalLM (names).
    """

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
        """The output projection, (vocab_size, hidden_size)."""
        return self.lm_head.weight

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        causal: bool | Tensor | None = None,
        prefix_len: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Final normed hidden states.

        Args:
            input_ids: int64 (batch, seqlen), or packed (total_tokens,) together with cu_seqlens.
            causal: bool, or bool tensor () or (num_seqs,): each sequence sees its past, or all of itself.
            prefix_len: int32 (num_seqs,), instead of causal: the first prefix_len tokens are seen by all.
            cu_seqlens: int32 (num_seqs + 1,), for packed input only.
            max_seqlen: the longest sequence in tokens; None reads it from cu_seqlens (on a GPU this waits for it).
            impl: which implementation of attention; see `antlm-fast doctor`.

        Returns:
            The shape of input_ids with hidden_size behind it.

        Raises:
            ValueError: neither or both of causal and prefix_len; a shape that does not fit; a sequence longer than
                max_position_embeddings.
        """
        if (causal is None) == (prefix_len is None):
            raise ValueError(
                "causal and prefix_len must be given one at a time; got " + ("neither" if causal is None else "both")
            )
        if input_ids.ndim == 2:
            if cu_seqlens is not None:
                raise ValueError(
                    f"cu_seqlens must be None for input_ids (batch, seqlen); got {tuple(cu_seqlens.shape)}"
                )
            batch, max_seqlen = input_ids.shape
            cu_seqlens = torch.arange(batch + 1, dtype=torch.int32, device=input_ids.device) * max_seqlen
        elif input_ids.ndim != 1 or cu_seqlens is None:
            raise ValueError(
                "input_ids must be (batch, seqlen), or (total_tokens,) with cu_seqlens; "
                f"got shape {tuple(input_ids.shape)} and cu_seqlens {None if cu_seqlens is None else 'given'}"
            )
        if max_seqlen is None:
            max_seqlen = int((cu_seqlens[1:] - cu_seqlens[:-1]).max()) if cu_seqlens.numel() > 1 else 0
        if max_seqlen > self.config.max_position_embeddings:
            raise ValueError(
                f"max_seqlen must be at most max_position_embeddings ({self.config.max_position_embeddings}); "
                f"got {max_seqlen}"
            )
        tokens = input_ids.reshape(-1)
        cos, sin = _rotary_tables(_positions(cu_seqlens, tokens.numel()), self.config)
        packing = _Packing(
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            causal=causal,
            prefix_len=prefix_len,
            cos=cos,
            sin=sin,
            impl=impl,
        )
        return self.model(tokens, packing).reshape(*input_ids.shape, self.config.hidden_size)

    def forward(
        self,
        input_ids: Tensor,
        *,
        causal: bool | Tensor | None = None,
        prefix_len: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Logits (..., vocab_size) at every position; arguments as `hidden_states`. Training uses `loss_sums`."""
        hidden = self.hidden_states(
            input_ids, causal=causal, prefix_len=prefix_len, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, impl=impl
        )
        return self.lm_head(hidden)

    def loss_sums(
        self, batch: PackedBatch, *, z_loss: float = 0.0, label_smoothing: float = 0.0, impl: str = "auto"
    ) -> dict[Objective, Tensor]:
        """Sum of the loss over each objective's labelled tokens; only those rows go through the head.

        Returns:
            float32 scalars, differentiable, one per objective present in the batch.
        """
        hidden = self.hidden_states(
            batch.input_ids,
            prefix_len=batch.prefix_len,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            impl=impl,
        )
        return {
            objective: linear_cross_entropy(
                hidden.index_select(0, positions),
                self.head_weight,
                batch.targets[objective],
                reduction="sum",
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                impl=impl,
            )
            for objective, positions in batch.labelled.items()
        }


class _Body(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(_Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, tokens: Tensor, packing: _Packing) -> Tensor:
        x = self.embed_tokens(tokens)  # (total_tokens, hidden_size)
        for layer in self.layers:
            x = layer(x, packing)
        return self.norm(x)


class _Layer(nn.Module):
    def __init__(self, config: BabyLlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = _SwiGLU(config)

    def forward(self, x: Tensor, packing: _Packing) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), packing)
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

    def forward(self, x: Tensor, packing: _Packing) -> Tensor:
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))  # (total_tokens, heads, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        cu_seqlens, max_seqlen = packing.cu_seqlens, packing.max_seqlen
        out = attention_varlen(
            _rotate(q, packing),
            _rotate(k, packing),
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


def _positions(cu_seqlens: Tensor, total_tokens: int) -> Tensor:
    """Position of each packed token within its own sequence, int64 (total_tokens,)."""
    index = torch.arange(total_tokens, device=cu_seqlens.device)
    sequence = torch.searchsorted(cu_seqlens[1:], index, right=True).clamp_(max=max(cu_seqlens.numel() - 2, 0))
    return index - cu_seqlens[sequence]


def _rotary_tables(positions: Tensor, config: BabyLlamaConfig) -> tuple[Tensor, Tensor]:
    """cos and sin of position * theta^(-2i / head_dim), float32 (total_tokens, 1, head_dim)."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=positions.device) / config.head_dim
    angles = positions.float()[:, None] * (1.0 / config.rope_theta**exponent)
    angles = torch.cat((angles, angles), dim=-1)[:, None, :]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, packing: _Packing) -> Tensor:
    """Rotary embedding: the two halves of head_dim are the two coordinates that turn. Keeps x's dtype."""
    cos, sin = packing.cos.to(x.dtype), packing.sin.to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
