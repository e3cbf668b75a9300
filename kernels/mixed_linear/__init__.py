"""A linear layer whose products are taken in a narrower dtype than its weights are kept in."""

from antlm_fast.kernels.mixed_linear.api import OPS, MixedLinearCall, mixed_linear

__all__ = ["OPS", "MixedLinearCall", "mixed_linear"]
