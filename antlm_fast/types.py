"""The values that pass between the layers: objectives, vocabularies, token rows, packed batches.

This file imports nothing of the package, so every layer may import it.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray


class InputError(ValueError):
    """What the user gave (a file, a setting, a checkpoint) cannot be used; the message says which and why."""


class Objective(StrEnum):
    """What a sequence is trained to predict (spec: AntLM, arXiv 2412.03275; MNTP from arXiv 2410.24159).

    CLM   the next token, under a causal mask.
    MLM   the original token at a selected position, under a full mask.
    MNTP  as MLM, but token k is predicted from position k - 1.
    """

    CLM = "CLM"
    MLM = "MLM"
    MNTP = "MNTP"


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """What an objective must know of a tokenizer.

    Args:
        size: number of token ids; ids are 0 .. size - 1.
        mask_id: the id that hides a token.
        special_ids: ids that are never selected for masking and never drawn as random tokens (mask_id included).
        word_start: bool (size,); True where the token begins a word (whole-word masking).
    """

    size: int
    mask_id: int
    special_ids: tuple[int, ...]
    word_start: NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class TokenRows:
    """Raw token rows as the data layer hands them out: packed, no padding, no objective yet.

    Args:
        ids: int64 (total_tokens,).
        cu_seqlens: int32 (num_seqs + 1,); sequence s is ids[cu_seqlens[s]:cu_seqlens[s + 1]]; sequences never see
            each other. Row modes decide what a sequence is: a row of the stream, or one document.
    """

    ids: NDArray[np.int64]
    cu_seqlens: NDArray[np.int32]


@dataclass(frozen=True, kw_only=True)
class PackedBatch:
    """One micro-batch, ready for a model: packed sequences, their visibility, and the labelled positions alone.

    Args:
        input_ids: int64 (total_tokens,).
        cu_seqlens: int32 (num_seqs + 1,).
        max_seqlen: the longest sequence, in tokens.
        prefix_len: int32 (num_seqs,); 0 is causal, at least the sequence's length is bidirectional.
        labelled: for each objective present, int64 (n,) ascending positions whose hidden state is read by the head.
        targets: for each objective present, int64 (n,) the token each labelled position must predict.
    """

    input_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    max_seqlen: int
    prefix_len: torch.Tensor
    labelled: dict[Objective, torch.Tensor]
    targets: dict[Objective, torch.Tensor]

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()

    @property
    def num_labelled(self) -> dict[Objective, int]:
        return {objective: positions.numel() for objective, positions in self.labelled.items()}

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same batch on a device; the copies are asynchronous where memory is pinned."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=True)

        return PackedBatch(
            input_ids=move(self.input_ids),
            cu_seqlens=move(self.cu_seqlens),
            max_seqlen=self.max_seqlen,
            prefix_len=move(self.prefix_len),
            labelled={objective: move(positions) for objective, positions in self.labelled.items()},
            targets={objective: move(tokens) for objective, tokens in self.targets.items()},
        )
