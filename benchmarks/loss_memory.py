"""Peak memory of head and loss, forward and backward, beyond inputs and their gradients.

    python benchmarks/loss_memory.py            measure on this machine's CPU, write results/loss_memory.json
    python benchmarks/loss_memory.py --show     the table of the results that are there, as Markdown

Each case runs in a process of its own: the most resident memory while the step runs, minus what was resident before it
and minus the gradients. What would need more than LARGEST_GIB is not run but computed, and marked so; so are Liger's
and cut-cross-entropy's figures, which have no CPU implementation.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from harness import environment
from resident_memory import cannot_measure, in_fresh_process, peak_mib
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from antlm_fast.kernels.linear_cross_entropy import linear_cross_entropy

RESULTS = Path(__file__).parent / "results" / "loss_memory.json"
ROWS = (2048, 8192, 65536)
VOCABULARIES = (16384, 50304, 131072)
SHARES = (0.15, 1.0)
HIDDEN_SIZE = 256
LARGEST_GIB = 6.0
LARGEST_CHUNKED = 2**29  # logits
_MIB = 2**20
_BYTES = 2  # bfloat16


def _ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return linear_cross_entropy(hidden, weight, targets, impl="torch")


def _eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(F.linear(hidden, weight), targets)


def _labelled_eager(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    rows = (targets != -100).nonzero().squeeze(1)
    return _eager(hidden.index_select(0, rows), weight, targets.index_select(0, rows))


def _torch_chunked(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.nn.functional.linear_cross_entropy")
    return F.linear_cross_entropy(hidden, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


MEASURED: dict[str, Callable[..., torch.Tensor]] = {
    "antlm_fast torch": _ours,
    "eager": _eager,
    "gather + eager": _labelled_eager,
    "F.linear_cross_entropy": _torch_chunked,
}


def eager_mib(rows: int, vocabulary: int) -> float:
    """Logits, log-probabilities and the logits' gradient, all at once."""
    return 3 * rows * vocabulary * _BYTES / _MIB


def liger_mib(rows: int, vocabulary: int) -> float:
    """One chunk of logits of all rows, labelled or not; its size by the rule in fused_linear_cross_entropy.py there."""
    share = -(-vocabulary // HIDDEN_SIZE)
    chunk = 1 << (-(-rows // share) - 1).bit_length()
    return chunk * vocabulary * _BYTES / _MIB


def cut_cross_entropy_mib(rows: int, share: float) -> float:
    """Log-sums and target logits of the labelled rows, and their indices; logits exist in tiles on the chip alone."""
    return rows * share * (4 + 4 + 8) / _MIB


def measure(provider: str, rows: int, vocabulary: int, share: float) -> float:
    """MiB beyond inputs and their gradients; runs in a fresh process."""
    torch.manual_seed(0)
    hidden = torch.randn(rows, HIDDEN_SIZE).bfloat16().requires_grad_()
    weight = (torch.randn(vocabulary, HIDDEN_SIZE) / HIDDEN_SIZE**0.5).bfloat16().requires_grad_()
    targets = torch.randint(vocabulary, (rows,)).where(torch.rand(rows) < share, -100)
    # libraries load and thread pools start before the measurement, at sizes that are lost in it
    small = (hidden[:64].detach().requires_grad_(), weight[:64].detach().requires_grad_())
    torch.autograd.grad(MEASURED[provider](*small, targets[:64].clamp(max=63)), small)

    def step() -> tuple[torch.Tensor, ...]:
        return torch.autograd.grad(MEASURED[provider](hidden, weight, targets), (hidden, weight))

    return peak_mib(step)


def _measured_row(case: tuple[str, int, int, float]) -> dict[str, Any]:
    provider, rows, vocabulary, share = case
    row: dict[str, Any] = {"provider": provider, "rows": rows, "vocabulary": vocabulary, "share": share}
    live = rows if provider == "eager" else rows * share
    if "eager" in provider and eager_mib(int(live), vocabulary) > LARGEST_GIB * 1024:
        return row | {"mib": round(eager_mib(int(live), vocabulary), 1), "how": "computed"}
    if provider == "F.linear_cross_entropy" and rows * vocabulary > LARGEST_CHUNKED:
        return row | {"mib": None, "how": "not run: it takes minutes"}
    try:
        return row | {"mib": round(max(measure(*case), 0.0), 1), "how": "measured"}
    except RuntimeError as error:
        return row | {"mib": None, "how": str(error).splitlines()[0]}


def run() -> list[dict[str, Any]]:
    cases = [(rows, vocabulary, share) for vocabulary in VOCABULARIES for rows in ROWS for share in SHARES]
    found = []
    for rows, vocabulary, share in cases:
        for provider in MEASURED:
            row = in_fresh_process(_measured_row, (provider, rows, vocabulary, share))
            print(row, flush=True)
            found.append(row)
        computed = {"Liger": liger_mib(rows, vocabulary), "cut-cross-entropy": cut_cross_entropy_mib(rows, share)}
        found += [
            {"provider": name, "rows": rows, "vocabulary": vocabulary, "share": share, "mib": round(mib, 1)}
            | {"how": "computed"}
            for name, mib in computed.items()
        ]
    return found


def markdown(rows: list[dict[str, Any]]) -> str:
    """One line for each (vocabulary, tokens, labels), one column for each provider."""
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    lines = ["| vocabulary | tokens | labelled | " + " | ".join(providers) + " |"]
    lines.append("|---" * (3 + len(providers)) + "|")
    for vocabulary, tokens, share in dict.fromkeys((row["vocabulary"], row["rows"], row["share"]) for row in rows):
        cells = []
        for provider in providers:
            key = (provider, vocabulary, tokens, share)
            row = next(x for x in rows if (x["provider"], x["vocabulary"], x["rows"], x["share"]) == key)
            mib = "-" if row["mib"] is None else f"{row['mib']:,.0f}"
            cells.append(f"*{mib}*" if row["how"] == "computed" else mib)
        lines.append(f"| {vocabulary:,} | {tokens:,} | {share:.0%} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--show", action="store_true", help="print the table of the results that are there")
    options = parser.parse_args()
    if not options.show:
        if reason := cannot_measure():
            print(f"loss_memory.py: {reason}", file=sys.stderr)
            return 2
        result = {"environment": environment(), "hidden_size": HIDDEN_SIZE, "dtype": "bfloat16", "rows": run()}
        RESULTS.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(markdown(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
