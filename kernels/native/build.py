"""Compiles the C++ kernels into one shared library: `python kernels/native/build.py`.

Needs a C++17 compiler with GCC's vector extensions (g++ 12 or newer, or what $CXX names) and nothing else: no torch, no
Python headers. setup.py runs it for installs and wheels. Every kernel is compiled once for each instruction set and the
library chooses when it is loaded, so a wheel built anywhere runs everywhere.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

FOLDER = Path(__file__).parent.resolve()
LIBRARY = "libantlm_native.so"
KERNELS = ("attention", "cross_entropy", "fused_layers", "optimizer", "weight_gradient")
_FLAGS = ["-std=gnu++17", "-fPIC", "-fvisibility=hidden", "-ffp-contract=fast", "-fno-math-errno"]
_FLAGS += ["-fno-trapping-math", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-function", "-Wno-maybe-uninitialized"]
_AVX512 = ["-march=x86-64-v4", "-mavx512bf16", "-mprefer-vector-width=512"]
_AMX = ["-mamx-tile", "-mamx-bf16", "-DANTLM_AMX"]
SANITIZERS = {
    "address": ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"],
    "thread": ["-fsanitize=thread"],
}


class BuildError(RuntimeError):
    """The library could not be compiled; the message says why."""


def sources_hash(folder: Path = FOLDER) -> str:
    """Of all C++ files: a library that was made of others is not loaded."""
    digest = hashlib.sha256()
    for path in sorted((*folder.glob("*.cpp"), *folder.glob("*.h"))):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def is_current(library: Path) -> bool:
    """Whether the file is made of these sources."""
    return library.is_file() and sources_hash().encode() in library.read_bytes()


def compiler() -> list[str] | None:
    """The command of a C++ compiler, or None."""
    chosen = os.environ.get("CXX")
    if chosen:
        return shlex.split(chosen)
    return next(([name] for name in ("g++", "c++", "clang++") if shutil.which(name)), None)


def build(target: Path, *, sanitize: str | None = None, jobs: int | None = None) -> Path:
    """Compile and link the library.

    Args:
        target: the file to write; it is replaced in one step.
        sanitize: a name in SANITIZERS: build with checks, for tests.
        jobs: compilations at a time; None is one a core.

    Raises:
        BuildError: there is no compiler, or it refuses; the message has its words.
    """
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler was found (g++ on Debian: apt install g++), or name one in CXX")
    if platform.system() != "Linux":
        raise BuildError(f"the C++ kernels are built on Linux; this is {platform.system()}")
    common = [*command, *_FLAGS, f'-DANTLM_SOURCES="{sources_hash()}"']
    link = [*command, "-shared", "-Wl,-z,defs" if sanitize is None else "-Wl,-z,lazy"]
    if sanitize is not None:
        common += ["-g", "-fno-omit-frame-pointer", *SANITIZERS[sanitize]]
        link += SANITIZERS[sanitize]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        amx = _AMX if _compiles(command, [*_AVX512, *_AMX]) else []
        # what nearly every machine runs is optimised most; the others would take most of the time to compile
        instruction_sets = {"portable": ["-O1"]}
        if platform.machine() in ("x86_64", "AMD64"):
            instruction_sets["avx2"] = ["-O2", "-march=x86-64-v3"]
            if _compiles(command, _AVX512):
                instruction_sets["avx512"] = ["-O3", *_AVX512, *amx]
        # OpenMP's symbols are not linked but found in the process: torch has brought its own runtime along
        steps = [([*common, *amx[2:], "-c", str(FOLDER / "cpu.cpp")], folder / "cpu.o")]
        for name, flags in instruction_sets.items():
            if sanitize is not None:  # checks make large code, which takes minutes to optimise
                flags = ["-O1", *(flag for flag in flags if not flag.startswith("-O"))]
            for kernel in KERNELS:
                words = [*common, "-fopenmp", *flags, f"-DANTLM_ISA={name}", "-c", str(FOLDER / f"{kernel}.cpp")]
                steps.append((words, folder / f"{kernel}_{name}.o"))
        with ThreadPoolExecutor(jobs or os.cpu_count() or 1) as pool:
            list(pool.map(lambda step: _run([*step[0], "-o", str(step[1])]), steps))
        linked = folder / LIBRARY
        _run([*[word for word in link if word != "-Wl,-z,defs"], *(str(file) for _, file in steps), "-o", str(linked)])
        target.parent.mkdir(parents=True, exist_ok=True)
        beside = target.with_name(target.name + ".part")
        shutil.copy(linked, beside)
        beside.replace(target)  # a process that has the old one mapped keeps it
    return target


def _compiles(command: list[str], flags: list[str]) -> bool:
    words = [*command, *flags, "-x", "c++", "-fsyntax-only", "-"]
    try:
        done = subprocess.run(words, input="#include <immintrin.h>\n", text=True, capture_output=True, check=False)
    except OSError as error:
        raise BuildError(f"{words[0]} cannot be run: {error}") from error
    return done.returncode == 0


def _run(words: list[str]) -> None:
    try:
        done = subprocess.run(words, capture_output=True, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{words[0]} cannot be run: {error}") from error
    if done.returncode:
        raise BuildError(f"{words[0]} failed on {Path(words[-3]).name}:\n{done.stderr.strip()[-4000:]}")
    if done.stderr:
        print(done.stderr, file=sys.stderr, end="")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FOLDER / LIBRARY)
    parser.add_argument("--sanitize", choices=SANITIZERS, help="with checks, for tests")
    parser.add_argument("--jobs", type=int, help="compilations at a time; default: one a core")
    parser.add_argument("--if-needed", action="store_true", help="only if --output is not made of these sources")
    arguments = parser.parse_args()
    if arguments.if_needed and is_current(arguments.output):
        return 0
    try:
        print(build(arguments.output, sanitize=arguments.sanitize, jobs=arguments.jobs))
    except BuildError as error:
        print(f"native kernels: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
