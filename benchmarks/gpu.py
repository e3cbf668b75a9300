"""The kernels on a GPU, proved and measured in minutes, from a bare checkout: `python benchmarks/gpu.py`.

    python benchmarks/gpu.py --minutes 8 --output DIR        everything, in order of worth
    python benchmarks/gpu.py --minutes 4 --output DIR --stages d e --merge     some stages, into results that are there
    python benchmarks/gpu.py --peers WHEELS                  with peers from a folder of wheels (nothing is installed)
    python benchmarks/gpu.py --device cpu --minutes 3        the code itself: tiny sizes, kernels interpreted
    python benchmarks/gpu.py --dry-run                       the plan
    python benchmarks/gpu.py --compare A.json B.json         exit status 1 where B is slower than A

It takes the Python, torch and Triton that are there: no network, no install, no compiler but the one that Triton calls
for its launchers. Each stage runs in a process of its own, with a share of the time; what it does not use goes to those
after it. A stage that crashes, hangs or raises keeps the rows it had, and the others run. A kernel whose numbers are
wrong has a reason in place of a speed.

DIR then holds gpu.json (every sample, card, versions, date), summary.txt (at most 100 lines), tiles.json, tiles.patch
and a log for each stage. Exit status 1 if anything of ours failed.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
import compare
import results
from gpu_stages import summary
from gpu_stages.plan import GPU_SIZES, STAGES, Stage
from gpu_stages.planted import FAULTS
from harness import Row, environment
from roofline import limits_of

FOLDER = Path(__file__).resolve().parent
# the end of a stage's share, for what it has in hand: what is not done by then is ended
_GRACE_S, _GRACE_SHARE = 15.0, 0.25
# for the summary
_END_S = 2.0


def parser() -> argparse.ArgumentParser:
    letters = [stage.letter for stage in STAGES]
    found = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument(
        "--minutes", type=float, default=8.0, help="the most that all stages may take; default %(default)s"
    )
    found.add_argument("--output", type=Path, metavar="DIR", default=Path("build/gpu"), help="default: %(default)s")
    found.add_argument("--stages", nargs="+", choices=letters, default=letters, metavar="LETTER", help="default: all")
    found.add_argument("--merge", action="store_true", help="keep the suites that DIR has and are not run now")
    found.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu only tries the code out")
    found.add_argument("--peers", type=Path, metavar="FOLDER", help="of wheels, or of unpacked packages")
    found.add_argument("--dry-run", action="store_true", help="print the plan with its estimated minutes")
    found.add_argument(
        "--plant", nargs="+", default=(), metavar="LETTER=FAULT", help=f"fail on purpose: FAULT is {', '.join(FAULTS)}"
    )
    found.add_argument("--compare", nargs=2, type=Path, metavar=("A.json", "B.json"), help="measure nothing")
    found.add_argument("--across", action="store_true", help="--compare also results of different cards")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    begun = time.monotonic()
    arguments = parser().parse_args(argv)
    if arguments.compare:
        return compare.compare(*arguments.compare, across=arguments.across)
    stages = [stage for stage in STAGES if stage.letter in arguments.stages]
    if arguments.dry_run:
        print("\n".join(plan(stages, arguments.minutes, arguments.device)))
        return 0
    planted = planted_faults(arguments.plant)
    if arguments.minutes <= 0:
        raise SystemExit(f"--minutes must be above 0; got {arguments.minutes}")
    name = name_of(arguments.device)
    if arguments.merge and (reason := unlike(arguments.output, arguments.device, name)):
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as scratch:
        paths = [str(FOLDER), str(FOLDER.parent), *peers_paths(arguments.peers, Path(scratch))]
        suites = run_stages(
            stages,
            seconds=60 * arguments.minutes - (time.monotonic() - begun) - _END_S,
            device=arguments.device,
            output=arguments.output,
            paths=paths,
            planted=planted,
            merge=arguments.merge,
            card=name,
        )
    text = summary.lines(suites)
    (arguments.output / "summary.txt").write_text("\n".join(text) + "\n", encoding="utf-8")
    print("", *text, sep="\n")
    return 1 if summary.failures(suites) else 0


def planted_faults(texts: Sequence[str]) -> dict[str, str]:
    """{letter: fault} of --plant."""
    faults = {}
    for text in texts:
        letter, _, fault = text.partition("=")
        if letter not in [stage.letter for stage in STAGES] or fault not in FAULTS:
            raise SystemExit(f"--plant must be a stage's letter = one of {', '.join(FAULTS)}; got {text}")
        faults[letter] = fault
    return faults


def name_of(device: str) -> str | None:
    """The card's name; None for the CPU. Asked in another process: this one needs no GPU memory.

    Raises:
        SystemExit: nothing can be run on this device.
    """
    probe = "import torch, triton; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:]
        raise SystemExit(f"torch and triton must be installed; got {''.join(last)}")
    if device == "cpu":
        return None
    if name := done.stdout.strip():
        return name
    raise SystemExit(
        "--device cuda: this torch sees no CUDA device (--device cpu tries the code out, --dry-run shows the plan)"
    )


def unlike(output: Path, device: str, name: str | None) -> str | None:
    """Why nothing may be merged into what DIR has, or None: one file is of one card."""
    if not (output / "gpu.json").exists():
        return None
    environments = [record["environment"] for record in results.read(output / "gpu.json").values()]
    there = {(each["device"], each["gpu"]) for each in environments}
    if there <= {(device, name)}:
        return None
    had = ", ".join(sorted(str(gpu or on) for on, gpu in there))
    return f"--merge must be of results of the same device; got {had} and {name or device}"


def plan(stages: Sequence[Stage], minutes: float, device: str) -> list[str]:
    """What would be done, and how long it may take."""
    total = sum(stage.expected(device) for stage in stages)
    sizes = GPU_SIZES[device]
    lines = [f"minutes expected, share of {minutes:g}, stage"]
    for stage in stages:
        expected = stage.expected(device)
        share = minutes * expected / total
        lines.append(f"{expected:6.1f} {share:6.1f}  {stage.letter} {stage.name:11}{stage.what}")
    lines += [f"{total:6.1f} {minutes:6.1f}  all", "", "attention (in this order, until the time is up):"]
    lines += [f"  {shape.title}, {shape.visibility}{', packed' if shape.packed else ''}" for shape in sizes.attention]
    lines.append("disentangled attention (batch, heads, tokens, head size): " + ", ".join(map(str, sizes.disentangled)))
    lines.append("loss (rows, hidden, vocabulary, labelled): " + ", ".join(map(str, sizes.cross_entropy)))
    for each in sizes.steps:
        batches = ", ".join(f"{sequences} x {seqlen}" for sequences, seqlen in each.batches)
        lines.append(f"steps: {each.model}, {batches} tokens: {'; '.join(each.variants + each.compiled)}")
    return lines


def peers_paths(folder: Path | None, scratch: Path) -> list[str]:
    """Where Python finds the peers of a folder: wheels are unpacked, since Triton reads kernels' sources from files."""
    if folder is None:
        return []
    if not folder.is_dir():
        raise SystemExit(f"--peers must be a folder; got {folder}")
    for wheel in sorted(folder.glob("*.whl")):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(scratch)
    return [str(scratch), str(folder.resolve())]


def run_stages(
    stages: Sequence[Stage],
    *,
    seconds: float,
    device: str,
    output: Path,
    paths: Sequence[str],
    planted: Mapping[str, str],
    merge: bool = False,
    card: str | None = None,
) -> dict[str, Any]:
    """Run the stages one after the other, and write gpu.json after each.

    Args:
        seconds: for all of them; a stage has its part of what is left, by its expected minutes.
        paths: put before Python's own in the stages' processes.
        planted: a fault for a stage, by its letter.
        card: its name, for what is written where no stage came to tell it.

    Returns:
        Suites, by name: "stages" says how each stage ended.
    """
    (output / "logs").mkdir(parents=True, exist_ok=True)
    until = time.monotonic() + seconds
    path = output / "gpu.json"
    suites: dict[str, Any] = results.read(path) if merge and path.exists() else {}
    ended = results.rows_of(suites["stages"]) if "stages" in suites else []
    limits = next((record["limits"] for record in suites.values() if record["limits"] is not None), None)
    surroundings: dict[str, Any] | None = suites["stages"]["environment"] if "stages" in suites else None
    for number, stage in enumerate(stages):
        weights = [each.expected(device) for each in stages[number:]]
        left = until - time.monotonic()
        share = left * weights[0] / sum(weights)
        if device == "cuda":
            share = min(max(share, stage.least_s), left)
        print(f"{stage.letter} {stage.name}: {share:.0f} s at most", flush=True)
        begun = time.monotonic()
        request = {
            "target": stage.target,
            "device": device,
            # this clock is one for all processes: what a process takes to begin counts
            "until": begun + share - min(_GRACE_S, _GRACE_SHARE * share),
            "limits": limits,
            "folder": str(output.resolve()),
            "plant": planted.get(stage.letter),
        }
        own_surroundings, rows, reason = run_stage(
            request, share, output / "logs" / f"{stage.letter}-{stage.name}.log", paths
        )
        # a stage that crashed at once has said nothing of them
        surroundings = own_surroundings or surroundings or environment("cpu") | {"device": device, "gpu": card}
        taken = time.monotonic() - begun
        row = Row(
            suite="stages", workload="stages", case=f"{stage.letter} {stage.name}", provider="stage", reason=reason
        )
        row = row if reason else replace(row, samples=(taken,))
        ended = [each for each in ended if each.case != row.case] + [row]
        print(f"  {'FAILED: ' + reason if reason else 'ended'} after {taken:.0f} s, {len(rows)} rows", flush=True)
        if stage.name == "limits" and any(each.samples for each in rows):
            limits = limits_of(rows).json()
        for suite in dict.fromkeys(each.suite for each in rows):
            own = [each for each in rows if each.suite == suite]
            suites[suite] = _record(surroundings, limits, device, taken, own)
        suites["stages"] = _record(surroundings, limits, device, seconds - (until - time.monotonic()), ended)
        results.write(path, suites, merge=False)
    return suites


def _record(surroundings: Mapping[str, Any], limits: Any, device: str, seconds: float, rows: Sequence[Row]) -> Any:
    record = results.suite_record(surroundings, None, f"gpu.py, {device}", seconds / 60, rows)
    return record | {"limits": limits}


def run_stage(
    request: Mapping[str, Any], seconds: float, log: Path, paths: Sequence[str]
) -> tuple[dict[str, Any] | None, list[Row], str | None]:
    """One stage in a process of its own, ended with all that it started when its time is over.

    Returns:
        Its surroundings (None if it did not come to tell them), its rows, and why it did not end well, if it did not.
    """
    variables = dict(os.environ) | {"PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])}
    variables["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # the proof asks for deterministic library products
    # torch.compile would give a process that compiles another one, without what was compiled ahead
    home = Path(tempfile.gettempdir())
    with suppress(RuntimeError):  # a user without a home folder
        home = Path.home()
    variables.setdefault("TRITON_CACHE_DIR", str(home / ".triton" / "cache"))
    if request["device"] == "cpu":
        variables["TRITON_INTERPRET"] = "1"
    with tempfile.TemporaryDirectory() as folder, log.open("w", encoding="utf-8") as file:
        rows = Path(folder, "rows.jsonl")
        command = [sys.executable, "-u", "-m", "gpu_stages", json.dumps({**request, "rows": str(rows)})]
        process = subprocess.Popen(
            command, env=variables, cwd=FOLDER.parent, stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        reason = None
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            reason = f"no end within its {seconds:.0f} s"
        finally:
            with suppress(ProcessLookupError):  # the session's whole group: what the stage started ends with it
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        found = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()] if rows.exists() else []
    if reason is None and process.returncode:
        reason = _reason_of(process.returncode, log)
    surroundings = next((line["environment"] for line in found if "environment" in line), None)
    own = [Row.read(values) for line in found for values in line.get("rows", ())]
    return surroundings, own, reason


def _reason_of(status: int, log: Path) -> str:
    """From the process's status and its last words."""
    words = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    how = f"crashed by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    return f"{how}: {words[-1][:160]}" if words else how


if __name__ == "__main__":
    raise SystemExit(main())
