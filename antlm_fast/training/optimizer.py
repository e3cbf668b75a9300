"""The optimizer: AdamW with weight decay on matrices only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from antlm_fast.types import InputError


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """AdamW (arXiv 1711.05101) and what surrounds a step.

    Args:
        lr: peak learning rate; its course is LrScheduleConfig's.
        beta1, beta2, eps: of AdamW.
        weight_decay: on parameters with two axes or more (embeddings included, norms not), as Hugging Face's Trainer.
        clip_norm: the gradient's largest global 2-norm; None never clips.
        reset_on_switch: forget the moments when a phase begins; AntLM is silent, so the default keeps them.
    """

    lr: float = 2.5e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float | None = 1.0
    reset_on_switch: bool = False

    def __post_init__(self) -> None:
        for name in ("lr", "eps"):
            if getattr(self, name) <= 0:
                raise InputError(f"optimizer.{name} must be above 0; got {getattr(self, name)}")
        for name in ("beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise InputError(f"optimizer.{name} must be at least 0 and below 1; got {getattr(self, name)}")
        if self.weight_decay < 0:
            raise InputError(f"optimizer.weight_decay must be at least 0; got {self.weight_decay}")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise InputError(f"optimizer.clip_norm must be above 0, or none; got {self.clip_norm}")


def build_optimizer(model: nn.Module, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW over the model's parameters; one fused pass over memory on CPU and CUDA."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )
