"""Text from a model: continue a sequence (causal read-out), or fill its masked positions (bidirectional read-out)."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from antlm_fast.models.language_model import LanguageModel
from antlm_fast.types import InputError


@torch.no_grad()
def generate(
    model: LanguageModel,
    input_ids: Sequence[int] | Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos_id: int | None = None,
    banned_ids: Collection[int] = (),
    seed: int = 0,
) -> list[int]:
    """Continues a sequence, one token at a time.

    p = softmax(logits / temperature) over the ids that top_k and then top_p leave. Every step recomputes the whole
    sequence: no state is kept, so what was generated cannot differ from a forward over the result.

    Args:
        model: any model of this package.
        input_ids: the prompt, (seqlen,), at least one token.
        max_new_tokens: stop after this many.
        temperature: 0 takes the most probable token (the lowest id where two are equal); larger is more random.
        top_k: only the k most probable tokens; None keeps all.
        top_p: only the fewest tokens whose probabilities reach top_p together; None keeps all.
        eos_id: stop after this token; None never stops early.
        banned_ids: never generated (the mask token, template tokens).
        seed: of the random draws.

    Returns:
        The prompt and what follows it, eos_id included.

    Raises:
        InputError: an argument outside its range; prompt and new tokens do not fit max_position_embeddings.

    Determinism: the same arguments give the same tokens on the same device and library versions.
    """
    vocab_size: int = model.config.vocab_size
    ids = _checked_ids(input_ids, vocab_size)
    if max_new_tokens < 0:
        raise InputError(f"max_new_tokens must be at least 0; got {max_new_tokens}")
    longest: int = model.config.max_position_embeddings
    if len(ids) + max_new_tokens > longest:
        raise InputError(
            f"max_new_tokens must leave the prompt of {len(ids)} tokens within max_position_embeddings ({longest}); "
            f"got {max_new_tokens}"
        )
    if not 0.0 <= temperature < float("inf"):
        raise InputError(f"temperature must be finite and at least 0; got {temperature}")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k must be at least 1 or None; got {top_k}")
    if top_p is not None and not 0.0 < top_p <= 1.0:
        raise InputError(f"top_p must be above 0 and at most 1, or None; got {top_p}")
    if not 0 <= seed < 2**63:
        raise InputError(f"seed must be at least 0 and below 2^63; got {seed}")
    banned = _checked_bans(banned_ids, vocab_size)
    generator = torch.Generator().manual_seed(seed)  # on the CPU: the draws do not depend on the device
    with _evaluation_mode(model):
        for _ in range(max_new_tokens):
            tokens = torch.tensor([ids], dtype=torch.int64, device=model.head_weight.device)
            last = torch.tensor([len(ids) - 1], dtype=torch.int64, device=tokens.device)
            hidden = model.hidden_states(tokens, causal=True, rows=last)
            logits = _allowed_logits(model, model.head_features(hidden)[0], banned)
            ids.append(_next_token(logits, temperature, top_k, top_p, generator))
            if ids[-1] == eos_id:
                break
    return ids


@torch.no_grad()
def fill(
    model: LanguageModel,
    input_ids: Sequence[int] | Tensor,
    mask_id: int,
    *,
    top_k: int = 5,
    shift: int = 0,
    banned_ids: Collection[int] = (),
) -> dict[int, list[tuple[int, float]]]:
    """What may stand at each masked position, from one bidirectional forward (every mask is hidden at once).

    Args:
        model: any model of this package.
        input_ids: (seqlen,), with mask_id at least once.
        mask_id: the id to fill; it is never proposed.
        top_k: how many tokens to propose at each position.
        shift: 0 reads a masked position at itself; 1 at the position before it, as a model trained on MNTP predicts.
        banned_ids: never proposed.

    Returns:
        {position: [(id, probability), ...]}, most probable first; probabilities are over the ids that are not banned.

    Raises:
        InputError: an argument outside its range, no masked position, or (shift = 1) a mask at position 0.
    """
    vocab_size: int = model.config.vocab_size
    ids = _checked_ids(input_ids, vocab_size)
    longest: int = model.config.max_position_embeddings
    if len(ids) > longest:
        raise InputError(f"input_ids must be at most max_position_embeddings ({longest}) long; got {len(ids)} tokens")
    if shift not in (0, 1):
        raise InputError(f"shift must be 0 or 1; got {shift}")
    banned = _checked_bans({mask_id, *banned_ids}, vocab_size)
    if not 1 <= top_k <= vocab_size - len(banned):
        raise InputError(f"top_k must be between 1 and {vocab_size - len(banned)} (ids not banned); got {top_k}")
    masked = [position for position, token in enumerate(ids) if token == mask_id]
    if not masked:
        raise InputError(f"input_ids must hold mask_id ({mask_id}) at least once; got none")
    if masked[0] < shift:
        raise InputError("input_ids must have a token before the first mask (shift=1 reads there); got a mask at 0")
    with _evaluation_mode(model):
        tokens = torch.tensor([ids], dtype=torch.int64, device=model.head_weight.device)
        read_at = torch.tensor([position - shift for position in masked], dtype=torch.int64, device=tokens.device)
        features = model.head_features(model.hidden_states(tokens, causal=False, rows=read_at))
        probabilities, proposed = torch.softmax(_allowed_logits(model, features, banned), dim=-1).topk(top_k, dim=-1)
    return {
        position: list(zip(candidates, shares, strict=True))
        for position, candidates, shares in zip(masked, proposed.tolist(), probabilities.tolist(), strict=True)
    }


@contextmanager
def _evaluation_mode(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _checked_ids(input_ids: Sequence[int] | Tensor, vocab_size: int) -> list[int]:
    if isinstance(input_ids, Tensor):
        if input_ids.ndim != 1:
            raise InputError(f"input_ids must be one sequence (seqlen,); got shape {tuple(input_ids.shape)}")
        input_ids = input_ids.tolist()
    ids = [int(token) for token in input_ids]
    if not ids:
        raise InputError("input_ids must hold at least one token; got none")
    for token in ids:
        if not 0 <= token < vocab_size:
            raise InputError(f"input_ids must be between 0 and {vocab_size - 1}; got {token}")
    return ids


def _checked_bans(banned_ids: Collection[int], vocab_size: int) -> list[int]:
    banned = sorted(set(banned_ids))
    for token in banned:
        if not 0 <= token < vocab_size:
            raise InputError(f"banned_ids must be between 0 and {vocab_size - 1}; got {token}")
    if len(banned) == vocab_size:
        raise InputError(f"banned_ids must leave at least one id; got all {vocab_size}")
    return banned


def _allowed_logits(model: LanguageModel, features: Tensor, banned: list[int]) -> Tensor:
    """Logits of features (..., hidden_size) in float32 on the CPU, (..., vocab_size); minus infinity where banned."""
    logits = features @ model.head_weight.T
    if model.head_bias is not None:
        logits = logits + model.head_bias
    logits = logits.float().cpu()
    logits[..., banned] = float("-inf")
    return logits


def _next_token(
    logits: Tensor, temperature: float, top_k: int | None, top_p: float | None, generator: torch.Generator
) -> int:
    if temperature == 0.0:
        return int(logits.argmax())
    # the maximum is taken out first: a tiny temperature must not overflow to inf - inf
    probabilities = torch.softmax((logits - logits.max()) / temperature, dim=-1)
    probabilities, order = probabilities.sort(descending=True, stable=True)
    if top_k is not None:
        probabilities = probabilities[:top_k]
        probabilities = probabilities / probabilities.sum()
    if top_p is not None:
        # a token is kept if those before it do not reach top_p yet; the first always is
        reached_before = probabilities.cumsum(dim=-1) - probabilities
        kept = reached_before < top_p
        kept[0] = True
        probabilities = torch.where(kept, probabilities, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])
