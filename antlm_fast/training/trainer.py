"""The training loop: it names no objective. The phase says what each batch is; the batch says what is visible."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from antlm_fast.data.rows import Rows
from antlm_fast.evaluation.held_out_text import fixed_batches
from antlm_fast.evaluation.perplexity import mean_losses
from antlm_fast.models import LanguageModel
from antlm_fast.objectives import make_batch
from antlm_fast.schedule import Schedule
from antlm_fast.training.batch_plan import BatchPlan, steps_per_epoch
from antlm_fast.training.checkpoint import TrainState, latest_checkpoint, load_checkpoint, save_checkpoint
from antlm_fast.training.config import TrainConfig
from antlm_fast.training.freed_memory import freed_memory_is_kept
from antlm_fast.training.kept_copies import copies_kept
from antlm_fast.training.lr_schedule import lr_at
from antlm_fast.training.metrics import MetricsLog
from antlm_fast.training.optimizer import begin_step, build_optimizer, clipped_step
from antlm_fast.training.progress import Progress
from antlm_fast.training.run_signals import RunSignals
from antlm_fast.training.weight_average import WeightAverage
from antlm_fast.types import InputError, Objective, PackedBatch, Vocabulary

RANK = 0  # one process trains; the masks' key has a place for more


class _StoppedError(Exception):
    """A signal came within a validation."""


class Trainer:
    """Trains a model through a schedule's phases, resumable at any moment with the same result.

    Determinism: batches, masks, rates and the seed of dropout are functions of (config, step); with the same
    hardware, torch and number of threads, a run that was killed and resumed has the same weights and metrics.jsonl,
    bit for bit, on a CPU. Training seeds torch's default generator.

    Args:
        config: with device and precision resolved (no "auto").
        model: on the config's device.
        vocabulary: of the tokenizer that made the rows.
        train_rows, validation_rows: the data, both in rows of data.row_tokens; the length ramp makes longer ones of
            the first alone.
        run_folder: holds metrics.jsonl, throughput.jsonl and checkpoints/.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: LanguageModel,
        vocabulary: Vocabulary,
        train_rows: Rows,
        validation_rows: Rows,
        run_folder: Path,
    ) -> None:
        self.config = config
        self.model = model
        self.vocabulary = vocabulary
        self.rows = {train_rows.row_tokens: train_rows}
        for row_tokens, _ in config.batch.stages:
            try:
                self.rows[row_tokens] = train_rows.with_row_tokens(row_tokens)
            except InputError as error:
                raise InputError(f"batch.length_ramp: {error}") from None
        self.run_folder = run_folder
        self.device = next(model.parameters()).device
        self.optimizer = build_optimizer(model, config.optimizer)
        decay = config.optimizer.ema_decay
        self.average = None if decay is None else WeightAverage(model, decay)
        self.timeline = Schedule.parse(config.schedule).timeline(
            steps_per_epoch(config.batch, train_rows.rows_per_epoch), epochs=config.epochs, steps=config.steps
        )
        self.plan = BatchPlan(
            config.batch,
            {row_tokens: rows.rows_per_epoch for row_tokens, rows in self.rows.items()},
            self.timeline.total_steps,
        )
        masked = {phase.masked_objective for phase in self.timeline.phases if phase.masked_share > 0}
        self.validation_batches = list(
            fixed_batches(
                validation_rows,
                num_rows=config.evaluation.validation_rows,
                rows_per_batch=config.batch.micro_rows,
                masked=masked | {Objective.MLM},
                masking=config.masking,
                vocabulary=vocabulary,
                seed=config.seed,
            )
        )
        self._loss_sums: dict[str, Tensor] = {}
        self._loss_counts: dict[str, int] = {}
        self._tokens = 0  # read since the run began

    def run(self, *, resume: bool, signals: RunSignals | None = None) -> None:
        """Train to the end of the schedule, or until a signal asks to stop; a checkpoint is saved then.

        Args:
            resume: go on from the newest checkpoint, or from the start if there is none.
            signals: what is looked at after each step; None obeys no signal.

        Raises:
            KeyboardInterrupt, SystemExit: a signal asked to stop.
            InputError: the checkpoint is damaged, the disk refuses a write, or the loss is no longer finite; in each
                case the earlier checkpoints are intact.
        """
        signals = signals or RunSignals()
        state = TrainState(step=0, tokens=0, metrics_bytes=0, loss_sums={}, loss_counts={})
        newest = latest_checkpoint(self.checkpoints) if resume else None
        if newest is not None:
            state = load_checkpoint(newest, self.model, self.optimizer, average=self._averages)
        self._loss_sums = {name: self._scalar(value) for name, value in state.loss_sums.items()}
        self._loss_counts = dict(state.loss_counts)
        self._tokens = state.tokens
        try:
            with signals.deferred():
                log = MetricsLog(
                    self.run_folder,
                    keep_bytes=state.metrics_bytes,
                    step=state.step,
                    tensorboard=self.config.logging.tensorboard,
                )
                progress = Progress(self.timeline.total_steps, state.step)
                on_cpu = self.device.type == "cpu"
                try:
                    memory_kept = freed_memory_is_kept() if on_cpu else contextlib.nullcontext()
                    with memory_kept, copies_kept(self.model, self.optimizer, self, signals, *self.rows.values()):
                        self._train(state, log, progress, signals)
                finally:
                    progress.close()
                    log.close()
        except OSError as error:
            safe = latest_checkpoint(self.checkpoints)
            kept = f"{safe} is intact: make room, then resume" if safe else "no checkpoint was written yet"
            raise InputError(f"the run could not be written to {self.run_folder}: {error}; {kept}") from error

    @property
    def checkpoints(self) -> Path:
        return self.run_folder / "checkpoints"

    @property
    def _averages(self) -> dict[str, Tensor] | None:
        return None if self.average is None else self.average.tensors

    def judged_weights(self) -> contextlib.AbstractContextManager[None]:
        """While this is open, the model holds what is validated and published: the average, where one is kept."""
        return contextlib.nullcontext() if self.average is None else self.average.in_model()

    def _train(self, state: TrainState, log: MetricsLog, progress: Progress, signals: RunSignals) -> None:
        """All steps that are left; a signal that asks to stop is obeyed after a step or within a validation."""
        total_steps = self.timeline.total_steps
        if log.num_bytes == 0:
            log.write(self._run_record())
            if not self._evaluate(0, log, progress, signals):
                return
        elif state.validation_due:
            if not self._evaluate(state.step, log, progress, signals):
                return
            self._save(state.step, log)
        window_begun, window_tokens = time.monotonic(), 0
        for step in range(state.step, total_steps):
            index = self.timeline.index_at(step)
            if step in (state.step, self.timeline.first_step(index)):
                progress.phase(index, len(self.timeline.phases), self.timeline.phases[index].name, step)
            grad_norm, tokens = self._step(step)
            window_tokens += tokens
            self._tokens += tokens
            progress.advance()

            done = step + 1
            phase_ends = done == self.timeline.ends[index]
            evaluates = phase_ends or done % (self.config.evaluation.every_steps or self.timeline.steps_per_epoch) == 0
            saves = done % self.config.checkpoint.every_steps == 0 if self.config.checkpoint.every_steps else evaluates
            saves = saves or done == total_steps or (phase_ends and self.config.checkpoint.keep_phase_ends)
            logs = phase_ends or done % self.config.logging.every_steps == 0
            if logs or saves:
                self._check_finite(done, grad_norm)
            if logs:
                losses = self._take_losses(step)
                log.write(self._train_record(step, losses, float(grad_norm)))
                seconds = time.monotonic() - window_begun
                log.write_throughput(done, window_tokens / seconds, seconds)
                progress.trained(done, losses, window_tokens / seconds)
                window_begun, window_tokens = time.monotonic(), 0
            before = time.monotonic()
            evaluated = not evaluates or self._evaluate(done, log, progress, signals)
            if saves or signals.save or signals.stop is not None:
                self._check_finite(done, grad_norm)
                saved = self._save(done, log, validation_due=not evaluated)
                if signals.save:
                    signals.save = False
                    progress.saved(saved)
                if signals.stop is not None:  # maybe since the checkpoint was begun: it holds this step all the same
                    return
            window_begun += time.monotonic() - before

    def _step(self, step: int) -> tuple[Tensor, int]:
        """One optimizer step; returns the gradient's norm before clipping and the number of tokens read.

        Nothing is read back from the device, so a GPU is never waited for here.
        """
        config = self.config
        index = self.timeline.index_at(step)
        if config.optimizer.reset_on_switch and step == self.timeline.first_step(index):
            self.optimizer.state.clear()
        lr = lr_at(step, config.optimizer.lr, config.lr_schedule, self.timeline)
        for group in self.optimizer.param_groups:
            group["lr"] = lr

        batches = list(self._train_batches(step))
        labelled = max(sum(sum(batch.num_labelled.values()) for batch in batches), 1)
        self.model.train()
        begin_step(self.model, self.optimizer, num_micro_batches=len(batches), precision=config.precision)
        for micro_batch, batch in enumerate(batches):
            torch.manual_seed(dropout_seed(config.seed, step, micro_batch, RANK))
            with torch.autocast(self.device.type, torch.bfloat16, enabled=config.precision == "bfloat16"):
                sums = self.model.loss_sums(
                    batch.to(self.device),
                    z_loss=config.loss.z_loss,
                    label_smoothing=config.loss.label_smoothing,
                    last_layer_rows=config.loss.last_layer_rows,
                )
                loss = torch.stack(list(sums.values())).sum() / labelled
            loss.backward()
            for objective, value in sums.items():
                self._loss_sums[objective] = self._loss_sums.get(objective, self._scalar(0.0)) + value.detach()
                self._loss_counts[objective] = self._loss_counts.get(objective, 0) + batch.num_labelled[objective]
        grad_norm = clipped_step(self.model, self.optimizer, config.optimizer.clip_norm)
        if self.average is not None:
            self.average.update()
        return grad_norm, sum(batch.num_tokens for batch in batches)

    def _check_finite(self, done: int, grad_norm: Tensor) -> None:
        """Before anything of these weights is logged or saved: a run that diverged never replaces a checkpoint."""
        if not math.isfinite(float(grad_norm)):
            raise InputError(
                f"training diverged by step {done}: the gradient's norm is {float(grad_norm)}; lower optimizer.lr "
                f"({self.config.optimizer.lr}) or lengthen the warm-up (lr_schedule), and begin in another --output"
            )

    def _train_batches(self, step: int) -> Iterator[PackedBatch]:
        """The micro-batches of a step: a pure function of (config, step)."""
        phase = self.timeline.at(step)
        for micro_batch, span in enumerate(self.plan.micro_batches(step)):
            yield make_batch(
                self.rows[span.row_tokens].read(span.epoch, span.start, span.stop),
                masked_share=phase.masked_share,
                masked_objective=phase.masked_objective,
                visibility=phase.visibility,
                masking=self.config.masking,
                vocabulary=self.vocabulary,
                rate=self.config.masking.rate_at(step, self.timeline.total_steps),
                key=(self.config.seed, step, micro_batch, RANK),
            )

    def _evaluate(self, done: int, log: MetricsLog, progress: Progress, signals: RunSignals) -> bool:
        """Validate; False, and nothing is logged, where a signal asks to stop meanwhile."""

        def batches() -> Iterator[PackedBatch]:
            for batch in self.validation_batches:
                if signals.stop is not None:
                    raise _StoppedError
                yield batch

        try:
            with self.judged_weights():
                losses = mean_losses(self.model, batches(), self.config.precision)
        except _StoppedError:
            return False
        named = {str(objective): loss for objective, loss in losses.items()}
        record = {
            "kind": "validation",
            "step": done,
            "phase": self.timeline.index_at(max(done - 1, 0)),
            "epoch": done / self.timeline.steps_per_epoch,
            "loss": named,
        }
        log.write(record)
        progress.validated(done, named)
        return True

    def _save(self, done: int, log: MetricsLog, *, validation_due: bool = False) -> Path:
        log.sync()
        state = TrainState(
            step=done,
            tokens=self._tokens,
            metrics_bytes=log.num_bytes,
            loss_sums={name: float(value) for name, value in self._loss_sums.items()},
            loss_counts=dict(self._loss_counts),
            validation_due=validation_due,
        )
        return save_checkpoint(
            self.checkpoints,
            state,
            self.model,
            self.optimizer,
            keep=self.config.checkpoint.keep,
            keep_steps=self.timeline.ends if self.config.checkpoint.keep_phase_ends else (),
            average=self._averages,
        )

    def _take_losses(self, step: int) -> dict[str, float]:
        """Mean loss per labelled token since the last training line, by objective; starts the next line."""
        losses = {str(name): float(self._loss_sums[name]) / count for name, count in self._loss_counts.items() if count}
        self._loss_sums, self._loss_counts = {}, {}
        return losses

    def _run_record(self) -> dict[str, object]:
        phases = [
            {
                "name": phase.name,
                "objective": phase.objective,
                "first_step": self.timeline.first_step(index),
                "end_step": self.timeline.ends[index],
            }
            for index, phase in enumerate(self.timeline.phases)
        ]
        return {
            "kind": "run",
            "total_steps": self.timeline.total_steps,
            "steps_per_epoch": self.timeline.steps_per_epoch,
            "phases": phases,
        }

    def _train_record(self, step: int, losses: dict[str, float], grad_norm: float) -> dict[str, object]:
        phase = self.timeline.at(step)
        masking = self.config.masking
        return {
            "kind": "train",
            "step": step + 1,
            "phase": self.timeline.index_at(step),
            "epoch": (step + 1) / self.timeline.steps_per_epoch,
            "objective": phase.objective,
            "loss": losses,
            "lr": lr_at(step, self.config.optimizer.lr, self.config.lr_schedule, self.timeline),
            "mask_rate": masking.rate_at(step, self.timeline.total_steps) if phase.masked_share > 0 else None,
            "grad_norm": grad_norm,
            "tokens": self._tokens,
        }

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor(value, dtype=torch.float64, device=self.device)


def dropout_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """What torch's default generator is seeded with before a micro-batch; below 2^63."""
    key = np.random.SeedSequence([seed, step, micro_batch, rank, 4])  # 4: apart from the masks' and the rows' streams
    return int(key.generate_state(1, np.uint64)[0] >> np.uint64(1))
