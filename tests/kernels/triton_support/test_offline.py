"""Kernels compiled for GPUs that are not there: the right binary per target, and nothing left behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("there are no compiled kernels under TRITON_INTERPRET=1", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from antlm_fast.kernels.triton_support.offline import TARGETS, compile_offline, standing_in, target  # noqa: E402


@triton.jit
def scale_rows(x_ptr, out_ptr, factor, count, extra_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at, mask=at < count)
    if extra_ptr is not None:
        x += tl.load(extra_ptr + at, mask=at < count)
    tl.store(out_ptr + at, x * factor, mask=at < count)


def arguments(**changes):
    x = torch.empty(1024, device="meta")
    return {"x_ptr": x, "out_ptr": x, "factor": 2.0, "count": 1000, "extra_ptr": None, "BLOCK": 256, **changes}


def compiled_for(arch, **changes):
    return compile_offline(scale_rows, arguments(**changes), target(arch), num_warps=4, num_stages=1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Triton's cache of this test alone."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    return tmp_path


def entries(folder):
    return sorted(
        str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.suffix in (".cubin", ".hsaco")
    )


@pytest.mark.parametrize(("name", "arch"), [("90", 90), ("sm_90", 90), ("sm_120", 120), ("gfx942", "gfx942")])
def test_a_target_by_its_name(name, arch):
    assert target(name).arch == arch
    assert target(name).warp_size == (64 if name == "gfx942" else 32)


@pytest.mark.parametrize("name", ["70", "sm90", "gfx90a", "", "sm_sm_90"])
def test_an_unknown_architecture_is_named_beside_the_known_ones(name):
    with pytest.raises(ValueError) as caught:
        target(name)
    assert str(caught.value) == (f"arch must be one of sm_80, sm_86, sm_89, sm_90, sm_100, sm_120, gfx942; got {name}")


def test_two_targets_give_two_binaries_and_one_target_one(own_cache):
    first, second, again = compiled_for("80"), compiled_for("90"), compiled_for("80")
    assert first.asm["cubin"] == again.asm["cubin"] != second.asm["cubin"]
    assert (".target sm_80" in first.asm["ptx"], ".target sm_90" in second.asm["ptx"]) == (True, True)
    assert len(entries(own_cache)) == 2


def test_every_target_compiles(own_cache):
    for arch, expected in TARGETS.items():
        assert compiled_for(arch).metadata.target == expected
    assert len(entries(own_cache)) == len(TARGETS)


def test_arguments_choose_the_specialisation_as_in_a_launch(own_cache):
    extra = torch.empty(1024, device="meta")
    texts = {
        compiled_for("80", **changes).asm["ttir"]
        for changes in (
            {},
            {"count": 1008},
            {"count": 1},
            {"extra_ptr": extra},
            {"extra_ptr": extra[1:]},
            {"BLOCK": 128},
        )
    }
    assert len(texts) == 6
    assert compiled_for("80", count=1001).hash == compiled_for("80").hash


def test_the_device_caches_and_the_driver_are_as_before():
    scale_rows.device_caches.clear()
    state = dict(vars(driver))
    compiled_for("90")
    assert len(scale_rows.device_caches) == 0
    assert vars(driver) == state
    with pytest.raises(Exception, match="BLOCK|arange"):
        compiled_for("90", BLOCK=100)
    assert len(scale_rows.device_caches) == 0
    assert vars(driver) == state


def test_a_launch_after_an_offline_compile_for_another_gpu_looks_up_its_own(own_cache):
    """What a real device 0 would do: its first lookup asks the driver for the target and compiles for it."""
    compiled_for("80")
    x = torch.empty(1024)
    with standing_in(target("90")):
        launched = scale_rows.warmup(
            x, x, 2.5, 1001, None, 256, grid=(7,), num_warps=4, num_stages=1, enable_fp_fusion=True
        )
    scale_rows.device_caches.clear()
    assert launched.metadata.target.arch == 90
    # tensors that exist, by position: the same entry
    assert launched.hash == compiled_for("90").hash
    assert len(entries(own_cache)) == 2


def test_a_function_that_is_not_compiled_is_refused():
    with pytest.raises(TypeError, match="kernel must be a compiled function of triton.jit; got builtin_function"):
        compile_offline(len, {}, target("80"), num_warps=4, num_stages=1)


SECOND_PROCESS = """
import sys, triton
from importlib.util import module_from_spec, spec_from_file_location
spec = spec_from_file_location("again", sys.argv[1])
test = module_from_spec(spec)
spec.loader.exec_module(test)
seen = []
triton.knobs.compilation.listener = lambda *, cache_hit, **rest: seen.append(cache_hit)
compiled = [test.compiled_for(arch) for arch in sys.argv[2:]]
print(seen, [kernel.hash for kernel in compiled])
"""


def test_a_second_process_compiles_nothing_new(own_cache):
    if not hasattr(triton, "knobs"):
        pytest.skip("this Triton has no compilation listener")
    hashes = [compiled_for("80").hash, compiled_for("90").hash]
    before = entries(own_cache)
    done = subprocess.run(
        [sys.executable, "-c", SECOND_PROCESS, __file__, "80", "90", "86"],
        capture_output=True,
        text=True,
        check=False,
    )
    seen, found = done.stdout.strip().split("] ")
    assert seen == "[True, True, False", done.stderr
    assert all(name in found for name in hashes)
    new = set(entries(own_cache)) - set(before)
    assert len(new) == 1
