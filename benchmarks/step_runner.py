"""One model and its optimizer, a training step at a time; made in a worker's process or in this one.

A step is forward, backward, clipping and AdamW: ours as the trainer's own functions do it, in memory that the process
keeps, as there; the peers' by torch's clip_grad_norm_ and fused AdamW. Making the batch is left out for all alike. The
learning rate is 0: the arithmetic is the same, and the weights stay those that were checked. Dropout is on, where the
model has any.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from fake_cuda import fake_cuda
from harness import Told, captured, synchronize
from peers import hugging_face
from peers.eager_ltg_bert import EagerLtgBert
from resident_memory import cannot_measure, peak_resident_mib
from torch import Tensor, nn

from antlm_fast.kernels.working_copies import KeptCopies
from antlm_fast.models import MODEL_CONFIGS, LanguageModel, build_model
from antlm_fast.objectives import MaskingConfig, make_batch
from antlm_fast.training.freed_memory import freed_memory_is_kept
from antlm_fast.training.optimizer import OptimizerConfig, begin_step, build_optimizer, clipped_step
from antlm_fast.types import Objective, PackedBatch, TokenRows, Vocabulary

# the largest relative error of all gradients together, in 2-norm; autocast alone costs 1 to 3 %
BOUNDS = {"fp32": 1e-4, "bf16": 5e-2, "fp64": 1e-6}
CHECKED_SEQUENCES = 2
_COMPILED_FACTOR = 2.0  # two bfloat16 computations, each off by its own roundings
_LOSS_BOUND = 0.05

Loss = Callable[[], Tensor]


class StepRunner:
    """A variant of the step.

    Args:
        config: of our model, as a dict with its architecture.
        source: "ours", "ltg" (the eager peer), or a family of peers.hugging_face.
        form: implementation of ours ("auto"), form of the eager peer, or transformers' attention.
        precision: "fp32", "bf16" (autocast) or "fp64".
        compiled: model and loss under torch.compile, static shapes, a bool for the flag.
        mode: of torch.compile; "reduce-overhead" replays CUDA graphs.
        dropout: False sets all of the model's dropout to 0.
        device: "cpu" or "cuda".
    """

    def __init__(
        self,
        config: dict[str, Any],
        source: str,
        form: str,
        precision: str,
        compiled: bool = False,
        mode: str | None = None,
        dropout: bool = True,
        device: str = "cpu",
    ) -> None:
        self._memory = contextlib.ExitStack()  # as long as this object
        if source == "ours" and device == "cpu":
            self._memory.enter_context(freed_memory_is_kept())
        torch.manual_seed(0)
        if not dropout:
            config = {name: 0.0 if name.endswith("_dropout") else value for name, value in config.items()}
        self.config = MODEL_CONFIGS[config["architecture"]](**config)
        self.source, self.form, self.precision, self.device = source, form, precision, device
        self.compiled, self.mode = compiled, mode
        self.model = self._build().to(device, torch.float64 if precision == "fp64" else torch.float32)
        self.drops = any(part.p > 0 for part in self.model.modules() if isinstance(part, nn.Dropout))
        self.model.train()
        self.optimizer = self._optimizer_of(self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._copies = KeptCopies()
        self.batches: dict[tuple[str, int, int], PackedBatch] = {}
        self._steps: dict[tuple[str, int, int], Callable[[], Tensor]] = {}

    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def first_step(self, objective: str, sequences: int, seqlen: int) -> float:
        """Seconds from this process's launch to the end of the step: imports, the model, compilation, all of it."""
        from workers import LAUNCHED, seconds_since_launch

        begun = time.perf_counter()
        self.step(objective, sequences, seqlen)
        return seconds_since_launch() if LAUNCHED in os.environ else time.perf_counter() - begun

    def step(self, objective: str, sequences: int, seqlen: int) -> float:
        """One step; seconds, without the making of the batch."""
        key = (objective, sequences, seqlen)
        if key not in self._steps:
            self._steps[key] = self._loss_of(*key)
        synchronize(self.device)
        begun = time.perf_counter()
        with self._copies.in_use():  # as a run of the trainer
            self._backward(self._steps[key])
            clipped_step(self.model, self.optimizer, OptimizerConfig().clip_norm)
        synchronize(self.device)
        return time.perf_counter() - begun

    def peak_mib(self, objective: str, sequences: int, seqlen: int) -> float:
        """Most memory during a step: of the whole process on a CPU, weights and libraries too; of torch on a GPU."""
        work = functools.partial(self.step, objective, sequences, seqlen)
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            work()
            return torch.cuda.max_memory_allocated() / 2**20
        if reason := cannot_measure():
            raise Told(reason)
        return peak_resident_mib(work)

    def flips(self, objective: str, before: str, sequences: int, seqlen: int, steps: int) -> dict[str, Any]:
        """After a step of another objective: seconds of `steps` steps of this one, and what was compiled for them."""
        self.step(before, sequences, seqlen)
        graphs = compiled_graphs()
        seconds = [self.step(objective, sequences, seqlen) for _ in range(steps)]
        return {"seconds": seconds, "recompiles": compiled_graphs() - graphs}

    def recaptures(self, objective: str, sequences: int, seqlen: int) -> float:
        """CUDA graphs that had to be captured anew for a flip: 0 where the old one's replay gives the new loss."""
        if self.device != "cuda":
            raise Told("CUDA graphs need a CUDA device")
        if self.source != "ours":
            return 1.0  # the flag is a Python bool: a graph has one of its values for good
        batch = self.batch(objective, sequences, seqlen)
        held = batch.prefix_len.clone()
        flag = torch.zeros_like(held)
        hidden: list[Tensor] = []

        def call() -> None:
            keywords = {"prefix_len": flag, "cu_seqlens": batch.cu_seqlens, "max_seqlen": batch.max_seqlen}
            hidden[:] = [self.model.hidden_states(batch.input_ids, **keywords)]

        self.model.eval()
        with torch.no_grad():
            replay = captured(call)
            flag.copy_(torch.where(held > 0, 0, seqlen))
            replay()
            found = hidden[0].clone()
            call()
        self.model.train()
        return 0.0 if torch.allclose(found, hidden[0], rtol=1e-3, atol=1e-3) else 1.0

    def check(self, objective: str, sequences: int, seqlen: int, exact: str | None) -> float:
        """That the step computes what it should; returns the relative error of its gradients.

        Args:
            exact: file of float64 gradients of our reference with these weights; None: those of the same model in
                float64, eager, and the flag must do what it says.

        Raises:
            AssertionError: it does not.
        """
        key = (objective, CHECKED_SEQUENCES, seqlen)
        wanted = torch.load(exact, weights_only=True) if exact is not None else self._own_exact(*key)
        if self.source in hugging_face.FAMILIES:
            with self._eager_mode():
                ids = self.batch(*key).input_ids.view(CHECKED_SEQUENCES, seqlen)
                hugging_face.assert_visibility(self.model, ids, causal=objective == "CLM")
        error = relative_error(self.gradients(*key), wanted)
        if not error <= BOUNDS[self.precision]:
            raise AssertionError(f"gradients are off by {error:.1e}; the bound is {BOUNDS[self.precision]:.0e}")
        if self.compiled:
            self._check_compiled(objective, sequences, seqlen)
        return error

    def gradients(self, objective: str, sequences: int, seqlen: int) -> dict[str, Tensor]:
        """Before clipping, float32 on the CPU, by name; not compiled, dropout off."""
        with self._eager_mode():
            self._backward(self._loss_of(objective, sequences, seqlen, compiled=False))
        found = {name: p.grad.float().cpu() for name, p in self.model.named_parameters() if p.grad is not None}
        self.optimizer.zero_grad(set_to_none=True)
        return found

    def batch(self, objective: str, sequences: int, seqlen: int) -> PackedBatch:
        key = (objective, sequences, seqlen)
        if key not in self.batches:
            self.batches[key] = drawn_batch(self.config.vocab_size, *key).to(self.device)
        return self.batches[key]

    def _build(self) -> nn.Module:
        """With our model's first weights where the peer is the same model: the seed gives them in every process."""
        if self.source == "ours":
            return build_model(self.config)
        if self.source in ("bert", "gpt2", "modernbert"):
            return hugging_face.build(self.source, self.config, self.form)
        ours = build_model(self.config)
        is_ltg = self.source == "ltg"
        peer = EagerLtgBert(self.config, self.form) if is_ltg else hugging_face.build("llama", self.config, self.form)
        peer.load_state_dict(ours.state_dict())
        return peer

    def _optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        return build_optimizer(model, OptimizerConfig(), impl="auto" if self.source == "ours" else "torch")

    def _backward(self, loss: Loss) -> Tensor:
        precision = "bfloat16" if self.precision == "bf16" else "float32"
        begin_step(self.model, self.optimizer, num_micro_batches=1, precision=precision)
        if self.mode is not None:
            torch.compiler.cudagraph_mark_step_begin()  # what the last step left in graphs' memory may go
        with torch.autocast(self.device, torch.bfloat16, enabled=self.precision == "bf16"):
            value = loss()
        value.backward()
        return value.detach()

    def _loss_of(self, objective: str, sequences: int, seqlen: int, *, compiled: bool | None = None) -> Loss:
        batch, causal = self.batch(objective, sequences, seqlen), objective == "CLM"
        ((positions, targets),) = ((batch.labelled[name], batch.targets[name]) for name in batch.labelled)
        compiled = self.compiled if compiled is None else compiled
        if isinstance(self.model, LanguageModel):
            return functools.partial(self._our_loss, batch, compiled, positions.numel())
        ids = batch.input_ids.view(sequences, seqlen)
        if isinstance(self.model, EagerLtgBert):
            eager = self._compiled_call if compiled else self.model
            rows = self.model.bucket_rows(seqlen, str(ids.device))
            return lambda: eager(ids, positions, targets, rows, causal=causal)
        dense = torch.full_like(batch.input_ids, -100)
        dense[positions] = targets
        stock = self._compiled_call if compiled else functools.partial(hugging_face.loss, self.model)
        return lambda: stock(ids, dense, causal=causal)

    def _our_loss(self, batch: PackedBatch, compiled: bool, labelled: int) -> Tensor:
        impl = self.form
        if compiled:
            # all rows in every layer: which rows are labelled would be another shape under each objective
            self.model.hidden_states = self._compiled_body
            sums = self.model.loss_sums(batch, impl=impl, last_layer_rows=False)
            del self.model.hidden_states
        else:
            sums = self.model.loss_sums(batch, impl=impl)
        return torch.stack(list(sums.values())).sum() / labelled

    @functools.cached_property
    def _compiled_body(self) -> Callable[..., Tensor]:
        return torch.compile(self.model.hidden_states, dynamic=False, mode=self.mode)

    @functools.cached_property
    def _compiled_call(self) -> Callable[..., Tensor]:
        if isinstance(self.model, EagerLtgBert):
            return torch.compile(self.model, dynamic=False, mode=self.mode)
        return torch.compile(functools.partial(hugging_face.loss, self.model), dynamic=False, mode=self.mode)

    def _own_exact(self, objective: str, sequences: int, seqlen: int) -> dict[str, Tensor]:
        twin = copy.copy(self)
        torch.manual_seed(0)
        twin.model = hugging_face.build(self.source, self.config, "eager").double().to(self.device)
        twin.model.load_state_dict(self.model.state_dict())
        twin.precision = "fp64"
        twin.optimizer = self._optimizer_of(twin.model)
        return twin.gradients(objective, sequences, seqlen)

    def _check_compiled(self, objective: str, sequences: int, seqlen: int) -> None:
        """The compiled step beside the same model's eager one, on the batch that is timed."""
        key = (objective, sequences, seqlen)
        loss = self._backward(self._loss_of(*key))
        if self.drops:  # other draws, other gradients: only the loss can be compared
            eager = self._backward(self._loss_of(*key, compiled=False))
            error, bound, what = float((loss - eager).abs() / eager), _LOSS_BOUND, "the loss is"
        else:
            found = {name: p.grad.float().cpu() for name, p in self.model.named_parameters() if p.grad is not None}
            error, what = relative_error(found, self.gradients(*key)), "gradients are"
            bound = _COMPILED_FACTOR * BOUNDS[self.precision]
        if not error <= bound:
            raise AssertionError(f"compiled, {what} off by {error:.1e}; the bound is {bound:.0e}")

    @contextlib.contextmanager
    def _eager_mode(self) -> Iterator[None]:
        """Dropout off."""
        self.model.eval()
        try:
            yield
        finally:
            self.model.train()


def relative_error(found: dict[str, Tensor], exact: dict[str, Tensor]) -> float:
    """2-norm of the difference of all gradients together, over that of the exact ones."""
    if found.keys() != exact.keys():
        raise AssertionError(f"no gradient, or a stray one: {sorted(found.keys() ^ exact.keys())[0]}")
    wrong = sum(float((found[name] - exact[name]).double().norm() ** 2) for name in exact)
    return float((wrong / sum(float(gradient.double().norm() ** 2) for gradient in exact.values())) ** 0.5)


def fake_loss(config: dict[str, Any], source: str, form: str, objective: str, sequences: int, seqlen: int) -> str:
    """Shape and device of the loss on a GPU that is not there; see fake_cuda.py."""
    runner = object.__new__(StepRunner)
    runner.config = MODEL_CONFIGS[config["architecture"]](**config)
    runner.source, runner.form, runner.precision, runner.compiled = source, form, "bf16", False
    real = drawn_batch(runner.config.vocab_size, objective, sequences, seqlen)
    with torch.device("meta"):  # nothing is drawn: only shapes matter
        model = runner._build().requires_grad_(False).eval()
    with fake_cuda():
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        runner.model = model._apply(lambda x: torch.empty(x.shape, dtype=x.dtype, device="cuda"))
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        fake = {
            name: {key: torch.empty(x.shape, dtype=x.dtype, device="cuda") for key, x in held.items()}
            for name, held in (("labelled", real.labelled), ("targets", real.targets))
        }
        whole = {
            name: torch.empty(getattr(real, name).shape, dtype=getattr(real, name).dtype, device="cuda")
            for name in ("input_ids", "cu_seqlens", "prefix_len")
        }
        runner.batches = {(objective, sequences, seqlen): replace(real, **whole, **fake)}
        loss = runner._loss_of(objective, sequences, seqlen)()
        return f"loss {tuple(loss.shape)} {str(loss.dtype).removeprefix('torch.')} on {loss.device.type}"


def save_exact(config: dict[str, Any], objective: str, seqlen: int, path: Path) -> None:
    """The float64 gradients of our reference, by which every variant with our weights is judged.

    The reference gathers tables for every pair of tokens, 20 GiB for 512 of them: beyond 128 the plain-torch
    implementation stands for it, which the tests hold to it within 1e-12 in float64.
    """
    runner = StepRunner(config, "ours", "reference" if seqlen <= 128 else "torch", "fp64")
    torch.save(runner.gradients(objective, CHECKED_SEQUENCES, seqlen), path)


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def drawn_batch(vocab_size: int, objective: str, sequences: int, seqlen: int) -> PackedBatch:
    """Random tokens, the same for everyone; MLM labels 15 % of them. The last id is the mask token."""
    vocabulary = Vocabulary(
        size=vocab_size, mask_id=vocab_size - 1, special_ids=(vocab_size - 1,), word_start=np.ones(vocab_size, np.bool_)
    )
    rows = TokenRows(
        ids=np.random.default_rng(0).integers(vocab_size - 1, size=sequences * seqlen),
        cu_seqlens=np.arange(sequences + 1, dtype=np.int32) * seqlen,
    )
    return make_batch(
        rows,
        masked_share=1.0 if objective == "MLM" else 0.0,
        masked_objective=Objective.MLM,
        visibility=None,
        masking=MaskingConfig(),
        vocabulary=vocabulary,
        rate=0.15,
        key=(0,),
    )
