"""Cross-entropy straight from hidden states: the head's projection and the loss, without (rows, vocab) logits."""

from antlm_fast.kernels.linear_cross_entropy.api import OPS, LinearCrossEntropyCall, linear_cross_entropy

__all__ = ["OPS", "LinearCrossEntropyCall", "linear_cross_entropy"]
