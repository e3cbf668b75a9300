"""What one batch asks of the model: inputs, labels and visibility. Time (the schedule) is elsewhere."""

from antlm_fast.objectives.masking import MaskingConfig
from antlm_fast.objectives.mixed import make_batch

__all__ = ["MaskingConfig", "make_batch"]
