"""Checkpoints: a folder a step, written whole or not at all, verified when read; safetensors and JSON, no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from antlm_fast.models.pretrained import write_safetensors
from antlm_fast.types import InputError

PREFIX = "step_"
WRITING = ".writing_"
DROPPED = ".dropped_"


@dataclass(frozen=True, kw_only=True)
class TrainState:
    """What a run must remember beside weights and moments; all else is a function of the step.

    Args:
        step: optimizer steps done.
        tokens: read by them.
        metrics_bytes: length of metrics.jsonl at that moment; what lies behind it is cut off on resume.
        loss_sums, loss_counts: what the next training line has gathered so far, by objective.
        validation_due: the validation that belongs to this step was not done, because a signal ended the run.
    """

    step: int
    tokens: int
    metrics_bytes: int
    loss_sums: dict[str, float]
    loss_counts: dict[str, int]
    validation_due: bool = False


def save_checkpoint(
    folder: Path,
    state: TrainState,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    keep: int,
    keep_steps: Collection[int] = (),
    average: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write folder/step_00001234 atomically (temporary folder, fsync, rename), then drop all but the newest `keep`.

    Args:
        keep_steps: steps whose checkpoints are never dropped.
        average: the weights' moving average by parameter name, in a file of its own; None where none is kept.

    Raises:
        OSError: the disk is full or not writable; the checkpoints that were there are untouched.
    """
    final = folder / f"{PREFIX}{state.step:08d}"
    if final.exists():  # the same step of the same run: the same tensors; its validation may have been due
        _write_state(final, state, _read_document(final)[1])
        return final
    temporary = folder / f"{WRITING}{final.name}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        tensors: dict[str, dict[str, Tensor]] = {
            "model": dict(model.named_parameters()),
            "optimizer": _moments(model, optimizer),
        }
        if average is not None:
            tensors["average"] = dict(average)
        files = {
            f"{name}.safetensors": _write_tensors(temporary / f"{name}.safetensors", tensors[name]) for name in tensors
        }
        _write_state(temporary, state, files)
        temporary.rename(final)
        _sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    kept = {f"{PREFIX}{step:08d}" for step in keep_steps}
    for old in _complete(folder)[:-keep]:
        if old.name not in kept:  # renamed first: half a folder never counts as a checkpoint
            old.rename(folder / f"{DROPPED}{old.name}")
    for dropped in folder.glob(f"{DROPPED}*"):
        shutil.rmtree(dropped)
    return final


def latest_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint, or None; what a killed writer left behind is never taken for one."""
    complete = _complete(folder)
    return complete[-1] if complete else None


def load_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    average: Mapping[str, Tensor] | None = None,
) -> TrainState:
    """Restore weights and moments in place, and the moving average where one is kept.

    Raises:
        InputError: a file is missing, cut short or altered, or belongs to another model; nothing was restored then.
    """
    state, files = _read_document(path)
    tensors = {}
    for name, expected in files.items():
        tensors[name] = _read_tensors(path / name, expected)
    weights = tensors["model.safetensors"]
    _check_fit(path, model, weights)
    if average is not None and "average.safetensors" not in tensors:
        raise InputError(f"checkpoint {path} must hold average.safetensors where optimizer.ema_decay is set; got none")
    with torch.no_grad():
        for name, parameter in model.named_parameters():  # tied weights are one parameter, under one name
            parameter.copy_(weights[name])
        for name, value in (average or {}).items():
            value.copy_(tensors["average.safetensors"][name])
    _restore_moments(model, optimizer, tensors["optimizer.safetensors"])
    return state


def load_weights(path: Path, model: nn.Module) -> None:
    """Restore in place what the run would publish: the moving average where the checkpoint has one, else the weights.

    Raises:
        InputError: a file is missing, cut short or altered, or belongs to another model; nothing was restored then.
    """
    _, files = _read_document(path)
    name = "average.safetensors" if "average.safetensors" in files else "model.safetensors"
    weights = _read_tensors(path / name, files[name])
    _check_fit(path, model, weights)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            parameter.copy_(weights[parameter_name])


def _complete(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob(f"{PREFIX}*") if path.is_dir())


def _read_document(path: Path) -> tuple[TrainState, dict[str, Any]]:
    """State and files of a checkpoint's state.json."""
    try:
        document = json.loads((path / "state.json").read_text(encoding="utf-8"))
        return TrainState(**document["state"]), document["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"checkpoint {path} is damaged: state.json cannot be read ({error}){_hint(path)}") from None


def _moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's tensors under "parameter name|moment name"."""
    return {
        f"{name}|{moment}": value
        for name, parameter in model.named_parameters()
        for moment, value in optimizer.state[parameter].items()
    }


def _restore_moments(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in tensors.items():
        parameter_name, moment = name.split("|")
        parameter = parameters[parameter_name]
        device = "cpu" if value.ndim == 0 and parameter.device.type == "cpu" else parameter.device
        optimizer.state[parameter][moment] = value.to(device)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> dict[str, Any]:
    write_safetensors({name: tensor.detach().contiguous() for name, tensor in tensors.items()}, path)
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _read_tensors(path: Path, expected: dict[str, Any]) -> dict[str, Tensor]:
    hint = _hint(path.parent)
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            raise InputError(
                f"checkpoint file {path} is cut short: {expected['bytes']} bytes were written, {size} are there{hint}"
            )
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != expected["sha256"]:
                raise InputError(f"checkpoint file {path} is damaged: its sha256 is not the one written{hint}")
        return load_file(path)
    except FileNotFoundError:
        raise InputError(f"checkpoint file {path} is missing{hint}") from None


def _hint(checkpoint: Path) -> str:
    older = [path for path in _complete(checkpoint.parent) if path.name < checkpoint.name]
    return f"; remove {checkpoint} to resume from {older[-1].name}" if older else ""


def _check_fit(path: Path, model: nn.Module, weights: dict[str, Tensor]) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    for name, parameter in model.named_parameters():
        if shapes.get(name) != tuple(parameter.shape):
            config = getattr(model, "config", None)
            what = "vocabulary" if parameter.shape[0] == getattr(config, "vocab_size", None) else "model"
            raise InputError(
                f"checkpoint {path} does not match the run's {what}: {name} must have shape {tuple(parameter.shape)}; "
                f"got {shapes.get(name, 'none')}"
            )


def _write_state(folder: Path, state: TrainState, files: dict[str, Any]) -> None:
    """Write state.json, whole or not at all."""
    part = folder / ".state.json.part"
    with part.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": 1, "state": asdict(state), "files": files}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    part.rename(folder / "state.json")
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
