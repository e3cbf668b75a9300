"""What a compiled Triton kernel costs: registers, spills, shared memory, and the instructions of its main loops.

Nothing here runs a kernel. `resources` reads the binary with the disassembler that Triton's wheel brings along, so the
figures are facts of the binary; they are no times.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_LABEL = re.compile(r"^(\S+):")
_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]+\*/\s+(?:@(!?\w+)\s+)?([A-Z]\S*)\s*(.*?)\s*;")
_TARGET = re.compile(r"`\(([^)]+)\)")
_SECTION = re.compile(r"^\s*\.section\s+\.text\.")
# HMMA, IMMA, DMMA, QMMA, OMMA of a warp; HGMMA, IGMMA, QGMMA of four; UTCHMMA, UTCQMMA, UTCIMMA of tensor memory
_MMA = re.compile(r"^(UTC\w*|[A-Z]|[A-Z]G)MMA$")
_FFMA = re.compile(r"^FFMA2?$")
_LOCAL_WIDTH = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


@dataclass(frozen=True)
class Instruction:
    """One instruction of SASS; `guard` is its predicate, or None."""

    guard: str | None
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.split(".")[0]

    @property
    def target(self) -> str | None:
        found = _TARGET.search(self.operands)
        return found.group(1) if found else None

    @property
    def always(self) -> bool:
        """No predicate guards it, neither before the opcode nor, as in `BRA.U UP0, label`, among its operands."""
        return self.guard in (None, "PT", "UPT") and "," not in self.operands

    @property
    def local_bytes(self) -> int:
        """Bytes a thread moves between registers and local memory."""
        widths = [_LOCAL_WIDTH[part] for part in self.opcode.split(".") if part in _LOCAL_WIDTH]
        return widths[-1] if widths else 4


@dataclass
class Block:
    """Instructions that run one after another; `after` are the numbers of the blocks that may follow."""

    body: list[Instruction] = field(default_factory=list)
    after: list[int] = field(default_factory=list)


def resources(compiled: Any) -> dict[str, Any]:
    """Registers, spills, memory and instructions of one compiled kernel.

    For NVIDIA: registers (per thread), stack_bytes, spill_store_bytes and spill_load_bytes (per thread, each spilling
    instruction counted once, as ptxas reports them), shared_bytes (per program), instructions (without the padding and
    the trap behind the code) and loops, see `main_loops`.
    For AMD: registers (vector), agprs, sgprs, vgpr_spills and sgpr_spills (registers), stack_bytes, shared_bytes,
    instructions, mma; loops is empty.
    """
    shared = {"shared_bytes": compiled.metadata.shared}
    if "cubin" not in compiled.asm:
        return {**_amd_resources(compiled.asm["amdgcn"]), **shared}
    usage = _tool("cuobjdump", "-res-usage", cubin=compiled.asm["cubin"])
    # a kernel that calls no function has one entry; several are told apart by the kernel's name
    entry = re.search(rf"Function {re.escape(compiled.metadata.name)}:\s*REG:(\d+) STACK:(\d+)", usage)
    if entry is None:
        raise ValueError(f"cuobjdump must name {compiled.metadata.name}; got {usage}")
    return {
        "registers": int(entry.group(1)),
        "stack_bytes": int(entry.group(2)),
        **sass_counts(_tool("nvdisasm", "-c", cubin=compiled.asm["cubin"])),
        **shared,
    }


def sass_counts(text: str) -> dict[str, Any]:
    """Instructions, spilled bytes and loops of the output of `nvdisasm -c`."""
    blocks, code = blocks_of(text)
    return {
        "spill_store_bytes": sum(each.local_bytes for each in code if each.name == "STL"),
        "spill_load_bytes": sum(each.local_bytes for each in code if each.name == "LDL"),
        "instructions": len(code),
        "loops": main_loops(blocks),
    }


def main_loops(blocks: list[Block]) -> list[dict[str, int]]:
    """The innermost loops that do the work, in program order.

    A loop with MMAs counts where no loop inside it has any; a loop without counts where it contains no loop and lies in
    none that counts. In a kernel without MMAs, FFMA takes their place (dot products of IEEE fp32). A loop that only
    waits on a barrier is no loop here, and its instructions are not counted in the loop around it.

    Returns:
        One dict per loop: instructions, mma, ffma, ldl, stl (loads and stores of local memory: spills).
    """
    work = "mma" if any(_MMA.match(each.name) for block in blocks for each in block.body) else "ffma"
    loops = _natural_loops(blocks)
    counts = {header: _count(blocks, body) for header, body in loops.items()}
    waits = [
        body
        for header, body in loops.items()
        if counts[header][work] == 0 and any("PHASECHK" in each.opcode for at in body for each in blocks[at].body)
    ]
    waiting = frozenset().union(*waits)
    kept: list[frozenset[int]] = []
    # the smallest first: what lies in a loop is seen before the loop
    for header, body in sorted(loops.items(), key=lambda item: len(item[1])):
        if header in waiting and body in waits:
            continue
        inside = [other for other in loops if other != header and loops[other] < body and loops[other] not in waits]
        if counts[header][work] > 0:
            if not any(counts[other][work] for other in inside):
                kept = [other for other in kept if not other < body] + [body]
        elif not inside and not any(body < other for other in kept):
            kept.append(body)
    return [_count(blocks, body - waiting) for body in sorted(kept, key=min)]


def blocks_of(text: str) -> tuple[list[Block], list[Instruction]]:
    """Basic blocks with their successors, and all instructions but padding and traps, of `nvdisasm -c` output.

    Block 0 is empty and leads to the first block of every section. BSYNC, which ends a divergent part, falls through:
    ptxas puts it right before the place where the threads meet.
    """
    blocks, code, labels = [Block()], list[Instruction](), dict[str, int]()
    for section in _sections(text):
        blocks[0].after.append(len(blocks))
        blocks.append(Block())
        for item in section:
            if isinstance(item, str):
                if blocks[-1].body:
                    blocks.append(Block())
                labels[item] = len(blocks) - 1
                continue
            blocks[-1].body.append(item)
            code.append(item)
            if item.name in ("BRA", "JMP", "EXIT", "RET", "KILL", "WARPSYNC"):
                blocks.append(Block())
    starts = set(blocks[0].after)
    for at, block in enumerate(blocks[1:], 1):
        last = block.body[-1] if block.body else None
        targets: Iterable[str] = ()
        falls_through = True
        if last is not None and last.name in ("BRA", "JMP", "WARPSYNC"):
            targets = [last.target] if last.target else []
            falls_through = last.name == "WARPSYNC" or not last.always
        elif last is not None and last.name in ("EXIT", "RET", "KILL"):
            falls_through = last.guard is not None
        block.after = [labels[name] for name in targets if name in labels]
        if falls_through and at + 1 < len(blocks) and at + 1 not in starts:
            block.after.append(at + 1)
    return blocks, code


def _sections(text: str) -> Iterator[list[str | Instruction]]:
    """Labels and instructions of each code section; the trap `L: BRA L` and the NOPs at the end are left out."""
    section: list[str | Instruction] = []
    for line in [*text.splitlines(), ".section .text."]:
        if _SECTION.match(line):
            while section and (isinstance(section[-1], str) or section[-1].name == "NOP"):
                section.pop()
            if section:
                yield section
            section = []
        elif found := _LABEL.match(line):
            section.append(found.group(1))
        elif found := _INSTRUCTION.match(line):
            item = Instruction(*found.groups())
            trap = item.name == "BRA" and item.always and section and item.target == section[-1]
            if not trap:
                section.append(item)


def _natural_loops(blocks: list[Block]) -> dict[int, frozenset[int]]:
    """The blocks of each loop by its header: those that reach an edge back to it without leaving it.

    The text between a label and the branch back to it would not do: ptxas moves the slow path of a wait behind the
    last EXIT, and the branch back from there spans half the kernel.
    """
    before: list[list[int]] = [[] for _ in blocks]
    order: list[int] = []
    stack, seen = [0], {0}
    while stack:
        at = stack.pop()
        order.append(at)
        for to in blocks[at].after:
            before[to].append(at)
            if to not in seen:
                seen.add(to)
                stack.append(to)
    # bit i of dominators[b]: every path to block b leads through block i
    everything = sum(1 << at for at in order)
    dominators = dict.fromkeys(order, everything) | {0: 1}
    changed = True
    while changed:
        changed = False
        for at in order[1:]:
            new = everything
            for origin in before[at]:
                new &= dominators[origin]
            new |= 1 << at
            changed |= new != dominators[at]
            dominators[at] = new
    loops: dict[int, set[int]] = {}
    for origin in order:
        for header in blocks[origin].after:
            if dominators[origin] >> header & 1:
                body = loops.setdefault(header, {header})
                pending = [origin]
                while pending:
                    at = pending.pop()
                    if at not in body:
                        body.add(at)
                        pending += before[at]
    return {header: frozenset(body) for header, body in loops.items()}


def _count(blocks: list[Block], body: Iterable[int]) -> dict[str, int]:
    names = [each.name for at in body for each in blocks[at].body]
    return {
        "instructions": len(names),
        "mma": sum(_MMA.match(name) is not None for name in names),
        "ffma": sum(_FFMA.match(name) is not None for name in names),
        "ldl": names.count("LDL"),
        "stl": names.count("STL"),
    }


def _amd_resources(text: str) -> dict[str, Any]:
    def entry(name: str) -> int:
        found = re.search(rf"^\s*(?:- )?\.{name}:\s*(\d+)", text, re.MULTILINE)
        return int(found.group(1)) if found else 0

    names = re.findall(r"^\t([a-z]+_\w+)", text.split(".section", 1)[0], re.MULTILINE)
    return {
        "registers": entry("vgpr_count"),
        "agprs": entry("agpr_count"),
        "sgprs": entry("sgpr_count"),
        "vgpr_spills": entry("vgpr_spill_count"),
        "sgpr_spills": entry("sgpr_spill_count"),
        "stack_bytes": entry("private_segment_fixed_size"),
        "instructions": len(names),
        "mma": sum("mfma" in name for name in names),
        "loops": [],
    }


def _tool(name: str, option: str, *, cubin: bytes) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        done = subprocess.run([program, option, path], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{name} {option} must read the kernel's binary; got {done.stderr.strip()}")
    return done.stdout
