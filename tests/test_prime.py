"""Kernels compiled ahead: what `antlm-fast prime` leaves in Triton's cache is what the model's launches look up."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from antlm_fast.cli import main

ROOT = Path(__file__).parents[1]
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
compiles = pytest.mark.skipif(
    find_spec("triton") is None or INTERPRETED,
    reason="there are no compiled kernels under TRITON_INTERPRET=1" if INTERPRETED else "triton is not installed",
)
needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
KERNELS = ["forward_kernel", "delta_kernel", "dq_kernel", "dkdv_kernel"]
# the model's settings, and how prime is told of them
MODELS = {
    "demo": ("BabyLlama", "hidden_size=128, num_attention_heads=4", "bfloat16", ["--recipe", "demo"]),
    "demo, float32": (
        "BabyLlama",
        "hidden_size=128, num_attention_heads=4",
        "float32",
        ["--recipe", "demo", "--precision", "float32"],
    ),
    "relative positions and dropout": (
        "LtgBert",
        "hidden_size=128, num_attention_heads=2",
        "bfloat16",
        ["--recipe", "antlm-ltgbert-xs"],
    ),
    "one head for two of 40": (
        "BabyLlama",
        "hidden_size=80, num_attention_heads=2, num_key_value_heads=1",
        "bfloat16",
        ["--head-dim", "40", "--heads", "2", "--kv-heads", "1"],
    ),
}


def in_new_process(arguments: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", *arguments],
        cwd=ROOT,
        env=os.environ | {"TRITON_CACHE_DIR": str(cache), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def primed(cache: Path, *arguments: str) -> list[str]:
    """Runs `antlm-fast prime` in a new process; returns its lines."""
    done = in_new_process(["-m", "antlm_fast.cli", "prime", *arguments], cache)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def entries(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/__grp__*.json"))


@compiles
def test_priming_compiles_each_kernel_once(tmp_path: Path) -> None:
    for how, counts in (("compiled", "4 compiled, 0 were there"), ("was there", "0 compiled, 4 were there")):
        lines = primed(tmp_path, "--arch", "90", "--recipe", "demo")
        rows = [re.fullmatch(r"sm_90 +(\w+) +[0-9.]+ s  (.+)", line) for line in lines[:-1]]
        assert [row and row.groups() for row in rows] == [(kernel, how) for kernel in KERNELS]
        assert lines[-1].startswith(f"4 kernels in {tmp_path}: {counts}, ")
        assert len(entries(tmp_path)) == 4
    lines = primed(tmp_path, "--arch", "sm_90", "--arch", "80", "--recipe", "demo")
    assert [line.split()[0] for line in lines] == ["sm_90"] * 4 + ["sm_80"] * 4 + ["8"]
    assert lines[-1].startswith(f"8 kernels in {tmp_path}: 4 compiled, 4 were there, ")


STEPS = """
import contextlib, sys
from pathlib import Path
import torch
from triton.runtime.jit import JITFunction
from antlm_fast.kernels.attention import api, attention_varlen, triton_launches
from antlm_fast.kernels.native import library
from antlm_fast.kernels.triton_support.offline import standing_in, target
from antlm_fast.models import {model}, {model}Config
from antlm_fast.types import Objective, PackedBatch

# as on the GPU, but for the launch itself
api.unavailable_reason = lambda device_type: None
library._loaded = lambda: "the C++ kernels are the CPU's"
triton_launches.arch_of = lambda device: "sm_90"
launched, run = [], JITFunction.run
def look_up(self, *arguments, grid, warmup, **named):
    launched.append(self.fn.__name__)
    return run(self, *arguments, grid=grid, warmup=True, **named)
JITFunction.run = look_up
entries = lambda: len(list(Path(sys.argv[1]).glob("*/__grp__*.json")))

model = {model}({model}Config(vocab_size=50, num_hidden_layers=2, intermediate_size=32, {settings}))
autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled={precision!r} == "bfloat16")
before = entries()
with standing_in(target("90")):
    for lengths in ([7, 64, 1, 33], [16] * 16, [129], [1]):
        starts = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        for prefix in (0, 2**31 - 1):
            batch = PackedBatch(
                input_ids=torch.randint(50, (sum(lengths),)), cu_seqlens=starts, max_seqlen=max(lengths),
                prefix_len=torch.full((len(lengths),), prefix, dtype=torch.int32),
                labelled={{Objective.CLM: torch.arange(sum(lengths))}},
                targets={{Objective.CLM: torch.randint(50, (sum(lengths),))}},
            )
            with autocast():
                loss = model.loss_sums(batch)[Objective.CLM]
            loss.backward()
    model.eval()
    for causal in (True, False, torch.tensor(True), torch.tensor([True, False, True])):
        with torch.inference_mode(), autocast():
            model(torch.randint(50, (3, 19)), causal=causal)
    after = entries()
    # a kernel that was not primed would have been seen
    q, starts = torch.ones(8, 2, 16), torch.tensor([0, 8], dtype=torch.int32)
    attention_varlen(q, q, q, starts, starts, 8, 8, causal=True, dropout_p=0.5, impl="triton")
print(len(launched), sorted(set(launched)), before, after - before, entries() - after)
"""


@compiles
@pytest.mark.parametrize("name", MODELS)
def test_the_models_own_launches_find_what_was_primed(tmp_path: Path, name: str) -> None:
    """Other lengths, batches, numbers of sequences and flags than the ones that were compiled with."""
    model, settings, precision, arguments = MODELS[name]
    there = len(primed(tmp_path, "--arch", "90", *arguments)) - 1
    code = STEPS.format(model=model, settings=settings, precision=precision)
    done = in_new_process(["-c", code, str(tmp_path)], tmp_path)
    # 8 steps of 2 layers and 4 kernels, 4 evaluations of 2 layers, and the one call that was not primed
    launches = 8 * 2 * 4 + 4 * 2 + 1
    assert there == (5 if model == "LtgBert" else 4)  # evaluation drops nothing
    assert done.stdout.strip() == f"{launches} {sorted(KERNELS)} {there} 0 1", done.stderr


@compiles
def test_the_gpu_that_is_there_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget

    from antlm_fast.kernels.triton_support.offline import standing_in
    from antlm_fast.prime import prime, sizes_of
    from antlm_fast.recipes import get_recipe

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device=None: (8, 7))
    monkeypatch.setattr("antlm_fast.prime.unavailable_reason", lambda device_type: None)
    with standing_in(GPUTarget("cuda", 87, 32)):  # with no row of its own in the table of tiles
        first = next(prime(sizes_of(get_recipe("demo"))))
    assert (first.arch, first.name, first.compiled) == ("sm_87", "forward_kernel", True)


@needs_triton
def test_sizes_are_the_recipes() -> None:
    from antlm_fast.prime import AttentionSizes, sizes_of
    from antlm_fast.recipes import get_recipe

    config = get_recipe("antlm-babyllama")
    assert sizes_of(config) == AttentionSizes(head_dim=64, heads=8, kv_heads=8, dtype=torch.bfloat16)
    assert sizes_of(config, "float32").dtype == torch.float32
    assert sizes_of(get_recipe("ltgbert")) == AttentionSizes(
        head_dim=64, heads=6, kv_heads=6, dtype=torch.bfloat16, dropout=True, bucket_size=32
    )


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["prime", *arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert told.err.count("\n") == 1
    return told.err.removeprefix("antlm-fast: ").strip()


@compiles
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--arch", "70"], "arch must be one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942; got 70"),
        (
            ["--arch", "90", "--arch", "x"],
            "arch must be one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942; got x",
        ),
        ([], "arch must be given where there is no GPU, such as --arch 90 (among sm_80, "),
        (["--arch", "90", "--recipe", "demmo"], "recipe must be a known name; got 'demmo', the nearest are demo"),
        (["--arch", "90", "--config", "no.toml"], "config file no.toml does not exist"),
        (["--arch", "90", "--recipe", "demo", "--head-dim", "64"], "must be given one at a time"),
        (["--arch", "90", "--head-dim", "0", "--heads", "2"], "head_dim must be from 1 to 256"),
        (["--arch", "90", "--head-dim", "320", "--heads", "2"], "head_dim must be from 1 to 256"),
        (["--arch", "90", "--head-dim", "64"], "--heads must be given with --head-dim"),
        (["--arch", "90", "--heads", "4"], "must come with --head-dim"),
        (
            ["--arch", "90", "--head-dim", "64", "--heads", "3", "--kv-heads", "2"],
            "heads must be a multiple of kv_heads 2",
        ),
    ],
)
def test_bad_arguments_are_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: list[str], message: str
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert message in fails(capsys, *arguments)


def test_without_triton_it_says_how_to_get_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None; from antlm_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    done = in_new_process(["-c", code, "prime", "--arch", "90"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "antlm-fast: prime needs triton: pip install '.[gpu]' in antlm_fast's checkout\n"


@needs_triton
def test_without_a_home_folder_a_folder_named_tilde_is_made(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("antlm_fast.prime.cache_folder", lambda: Path("~/.triton/cache"))
    assert fails(capsys, "--arch", "90").endswith(
        "TRITON_CACHE_DIR must be set where the user has no home folder; got none"
    )


@needs_triton
def test_interpreted_kernels_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    done = in_new_process(["-m", "antlm_fast.cli", "prime", "--arch", "90"], tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        "antlm-fast: TRITON_INTERPRET must not be set: interpreted kernels are never compiled; got 1\n"
    )


@compiles
def test_a_cache_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = in_new_process(["-m", "antlm_fast.cli", "prime", "--arch", "90", "--recipe", "demo"], tmp_path / "file")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert str(tmp_path / "file") in done.stderr
