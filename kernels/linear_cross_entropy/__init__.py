"""Cross-entropy straight from hidden states: the head's projection and the loss, without (rows, vocab) logits."""

from antlm_fast.kernels.linear_cross_entropy.api import OPS, LinearCrossEntropyCall, linear_cross_entropy
from antlm_fast.kernels.linear_cross_entropy.contract import LossMetrics, LossSums
from antlm_fast.kernels.linear_cross_entropy.labelled import LabelledRows, compact_labelled

__all__ = [
    "OPS",
    "LabelledRows",
    "LinearCrossEntropyCall",
    "LossMetrics",
    "LossSums",
    "compact_labelled",
    "linear_cross_entropy",
]
