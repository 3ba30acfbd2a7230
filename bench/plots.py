"""``./dev bench --plots``: draw the recorded results; matplotlib is needed for this alone.

Each plot is an SVG whose text stays text, so that a test can hold its figures against the results.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.recorded import Recorded, recorded

OURS, OTHERS = "#2b6cb0", "#a0aec0"


def draw(one: Recorded, path: Path) -> None:
    """Draw medians as bars, and lines from the 5th to the 95th percentile; time on a logarithmic scale."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": path.name, "font.size": 9})
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    series = one.report.series
    figure, axes = pyplot.subplots(figsize=(8, 0.36 * len(series) + 1.6), layout="constrained")
    for row, contender in enumerate(series):
        low, middle, high = contender.quantile(0.05), contender.median, contender.quantile(0.95)
        axes.barh(row, middle, color=OURS if contender.name.startswith("isolator") else OTHERS, height=0.7)
        axes.plot([low, high], [row, row], color="black", linewidth=1)
        axes.text(high * 1.06, row, f"{middle:.2f} {contender.unit}", va="center")
    axes.set_yticks(range(len(series)), [contender.name for contender in series])
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.set_xlim(right=2 * max(contender.quantile(0.95) for contender in series))
    axes.set_xlabel(f"{series[0].unit}, median of {len(series[0].samples)} interleaved rounds, logarithmic")
    axes.set_title(one.report.title, loc="left", fontweight="bold")
    line = mpl.lines.Line2D([], [], color="black", label="5th to 95th percentile")
    axes.legend(handles=[Patch(color=OURS, label="Isolator"), Patch(color=OTHERS, label="others"), line], loc="best")
    axes.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(one.caption, fontsize=7, x=0.01, ha="left")
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    pyplot.close(figure)


def main(library: str, folder: Path) -> int:
    """Draw everything into ``folder``; ``library``: where matplotlib is."""
    sys.path.append(library)
    folder.mkdir(parents=True, exist_ok=True)
    for one in recorded():
        path = folder / f"{one.report.name}.svg"
        draw(one, path)
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
