"""Instructions per loop, counted by hand on a few lines of SASS and on a kernel whose MMAs are known."""

import importlib
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def sass():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield importlib.import_module("sass")
    sys.modules.pop("sass", None)


def listing(lines):
    """SASS as nvdisasm prints it: a label ends with a colon, the rest are instructions."""
    text = ['\t.section\t.text.kernel,"ax",@progbits', "kernel:", ".text.kernel:"]
    for at, line in enumerate(part.strip() for part in lines.strip().splitlines()):
        text.append(line if line.endswith(":") else f"        /*{at * 16:04x}*/                   {line} ;")
    return "\n".join(text)


def loop(instructions, mma=0, ffma=0, ldl=0, stl=0):
    return {"instructions": instructions, "mma": mma, "ffma": ffma, "ldl": ldl, "stl": stl}


def test_two_loops_in_a_row_with_spills_and_padding(sass):
    found = sass.sass_counts(
        listing(
            """MOV R1, c[0x0][0x28]
            STL.64 [R1], R4
            .L_x_0:
            HMMA.16816.F32.BF16 R4, R68.reuse, R2, R4
            LDL.128 R8, [R1+0x8]
            NOP
            @!P0 BRA `(.L_x_0)
            .L_x_1:
            FFMA R0, R1, R2, R3
            HGMMA.64x64x16.F32.BF16 R24, gdesc[UR12].tnspB, R24, gsb0
            IMMA.16832.S8.S8 R4, R68, R2, R4
            STL [R1+0x10], R4
            @P1 EXIT
            BRA `(.L_x_1)
            EXIT
            .L_x_2:
            BRA `(.L_x_2)
            NOP
            NOP
            .L_x_3:"""
        )
    )
    assert found == {
        "spill_store_bytes": 12,
        "spill_load_bytes": 16,
        "instructions": 13,
        "loops": [loop(4, mma=1, ldl=1), loop(6, mma=2, ffma=1, stl=1)],
    }


def test_the_waits_of_a_tensor_memory_loop_are_not_loops_of_their_own(sass):
    """One wait spins in place; the other was moved behind the EXIT and branches back into the loop."""
    found = sass.sass_counts(
        listing(
            """.L_x_0:
            UTCATOMSWS.FIND_AND_SET.ALIGN UP0, UR6, UR5
            BRA.U !UP0, `(.L_x_0)
            .L_x_1:
            UTCHMMA gdesc[UR8], gdesc[UR10], tmem[UR19], tmem[UR16], idesc[UR17], UPT
            SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR22], R12
            @!P4 BRA `(.L_x_3)
            .L_x_2:
            UTCQMMA gdesc[UR8], gdesc[UR10], tmem[UR19], tmem[UR16], idesc[UR17], UPT
            .L_x_5:
            SYNCS.PHASECHK.TRANS64.TRYWAIT P5, [UR23], R12
            @!P5 BRA `(.L_x_5)
            MUFU.EX2 R3, R3
            @!P3 BRA `(.L_x_1)
            EXIT
            .L_x_3:
            SYNCS.PHASECHK.TRANS64.TRYWAIT P4, [UR22], R12
            @!P4 BRA `(.L_x_3)
            BRA `(.L_x_2)
            .L_x_4:
            BRA `(.L_x_4)"""
        )
    )
    # six in place, and the branch back from the slow path
    assert found["loops"] == [loop(2), loop(7, mma=2)]
    assert found["instructions"] == 14


def test_only_the_innermost_loop_with_mmas_counts(sass):
    found = sass.sass_counts(
        listing(
            """.L_x_0:
            HMMA.16816.F32 R4, R68, R2, R4
            .L_x_1:
            DMMA.884 R4, R68, R2, R4
            .L_x_2:
            LDG.E R0, [R2.64]
            @P0 BRA `(.L_x_2)
            @P1 BRA `(.L_x_1)
            @P2 BRA `(.L_x_0)
            EXIT"""
        )
    )
    assert found["loops"] == [loop(4, mma=1)]


def test_without_mmas_the_ffmas_of_full_precision_take_their_place(sass):
    found = sass.sass_counts(
        listing(
            """.L_x_0:
            FFMA R0, R1, R2, R3
            FFMA2 R4, R6, R8, R10
            BSSY B0, `(.L_x_2)
            @P0 BRA `(.L_x_1)
            IADD3 R4, R4, 0x1, RZ
            BSYNC B0
            .L_x_1:
            BSYNC B0
            .L_x_2:
            @P2 BRA `(.L_x_0)
            EXIT"""
        )
    )
    assert found["loops"] == [loop(8, ffma=2)]


AMD = """
\tv_mov_b32_e32 v0, 0
.LBB0_1:
\tv_mfma_f32_32x32x8_bf16_1k a[0:15], v[0:1], v[2:3], a[0:15]
\ts_cbranch_scc1 .LBB0_1
\ts_endpgm
\t.section\t.rodata,"a",@progbits
amdhsa.kernels:
  - .agpr_count:     16
    .private_segment_fixed_size: 8
    .sgpr_count:     28
    .sgpr_spill_count: 1
    .vgpr_count:     92
    .vgpr_spill_count: 2
"""


def test_amd_tells_its_resources_in_the_assembly(sass):
    compiled = SimpleNamespace(asm={"amdgcn": AMD}, metadata=SimpleNamespace(shared=12288))
    assert sass.resources(compiled) == {
        "registers": 92,
        "agprs": 16,
        "sgprs": 28,
        "vgpr_spills": 2,
        "sgpr_spills": 1,
        "stack_bytes": 8,
        "shared_bytes": 12288,
        "instructions": 4,
        "mma": 1,
        "loops": [],
    }


@pytest.fixture(scope="module")
def compile_matmul(tmp_path_factory):
    """A product of two tiles of a (64, k) and a (k, 64) matrix per turn, 4 warps."""
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("there are no compiled kernels under TRITON_INTERPRET=1")
    folder = tmp_path_factory.mktemp("matmul")
    (folder / "matmul.py").write_text(MATMUL)
    from antlm_fast.kernels.triton_support.offline import compile_offline, target

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(folder / "cache"))
        patch.syspath_prepend(str(folder))
        kernel = importlib.import_module("matmul").matmul

        def compiled(arch, dtype):
            x = torch.empty(64, 64, device="meta", dtype=dtype)
            arguments = {"a_ptr": x, "b_ptr": x, "c_ptr": x, "k_len": 64, "stride": 64, "BLOCK": 64, "BLOCK_K": 32}
            return compile_offline(kernel, arguments, target(arch), num_warps=4, num_stages=3)

        yield compiled
    sys.modules.pop("matmul", None)


MATMUL = """
import triton
import triton.language as tl


@triton.jit
def matmul(a_ptr, b_ptr, c_ptr, k_len, stride, BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    rows, inner = tl.arange(0, BLOCK), tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, k_len, BLOCK_K):
        a = tl.load(a_ptr + rows[:, None] * stride + start + inner[None, :])
        b = tl.load(b_ptr + (start + inner)[:, None] * stride + rows[None, :])
        acc = tl.dot(a, b, acc, input_precision="ieee")
    tl.store(c_ptr + rows[:, None] * stride + rows[None, :], acc)
"""


# 64 * 64 * 32 products per turn: a warp's m16n8k16 does 2048 of them, a thread's FFMA one; wgmma m64n64k16 does half,
# and so does a tcgen05.mma
@pytest.mark.parametrize(
    ("arch", "dtype", "mma", "ffma"),
    [
        ("80", torch.bfloat16, 16, 0),
        ("90", torch.bfloat16, 2, 0),
        ("100", torch.bfloat16, 2, 0),
        ("80", torch.float32, 0, 1024),
    ],
)
def test_a_matmul_has_one_loop_with_its_mmas(sass, compile_matmul, arch, dtype, mma, ffma):
    found = sass.resources(compile_matmul(arch, dtype))
    main = [each for each in found["loops"] if each["mma"] + each["ffma"] > 0]
    assert [(each["mma"], each["ffma"]) for each in main] == [(mma, ffma)]
    assert mma + ffma < main[0]["instructions"] < found["instructions"]
    assert (found["stack_bytes"], found["spill_store_bytes"], found["spill_load_bytes"]) == (0, 0, 0)
    assert 32 <= found["registers"] <= 255
    # two stages or more of a and b in flight
    assert found["shared_bytes"] >= 2 * 2 * 64 * 32 * dtype.itemsize


def test_amd_compiles_to_what_is_read(sass, compile_matmul):
    found = sass.resources(compile_matmul("gfx942", torch.bfloat16))
    assert found["mma"] > 0
    assert 0 < found["registers"] <= 512
    assert (found["vgpr_spills"], found["sgpr_spills"], found["stack_bytes"]) == (0, 0, 0)
