"""Linear cross-entropy as it is defined, with every logit in memory. The specification, not the way to run."""

from __future__ import annotations

import torch

from antlm_fast.kernels.linear_cross_entropy.contract import LossOptions, RowResults


def forward(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    counts: torch.Tensor | None,
    options: LossOptions,
) -> RowResults:
    """Arguments as in torch_impl."""
    compute_dtype = options.compute_dtype
    biases = None if bias is None else bias.to(compute_dtype)
    projected = torch.nn.functional.linear(hidden.to(compute_dtype), weight.to(compute_dtype), biases)
    logits = projected.to(options.dtype)
    if options.softcap is not None:
        logits = options.softcap * torch.tanh(logits / options.softcap)
    lse = torch.logsumexp(logits, -1)
    inside = targets if counts is None else targets.where(counts, 0)
    target_logits = logits.gather(1, inside[:, None]).squeeze(1)
    losses = (1.0 - options.label_smoothing) * (lse - target_logits)
    if options.label_smoothing:  # a class whose logit is -inf costs infinitely much here, and nothing elsewhere
        losses = losses + options.label_smoothing * (lse - logits.mean(-1))
    losses = losses + options.z_loss * lse.square()
    correct = target_logits >= logits.amax(-1)
    if counts is not None:
        losses, lse, correct = losses.where(counts, 0.0), lse.where(counts, 0.0), correct & counts
    loss = losses.sum() if options.reduce else losses
    return RowResults(loss, losses.detach(), lse.detach(), correct if options.wants_correct else None)
