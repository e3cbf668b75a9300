"""Peak memory of disentangled attention, forward and backward, by the sequence's length.

    python benchmarks/attention_memory.py            measure on this machine's CPU; write the JSON and the drawing
    python benchmarks/attention_memory.py --draw     draw the results that are there again

Each case runs in a process of its own: the most resident memory while the step runs, minus what was resident before it
and minus the gradients. One sequence, bfloat16, six heads of 64, both relative terms.
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

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from antlm_fast.kernels.disentangled_attention import disentangled_attention, relative_bucket

RESULTS = Path(__file__).parent / "results" / "attention_memory.json"
DRAWING = Path(__file__).resolve().parents[1] / "docs" / "attention_memory.png"
LENGTHS = (128, 256, 512, 1024, 2048, 4096)
HEADS, HEAD_DIM, BUCKET_SIZE = 6, 64, 32


def _ours(*tensors: torch.Tensor, causal: bool) -> torch.Tensor:
    return disentangled_attention(*tensors, causal=causal, impl="torch")


def _gathered(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, q_rel: torch.Tensor, k_rel: torch.Tensor, *, causal: bool
) -> torch.Tensor:
    """Plain torch: both relative terms gathered into the scores, which all exist."""
    length = q.shape[1]
    q, k, v = (x[0].transpose(0, 1) for x in (q, k, v))
    q_rel, k_rel = (x.transpose(0, 1) for x in (q_rel, k_rel))
    places = torch.arange(length)
    row = (relative_bucket(places[:, None] - places) + BUCKET_SIZE - 1).expand(HEADS, -1, -1)
    scores = q @ k.mT + (q @ k_rel.mT).gather(-1, row) + (k @ q_rel.mT).gather(-1, row.mT).mT
    scores = scores * (3 * HEAD_DIM) ** -0.5
    if causal:
        scores = scores.masked_fill(places > places[:, None], -torch.inf)
    return (scores.softmax(-1) @ v).transpose(0, 1)[None]


PROVIDERS: dict[str, Callable[..., torch.Tensor]] = {"antlm_fast torch": _ours, "gathered into the scores": _gathered}


def measure(provider: str, length: int, causal: bool) -> float:
    """MiB beyond inputs and gradients; runs in a fresh process."""

    def inputs_of(length: int) -> list[torch.Tensor]:
        torch.manual_seed(0)
        shapes = [(1, length, HEADS, HEAD_DIM)] * 3 + [(2 * BUCKET_SIZE - 1, HEADS, HEAD_DIM)] * 2
        return [torch.randn(shape, dtype=torch.bfloat16).requires_grad_() for shape in shapes]

    def step(inputs: list[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        out = PROVIDERS[provider](*inputs, causal=causal)
        return torch.autograd.grad(out, inputs, torch.ones_like(out))

    step(inputs_of(16))  # libraries load and thread pools start before the measurement
    inputs = inputs_of(length)
    return max(peak_mib(lambda: step(inputs)), 0.0)


def run() -> list[dict[str, Any]]:
    found = []
    for causal in (True, False):
        for length in LENGTHS:
            for provider in PROVIDERS:
                mib = in_fresh_process(measure, provider, length, causal)
                found.append({"provider": provider, "length": length, "causal": causal, "mib": round(mib, 1)})
                print(found[-1], flush=True)
    return found


def draw(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.4), layout="constrained")
    colours = dict(zip(PROVIDERS, ("#2f6f9f", "#c2571a"), strict=True))
    for provider, colour in colours.items():
        for causal, style in ((False, "o-"), (True, "o--")):
            own = [row for row in rows if row["provider"] == provider and row["causal"] == causal]
            label = f"{provider}, {'causal' if causal else 'bidirectional'}"
            axes.plot([row["length"] for row in own], [row["mib"] for row in own], style, color=colour, label=label)
    axes.set(xscale="log", yscale="log", xlabel="sequence length, tokens", ylabel="peak memory, MiB")
    axes.set_xticks(LENGTHS, [f"{length:,}" for length in LENGTHS])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    axes.set_title("Disentangled attention, forward and backward, six heads of 64, bfloat16, CPU", fontsize=10)
    figure.savefig(DRAWING, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--draw", action="store_true", help="only draw the results that are there")
    if not parser.parse_args().draw:
        if reason := cannot_measure():
            print(f"attention_memory.py: {reason}", file=sys.stderr)
            return 2
        result = {"environment": environment(), "heads": HEADS, "head_dim": HEAD_DIM, "dtype": "bfloat16"}
        RESULTS.write_text(json.dumps(result | {"rows": run()}, indent=1) + "\n", encoding="utf-8")
    draw(json.loads(RESULTS.read_text(encoding="utf-8"))["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
