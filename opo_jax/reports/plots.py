"""Figures of several runs, and of gradient variance.

Like all of `reports` it reads run directories and imports neither JAX nor `Config`. A
run that did not measure a quantity has no curve, never a zero.
"""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator

from opo_jax.reports import style
from opo_jax.reports.charts import SCORES
from opo_jax.reports.run_files import Row, benchmarks, graded, read_metrics, series
from opo_jax.reports.style import (
  BLUE,
  DASHED,
  GREEN,
  GREY,
  INK,
  RUN_COLORS,
  RUN_DASHES,
  SKY,
  VERMILION,
)

# Metric -> label of the curves that runs are compared by, beside benchmark scores.
CURVES = {
  "reward/mean": "training reward (mean)",
  "policy/entropy": "entropy (nats per token)",
  "response_length/mean": "response length (tokens)",
  "policy/kl_to_start": "KL to start (nats per token)",
  "grad_norm": "gradient norm",
}


def compare_figure(
  run_dirs: dict[str, Path],
  out: Path,
  *,
  curves: Sequence[str] = tuple(CURVES)[:3],
  colors: Sequence[str] = RUN_COLORS,
) -> Path:
  """Draws the curves of several runs in common panels, and their held-out scores.

  Args:
    run_dirs: label in the legend -> run directory, in drawing order.
    out: figure to write; its suffix (.png, .svg, .pdf) decides the format.
    curves: keys of `CURVES`.
    colors: of the runs, in order.

  Returns:
    `out`, with a panel for each quantity and each benchmark that a run measured.

  Raises:
    ValueError: no run, or more runs than colours; a run without readable
      `metrics.jsonl`; or no run that measured any quantity.
  """
  if not 1 <= len(run_dirs) <= len(RUN_COLORS):
    raise ValueError(
      f"{len(run_dirs)} runs to compare; give at least one and at most "
      f"{len(RUN_COLORS)}, the number of colours"
    )
  runs = {label: read_metrics(path) for label, path in run_dirs.items()}
  every_row = [row for rows in runs.values() for row in rows]
  panels = [(key, CURVES[key]) for key in curves]
  panels[1:1] = [
    *((f"eval/{b}/pass@1", f"{b}, pass@1 (%)") for b in benchmarks(every_row)),
    *(
      (f"eval/{b}/{metric}", f"{b}, {label}")
      for b in graded(every_row)
      for metric, label, _ in SCORES
    ),
  ]
  panels = [(key, ylabel) for key, ylabel in panels if any(key in r for r in every_row)]
  if not panels:
    raise ValueError(
      f"none of the runs holds {', '.join(curves)} or scores under eval/; train first"
    )

  window = max(style.smoothing_window(rows) for rows in runs.values())
  xlabel = "RL step" if window == 1 else f"RL step (bold: mean of {window})"
  last_step = max(row["step"] for row in every_row)
  out = Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(style.STYLE):
    columns = min(2 if len(panels) <= 4 else 3, len(panels))
    height = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(4.9 * columns, 2.9 * height + 0.5), layout="constrained")
    axes = figure.subplots(height, columns, squeeze=False).ravel()
    for ax, (key, ylabel) in zip(axes, panels, strict=False):
      dashes = itertools.cycle(RUN_DASHES)
      for color, ls, rows in zip(colors, dashes, runs.values(), strict=False):
        if key.startswith("eval/"):
          points = [(row["step"], row, key) for row in rows if key in row]
          scale = 1 if key.endswith("_score") else 100
          style.interval_curve(ax, points, color, ls=ls, scale=scale)
        else:
          style.curve(ax, *series(rows, key), color, window, ls=ls)
      style.step_axis(ax, last_step)
      ax.set(xlabel=xlabel, ylabel=ylabel)
    for ax in axes[len(panels) :]:
      ax.remove()
    named = zip(colors, itertools.cycle(RUN_DASHES), runs, strict=False)
    handles = [Line2D([], [], color=c, ls=ls, label=label) for c, ls, label in named]
    ncols = min(2 * columns, len(runs))
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols)
    figure.savefig(out)
  return out


# Estimator -> (label, colour, dashes) in `variance_figure`.
VARIANCE_CURVES = {
  "reinforce": ("no baseline", GREY, "-"),
  "opo_loo": ("length (OPO)", BLUE, "-"),
  "opo_fitted_loo": ("length, fitted power", SKY, "-"),
  "energy_loo": ("logit energy", GREEN, "-"),
  "exact_loo": ("exact |s|²", VERMILION, "-"),
  "exact_all": ("floor: exact, all responses", VERMILION, ":"),
}


def variance_figure(rows: list[Row], out: str | Path) -> Path:
  """Draws `variance.json`, a row of panels for each policy.

  The first panel shows the error of each leave-one-out baseline over the group size,
  relative to the mean baseline. The others show the squared norm of each response's
  score over its length and its logit energy, with the line fitted within prompts.

  Args:
    rows: the `policies` of the file.
    out: figure to write; its suffix (.png, .svg, .pdf) decides the format.
  """
  out = Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(style.STYLE):
    figure = Figure(figsize=(11.4, 3.1 * len(rows) + 0.5), layout="constrained")
    axes = figure.subplots(len(rows), 3, squeeze=False)
    for (error, *norms), row in zip(axes, rows, strict=True):
      _error_over_size(error, row)
      for ax, column, name in zip(norms, (0, 1), ("length", "energy"), strict=True):
        _norm_over(ax, row, column, name)
    curves = [*VARIANCE_CURVES.values(), ("mean (rloo) = 1", INK, DASHED)]
    handles = [Line2D([], [], color=c, ls=ls, label=label) for label, c, ls in curves]
    figure.legend(handles=handles, loc="outside upper center", ncols=7)
    figure.savefig(out)
  return out


def _error_over_size(ax: Axes, row: Row) -> None:
  sizes = list(row["ratios"])
  for name, (_, color, ls) in VARIANCE_CURVES.items():
    errors = [row["ratios"][K][name].get("error") for K in sizes]
    xs = [i for i, error in enumerate(errors) if error]
    values, low, high = np.array([errors[i] for i in xs]).reshape(-1, 3).T
    ax.plot(xs, values, color=color, ls=ls, marker="o", ms=4)
    ax.fill_between(xs, low, high, color=color, alpha=0.14, lw=0)
  ax.axhline(1, color=INK, ls=DASHED, lw=1.1)
  ax.set_ylim(0, 2)  # a wide interval may exceed it
  ax.set_xticks(range(len(sizes)), sizes)
  ax.set_title(
    f"step {row['step']}, reward {row['reward/mean']:.2f}", loc="left", fontsize=10.5
  )
  ax.set(xlabel="K, responses per group", ylabel="error / error of the mean")


def _norm_over(ax: Axes, row: Row, column: int, name: str) -> None:
  points, fit = np.array(row["points"]), row["fits"][name]["within"]
  for reward, label, color in ((0, "incorrect", VERMILION), (1, "correct", GREEN)):
    x, y = np.exp(points[(points[:, 3] > 0.5) == reward][:, [column, 2]]).T
    ax.scatter(x, y, s=9, color=color, alpha=0.45, lw=0, label=label)
  ax.set(xscale="log", yscale="log", ylabel="|s|², squared norm of the score")
  ax.minorticks_off()
  ax.xaxis.set_major_formatter("{x:g}")
  ax.yaxis.set_major_formatter("{x:g}")
  if name == "length":
    ax.set_xlabel("length (tokens)")
    ax.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
  else:
    ax.set_xlabel("logit energy of the response")
    ax.xaxis.set_major_locator(LogLocator(numticks=4))
  if fit:
    middle, ends = points.mean(0), np.quantile(points[:, column], (0.01, 0.99))
    line = middle[2] + fit["slope"] * (ends - middle[column])
    label = f"slope {fit['slope']:.2f}, R² {fit['r2']:.2f}"
    ax.plot(np.exp(ends), np.exp(line), color=INK, lw=1.4, label=label)
  place = dict(loc="lower left", bbox_to_anchor=(-0.04, 1), borderaxespad=0.2, ncols=3)
  ax.legend(**place, handlelength=0.9, handletextpad=0.3, columnspacing=0.6)
