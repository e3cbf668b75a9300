"""Linear cross-entropy as it is defined, with every logit in memory. The specification, not the way to run."""

from __future__ import annotations

import torch


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    *,
    compute_dtype: torch.dtype,
    reduce: bool,
    z_loss: float,
    label_smoothing: float,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss of each row (n,), or with `reduce` their sum (), and the lse (n,). Arguments as in torch_impl."""
    biases = None if bias is None else bias.to(compute_dtype)
    projected = torch.nn.functional.linear(hidden.to(compute_dtype), weight.to(compute_dtype), biases)
    logits = projected.to(torch.promote_types(compute_dtype, torch.float32))
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    lse = torch.logsumexp(logits, -1)
    inside = targets if counts is None else targets.where(counts, 0)
    nll = lse - logits.gather(1, inside[:, None]).squeeze(1)
    uniform = lse - logits.mean(-1)
    loss = (1.0 - label_smoothing) * nll + label_smoothing * uniform + z_loss * lse.square()
    if counts is not None:
        loss, lse = loss.where(counts, 0.0), lse.where(counts, 0.0)
    return (loss.sum() if reduce else loss), lse.detach()
