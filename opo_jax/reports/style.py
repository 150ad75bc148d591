"""Colours, matplotlib settings, and the curves and axes that all figures share."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from opo_jax.reports.run_files import Row

# The palette of Okabe and Ito: distinct under every common colour vision.
BLUE, ORANGE, GREEN = "#1A80BF", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#8A8F98"
RUN_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
# Dashes tell overlapping runs apart.
RUN_DASHES = ("-", (0, (5, 1.6)), (0, (2, 1.2)), (0, (8, 1.6, 2, 1.6)))
INK = "#1c2127"
DASHED = (0, (4, 3))

STYLE = {
  "text.color": INK,
  "text.parse_math": False,  # labels come from the run: "$" is a dollar sign
  "axes.labelcolor": INK,
  "axes.edgecolor": "#7b838c",
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "grid.color": "#e3e6ea",
  "grid.linewidth": 0.6,
  "font.family": "DejaVu Sans",  # ships with matplotlib: same figure everywhere
  "font.size": 10.5,
  "legend.fontsize": 9.5,
  "legend.frameon": False,
  "legend.columnspacing": 1.0,
  "lines.linewidth": 1.8,
  "savefig.dpi": 180,
}


def curve(
  ax: Axes,
  steps: np.ndarray,
  values: np.ndarray,
  color: str,
  window: int,
  label=None,
  ls="-",
) -> None:
  """Draws a quantity over steps; with a window, smoothed over the faint raw curve."""
  if window > 1:
    ax.plot(steps, values, color=color, alpha=0.28, lw=0.8)
    values = smoothed(steps, values, window)
  marker = "o" if len(steps) <= 12 else None  # a single point draws no line
  ax.plot(steps, values, color=color, label=label, marker=marker, ls=ls)


def interval_curve(
  ax: Axes,
  points: list[tuple[float, Row, str]],
  color: str,
  label=None,
  ls="-",
  scale: float = 100,
) -> None:
  """Draws scale * row[key] over x for each (x, row, key), its interval as a band."""
  xs = [x for x, _, _ in points]
  values, low, high = (
    np.array([scale * row.get(f"{key}{end}", np.nan) for _, row, key in points])
    for end in ("", "_low", "_high")
  )
  ax.plot(xs, values, color=color, ls=ls, marker="o", label=label)
  ax.fill_between(xs, low, high, color=color, alpha=0.16, lw=0)
  ax.vlines(xs, low, high, color=color, alpha=0.3, lw=1)


def step_axis(ax: Axes, last_step: float) -> None:
  """Gives every figure of a run the same x range, so that steps line up."""
  pad = max(0.5, 0.02 * last_step)
  ax.set_xlim(-pad, last_step + pad)
  ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def smoothing_window(rows: list[Row]) -> int:
  """The odd number of steps to average over; 1 (no smoothing) below 30 steps."""
  last_step = rows[-1]["step"]
  return 1 if last_step < 30 else 2 * max(1, round(last_step / 50)) + 1


def smoothed(steps: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
  """The mean over the points within a window of steps centred on each point."""
  sums = np.concatenate([[0.0], np.cumsum(values)])
  low = np.searchsorted(steps, steps - window // 2, side="left")
  high = np.searchsorted(steps, steps + window // 2, side="right")
  return (sums[high] - sums[low]) / (high - low)
