"""What every model shares: the checks of a call, the packing of its tokens, the head and the loss."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.types import Objective, PackedBatch


class ModelSizes(Protocol):
    """What the rest of the package reads of any model's config."""

    @property
    def architecture(self) -> str: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...


def check_architecture(config: Any) -> None:
    """Refuses a config whose architecture is not its class's own.

    Raises:
        ValueError: it is another.
    """
    own: str = type(config).architecture  # the field's default
    if config.architecture != own:
        raise ValueError(f"architecture must be {own!r} in {type(config).__name__}; got {config.architecture!r}")


@dataclass(frozen=True, kw_only=True)
class Packing:
    """What every layer needs to know of the packed tokens; made once per forward.

    Args:
        cu_seqlens: int32 (num_seqs + 1,).
        max_seqlen: the longest sequence, in tokens.
        causal, prefix_len: who sees whom, as in `LanguageModel.hidden_states`; exactly one is given.
        impl: which implementation of attention, and of the layers around it.
    """

    cu_seqlens: Tensor
    max_seqlen: int
    causal: bool | Tensor | None
    prefix_len: Tensor | None
    impl: str

    @property
    def layer_impl(self) -> str:
        """Which implementation of what stands around attention."""
        return layer_impl(self.impl)

    def positions(self, index: Tensor) -> Tensor:
        """Position within its own sequence of each packed index, int64 (n,)."""
        sequence = torch.searchsorted(self.cu_seqlens[1:], index, right=True)
        return index - self.cu_seqlens[sequence.clamp_(max=max(self.cu_seqlens.numel() - 2, 0))]


def layer_impl(impl: str) -> str:
    """The fused layers that go with an implementation of attention: Triton has none, and the best is taken there."""
    return "auto" if impl == "triton" else impl


class LanguageModel(nn.Module, ABC):
    """A transformer whose every forward says what each sequence may see.

    A model gives `encode`, `head_weight` and, where its head has them, `head_bias` and `head_features`:
    logits = head_features(hidden) @ head_weight^T + head_bias.
    """

    config: ModelSizes

    @abstractmethod
    def encode(self, tokens: Tensor, packing: Packing, rows: Tensor | None) -> Tensor:
        """Hidden states (total_tokens, hidden_size) of tokens (total_tokens,), or of `rows` alone, (n, hidden_size)."""

    @property
    @abstractmethod
    def head_weight(self) -> Tensor:
        """The output projection, (vocab_size, hidden_size)."""

    @property
    def head_bias(self) -> Tensor | None:
        """The output projection's bias, (vocab_size,), or None."""
        return None

    def head_features(self, hidden: Tensor, impl: str = "auto") -> Tensor:
        """What the output projection is applied to, (n, hidden_size): the head's own layers, if it has any."""
        return hidden

    def hidden_states(
        self,
        input_ids: Tensor,
        *,
        causal: bool | Tensor | None = None,
        prefix_len: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        rows: Tensor | None = None,
        impl: str = "auto",
    ) -> Tensor:
        """Final hidden states, as the head reads them.

        Args:
            input_ids: int64 (batch, seqlen), or packed (total_tokens,) together with cu_seqlens.
            causal: bool, or bool tensor () or (num_seqs,): each sequence sees its past, or all of itself.
            prefix_len: int32 (num_seqs,), instead of causal: the first prefix_len tokens are seen by all.
            cu_seqlens: int32 (num_seqs + 1,), for packed input only.
            max_seqlen: the longest sequence in tokens; None reads it from cu_seqlens (on a GPU this waits for it).
            rows: int64 (n,) ascending packed positions (in a batch, sequence * seqlen + position): these alone are
                returned, and a model may leave out what no other needs of the last layer. None is every position.
            impl: which implementation of attention, and of the layers around it; see `antlm-fast doctor`.

        Returns:
            The shape of input_ids with hidden_size behind it; with rows, (n, hidden_size). Under autocast they may be
            in its dtype.

        Raises:
            TypeError: rows is not int64.
            ValueError: neither or both of causal and prefix_len; a shape that does not fit; a sequence longer than
                max_position_embeddings; rows out of order or out of range (read on the CPU alone; elsewhere that would
                stall the device).

        Gradients and determinism:
            With rows, every gradient is the one without. Dropout draws from torch's default generator.
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
        if rows is not None:
            _check_rows(rows, tokens)
        packing = Packing(cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, causal=causal, prefix_len=prefix_len, impl=impl)
        hidden = self.encode(tokens, packing, rows)
        return hidden if rows is not None else hidden.reshape(*input_ids.shape, self.config.hidden_size)

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
        features = self.head_features(hidden.flatten(0, -2), impl)
        logits = F.linear(features, self.head_weight, self.head_bias)
        return logits.unflatten(0, hidden.shape[:-1])

    def labelled_features(
        self, batch: PackedBatch, *, last_layer_rows: bool = True, impl: str = "auto"
    ) -> dict[Objective, Tensor]:
        """`head_features` of each objective's labelled rows, (n, hidden_size), out of one forward for all of them.

        Args:
            batch: a position is labelled under one objective at most.
            last_layer_rows: where at most half of the tokens are labelled, the last layer computes labelled rows
                alone. The numbers are the same but for rounding and the draws of dropout. False computes every row.
        """
        if not batch.labelled:
            return {}
        rows, places = _merged(list(batch.labelled.values()))
        few = last_layer_rows and 2 * rows.numel() <= batch.num_tokens
        hidden = self.hidden_states(
            batch.input_ids,
            prefix_len=batch.prefix_len,
            cu_seqlens=batch.cu_seqlens,
            max_seqlen=batch.max_seqlen,
            rows=rows if few else None,
            impl=impl,
        )
        features = self.head_features(hidden if few else hidden.index_select(0, rows), impl)
        if len(places) == 1:
            return dict.fromkeys(batch.labelled, features)
        return {
            objective: features.index_select(0, place) for objective, place in zip(batch.labelled, places, strict=True)
        }

    def loss_sums(
        self,
        batch: PackedBatch,
        *,
        z_loss: float = 0.0,
        label_smoothing: float = 0.0,
        last_layer_rows: bool = True,
        impl: str = "auto",
    ) -> dict[Objective, Tensor]:
        """Sum of the loss over each objective's labelled tokens; only those rows go through the head.

        Args:
            last_layer_rows: as in `labelled_features`.

        Returns:
            float32 (float64 for a float64 model) scalars, differentiable, one per objective present in the batch.
        """
        features = self.labelled_features(batch, last_layer_rows=last_layer_rows, impl=impl)
        return {
            objective: linear_cross_entropy(
                rows,
                self.head_weight,
                batch.targets[objective],
                bias=self.head_bias,
                reduction="sum",
                z_loss=z_loss,
                label_smoothing=label_smoothing,
                impl=impl,
            )
            for objective, rows in features.items()
        }


def _merged(positions: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """(all positions in ascending order, for each given tensor where its own are among them)."""
    if len(positions) == 1:
        return positions[0], positions
    rows, order = torch.cat(positions).sort(stable=True)
    # the inverse of the permutation says where each position went
    return rows, list(order.argsort().split([each.numel() for each in positions]))


def _check_rows(rows: Tensor, tokens: Tensor) -> None:
    if rows.dtype != torch.int64:
        raise TypeError(f"rows must be int64; got {rows.dtype}")
    if rows.ndim != 1:
        raise ValueError(f"rows must have shape (n,); got {tuple(rows.shape)}")
    if rows.device != tokens.device:
        raise ValueError(f"rows must be on input_ids' device {tokens.device}; got {rows.device}")
    # on a GPU their values would stall it; torch.compile cannot trace a choice by them
    if rows.device.type != "cpu" or torch.compiler.is_compiling() or not rows.numel():
        return
    if bool((rows.diff() <= 0).any()):
        raise ValueError(f"rows must be ascending; got a step of {int(rows.diff().min())}")
    for row in (int(rows[0]), int(rows[-1])):
        if not 0 <= row < tokens.numel():
            raise ValueError(f"rows must be in [0, {tokens.numel()}); got {row}")
