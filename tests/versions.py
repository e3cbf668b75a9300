"""The package with other versions of torch and Triton than the one it is developed with: `make versions`.

A pair of torch and Triton gets an environment of its own under build/versions, which a later run uses again. In it
every kernel is compiled for three architectures, in every kind of number and with every option, at the head size of the
recipes; and the tests run: those that Triton interprets, and the CPU's of kernels, models and training. The other
versions of Triton that pyproject.toml admits only compile. Long: by hand.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "build" / "versions"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# (torch, Triton): the oldest and the newest; each torch with the Triton that its CUDA builds bring
PAIRS = (("2.11.0", "3.6.0"), ("2.14.1", "3.8.0"))
# the others, which compile beside the torch of the python that runs this
TRITONS = ("3.7.1", "3.9.0")
COMPILE = ("benchmarks/aot.py", "--compiles", "--archs", "sm_80", "sm_90", "sm_100", "--head-dims", "64", "768")
RECIPES = ("antlm-babyllama", "antlm-ltgbert")
ON_A_CPU = ("tests/kernels", "tests/models", "tests/training")


@dataclass
class Report:
    """One line of the table at the end."""

    name: str
    started: float = field(default_factory=time.monotonic)
    cells: list[str] = field(default_factory=list)
    logs: int = 0
    failed: bool = False

    def step(self, command: Sequence[str], env: dict[str, str], telling: str) -> None:
        """Runs a command; what it says is kept in a file, and shown if it fails. `telling` finds the table's cell."""
        self.logs += 1
        log = FOLDER / f"{self.name.replace(' ', '-').replace(',', '')}-{self.logs}.log"
        with log.open("w", encoding="utf-8") as file:
            done = subprocess.run(command, env=env, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
        said = log.read_text(encoding="utf-8", errors="replace")
        found = re.findall(telling, said, re.MULTILINE)
        self.cells.append(found[-1] if found else f"exit status {done.returncode}")
        print(f"{self.name}: {self.cells[-1]} ({time.monotonic() - self.started:.0f} s so far)", flush=True)
        if done.returncode:
            self.failed = True
            print(*said.splitlines()[-40:], f"(all of it: {log.relative_to(ROOT)})", sep="\n", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [triton for _, triton in PAIRS] + list(TRITONS)
    parser.add_argument("--triton", nargs="+", choices=known, default=known, help="some versions of Triton alone")
    parser.add_argument("--interpreted", nargs="+", default=[], metavar="TEST", help="the tests that Triton interprets")
    parser.add_argument("--workers", default="2", help="processes at a time; default: 2")
    arguments = parser.parse_args()
    FOLDER.mkdir(parents=True, exist_ok=True)
    reports = [
        pair(torch, triton, arguments.interpreted, arguments.workers)
        for torch, triton in PAIRS
        if triton in arguments.triton
    ]
    reports += [compiled_alone(triton, arguments.workers) for triton in TRITONS if triton in arguments.triton]
    print("", "| versions | kernels compiled | interpreted | on a CPU | seconds |", "|---|---|---|---|---|", sep="\n")
    for report in reports:
        print("|", " | ".join(report.cells), "|")
    failed = [report.name for report in reports if report.failed]
    print(f"failed: {'; '.join(failed)}" if failed else "every version holds")
    return 1 if failed else 0


def pair(torch: str, triton: str, interpreted: Sequence[str], workers: str) -> Report:
    """Everything, in the pair's own environment."""
    report = Report(f"torch {torch}, Triton {triton}")
    python = environment(torch, triton)
    env = surroundings(triton)
    compile_kernels(report, python, env, workers)
    pytest = [python, "-m", "pytest", "-q", "-n", workers, "-p", "no:cacheprovider"]
    counts = r"^(\d+ (?:passed|failed).*) in [\d.]+s"
    report.step([*pytest, *interpreted], env | {"TRITON_INTERPRET": "1"}, counts)
    report.step([*pytest, *ON_A_CPU], env, counts)
    return finished(report)


def compiled_alone(triton: str, workers: str) -> Report:
    """The kernels compiled by a Triton beside the torch of this process."""
    report = Report(f"Triton {triton}")
    target = FOLDER / f"triton-{triton}"
    if not target.exists():
        part = target.with_suffix(".part")
        pip(sys.executable, "--no-deps", "--upgrade", "--target", str(part), f"triton=={triton}")
        part.rename(target)
    compile_kernels(report, sys.executable, surroundings(triton) | {"PYTHONPATH": str(target)}, workers)
    report.cells += ["-", "-"]
    return finished(report)


def compile_kernels(report: Report, python: str, env: dict[str, str], workers: str) -> None:
    """Attention's and the loss's kernels, and what `antlm-fast prime` compiles for a recipe."""
    report.step([python, *COMPILE, "--workers", workers], env, r"^compiled with Triton \S+, torch \S+: (.*)$")
    archs = [word for arch in ("80", "90", "100") for word in ("--arch", arch)]
    for recipe in RECIPES:
        report.step([python, "-m", "antlm_fast.cli", "prime", *archs, "--recipe", recipe], env, r"^(\d+) kernels in")
    every, *primed = report.cells
    report.cells = [f"{every}; primed {' + '.join(primed)}"]


def finished(report: Report) -> Report:
    report.cells = [report.name, *report.cells, f"{time.monotonic() - report.started:.0f}"]
    return report


def surroundings(triton: str) -> dict[str, str]:
    """Each Triton has a cache of its own, so that what is compiled is compiled now or by an earlier run of this."""
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return env | {"OMP_NUM_THREADS": "1", "TRITON_CACHE_DIR": str(FOLDER / f"cache-{triton}")}


def environment(torch: str, triton: str) -> str:
    """The python of a pair's environment, which is made if it is not there."""
    folder = FOLDER / f"torch-{torch}-triton-{triton}"
    python, ready = str(folder / "bin" / "python"), folder / "ready"
    if ready.exists():
        return python
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    for build in ([f"torch=={torch}+cpu"], [f"torch=={torch}", "--index-url", CPU_INDEX], [f"torch=={torch}"]):
        if pip(python, *build, check=False):
            break
    # the C++ library in the checkout serves: it is compiled with no torch
    pip(python, f"torch=={torch}", f"triton=={triton}", "--editable", ".[dev]", native="0")
    ready.touch()
    return python


def pip(python: str, *arguments: str, check: bool = True, native: str = "1") -> bool:
    """Whether an install succeeded.

    Raises:
        subprocess.CalledProcessError: it did not, and `check` is true.
    """
    done = subprocess.run(
        [python, "-m", "pip", "--disable-pip-version-check", "--quiet", "install", *arguments],
        env=os.environ | {"ANTLM_FAST_NATIVE": native},
        cwd=ROOT,
        stderr=None if check else subprocess.DEVNULL,
        check=check,
    )
    return done.returncode == 0


if __name__ == "__main__":
    raise SystemExit(main())
