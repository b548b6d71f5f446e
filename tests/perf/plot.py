"""Draws the rig's JSON as a picture: requests per second and CPU time per request, case by case.

Run by the interpreter of the rig's environment, which has matplotlib: `plot.py bench.json bench.png`.
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any

OURS, OTHERS = "#1f6f8b", "#b8b8b8"
USER, KERNEL = "#5b8c5a", "#c9a66b"


def median(rounds: dict[str, dict[str, Any]], name: str) -> float:
    """The median of one figure over the rounds."""
    return statistics.median(one[name] for one in rounds.values())


def draw(data: dict[str, Any], target: Path) -> None:
    """One row for each case: throughput at the left, CPU time at the right."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    cases = {name: labels for name, labels in data["results"].items() if name != "startup"}
    heights = [0.6 + 0.32 * len(labels) for labels in cases.values()]
    figure, axes = pyplot.subplots(
        len(cases), 2, figsize=(12, sum(heights) + 1), squeeze=False, gridspec_kw={"height_ratios": heights})
    for row, (name, labels) in zip(axes, cases.items(), strict=True):
        names = list(labels)[::-1]
        rates = [median(labels[label], "rate") for label in names]
        row[0].barh(names, rates, color=[OURS if label.startswith("kore") else OTHERS for label in names])
        row[0].set_title(f"{name}: requests per second", fontsize=9, loc="left")
        user = [median(labels[label], "cpu_user") for label in names]
        kernel = [median(labels[label], "cpu_system") for label in names]
        row[1].barh(names, user, color=USER, label="user")
        row[1].barh(names, kernel, left=user, color=KERNEL, label="kernel")
        row[1].set_title(f"{name}: CPU µs per request", fontsize=9, loc="left")
        for axis in row:
            axis.tick_params(labelsize=8)
            for side in ("top", "right"):
                axis.spines[side].set_visible(False)
    axes[0][1].legend(fontsize=8, frameon=False)
    figure.suptitle(f"{data['date'][:10]}, {data['machine']}, {data['kernel']}", fontsize=9)
    figure.tight_layout(rect=(0, 0, 1, 0.98))
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
