"""Draws the curves of a run: ``python docs/draw_curves.py RUN/metrics.csv docs/images/quickstart.svg``."""

import csv
import sys
from pathlib import Path

import matplotlib as mpl

mpl.use("svg")

from matplotlib import pyplot as plt

BLUE, ORANGE, GREY = "#1f5fa8", "#d0621b", "#555555"


def column(path: Path, name: str) -> tuple[list[int], list[float]]:
    """Return the steps at which a metric was logged, and its values.

    Args:
        path: A run's ``metrics.csv``.
        name: The metric's key.
    """
    with path.open(newline="") as file:
        rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]
    return [step for step, _ in rows], [value for _, value in rows]


def draw(metrics: Path, image: Path) -> None:
    """Draw loss, accuracy and gradient norm over the steps.

    Args:
        metrics: A run's ``metrics.csv``.
        image: The SVG file to write.
    """
    mpl.rcParams.update(
        {
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": "lit_basics",  # the same run gives the same file
            "font.family": "sans-serif",
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.edgecolor": GREY,
            "axes.grid": True,
            "grid.color": "#e4e4e4",
            "lines.linewidth": 1.4,
            "lines.markersize": 3.5,
        }
    )
    figure, (loss, accuracy, norm) = plt.subplots(1, 3, figsize=(9.6, 2.7), layout="constrained")
    loss.plot(*column(metrics, "train/loss"), color=BLUE, label="train/loss")
    loss.plot(*column(metrics, "val/loss"), "o-", color=ORANGE, label="val/loss")
    loss.set_yscale("log")
    loss.legend(frameon=False)
    loss.set_title("loss")
    accuracy.plot(*column(metrics, "val/acc"), "o-", color=ORANGE, label="val/acc")
    accuracy.set_ylim(0, 1.02)
    accuracy.legend(frameon=False, loc="lower right")
    accuracy.set_title("accuracy")
    norm.plot(*column(metrics, "grad/norm"), color=BLUE, linewidth=0.6, label="grad/norm")
    norm.set_ylim(bottom=0)
    norm.legend(frameon=False)
    norm.set_title("norm of the gradient")
    for axes in (loss, accuracy, norm):
        axes.set_xlabel("step")
        axes.set_xlim(left=0)
    figure.savefig(image, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
