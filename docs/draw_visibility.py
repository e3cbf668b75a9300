"""Draw visibility.png: which tiles the attention kernels compute, with and without a mask.

python docs/draw_visibility.py
"""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle

from antlm_fast.kernels.attention.reference import row_limit

LENGTH, LONG, SHORT = 32, 8, 4  # tokens; the sides of a tile
KINDS = {"causal\nprefix_len = 0": 0, "prefix-LM\nprefix_len = 14": 14, "bidirectional\nprefix_len ≥ 32": LENGTH}
WHOLE, PARTIAL, HIDDEN, EDGE = "#2f6f9f", "#f2b134", "#fbe3b0", "#ffffff"


def main() -> None:
    figure, axes = plt.subplots(2, 3, figsize=(10.5, 7.6), layout="constrained")
    for column, (title, prefix_len) in enumerate(KINDS.items()):
        visible = torch.arange(LENGTH) < row_limit(LENGTH, LENGTH, prefix_len, torch.device("cpu"))[:, None]
        _draw(axes[0, column], visible, rows=LONG, cols=SHORT)
        _draw(axes[1, column], visible, rows=SHORT, cols=LONG)
        axes[0, column].set_title(title, fontsize=11)
    axes[0, 0].set_ylabel("forward, dQ\na program: one band of query rows,\nwalking right over keys", fontsize=10)
    axes[1, 0].set_ylabel("dK, dV\na program: one band of keys,\nwalking down over query rows", fontsize=10)
    figure.legend(
        handles=[
            Patch(color=WHOLE, label="loop without a mask"),
            Patch(color=PARTIAL, label="loop with one compare"),
            Patch(color=HIDDEN, label="computed, then masked"),
            Patch(facecolor="white", edgecolor="#bbbbbb", label="never computed"),
        ],
        loc="outside lower center",
        ncols=4,
        frameon=False,
    )
    figure.savefig(Path(__file__).with_name("visibility.png"), dpi=110)


def _draw(axis: Axes, visible: torch.Tensor, rows: int, cols: int) -> None:
    for top in range(0, LENGTH, rows):
        for left in range(0, LENGTH, cols):
            seen = visible[top : top + rows, left : left + cols]
            if not seen.any():
                continue
            axis.add_patch(Rectangle((left, top), cols, rows, facecolor=WHOLE if seen.all() else PARTIAL))
            for row, col in (~seen).nonzero().tolist():
                axis.add_patch(Rectangle((left + col, top + row), 1, 1, facecolor=HIDDEN))
            axis.add_patch(Rectangle((left, top), cols, rows, fill=False, edgecolor=EDGE, linewidth=1.2))
    bands = range(0, LENGTH + 1, rows if rows > cols else cols)
    for edge in bands:
        (axis.axhline if rows > cols else axis.axvline)(edge, color="#444444", linewidth=0.9)
    axis.set(xlim=(0, LENGTH), ylim=(LENGTH, 0), aspect="equal", xticks=[0, LENGTH], yticks=[0, LENGTH])
    axis.set_xlabel("key", fontsize=9, labelpad=-8)
    axis.tick_params(length=0, labelsize=8)


if __name__ == "__main__":
    main()
