"""Processes that hold one variant each and take turns: `Worker` here, `python workers.py` there.

A variant gets a process of its own where what it is depends on the process: allocator settings, torch.compile's caches
(a new, empty folder for each), threads, the cost of its imports. A worker computes only while it is asked to; the
others wait on their pipes meanwhile.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import select
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from harness import Told, told

_logger = logging.getLogger("workers")

# glibc: never give memory back to the system between steps
MALLOC = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": "68719476736",
    "MALLOC_TOP_PAD_": "268435456",
}
LAUNCHED = "ANTLM_FAST_BENCHMARK_LAUNCHED"


class Worker:
    """An object in a process of its own.

    Args:
        target: "module:class", importable from this folder; called there with `arguments`, which are JSON.
        environment: variables for that process besides this one's.

    Raises:
        Told: the object could not be made; the message is its error there.
    """

    def __init__(self, target: str, arguments: Mapping[str, Any], environment: Mapping[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (as long as the process)
        variables = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": self._folder.name, **(environment or {})}
        variables[LAUNCHED] = repr(time.time())
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=variables,
        )
        try:
            self._ask({"target": target, "arguments": dict(arguments)}, 300.0)
        except Told:
            self.close()
            raise

    def call(self, method: str, *, timeout: float = 600.0, **arguments: Any) -> Any:
        """What the object's method returns; JSON both ways.

        Raises:
            Told: it raised there, ended, or took longer than `timeout` seconds (the process is then ended).
        """
        return self._ask({"method": method, "arguments": arguments}, timeout)

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.seek(0)
        said = self._errors.read().decode(errors="replace")
        if "Traceback" in said:
            _logger.debug("a worker said: %s", said[-8000:])
        self._errors.close()
        self._folder.cleanup()

    def _ask(self, request: Mapping[str, Any], timeout: float) -> Any:
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        if stdin.closed:
            raise Told("its process has ended")
        try:
            stdin.write(json.dumps(request).encode() + b"\n")
            stdin.flush()
        except OSError:
            raise Told(self._last_words()) from None
        if not select.select([stdout], [], [], timeout)[0]:
            self._process.kill()
            raise Told(f"no answer within {timeout:.0f} s")
        line = stdout.readline()  # an answer is one line, written at once
        if not line:
            raise Told(self._last_words())
        answer = json.loads(line)
        if "error" in answer:
            raise Told(answer["error"])
        return answer["value"]

    def _last_words(self) -> str:
        status = self._process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process ended with status {status}" + (f": {told(Told(lines[-1]))}" if lines else "")


def serve() -> None:
    """Makes the object that the first line asks for, then answers one line after the other until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not stand among the answers
    held: Any = None
    for line in sys.stdin.buffer:
        request = json.loads(line)
        try:
            if held is None:
                module, _, name = request["target"].partition(":")
                held = getattr(importlib.import_module(module), name)(**request["arguments"])
                value = None
            else:
                value = getattr(held, request["method"])(**request["arguments"])
            answer = {"value": value}
        except Exception as error:  # the other side decides what it means
            traceback.print_exc()
            answer = {"error": told(error)}
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def seconds_since_launch() -> float:
    """Since this process was asked for: the interpreter's start and all imports included."""
    return time.time() - float(os.environ[LAUNCHED])


if __name__ == "__main__":
    serve()
