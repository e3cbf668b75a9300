"""Whole training steps: both objectives in one process, Hugging Face's Llama beside ours, and the cost of a switch.

A step is forward, backward, clipping and AdamW, as the trainer's; making the batch is left out for all alike. The
learning rate is 0: the arithmetic is the same, and the weights stay those that were checked.
"""

from __future__ import annotations

import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from harness import Call, Provider, Row, attempt, measure, row
from sizes import Sizes
from torch import Tensor, nn
from torch.nn import functional as F

from antlm_fast.models import BabyLlama, BabyLlamaConfig
from antlm_fast.objectives import MaskingConfig, make_batch
from antlm_fast.training.optimizer import OptimizerConfig, build_optimizer
from antlm_fast.types import Objective, PackedBatch, TokenRows, Vocabulary

# the largest relative error of all gradients together, in 2-norm; autocast alone costs 1 to 3 %
PRECISIONS = {"fp32": 1e-4, "bf16": 5e-2}
OBJECTIVES = (Objective.CLM, Objective.MLM)


class Runner:
    """A model with its optimizer, one step at a time, on either objective."""

    def __init__(self, model: nn.Module, loss_of: Callable[[nn.Module, PackedBatch], Callable[[], Tensor]]) -> None:
        self.model = model.train()
        self.loss_of = loss_of
        self.optimizer = build_optimizer(model, OptimizerConfig())
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0

    def step(self, batch: PackedBatch, precision: str) -> Call:
        loss_of_batch = self.loss_of(self.model, batch)

        def call() -> None:
            self.optimizer.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
                loss = loss_of_batch()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()

        return call

    def gradients(self, batch: PackedBatch, precision: str) -> dict[str, Tensor]:
        """Before clipping, float32; by name, which is the same in every model here."""
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = self.loss_of(self.model, batch)()
        loss.backward()
        found = {name: p.grad.float() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found


class Field:
    """The runners of a suite, all with the same weights, and the float64 gradients they are held to."""

    def __init__(self, config: BabyLlamaConfig) -> None:
        torch.manual_seed(0)
        self.model = BabyLlama(config)
        self.ours = functools.cache(lambda: Runner(self.model, _our_loss))
        self.hugging_face = functools.cache(self._hugging_face)
        self.exact = functools.cache(self._exact)

    def batch(self, objective: Objective, sequences: int, seqlen: int) -> PackedBatch:
        size = self.model.config.vocab_size
        vocabulary = Vocabulary(
            size=size, mask_id=size - 1, special_ids=(size - 1,), word_start=np.ones(size, dtype=np.bool_)
        )
        rows = TokenRows(
            ids=np.random.default_rng(0).integers(size - 1, size=sequences * seqlen),
            cu_seqlens=np.arange(sequences + 1, dtype=np.int32) * seqlen,
        )
        return make_batch(
            rows,
            masked_share=1.0 if objective is Objective.MLM else 0.0,
            masked_objective=Objective.MLM,
            visibility=None,
            masking=MaskingConfig(),
            vocabulary=vocabulary,
            rate=0.15,
            key=(0,),
        )

    def checked(
        self, runner: Callable[[], Runner], objective: Objective, precision: str, sequences: int, seqlen: int
    ) -> Call:
        """A step of the runner, once its gradients on the first sequences are those of the float64 reference."""
        small = self.batch(objective, 2, seqlen)
        found, exact = runner().gradients(small, precision), self.exact(objective, seqlen)
        if found.keys() != exact.keys():
            raise AssertionError(f"no gradient, or a stray one: {sorted(found.keys() ^ exact.keys())[0]}")
        wrong = sum(float((found[name] - exact[name]).norm() ** 2) for name in exact) ** 0.5
        error = wrong / sum(float(gradient.norm() ** 2) for gradient in exact.values()) ** 0.5
        if not error <= PRECISIONS[precision]:
            raise AssertionError(f"gradients are off by {error:.1e}; the bound is {PRECISIONS[precision]:.0e}")
        return runner().step(self.batch(objective, sequences, seqlen), precision)

    def _exact(self, objective: Objective, seqlen: int) -> dict[str, Tensor]:
        runner = Runner(copy.deepcopy(self.model).double(), functools.partial(_our_loss, impl="reference"))
        return runner.gradients(self.batch(objective, 2, seqlen), "fp64")

    def _hugging_face(self, attn_implementation: str) -> Runner:
        import transformers

        values = asdict(self.model.config) | {"num_key_value_heads": self.model.config.kv_heads}
        rope = {"rope_type": "default", "rope_theta": values.pop("rope_theta")}
        values |= {"rope_parameters": rope, "attn_implementation": attn_implementation, "use_cache": False}
        config = transformers.LlamaConfig(**values)
        model = transformers.LlamaForCausalLM(config)
        model.load_state_dict(self.model.state_dict())
        return Runner(model, _hugging_face_loss)


def _our_loss(model: Any, batch: PackedBatch, impl: str = "auto") -> Callable[[], Tensor]:
    labelled = sum(batch.num_labelled.values())
    return lambda: torch.stack(list(model.loss_sums(batch, impl=impl).values())).sum() / labelled


def _hugging_face_loss(model: nn.Module, batch: PackedBatch) -> Callable[[], Tensor]:
    """As LlamaForCausalLM computes it: logits of every position, in float32 for the loss."""
    ids = batch.input_ids.view(batch.prefix_len.numel(), -1)
    (objective,) = batch.labelled
    targets = torch.full_like(batch.input_ids, -100)
    targets[batch.labelled[objective]] = batch.targets[objective]
    causal = objective is Objective.CLM
    return lambda: F.cross_entropy(model(ids, is_causal=causal).logits.flatten(0, 1).float(), targets)


def train_step(sizes: Sizes) -> Iterator[list[Row]]:
    """Tokens per second of CLM and MLM steps on the same models."""
    field = Field(sizes.model)
    runners: dict[str, Callable[[], Runner]] = {
        "antlm_fast": field.ours,
        "Hugging Face sdpa": functools.partial(field.hugging_face, "sdpa"),
        "Hugging Face eager": functools.partial(field.hugging_face, "eager"),
    }
    for sequences, seqlen in sizes.batches:
        for precision in PRECISIONS:
            providers = [
                Provider(
                    case=objective,
                    name=name,
                    prepare=functools.partial(field.checked, runner, objective, precision, sequences, seqlen),
                    amount=sequences * seqlen,
                    unit="tokens/s",
                )
                for objective in OBJECTIVES
                for name, runner in runners.items()
            ]
            shape = f"{_parameters(field)}, {sequences} x {seqlen} tokens, {precision}"
            yield measure("train_step", shape, providers, rounds=sizes.step_rounds)


def switch(sizes: Sizes, clock: Callable[[], float] = time.perf_counter) -> Iterator[list[Row]]:
    """The first step after the objective changes, beside the later ones of the same objective."""
    field = Field(sizes.model)
    sequences, seqlen = sizes.batches[0]
    for precision in PRECISIONS:
        steps: dict[Objective, Call] = {}
        later: dict[Objective, list[float]] = {objective: [] for objective in OBJECTIVES}
        first: dict[Objective, list[float]] = {objective: [] for objective in OBJECTIVES}
        reason = None
        for objective in OBJECTIVES:
            prepare = functools.partial(field.checked, field.ours, objective, precision, sequences, seqlen)
            prepared = attempt(prepare, warmup=1)
            if isinstance(prepared, str):
                reason = prepared
            else:
                steps[objective] = prepared
        for phase in range(sizes.flips + 1 if reason is None else 0):
            objective = OBJECTIVES[phase % 2]
            for place in range(sizes.phase_steps):
                begun = clock()
                steps[objective]()
                seconds = clock() - begun
                if phase:  # nothing was flipped before phase 0: it is warm-up
                    (later if place else first)[objective].append(seconds)
        yield [
            row(
                "switch",
                f"{_parameters(field)}, {sequences} x {seqlen} tokens, {precision}, {sizes.flips} flips",
                Provider(case=objective, name=name, prepare=prepare, amount=sequences * seqlen, unit="tokens/s"),
                samples[objective],
                reason,
            )
            for objective in OBJECTIVES
            for name, samples in (("later steps", later), ("first step after a flip", first))
        ]


def _parameters(field: Field) -> str:
    return f"{sum(parameter.numel() for parameter in field.model.parameters()) / 1e6:.2f}M parameters"
