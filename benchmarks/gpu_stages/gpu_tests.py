"""Stage c: the tests marked gpu with compiled kernels, on all cores; then the kernels under compute-sanitizer.

pytest says of each test how it went as soon as it is known, so where the time ends before the tests do, those that ran
count. A test that fails is a row by its name.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from subprocess import PIPE, STDOUT

from harness import TIME_USED_UP, Row

from gpu_stages.plan import GpuBench

ROOT = Path(__file__).resolve().parents[2]
# "[gw1] [ 12%] PASSED tests/a.py::b[c d]", or "tests/a.py::b[c d] PASSED   [ 12%]"; not the end's "FAILED tests/..."
_VERDICT = re.compile(r"^(?:\[gw\d+\] \[ *\d+%\] |tests/.+ )(PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)\b")
_NAME = re.compile(r"(tests/\S+::.+?)(?= (?:PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)|\s*$)")
_SHOWN = 20  # failures that get a row each
SANITIZER_MISSING = "compute-sanitizer is not installed"
_SANITIZER_SHARE = 0.35
_SANITIZER_LEAST_S = 20.0  # torch alone takes as long to begin under it
_SANITIZER_TOOLS = ("memcheck", "racecheck")


def run(bench: GpuBench) -> Iterator[list[Row]]:
    begun = time.monotonic()
    has_sanitizer = bench.sizes.sanitized and shutil.which("compute-sanitizer") is not None
    share = (1 - _SANITIZER_SHARE) if has_sanitizer else 1.0
    yield list(_tested(bench, begun + share * (bench.until - begun)))
    if bench.sizes.sanitized:
        for tool in _SANITIZER_TOOLS:
            yield [_sanitized(tool, bench.left(), has_sanitizer)]


def _tested(bench: GpuBench, until: float) -> Iterator[Row]:
    blank = Row(suite="tests", workload="pytest", case="", provider="antlm_fast", quantity="count")
    # a worker a core is what fills a machine; on one GPU more than a dozen contexts only wait
    workers = ("-n", str(min(os.cpu_count() or 1, 12))) if importlib.util.find_spec("xdist") else ()
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        *workers,
        *bench.sizes.tests,
    ]
    environment = dict(os.environ) | ({"TRITON_INTERPRET": "1"} if bench.device == "cpu" else {})
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=PIPE, stderr=STDOUT, text=True)
    counts: Counter[str] = Counter()
    failed: dict[str, str] = {}
    for line in _lines(process, until):
        print(line, end="", flush=True)
        if found := verdict_of(line):
            kind, test = found
            counts[kind] += 1
            if kind in ("FAILED", "ERROR"):
                failed[test] = kind
    status = process.wait()
    for kind in ("PASSED", "SKIPPED", "XFAIL"):
        if counts[kind] or kind == "PASSED":
            yield replace(blank, case=kind.lower(), samples=(float(counts[kind]),))
    yield replace(blank, case="all had their turn", **_whole(status, counts))
    for name, verdict in list(failed.items())[:_SHOWN]:
        yield replace(
            blank, workload="failures", case=name.rpartition("::")[2], reason=f"{verdict} {name}; see the log"
        )
    if len(failed) > _SHOWN:
        yield replace(
            blank, workload="failures", case="more", reason=f"FAILED {len(failed) - _SHOWN} more; see the log"
        )


def _lines(process: subprocess.Popen[str], until: float) -> Iterator[str]:
    """What the process says, to its end; at `until` it is killed, and what it had said by then comes still."""
    lines: queue.Queue[str | None] = queue.Queue()
    threading.Thread(target=_read, args=(process, lines), daemon=True).start()
    while (left := until - time.monotonic()) > 0:
        try:
            line = lines.get(timeout=left)
        except queue.Empty:
            break
        if line is None:
            return
        yield line
    process.kill()
    time.sleep(1.0)
    while not lines.empty():  # what it started may hold its output open: nobody waits for the end
        if (line := lines.get()) is not None:
            yield line


def _read(process: subprocess.Popen[str], lines: queue.Queue[str | None]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        lines.put(line)
    lines.put(None)


def verdict_of(line: str) -> tuple[str, str] | None:
    """("PASSED", the test's name) and the like, of a line of pytest -v, with xdist or without; None of any other."""
    verdict, name = _VERDICT.search(line), _NAME.search(line)
    return (verdict[1], name[1].strip()) if verdict and name else None


def _whole(status: int, counts: Counter[str]) -> dict[str, object]:
    if status == -signal.SIGKILL:
        return {"reason": f"{TIME_USED_UP} after {sum(counts.values())} tests"}
    if status not in (0, 1) or not counts:
        return {"reason": f"FAILED pytest ended with status {status} after {sum(counts.values())} tests; see the log"}
    return {"samples": (float(sum(counts.values())),)}


def _sanitized(tool: str, seconds: float, installed: bool) -> Row:
    row = Row(suite="tests", workload="compute-sanitizer", case=tool, provider="antlm_fast", quantity="count")
    if not installed:
        return replace(row, reason=SANITIZER_MISSING)
    if seconds < _SANITIZER_LEAST_S:
        return replace(row, reason=TIME_USED_UP)
    command = ["compute-sanitizer", "--tool", tool, "--print-limit", "20"]
    if tool == "memcheck":  # libraries try calls that may fail, and go on
        command += ["--report-api-errors", "no"]
    command += [sys.executable, "-m", "gpu_stages.sanitized"]
    # an allocation of its own for each tensor, or a write past one would land in the allocator's pool unseen
    environment = dict(os.environ) | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=seconds,
            check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        print(str(error.stdout)[-4000:])
        return replace(row, reason=f"{TIME_USED_UP}: not done within {seconds:.0f} s")
    print(done.stdout[-20_000:], flush=True)
    return replace(row, **_findings(done.stdout, done.returncode))


def _findings(output: str, status: int) -> dict[str, object]:
    """Of the tool's last line; a program that did not get to its end has no findings but that."""
    # of racecheck the errors count: its warnings are pairs of accesses that it cannot tell apart
    summary = re.search(r"ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: .*?\((\d+) error", output)
    if "every kernel ran" not in output or summary is None:
        return {"reason": f"FAILED the program under it ended with status {status}; see the log"}
    count = int(summary[1] or summary[2])
    return {"reason": f"FAILED {count} findings; see the log"} if count else {"samples": (0.0,)}
