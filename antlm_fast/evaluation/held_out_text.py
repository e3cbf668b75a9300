"""Held-out text under each objective: the same rows with the same masks every time, and their losses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from antlm_fast.data.corpus import DataConfig
from antlm_fast.data.prepare import prepare
from antlm_fast.data.rows import Rows
from antlm_fast.data.tokenizer import Tokenizer
from antlm_fast.evaluation.perplexity import mean_losses, perplexity
from antlm_fast.models import LanguageModel
from antlm_fast.objectives import MaskingConfig, make_batch
from antlm_fast.types import Objective, PackedBatch, Vocabulary

FIXED = 2**31  # stands in the masks' key where training has its step: no training batch shares these masks


def fixed_batches(
    rows: Rows,
    *,
    num_rows: int,
    rows_per_batch: int,
    masked: Iterable[Objective],
    masking: MaskingConfig,
    vocabulary: Vocabulary,
    seed: int,
) -> Iterator[PackedBatch]:
    """The first rows of epoch 0, once under CLM and once under each masked objective, each with its own mask.

    Args:
        num_rows: how many; fewer if there are fewer.
        masked: MLM, MNTP or both; masking.rate is used throughout, so that losses can be compared over a run.
    """
    end = min(num_rows, rows.rows_per_epoch)
    for number, start in enumerate(range(0, end, rows_per_batch)):
        chunk = rows.read(0, start, min(start + rows_per_batch, end))
        for share, objective in ((0.0, Objective.MLM), *((1.0, objective) for objective in sorted(masked))):
            yield make_batch(
                chunk,
                masked_share=share,
                masked_objective=objective,
                visibility=None,
                masking=masking,
                vocabulary=vocabulary,
                rate=masking.rate,
                key=(seed, FIXED, number),
            )


def score_text(
    model: LanguageModel,
    tokenizer: Tokenizer,
    source: str,
    precision: str,
    *,
    text_field: str = "text",
    masked: Iterable[Objective] = (Objective.MLM,),
) -> dict[str, Any]:
    """Losses and perplexities of all the text of a source, documents packed and kept apart.

    Args:
        source: as DataConfig.train.
        precision: "float32" or "bfloat16".
        text_field: as DataConfig's.
        masked: MLM, MNTP or both, beside CLM.

    Returns:
        {"source", "num_tokens", "objectives": {"CLM": {"loss", "perplexity"}, "MLM": ...}}; MLM hides 15 % of the
        tokens, each on its own, with masks that are the same at every call.
    """
    row_tokens = min(model.config.max_position_embeddings, 512)
    config = DataConfig(
        train=source, validation_share=0.0, text_field=text_field, row_mode="packed", row_tokens=row_tokens
    )
    store = prepare(config, tokenizer, "train")
    rows = Rows(store, mode="packed", row_tokens=row_tokens, seed=0, shuffle=False)
    batches = fixed_batches(
        rows,
        num_rows=rows.rows_per_epoch,
        rows_per_batch=max(4096 // row_tokens, 1),
        masked=masked,
        masking=MaskingConfig(),
        vocabulary=tokenizer.vocabulary,
        seed=0,
    )
    losses = mean_losses(model, batches, precision)
    scores = {str(objective): {"loss": loss, "perplexity": perplexity(loss)} for objective, loss in losses.items()}
    return {"source": source, "num_tokens": store.num_tokens, "objectives": scores}
