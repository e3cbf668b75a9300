"""Mean loss, perplexity and bits per byte on held-out batches."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from antlm_fast.evaluation.sentence_scores import evaluating
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy
from antlm_fast.models import LanguageModel
from antlm_fast.types import InputError, Objective, PackedBatch


@torch.no_grad()
def mean_losses(
    model: LanguageModel, batches: Iterable[PackedBatch], precision: str = "float32"
) -> dict[Objective, float]:
    """Mean negative log-likelihood per labelled token, for each objective that the batches label.

    Every labelled token counts the same, whichever batch it is in. Only labelled rows go through the head.

    Args:
        model: any model of this package.
        batches: packed batches; they are moved to the model's device.
        precision: "float32" (the parameters' own dtype) or "bfloat16" (torch.autocast).

    Returns:
        Nats per token, accumulated in float64, in the order of Objective; an objective without a label is left out.

    Raises:
        InputError: no batch has a labelled token, or an unknown precision.
    """
    device = model.head_weight.device
    # kept on the device, so a GPU is waited for once and not once a batch
    sums: dict[Objective, Tensor] = {}
    counts: dict[Objective, int] = {}
    with evaluating(model, device, precision):
        for host_batch in batches:
            batch = host_batch.to(device)
            for objective, rows in model.labelled_features(batch).items():
                if rows.shape[0] == 0:
                    continue
                nll: Tensor = linear_cross_entropy(
                    rows, model.head_weight, batch.targets[objective], bias=model.head_bias, reduction="none"
                )
                sums[objective] = sums.get(objective, torch.zeros((), device=device, dtype=torch.float64)) + nll.sum(
                    dtype=torch.float64
                )
                counts[objective] = counts.get(objective, 0) + rows.shape[0]
    if not counts:
        raise InputError("batches must label at least one token; got none")
    return {objective: float(sums[objective]) / counts[objective] for objective in Objective if objective in counts}


def perplexity(mean_loss: float) -> float:
    """exp(mean_loss) of a loss in nats per token; infinity where that does not fit a float."""
    try:
        return math.exp(mean_loss)
    except OverflowError:
        return math.inf


def bits_per_byte(mean_loss: float, *, num_tokens: int, num_bytes: int) -> float:
    """mean_loss * num_tokens / (num_bytes * ln 2): comparable between tokenizers.

    Args:
        mean_loss: nats per token.
        num_tokens: tokens the mean was taken over.
        num_bytes: UTF-8 bytes of the text that those tokens encode.
    """
    for name, value in (("num_tokens", num_tokens), ("num_bytes", num_bytes)):
        if value < 1:
            raise InputError(f"{name} must be at least 1; got {value}")
    return mean_loss * num_tokens / (num_bytes * math.log(2))
