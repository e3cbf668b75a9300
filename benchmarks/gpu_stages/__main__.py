"""One stage, in a process of its own: `python -m gpu_stages '{"target": "gpu_stages.limits:run", ...}'`.

Writes each list of rows to a file as it comes, one line of JSON each, so that what a crash or a hang cuts off is only
what was not there yet; prints them as tables, which become the stage's log.
"""

from __future__ import annotations

import importlib
import json
import logging
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import results
import torch
from harness import Row, environment, table
from roofline import Limits

from gpu_stages.plan import GPU_SIZES, GpuBench
from gpu_stages.planted import plant


def main() -> int:
    request = json.loads(sys.argv[1])
    warnings.simplefilter("ignore")
    logging.basicConfig(stream=sys.stdout, format="%(message)s")
    logging.getLogger("torch").setLevel(logging.ERROR)
    logging.getLogger("workers").setLevel(logging.DEBUG)  # what failed in them, whole
    logging.getLogger("harness").setLevel(logging.DEBUG)
    device = request["device"]
    if device == "cuda" and not torch.cuda.is_available():
        print("no CUDA device: torch sees none")
        return 2
    plant(request["plant"])
    bench = GpuBench(
        sizes=GPU_SIZES[device],
        device=device,
        limits=None if request["limits"] is None else Limits(**request["limits"]),
        until=request["until"],
        folder=Path(request["folder"]),
        planted=request["plant"],
    )
    module, _, function = request["target"].partition(":")
    with Path(request["rows"]).open("w", encoding="utf-8") as file:
        for line in records(getattr(importlib.import_module(module), function)(bench), device):
            file.write(json.dumps(line) + "\n")
            file.flush()
            if request["plant"] == "raise" and "rows" in line:
                raise RuntimeError("planted")
            if request["plant"] == "hang" and "rows" in line:
                time.sleep(1e6)
    return 0


def records(stage: Iterator[list[Row]], device: str) -> Iterator[dict[str, Any]]:
    yield {"environment": environment(device)}
    for rows in stage:
        for _, own in results.workloads(rows):
            print("", *table(own), sep="\n", flush=True)
        yield {"rows": [row.json() for row in rows]}


if __name__ == "__main__":
    sys.exit(main())
