"""The gate of compiled kernels: today's kernels pass it, and every fault it is there for is reported."""

import copy
import importlib
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "benchmarks"
MODULES = ("aot", "aot_compile", "aot_report", "peers", "peers.plain_flash_attention", "sass", "variants")


@pytest.fixture(scope="module", autouse=True)
def benchmarks():
    """The folder is a place of scripts, not a package: its modules are importable only here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        yield
    for name in MODULES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def gate():
    return importlib.import_module("aot")


@pytest.fixture(scope="module")
def report():
    return importlib.import_module("aot_report")


@pytest.fixture(scope="module")
def compiling(gate):
    """What compiles, where anything can be compiled."""
    if reason := gate.cannot_compile():
        pytest.skip(reason)
    return importlib.import_module("aot_compile")


@pytest.fixture
def table(gate, report):
    """The checked-in table, where it speaks of the installed compiler."""
    found = report.read_table()
    installed = gate._version("triton")
    if found["triton"] != installed:
        pytest.skip(f"the table was made with Triton {found['triton']}; {installed} is installed")
    return found


NAME = "sm_90 half 64 dq"


def row(**changes):
    loops = [{"instructions": 500, "mma": 16}, {"instructions": 700, "mma": 16, "stl": 1}]
    return {
        "tile": [128, 64, 4, 2],
        "registers": 255,
        "stack_bytes": 8,
        "spill_store_bytes": 8,
        "spill_load_bytes": 16,
        "instructions": 2000,
        "loops": loops,
        "shared_bytes": 65536,
        **changes,
    }


def with_loop(at, **changes):
    changed = copy.deepcopy(row())
    changed["loops"][at] |= changes
    return changed


def amd_row(**changes):
    kept = {name: value for name, value in row().items() if not name.startswith("spill")}
    return {**kept, "loops": [], "mma": 192, "vgpr_spills": 2, "sgpr_spills": 0, **changes}


def judged(gate, was, now, name=NAME):
    return gate.judge({"rows": {} if was is None else {name: was}}, {name: now}, {})


@pytest.mark.parametrize("now", [row(), row(registers=200, stack_bytes=0), with_loop(0, instructions=515)])
def test_the_same_less_or_a_little_more_instructions_pass(gate, now):
    assert judged(gate, row(), now) == []


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (row(spill_store_bytes=12), "spill_store_bytes was 8, is 12"),
        (row(spill_load_bytes=20), "spill_load_bytes was 16, is 20"),
        (row(stack_bytes=16), "stack_bytes was 8, is 16"),
        (row(shared_bytes=65552), "shared_bytes was 65536, is 65552"),
        (with_loop(0, instructions=516), "instructions of loop 1 was 500, is 516"),
        (with_loop(1, instructions=722), "instructions of loop 2 was 700, is 722"),
        (with_loop(1, mma=8), "mma of loop 2 was 16, is 8"),
        ({"tile": [128, 64, 4, 2], "error": "RuntimeError: no"}, "compiled, does not any more: RuntimeError: no"),
    ],
)
def test_every_growth_is_a_line(gate, now, said):
    assert f"{NAME}: {said}" in judged(gate, row(), now)


def test_a_row_or_a_main_loop_that_is_missing_is_a_line(gate):
    assert judged(gate, None, row()) == [f"{NAME}: row was missing from the table, is there"]
    one_loop = row(loops=row()["loops"][:1])
    assert judged(gate, row(), one_loop) == [
        f"{NAME}: main loops must be 2; got 1",
        f"{NAME}: main loops was 2, is 1",
    ]


@pytest.mark.parametrize(
    ("now", "said"),
    [
        (amd_row(vgpr_spills=3), "vgpr_spills was 2, is 3"),
        (amd_row(instructions=2061), "instructions of loop 1 was 2000, is 2061"),
        (amd_row(mma=193), "mma of loop 1 was 192, is 193"),
    ],
)
def test_amd_is_judged_by_its_whole_program(gate, now, said):
    assert judged(gate, amd_row(), amd_row(registers=512), "gfx942 half 64 dq") == []
    assert judged(gate, amd_row(), now, "gfx942 half 64 dq") == [f"gfx942 half 64 dq: {said}"]


@pytest.mark.parametrize(
    ("name", "now", "said"),
    [
        ("sm_80 half 128 forward", row(), "must not spill; got 24 bytes"),
        ("sm_90 half 64 forward float16", row(), "must not spill; got 24 bytes"),
        ("sm_86 half 64 dq", row(shared_bytes=101377), "shared_bytes must be at most 101376; got 101377"),
        ("sm_80 half 64 dq", row(shared_bytes=166913), "shared_bytes must be at most 166912; got 166913"),
        ("sm_100 half 64 dq", row(shared_bytes=232449), "shared_bytes must be at most 232448; got 232449"),
        ("gfx942 half 64 dq", amd_row(shared_bytes=65537), "shared_bytes must be at most 65536; got 65537"),
        ("sm_90 half 64 dq", row(registers=256), "registers must be at most 255; got 256"),
        ("sm_90 half 64 dq", {"error": "RuntimeError: no"}, "must compile; got RuntimeError: no"),
    ],
)
def test_rules_hold_whatever_the_table_says(gate, name, now, said):
    assert judged(gate, now, now, name) == [f"{name}: {said}"]


def test_amd_may_refuse_a_kernel_as_the_table_says_and_a_repair_is_noted(gate, report):
    name, refused = "gfx942 half 256 dq", {"tile": [64, 32, 8, 1], "error": "RuntimeError: no"}
    table = {"triton": gate._version("torch"), "rows": {name: refused}}
    assert judged(gate, refused, refused, name) == judged(gate, refused, amd_row(), name) == []
    said = "\n".join(gate.notes(table, {name: refused}, {name}))
    assert f"{name} does not compile: RuntimeError: no" in said
    assert "made with Triton" in said
    assert "rewritten" not in said
    assert "1 rows have another tile" in "\n".join(gate.notes(table, {name: amd_row()}, {name}))
    assert "1 rows shrank" in "\n".join(gate.notes(table, {name: amd_row()}, {name}))
    assert "not shipped any more" in "\n".join(gate.notes(table, {}, set()))
    assert report.shrunk(NAME, row(), row(spill_load_bytes=0))
    assert report.shrunk(NAME, row(), with_loop(0, instructions=400))
    assert not report.shrunk(NAME, row(), row())


def compared(ours=500, causal=500, full=500, spills=(0, 0, 0)):
    kinds = ("ours", "constexpr causal", "constexpr full")
    return {
        name: {"unmasked": count, "masked": 700, "registers": 255, "spill_bytes": spill}
        for name, count, spill in zip(kinds, (ours, causal, full), spills, strict=True)
    }


def test_visibility_as_data_may_cost_three_percent_and_no_spill(gate):
    def said(row):
        return gate.judge({"rows": {}}, {}, {NAME: row})

    assert said(compared(ours=515, spills=(8, 0, 8))) == []
    assert said(compared(ours=516, causal=600)) == [
        f"{NAME}: unmasked loop must be at most 1.03 of the constexpr kernel's; got 1.032"
    ]
    assert said(compared(spills=(12, 4, 8))) == [f"{NAME}: spill_bytes must be at most 8, as constexpr; got 12"]
    assert said({"tile": [128, 64, 4, 2], "error": "ValueError: no"}) == [
        f"{NAME}: must be compared; got ValueError: no"
    ]
    assert said(compared(full=None)) == [f"{NAME}: main loops must be found in our kernel and in the constexpr ones"]


def test_a_table_survives_the_file_a_row_a_line(report, tmp_path):
    table = {
        "triton": "3.9.0",
        "torch": "2.13.0",
        "date": "2026-01-31",
        "rows": {NAME: row(), "sm_90 half 64 delta": row(loops=[])},
        "comparison": {},
    }
    path = tmp_path / "table.json"
    report.write_table(table, path)
    assert report.read_table(path) == table
    assert any(NAME in line and line.endswith("},") for line in path.read_text(encoding="utf-8").splitlines())
    merged = report.merged(table["rows"], {"new": row(), NAME: row(registers=1)}, ["new", NAME, "absent"])
    assert list(merged) == ["new", NAME]
    assert merged[NAME]["registers"] == 1


def test_markdown_names_the_unmasked_loop_first(report):
    plain = {f"plain {name}": None for name in ("causal", "causal loop", "full")}
    rows = {
        NAME: row(),
        "sm_90 half 64 dkdv": row(loops=row()["loops"][::-1]),
        "sm_90 half 16 dq": row(),
        "sm_90 tf32 64 dq": row(),
        "gfx942 half 64 dq": amd_row(),
        "gfx942 half 128 dq": {"tile": [64, 64, 8, 2], "error": "RuntimeError: no"},
    }
    table = {"triton": "3.9.0", "torch": "2.13.0", "date": "2026-01-31", "rows": rows}
    table["comparison"] = {NAME: {"tile": [128, 64, 4, 2], **compared(ours=510, spills=(8, 8, 8)), **plain}}
    lines = list(report.markdown(table))
    assert "| sm_90 | 64 | dq | 128 x 64, 4, 2 | 255 | 24 | 64.0 | 500 | 700 | 16 / 16 |" in lines
    assert "| sm_90 | 64 | dkdv | 128 x 64, 4, 2 | 255 | 24 | 64.0 | 500 | 700 | 16 / 16 |" in lines
    assert "| gfx942 | 64 | dq | 128 x 64, 4, 2 | 255 | 2 registers | 64.0 | - | - | 192 |" in lines
    assert "| sm_90 | 64 | dq | 128 x 64, 4, 2 | 510 (8) | 500 (8) | 500 (8) | - | - | - | 1.020 |" in lines
    assert not any("| 16 | dq" in line or "tf32" in line for line in lines)
    assert all(line.count("|") in (0, 11, 12) for line in lines)


def test_without_triton_it_says_so_in_a_line(gate, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert gate.main([]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert "triton must be installed" in said


def test_an_unknown_choice_is_refused(gate, compiling, capsys):
    with pytest.raises(SystemExit) as stopped:
        gate.main(["--archs", "sm_70"])
    assert stopped.value.code == 2
    assert "--archs must be among sm_80, " in capsys.readouterr().err


def test_every_shipped_configuration_is_there_once(compiling):
    names = [config.name for config in compiling.configurations()]
    assert len(names) == len(set(names))
    assert {"sm_90 half 64 forward dropout", "gfx942 ieee 256 dkdv", "sm_80 half 80 dq"} < set(names)
    assert {"sm_100 half 128 dkdv float16", "sm_120 tf32 16 forward", "sm_89 ieee 32 delta"} < set(names)
    assert {
        "sm_90 half 64 dkdv relative dropout",
        "gfx942 half 32 dq relative",
        "sm_80 ieee 64 forward relative",
    } < set(names)
    assert not any(name.startswith("gfx942 tf32") for name in names)
    assert len(compiling.comparison_cases()) == 6 * 2 * 3
    float16 = compiling.launch_of(compiling.Config("sm_90", "half", 64, "forward", "float16"))
    assert str(float16.arguments["q_ptr"].dtype) == "torch.float16"
    dropout = compiling.launch_of(compiling.Config("sm_90", "half", 64, "forward", "dropout"))
    assert dropout.arguments["DROPOUT"] is True
    assert dropout.arguments["c2p_ptr"] is None
    relative = compiling.launch_of(compiling.Config("sm_90", "half", 64, "dq", "relative dropout"))
    assert relative.arguments["DROPOUT"] is True
    assert relative.arguments["TABLE_ROWS"] == 64


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_todays_kernels_hold(gate, compiling, table, arch):
    configs = [compiling.Config(arch, "half", 64, kernel) for kernel in ("forward", "dq", "dkdv")]
    assert gate.judge(table, {config.name: compiling.row_of(config) for config in configs}, {}) == []


def test_a_planted_spill_is_reported(gate, compiling):
    """As many accumulators as before in a quarter of the threads."""
    config = compiling.Config("sm_90", "half", 64, "forward")
    launch = compiling.launch_of(config)
    was = compiling.resources_of(launch, config.arch)
    now = compiling.resources_of(replace(launch, tile=replace(launch.tile, num_warps=1)), config.arch)
    assert now["spill_store_bytes"] > was["spill_store_bytes"]
    said = "\n".join(judged(gate, was, now, config.name))
    assert f"{config.name}: must not spill; got" in said
    assert f"{config.name}: spill_store_bytes was {was['spill_store_bytes']}, is {now['spill_store_bytes']}" in said


def test_what_does_not_compile_is_a_row_with_its_reason(compiling, monkeypatch):
    config = compiling.Config("gfx942", "half", 64, "delta")
    launch = compiling.launch_of(config)
    monkeypatch.setattr(compiling, "launch_of", lambda config: replace(launch, tile=replace(launch.tile, block_m=48)))
    found = compiling.row_of(config)
    assert found["tile"][0] == 48
    assert "power of 2" in found["error"]
    assert "\n" not in found["error"]
    assert "/" not in found["error"]


def test_the_compilers_first_complaint_is_the_reason(compiling):
    stderr = "<unknown>:0: error: width must be 8; got 1\nmodule {}\n/a/b.py:1:1: error: Failures were detected\n"
    said = compiling.one_line(RuntimeError("PassManager::run failed"), stderr)
    assert said == "RuntimeError: PassManager::run failed: width must be 8; got 1"
    assert compiling.one_line(ValueError("at 1:2:\n  x\n  ^\nmust be in /a/b/c.py\n")) == "ValueError: must be in c.py"
    assert compiling.one_line(ValueError()) == "ValueError: no message"


def test_visibility_as_data_costs_the_loop_of_a_constant_on_sm_90(gate, compiling, report):
    config = compiling.Config("sm_90", "half", 64, "forward")
    found = compiling.comparison_of(config)
    assert gate.judge({"rows": {}}, {}, {config.name: found}) == []
    assert report.ratio(found) <= 1.03
    assert found["ours"]["unmasked"] < found["ours"]["masked"]
    # a lone loop without a mask is the plain kernel's when it is bidirectional
    assert found["plain full"]["masked"] is None
    assert found["plain causal loop"]["masked"] is not None


def test_the_command_writes_a_table_that_it_then_holds_to(gate, compiling, report, monkeypatch, tmp_path, capsys):
    path = tmp_path / "table.json"
    options = ["--archs", "sm_80", "--kinds", "ieee", "--head-dims", "16", "--kernels", "delta", "--workers", "1"]
    options += ["--table", str(path)]
    assert gate.main([*options, "--write"]) == 0
    table = report.read_table(path)
    assert list(table["rows"]) == ["sm_80 ieee 16 delta"]
    # what follows compiles in this process: one start of a worker is enough
    monkeypatch.setattr(gate, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(workers))
    assert gate.main(options) == 0
    report.write_table({**table, "rows": {}}, path)
    capsys.readouterr()
    assert gate.main(options) == 1
    assert "FAIL sm_80 ieee 16 delta: row was missing" in capsys.readouterr().out
    assert gate.main(["--markdown", "--table", str(path)]) == 0
    assert f"Triton {gate._version('triton')}" in capsys.readouterr().out


def test_interpreting_is_no_compiling(gate, monkeypatch, capsys):
    pytest.importorskip("triton")
    monkeypatch.setitem(os.environ, "TRITON_INTERPRET", "1")
    assert gate.main([]) == 2
    assert "TRITON_INTERPRET" in capsys.readouterr().err


def test_with_another_triton_what_neither_compiles_nor_fits_fails(gate, compiling, monkeypatch, capsys):
    configs = list(compiling.configurations(("sm_80",), ("half",), (64,), ("forward",)))[:3]
    answers = [{"shared_bytes": 166912}, {"shared_bytes": 166913}, {"error": "CompilationError: None"}]
    rows = {config.name: answer for config, answer in zip(configs, answers, strict=True)}
    monkeypatch.setattr(
        gate, "_compiled", lambda pool, work, chosen, what: {one.name: rows[one.name] for one in chosen}
    )
    assert gate.compiles(configs[:1], 1) == 0
    assert capsys.readouterr().out.endswith(": sm_80 1 of 1\n")
    assert gate.compiles(configs, 1) == 1
    *failures, counts = capsys.readouterr().out.splitlines()
    assert failures == [
        f"FAIL {configs[1].name} takes 166913 bytes of shared memory; 166912 are there",
        f"FAIL {configs[2].name} does not compile: CompilationError: None",
    ]
    assert counts.endswith(": sm_80 1 of 3")
