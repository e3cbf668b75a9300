"""What stands between the matrix products of a transformer's layer, each in one pass over memory."""

from antlm_fast.kernels.fused_layers.api import (
    OPS,
    FusedLayerCall,
    add_dropout,
    add_norm,
    gated_unit,
    layer_norm,
    rotary,
    rotary_qkv,
)

__all__ = [
    "OPS",
    "FusedLayerCall",
    "add_dropout",
    "add_norm",
    "gated_unit",
    "layer_norm",
    "rotary",
    "rotary_qkv",
]
