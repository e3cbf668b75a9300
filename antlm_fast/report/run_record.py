"""Reads a run folder: what was configured, what was measured, what came out. A run may be unfinished."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from math import prod
from pathlib import Path
from statistics import median
from typing import Any

from antlm_fast.types import InputError, Objective
from antlm_fast.user_text import read_text


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """One phase of the schedule; it covers the steps first_step + 1 .. end_step."""

    name: str
    objective: str
    first_step: int
    end_step: int


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """Everything a report says of a run.

    Args:
        name: of the run.
        total_steps: what the schedule asks for.
        phases: in order.
        train, validation: the lines of metrics.jsonl of that kind, one per step, ascending.
        tokens_per_second: each measurement of throughput.jsonl.
        pairs: minimal_pairs.json, None where it is missing.
        config, versions, data: of config.json, empty where missing.
        model_config: model/config.json, empty where missing.
        num_parameters: read from the header of model/model.safetensors, None where it is missing.
    """

    name: str
    total_steps: int
    steps_per_epoch: int
    phases: tuple[PhaseRecord, ...]
    train: tuple[dict[str, Any], ...]
    validation: tuple[dict[str, Any], ...]
    tokens_per_second: tuple[float, ...]
    pairs: dict[str, Any] | None
    config: dict[str, Any]
    versions: dict[str, Any]
    data: dict[str, Any]
    model_config: dict[str, Any]
    num_parameters: int | None

    @property
    def schedule(self) -> str:
        return str(self.config.get("schedule") or "+".join(phase.name for phase in self.phases))

    @property
    def steps_done(self) -> int:
        return max((int(line["step"]) for line in (*self.train, *self.validation)), default=0)

    @property
    def tokens_seen(self) -> int | None:
        return int(self.train[-1]["tokens"]) if self.train and "tokens" in self.train[-1] else None

    @property
    def median_throughput(self) -> float | None:
        return median(self.tokens_per_second) if self.tokens_per_second else None

    @property
    def validated(self) -> tuple[str, ...]:
        """Objectives with a validation loss, CLM first."""
        found = {name for line in self.validation for name in line["loss"]}
        known = [str(objective) for objective in Objective if str(objective) in found]
        return (*known, *sorted(found - set(known)))

    @property
    def final_losses(self) -> dict[str, float]:
        """Each objective's last validation loss."""
        return {name: loss for line in self.validation for name, loss in line["loss"].items()}

    @property
    def best_read_out(self) -> tuple[str, str, float] | None:
        """(read-out, "sum" or "mean", accuracy) of the best overall accuracy; the first where they are equal."""
        overall = [
            (table["overall"], name, aggregate)
            for name, tables in ((self.pairs or {}).get("read_outs") or {}).items()
            for aggregate, table in tables.items()
        ]
        if not overall:
            return None
        accuracy, name, aggregate = max(overall, key=lambda entry: entry[0])
        return name, aggregate, accuracy

    def losses_at_ends(self, phase: PhaseRecord, objective: str) -> tuple[float | None, float | None]:
        """The last validation losses measured up to the phase's start, and within it; None before it is reached."""
        start = end = None
        if phase.first_step > self.steps_done:
            return None, None
        for line in self.validation:
            if objective in line["loss"]:
                if line["step"] <= phase.first_step:
                    start = line["loss"][objective]
                elif line["step"] <= phase.end_step:
                    end = line["loss"][objective]
        return start, end


def read_run(run_folder: Path) -> RunRecord:
    """The record of a run folder.

    metrics.jsonl must be there; every other file may be missing. A last line that was cut off (the run was stopped
    while writing it) is left out; where a step was measured twice (the run was resumed), the later line counts.

    Raises:
        InputError: no such folder, no metrics.jsonl, or a file whose content is not what it must be.
    """
    if not run_folder.is_dir():
        raise InputError(f"run folder must exist; got {run_folder}")
    metrics = run_folder / "metrics.jsonl"
    if not metrics.is_file():
        raise InputError(f"{run_folder}: no metrics.jsonl: this is no run folder, or the run has not started")
    lines = _json_lines(metrics)
    header = next((line for line in lines if line.get("kind") == "run"), None)
    if header is None:
        raise InputError(f"{metrics}: no line of kind 'run'")
    written = _json_object(run_folder / "config.json")
    config = written.get("config") or {}
    try:
        return RunRecord(
            name=str(config.get("name") or run_folder.resolve().name),
            total_steps=int(header["total_steps"]),
            steps_per_epoch=int(header.get("steps_per_epoch") or 0),
            phases=tuple(
                PhaseRecord(
                    name=str(phase["name"]),
                    objective=str(phase["objective"]),
                    first_step=int(phase["first_step"]),
                    end_step=int(phase["end_step"]),
                )
                for phase in header["phases"]
            ),
            train=_by_step(lines, "train"),
            validation=_by_step(lines, "validation"),
            tokens_per_second=tuple(
                float(line["tokens_per_second"]) for line in _json_lines(run_folder / "throughput.jsonl")
            ),
            pairs=_json_object(run_folder / "minimal_pairs.json") or None,
            config=config,
            versions=written.get("versions") or {},
            data=written.get("data") or {},
            model_config=_json_object(run_folder / "model" / "config.json"),
            num_parameters=_num_parameters(run_folder / "model" / "model.safetensors"),
        )
    except KeyError as error:
        raise InputError(f"{run_folder}: key {error} is missing in metrics.jsonl or throughput.jsonl") from error


def _by_step(lines: list[dict[str, Any]], kind: str) -> tuple[dict[str, Any], ...]:
    by_step = {int(line["step"]): {"loss": {}, **line} for line in lines if line.get("kind") == kind}
    return tuple(by_step[step] for step in sorted(by_step))


def _json_lines(file: Path) -> list[dict[str, Any]]:
    """One object a line; nothing where the file is missing; without a last line that was cut off."""
    if not file.is_file():
        return []
    text = read_text(file, "run's file")
    objects = []
    lines = text.splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines) and not text.endswith("\n"):
                break
            raise InputError(f"{file}, line {number}: not JSON: {error.msg}") from error
        if not isinstance(value, dict):
            raise InputError(f"{file}, line {number}: must be a JSON object; got {line[:60]}")
        objects.append(value)
    return objects


def _json_object(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        value = json.loads(read_text(file, "run's file"))
    except json.JSONDecodeError as error:
        raise InputError(f"{file}, line {error.lineno}: not JSON: {error.msg}") from error
    if not isinstance(value, dict):
        raise InputError(f"{file}: must hold a JSON object; got {type(value).__name__}")
    return value


def _num_parameters(file: Path) -> int | None:
    """Counts a safetensors file's elements from its header: 8 bytes of length (little-endian), then JSON."""
    if not file.is_file():
        return None
    with file.open("rb") as stream:
        try:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
            return sum(prod(entry["shape"]) for name, entry in header.items() if name != "__metadata__")
        except (struct.error, ValueError, KeyError, TypeError, OverflowError, MemoryError) as error:
            raise InputError(f"{file}: not a safetensors file") from error
