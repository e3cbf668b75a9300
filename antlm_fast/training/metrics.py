"""What a run writes while it trains: metrics.jsonl (exactly repeatable), throughput.jsonl (not), TensorBoard."""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from antlm_fast.types import InputError


class MetricsLog:
    """metrics.jsonl of a run: one JSON object a line, the same bytes whether the run was interrupted or not.

    Args:
        run_folder: where the files lie.
        keep_bytes: length of metrics.jsonl at the checkpoint that training goes on from; the rest is cut off.
        step: optimizer steps done there (TensorBoard hides what came later).
        tensorboard: also write event files under run_folder/tensorboard.

    Raises:
        InputError: metrics.jsonl is shorter than keep_bytes, or tensorboard is asked for and not installed.
    """

    def __init__(self, run_folder: Path, *, keep_bytes: int, step: int, tensorboard: bool) -> None:
        path = run_folder / "metrics.jsonl"
        self._file = path.open("ab")
        if self._file.tell() < keep_bytes:
            raise InputError(
                f"{path} must hold the {keep_bytes} bytes it had at the checkpoint; got {self._file.tell()}"
            )
        self._file.truncate(keep_bytes)
        self._file.seek(keep_bytes)
        self._throughput = (run_folder / "throughput.jsonl").open("a", encoding="utf-8")
        self._board = _tensorboard_writer(run_folder / "tensorboard", step) if tensorboard else None

    @property
    def num_bytes(self) -> int:
        return self._file.tell()

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()
        if self._board is not None and "step" in record:
            scalars = {f"{record['kind']}/loss_{name}": value for name, value in record["loss"].items()}
            scalars |= {name: record[name] for name in ("lr", "mask_rate", "grad_norm") if record.get(name) is not None}
            for name, value in scalars.items():
                self._board.add_scalar(name, value, record["step"])

    def write_throughput(self, step: int, tokens_per_second: float, seconds: float) -> None:
        record = {"step": step, "tokens_per_second": round(tokens_per_second, 1), "seconds": round(seconds, 3)}
        self._throughput.write(json.dumps(record) + "\n")
        self._throughput.flush()

    def sync(self) -> None:
        """Everything written so far is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        self._throughput.close()
        if self._board is not None:
            self._board.close()


def check_tensorboard() -> None:
    """Raises InputError where event files cannot be written."""
    if find_spec("tensorboard") is None:
        raise InputError(
            "logging.tensorboard must be false where tensorboard is not installed; got true (pip install tensorboard)"
        )


def _tensorboard_writer(folder: Path, step: int) -> Any:
    check_tensorboard()
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(folder), purge_step=step)
