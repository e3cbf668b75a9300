"""The optimizer: AdamW or LAMB, with weight decay on matrices only."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from antlm_fast.kernels.dispatch import UnsupportedError
from antlm_fast.training.lamb import Lamb
from antlm_fast.training.native_optimizer import NativeAdamW, NativeLamb, unsupported_reason
from antlm_fast.types import InputError

KINDS = ("adamw", "lamb")
IMPLS = ("auto", "native", "torch")


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """What a step does with the gradient, and what surrounds it.

    Args:
        kind: "adamw" (arXiv 1711.05101), or "lamb" (arXiv 1904.00962), whose step of a matrix is as long as the
            matrix, whatever the gradient; its rates are some ten times AdamW's.
        lr: peak learning rate; its course is LrScheduleConfig's.
        beta1, beta2, eps: of either kind.
        weight_decay: on parameters with two axes or more, as Hugging Face's Trainer; never on biases and norms.
        decay_embeddings: whether tables that are looked up (nn.Embedding; a head tied to one is that table) are
            matrices in this sense. True is BabyLlama's and GPT-BERT's; LTG-BERT leaves them out. Under "lamb" what is
            not decayed also takes the trust ratio 1.
        clip_norm: the gradient's largest global 2-norm; None never clips.
        reset_on_switch: forget the moments when a phase begins; AntLM is silent, so the default keeps them.
        ema_decay: keep an average of the weights in float32, a <- ema_decay * a + (1 - ema_decay) * w after each
            step, beginning with the first weights. Validation, the finished model and its minimal pairs are then the
            average's; training goes on from the weights themselves. None keeps none.
    """

    kind: Literal["adamw", "lamb"] = "adamw"
    lr: float = 2.5e-4
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    decay_embeddings: bool = True
    clip_norm: float | None = 1.0
    reset_on_switch: bool = False
    ema_decay: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(f"optimizer.kind must be 'adamw' or 'lamb'; got {self.kind!r}")
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
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise InputError(f"optimizer.ema_decay must be at least 0 and below 1, or none; got {self.ema_decay}")


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, impl: str = "auto") -> torch.optim.Optimizer:
    """The optimizer over the model's parameters, in two groups: decayed, and not.

    Args:
        impl: "native" is the C++ kernels, for float32 parameters on the CPU; "torch" is AdamW in one fused pass over
            memory, and LAMB out of torch's operations; "auto" takes the first that serves.

    Raises:
        ValueError: impl is none of these.
        UnsupportedError: "native" was asked for and cannot serve.
    """
    tables = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, nn.Embedding) and not config.decay_embeddings
        for parameter in module.parameters()
    }
    groups: tuple[list[nn.Parameter], list[nn.Parameter]] = ([], [])
    for parameter in model.parameters():
        groups[parameter.ndim < 2 or id(parameter) in tables].append(parameter)
    decayed, others = groups
    native = _takes_native(impl, [*decayed, *others])
    betas = (config.beta1, config.beta2)
    if config.kind == "lamb":
        return (NativeLamb if native else Lamb)(
            [
                {"params": decayed, "weight_decay": config.weight_decay, "trust_ratio": True},
                {"params": others, "weight_decay": 0.0, "trust_ratio": False},
            ],
            lr=config.lr,
            betas=betas,
            eps=config.eps,
        )
    both = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if native:
        return NativeAdamW(both, lr=config.lr, betas=betas, eps=config.eps)
    # on a CPU the fused one takes every tensor for contiguous (torch 2.13)
    fused = True if all(parameter.is_contiguous() for parameter in (*decayed, *others)) else None
    return torch.optim.AdamW(both, lr=config.lr, betas=betas, eps=config.eps, fused=fused)


def begin_step(model: nn.Module, optimizer: torch.optim.Optimizer, *, num_micro_batches: int, precision: str) -> None:
    """Forget the gradients, and say in which dtype the next ones are kept.

    A linear layer's weight gradient is a bfloat16 product under autocast. Where nothing is added to it and the C++
    kernels take the step, it stays that, instead of being cast to float32: the same numbers in half of the memory.
    Several micro-batches are added in float32.

    Args:
        num_micro_batches: whose gradients are added in this step.
        precision: "float32" or "bfloat16".
    """
    optimizer.zero_grad(set_to_none=True)
    if not isinstance(optimizer, NativeAdamW | NativeLamb) or not hasattr(torch.Tensor, "grad_dtype"):
        return  # torch's own optimizers want the parameter's dtype, and before torch 2.10 there was no other
    stepped = (parameter for group in optimizer.param_groups for parameter in group["params"])
    narrow = num_micro_batches == 1 and precision == "bfloat16" and unsupported_reason(stepped) is None
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        if isinstance(module, nn.Linear) and id(module.weight) not in tables:
            module.weight.grad_dtype = torch.bfloat16 if narrow else module.weight.dtype


def clipped_step(model: nn.Module, optimizer: torch.optim.Optimizer, max_norm: float | None) -> Tensor:
    """One step of the optimizer, with the gradients scaled so that their 2-norm all together is at most `max_norm`.

    Args:
        max_norm: None scales nothing.

    Returns:
        The norm before that, float32 (); nothing is read back from a GPU.
    """
    largest = math.inf if max_norm is None else max_norm
    if isinstance(optimizer, NativeAdamW | NativeLamb):
        return optimizer.clipped_step(largest)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), largest)
    optimizer.step()
    return norm


def _takes_native(impl: str, parameters: list[nn.Parameter]) -> bool:
    if impl not in IMPLS:
        raise ValueError(f"impl must be one of {', '.join(map(repr, IMPLS))}; got {impl!r}")
    reason = unsupported_reason(parameters)
    if impl == "native" and reason is not None:
        raise UnsupportedError(f"build_optimizer(impl='native'): {reason}")
    return impl != "torch" and reason is None
