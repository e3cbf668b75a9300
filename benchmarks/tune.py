"""Choose the tiles of the attention kernels and rewrite kernels/attention/tiles.json.

    python benchmarks/tune.py                     on a GPU: the fastest of the candidates, by time, for that GPU's row
    python benchmarks/tune.py --without-gpu       by what the compiler says: the first candidate that spills nothing
    python benchmarks/tune.py --without-gpu --archs sm_90 --head-dims 64 --kinds "half relative"

Candidates are in order of preference: large tiles, which read keys and values least often, come first. One that spills,
or needs more shared memory than the architecture has, is passed over while another is left. With relative terms the
instructions for a pair of tokens vary with the tile's shape: the fewest win, among tiles that spill nothing. Afterwards
`python benchmarks/aot.py --write --compare` must follow, since the table of resources is that of the tiles.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, replace
from multiprocessing import get_context
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from antlm_fast.kernels.attention.triton_launches import TILES, offline_launches
from antlm_fast.kernels.attention.triton_tables import relative_terms
from antlm_fast.kernels.triton_support.launch import Launch, Tile, arch_of
from antlm_fast.kernels.triton_support.offline import TARGETS
from benchmarks.aot_report import SHARED_LIMIT
from benchmarks.sass import resources

KERNELS = ("forward", "delta", "dq", "dkdv")
PLAIN_KINDS = {"half": torch.bfloat16, "half dropout": torch.bfloat16, "tf32": torch.float32, "ieee": torch.float32}
RELATIVE_KINDS = {
    "half relative": torch.bfloat16,
    "half relative dropout": torch.bfloat16,
    "tf32 relative": torch.float32,
    "ieee relative": torch.float32,
}
KINDS = PLAIN_KINDS | RELATIVE_KINDS
HEAD_DIMS = (16, 32, 64, 128, 256)
# block_m, block_n, warps, stages
_FORWARD_TILES = (
    (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 32, 4, 2),
    (64, 32, 8, 2), (32, 32, 4, 2), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1),
)  # fmt: skip
_ROW_TILES = (
    (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (64, 32, 8, 2), (64, 32, 8, 1), (32, 32, 4, 2),
    (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1),
)  # fmt: skip
_KEY_TILES = (
    (64, 128, 8, 2), (64, 128, 8, 1), (64, 64, 4, 2), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2),
    (32, 64, 8, 1), (32, 32, 4, 2), (16, 64, 8, 1), (32, 32, 4, 1), (16, 32, 4, 1), (16, 16, 4, 1),
)  # fmt: skip
# beyond what the compiler's report prefers: only a clock can tell whether they pay
_TIMED_TILES = {
    "forward": ((128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 4, 2), (128, 64, 8, 4), (64, 128, 4, 2), (64, 64, 4, 4)),
    "dq": ((128, 64, 8, 3), (128, 128, 8, 2), (64, 128, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3), (128, 32, 4, 3)),
    "dkdv": ((128, 128, 8, 2), (64, 128, 8, 3), (128, 64, 8, 2), (64, 128, 4, 2), (64, 64, 4, 3), (32, 128, 4, 3)),
}  # fmt: skip
_RELATIVE_TILES = {
    "forward": ((128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
    "dq": ((128, 64, 8, 2), (64, 64, 8, 2), (64, 128, 8, 2), (32, 64, 8, 2), (32, 64, 4, 2), (32, 32, 4, 2)),
    "dkdv": ((64, 128, 8, 2), (64, 64, 8, 2), (128, 64, 8, 2), (64, 32, 8, 2), (64, 32, 4, 2), (32, 32, 4, 2)),
}


def candidates(kernel: str, kind: str, head_dim: int, *, timed: bool = False) -> list[Tile]:
    """The tiles to try, the preferred first. Wide rows of numbers leave less room for many of them.

    Args:
        timed: also those that only a clock can judge.
    """
    if kernel == "delta":
        return [Tile(min(128, 4096 // head_dim), 16, 4, 1)]
    largest = 64 * 64 if kind.startswith("ieee") else 128 * 64
    plain = {"forward": _FORWARD_TILES, "dq": _ROW_TILES, "dkdv": _KEY_TILES}
    tiles = [Tile(*tile) for tile in (_RELATIVE_TILES if "relative" in kind else plain)[kernel]]
    found = [tile for tile in tiles if tile.block_m * tile.block_n <= largest]
    if timed and kind.startswith("half"):
        found += [Tile(*tile) for tile in _TIMED_TILES[kernel]]
    return list(dict.fromkeys(found))


def choose_without_gpu(arch: str, kind: str, head_dim: int, kernel: str) -> Tile:
    """The first candidate that fits and spills nothing; where all spill, the one that spills least.

    With relative terms, of those that spill nothing the one with the fewest instructions for a pair of tokens.
    """
    launch = offline_launch(arch, kind, head_dim, kernel)
    best, least, cheapest = None, None, None
    for tile in candidates(kernel, kind, head_dim):
        found = resources(replace(launch, tile=tile).compile_for(TARGETS[arch]))
        if found["shared_bytes"] > SHARED_LIMIT[arch]:
            continue
        spilled = found.get("spill_store_bytes", found.get("vgpr_spills"))
        cost = 0.0
        if "relative" in kind:
            counts = [loop["instructions"] for loop in found["loops"] if loop["mma"] or loop["ffma"]]
            pairs = tile.block_m * tile.block_n
            cost = min(counts, default=found["instructions"]) * tile.num_warps / pairs
        # a few percent are no reason to leave the preferred tile
        if least is None or spilled < least or (spilled == least and cost < 0.97 * cheapest):
            best, least, cheapest = tile, spilled, cost
        if not spilled and "relative" not in kind:
            break
    if best is None:
        raise RuntimeError(f"no tile of {kernel} {kind} {head_dim} fits {arch}")
    return best


def choose_by_time(arch: str, kind: str, head_dim: int, kernel: str) -> Tile:
    """The fastest candidate on this machine's GPU: 16 sequences of 1,024 tokens, half causal, half bidirectional."""
    from triton.runtime.errors import OutOfResources
    from triton.testing import do_bench

    launch = launch_on_device(arch, kind, head_dim, kernel)
    times = {}
    for tile in candidates(kernel, kind, head_dim, timed=True):
        try:
            times[tile] = do_bench(lambda tile=tile: launch.launch(tile))
        except OutOfResources:
            continue
    return min(times, key=lambda tile: times[tile])


def offline_launch(arch: str, kind: str, head_dim: int, kernel: str) -> Launch:
    numbers, *options = kind.split()
    bucket_size = 32 if "relative" in options else None
    launches = offline_launches(
        arch, KINDS[kind], head_dim, 8, 8, dropout="dropout" in options, kind=numbers, bucket_size=bucket_size
    )
    return launches[KERNELS.index(kernel)]


def launch_on_device(
    arch: str,
    kind: str,
    head_dim: int,
    kernel: str,
    *,
    device: str = "cuda",
    sequences: tuple[int, int] = (16, 1024),
) -> Launch:
    """The offline launch with real tensors in place of those without memory.

    Args:
        sequences: how many, and tokens in each; every other one is causal.
    """
    launch = offline_launch(arch, kind, head_dim, kernel)
    seqs, length = sequences
    starts = torch.arange(seqs + 1, dtype=torch.int32, device=device) * length
    flags = torch.arange(seqs, dtype=torch.int32, device=device) % 2 * length
    arguments = dict(launch.arguments)
    for name, value in arguments.items():
        if name.startswith("cu_seqlens"):
            arguments[name] = starts
        elif name == "prefix_len_ptr":
            arguments[name] = flags
        elif name == "dropout_seed_ptr":
            arguments[name] = None if value is None else torch.zeros((), dtype=torch.int64, device=device)
        elif isinstance(value, torch.Tensor) and value.is_floating_point():
            shape = [seqs * length if size == 4096 else size for size in value.shape]  # the offline launch's tokens
            arguments[name] = torch.randn(shape, dtype=value.dtype, device=device)
    if arguments.get("c2p_ptr") is not None:
        relative = relative_terms(arguments["c2p_ptr"], arguments["p2c_ptr"], 32, 512, length)
        tables = {"run_starts_ptr": relative.run_starts, "reach": relative.reach, "total_k": seqs * length}
        tables["buckets_ptr"] = relative.buckets if kernel == "dkdv" else relative.mirrored
        arguments |= {name: value for name, value in tables.items() if name in arguments}
    sizes = {"num_seqs": seqs, "total_q": seqs * length, "total_k": seqs * length}
    sizes |= {"max_seqlen_q": length, "max_seqlen_k": length}
    # what is None there has no use for a size, and with one it would be another kernel than the one compiled ahead
    arguments |= {name: size for name, size in sizes.items() if arguments.get(name) is not None}
    heads = arguments["heads"]

    def programs(tile: Tile) -> int:
        if kernel == "delta":
            return -(-seqs * length // tile.block_m) * heads
        return -(-length // (tile.block_n if kernel == "dkdv" else tile.block_m)) * heads * (seqs + 1)

    return replace(launch, arguments=arguments, grid=programs)


def _choose(job: tuple[str, str, int, str]) -> tuple[tuple[str, str, int, str], Tile]:
    return job, choose_without_gpu(*job)


def jobs(archs: list[str], kinds: list[str], head_dims: list[int]) -> Iterator[tuple[str, str, int, str]]:
    for arch in archs:
        for head_dim in head_dims:
            if "half" in kinds:
                yield arch, "half", head_dim, "delta"
            for kind in kinds:
                if not (arch == "gfx942" and kind.startswith("tf32")):  # float32 is IEEE there
                    yield from ((arch, kind, head_dim, kernel) for kernel in KERNELS if kernel != "delta")


def write(chosen: dict[tuple[str, str, int, str], Tile], path: Path = TILES) -> None:
    """Put the chosen tiles into the table, one line for each use."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for (arch, kind, head_dim, kernel), tile in chosen.items():
        use = kernel if kernel == "delta" else f"{kernel} {kind}"
        table.setdefault(arch, {}).setdefault(use, {})[str(head_dim)] = astuple(tile)
    rows = []
    for arch, uses in table.items():
        lines = (f'    "{use}": {json.dumps(sizes)}' for use, sizes in uses.items())
        rows.append(f'  "{arch}": {{\n' + ",\n".join(lines) + "\n  }")
    part = path.with_suffix(".part")
    part.write_text("{\n" + ",\n".join(rows) + "\n}\n", encoding="utf-8")
    part.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--without-gpu", action="store_true", help="by registers and spills, for any architecture")
    parser.add_argument("--archs", nargs="+", choices=list(TARGETS), help="with --without-gpu (all)")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS), metavar="KIND")
    parser.add_argument("--head-dims", nargs="+", type=int, choices=HEAD_DIMS, default=list(HEAD_DIMS))
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    if not options.without_gpu:
        if not torch.cuda.is_available():
            print("tune.py: no CUDA device; --without-gpu chooses by the compiler's report", file=sys.stderr)
            return 2
        arch = arch_of(torch.device("cuda"))
        for job in jobs([arch], options.kinds, options.head_dims):
            tile = choose_by_time(*job)
            print(*job, tile, flush=True)
            write({job: tile})
        return 0
    wanted = list(jobs(options.archs or list(TARGETS), options.kinds, options.head_dims))
    with ProcessPoolExecutor(options.workers, mp_context=get_context("spawn")) as pool:
        for number, (job, tile) in enumerate(pool.map(_choose, wanted), 1):
            print(f"{number}/{len(wanted)}", *job, astuple(tile), flush=True)
            write({job: tile})
    return 0


if __name__ == "__main__":
    sys.exit(main())
