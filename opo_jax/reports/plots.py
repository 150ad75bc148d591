"""A finished (or half finished) run directory as pictures.

Reads the files that training left behind, `metrics.jsonl` above all, and imports
neither JAX nor anything else of this project: a picture can be made on a laptop from
a copied directory. What a run did not measure is not drawn, as zero least of all.
"""

import io
import itertools
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator

# The gap between the log-probs of sampler and learner that float rounding explains.
GAP_BOUND = 1e-4
# Smaller gaps, exact zeros above all, are drawn here: a log axis would lose them.
GAP_FLOOR = 1e-9

# Okabe and Ito's palette, which every common colour vision tells apart.
BLUE, ORANGE, GREEN = "#1A80BF", "#E69F00", "#009E73"
VERMILION, PURPLE, SKY, GREY = "#D55E00", "#CC79A7", "#56B4E9", "#8A8F98"
RUN_COLORS = (BLUE, VERMILION, GREEN, PURPLE, ORANGE, SKY, GREY)
# Runs that lie on each other are told apart by their dashes.
RUN_DASHES = ("-", (0, (5, 1.6)), (0, (2, 1.2)), (0, (8, 1.6, 2, 1.6)))
INK = "#1c2127"
DASHED = (0, (4, 3))

STYLE = {
  "text.color": INK,
  "text.parse_math": False,  # labels come from the run: a "$" is a dollar
  "axes.labelcolor": INK,
  "axes.edgecolor": "#7b838c",
  "axes.grid": True,
  "axes.axisbelow": True,
  "axes.spines.top": False,
  "axes.spines.right": False,
  "grid.color": "#e3e6ea",
  "grid.linewidth": 0.6,
  "font.family": "DejaVu Sans",  # ships with matplotlib: same picture everywhere
  "font.size": 10.5,
  "legend.fontsize": 9.5,
  "legend.frameon": False,
  "legend.columnspacing": 1.0,
  "lines.linewidth": 1.8,
  "savefig.dpi": 180,
}

Row = dict[str, Any]
Draw = Callable[[Axes], None]
Panel = Callable[[list[Row]], list[Draw]]  # one drawing, one a benchmark, or none


# What the curves of several runs are drawn of, beside the scores of every benchmark.
CURVES = {
  "reward/mean": "training reward (mean)",
  "policy/entropy": "entropy (nats per token)",
  "response_length/mean": "response length (tokens)",
  "policy/kl_to_start": "KL to start (nats per token)",
  "grad_norm": "gradient norm",
}


# Metric, label and colour of what is drawn where answers are more or less good.
SCORES = (("reward_score", "reward", BLUE), ("true_score", "true score", ORANGE))
WIN_RATES = (("reward_win_rate", "by reward", BLUE), ("true_win_rate", "true", ORANGE))


def compare_figure(
  run_dirs: dict[str, Path],
  out: Path,
  *,
  curves: Sequence[str] = tuple(CURVES)[:3],
  colors: Sequence[str] = RUN_COLORS,
) -> Path:
  """Draws curves of several runs over each other, and held-out pass@1 or scores.

  Args:
    run_dirs: label shown in the legend -> run directory, in drawing order.
    out: picture to write; its suffix (.png, .svg, .pdf) decides the format.
    curves: keys of `CURVES`.
    colors: of the runs, in order.

  Returns:
    `out`. One panel for each quantity, and for each benchmark, that a run measured.

  Raises:
    ValueError: no run, or more than there are colours; a run without readable
      `metrics.jsonl`; or none of the quantities measured.
  """
  if not 1 <= len(run_dirs) <= len(RUN_COLORS):
    raise ValueError(
      f"{len(run_dirs)} runs to compare; give at least one and at most "
      f"{len(RUN_COLORS)}, as many as there are colours"
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

  window = max(_window(rows) for rows in runs.values())
  xlabel = "RL step" if window == 1 else f"RL step (bold: mean of {window})"
  last_step = max(row["step"] for row in every_row)
  out = Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(STYLE):
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
          _interval_curve(ax, points, color, ls=ls, scale=scale)
        else:
          _curve(ax, *series(rows, key), color, window, ls=ls)
      _step_axis(ax, last_step)
      ax.set(xlabel=xlabel, ylabel=ylabel)
    for ax in axes[len(panels) :]:
      ax.remove()
    named = zip(colors, itertools.cycle(RUN_DASHES), runs, strict=False)
    handles = [Line2D([], [], color=c, ls=ls, label=label) for c, ls, label in named]
    ncols = min(2 * columns, len(runs))
    figure.legend(handles=handles, loc="outside upper center", ncols=ncols)
    figure.savefig(out)
  return out


def read_metrics(run_dir: str | Path) -> list[Row]:
  """The complete lines of `metrics.jsonl`, sorted by step, null and NaN left out.

  Returns:
    One dict for each line, at least one. Step 0 is the evaluation of the start model.

  Raises:
    ValueError: the file is missing or has no complete line, or a line other than
      the last is not a JSON object with a `step`.
  """
  path = Path(run_dir) / "metrics.jsonl"
  rows = read_lines(path)
  if not rows:
    raise ValueError(
      f"{path} is missing or holds no complete line yet; train at least one step "
      f"(make train RUN={run_dir}) or name another run directory"
    )
  return rows


# Reading ------------------------------------------------------------------------


def read_json(path: Path) -> Row:
  """The object, {} without the file; ValueError where it holds something else."""
  if not path.is_file():
    return {}
  try:
    values = json.loads(path.read_bytes())
  except (ValueError, RecursionError) as error:
    raise ValueError(f"{path} is not JSON ({error}); mend or remove it") from error
  if not isinstance(values, dict):
    raise ValueError(f"{path} holds no JSON object; mend or remove it")
  return values


def read_lines(path: Path) -> list[Row]:
  """JSON lines sorted by step; [] without the file. Only the last may be cut off."""
  lines = path.read_bytes().rstrip().split(b"\n") if path.is_file() else []
  rows = []
  for number, line in enumerate(lines, start=1):
    if not line.strip():
      continue
    try:
      row = json.loads(line, parse_constant=lambda name: None)
    except ValueError as error:  # UnicodeDecodeError is one: a cut inside a character
      if number == len(lines):
        break
      raise ValueError(
        f"{path}, line {number} is not JSON ({error}); only the last line may be cut "
        "off: remove or mend this one"
      ) from None
    if not isinstance(row, dict) or "step" not in row:
      raise ValueError(f'{path}, line {number}: expected an object with a "step"')
    rows.append({key: value for key, value in row.items() if value is not None})
  return sorted(rows, key=lambda row: row["step"])


def series(rows: list[Row], key: str) -> tuple[np.ndarray, np.ndarray]:
  """Steps and values of the rows that have measured `key`."""
  points = [(row["step"], row[key]) for row in rows if key in row]
  steps, values = np.array(points, np.float64).reshape(-1, 2).T
  return steps, values


def benchmarks(rows: list[Row]) -> dict[str, list[int]]:
  """Benchmark -> every k with a measured pass@k."""
  keys = {key for row in rows for key in row}
  found = [m for key in keys if (m := re.fullmatch(r"eval/(.+)/pass@(\d+)", key))]
  names = sorted({m[1] for m in found})
  return {name: sorted(int(m[2]) for m in found if m[1] == name) for name in names}


def graded(rows: list[Row]) -> list[str]:
  """Benchmarks whose answers are more or less good: with scores, without pass@k."""
  found = [re.fullmatch(r"eval/(.+)/reward_score", key) for row in rows for key in row]
  return sorted({match[1] for match in found if match})


def start_and_last(rows: list[Row], benchmark: str) -> list[tuple[str, Row]]:
  """The evaluation before the first RL step and the last one after it, with names."""
  scores = {f"eval/{benchmark}/pass@1", f"eval/{benchmark}/reward_score"}
  evaluated = [row for row in rows if scores & row.keys()]
  start = [("start", row) for row in evaluated[:1] if row["step"] == 0]
  final = [(f"step {r['step']}", r) for r in evaluated[-1:] if r["step"] > 0]
  return start + final


# Drawing ------------------------------------------------------------------------


class Chart:
  """One picture of the report: panels stacked over a common x axis."""

  def __init__(
    self, name: str, title: str, caption: str, *panels: Panel, xlabel: str = "RL step"
  ):
    self.name, self.title, self.caption = name, title, caption
    self.panels, self.xlabel = panels, xlabel


def render(chart: Chart, rows: list[Row]) -> bytes | None:
  """The picture as PNG; None if the rows hold nothing to draw."""
  draws = [draw for panel in chart.panels for draw in panel(rows)]
  if not draws:
    return None
  with matplotlib.rc_context(STYLE):
    size = 5.6, max(4.2, 2.1 * len(draws))  # inches: two side by side at 1200 px
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(draws), 1, sharex=True, squeeze=False).ravel()
    for ax, draw in zip(axes, draws, strict=True):
      _step_axis(ax, rows[-1]["step"])
      draw(ax)
      # Above the axes, where it cannot cover a curve.
      ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), borderaxespad=0.2, ncols=5)
    axes[-1].set_xlabel(chart.xlabel)
    figure.align_ylabels()
    image = io.BytesIO()
    figure.savefig(image, format="png")
  return image.getvalue()


def _lines(
  ylabel: str, *curves: tuple[str, str, str], scale: float = 1, log_bound: float = 0
) -> Panel:
  """Curves over steps, each a (key in the metrics, label, colour).

  The axis holds zero, or, with a bound, is logarithmic; then nothing is smoothed.
  """

  def panel(rows: list[Row]) -> list[Draw]:
    measured = [curve for curve in curves if any(curve[0] in row for row in rows)]

    def draw(ax: Axes) -> None:
      lowest = np.inf
      for key, label, color in measured:
        steps, values = series(rows, key)
        values = np.maximum(values, GAP_FLOOR) if log_bound else scale * values
        _curve(ax, steps, values, color, 1 if log_bound else _window(rows), label)
        lowest = min(lowest, values.min())
      if log_bound:
        label = f"bound {log_bound:.0e}"
        ax.axhline(log_bound, color=INK, ls=DASHED, lw=1.1, label=label)
        ax.set_yscale("log")
        ax.yaxis.set_major_formatter("{x:.0e}")
      elif lowest < 0:
        ax.axhline(0, color=INK, lw=0.9)
      else:
        ax.set_ylim(bottom=0)
      ax.set_ylabel(ylabel)

    return [draw] if measured else []

  return panel


def _curve(
  ax: Axes,
  steps: np.ndarray,
  values: np.ndarray,
  color: str,
  window: int,
  label=None,
  ls="-",
) -> None:
  """One quantity over steps; with a window the raw curve stays, faint, behind."""
  if window > 1:
    ax.plot(steps, values, color=color, alpha=0.28, lw=0.8)
    values = _smoothed(steps, values, window)
  marker = "o" if len(steps) <= 12 else None  # a single point has no line
  ax.plot(steps, values, color=color, label=label, marker=marker, ls=ls)


def _interval_curve(
  ax: Axes,
  points: list[tuple[float, Row, str]],
  color: str,
  label=None,
  ls="-",
  scale: float = 100,
) -> None:
  """row[key] over x for each (x, row, key), in percent, with its interval as a band."""
  xs = [x for x, _, _ in points]
  values, low, high = (
    np.array([scale * row.get(f"{key}{end}", np.nan) for _, row, key in points])
    for end in ("", "_low", "_high")
  )
  ax.plot(xs, values, color=color, ls=ls, marker="o", label=label)
  ax.fill_between(xs, low, high, color=color, alpha=0.16, lw=0)
  ax.vlines(xs, low, high, color=color, alpha=0.3, lw=1)


def _held_out(rows: list[Row]) -> list[Draw]:
  """pass@1 and the largest pass@k of each benchmark over the steps, or its scores."""
  if rows[-1]["step"] == 0:
    return []  # the start model alone is a single point: the table says it better

  def draw(ax: Axes, benchmark: str, ylabel: str, curves, scale: float) -> None:
    for metric, label, color in curves:
      key = f"eval/{benchmark}/{metric}"
      points = [(row["step"], row, key) for row in rows if key in row]
      if not points:
        continue
      _interval_curve(ax, points, color, label, scale=scale)
      step, row, _ = points[0]
      if step == 0:
        start = f"{percent(row, key)} %" if scale == 100 else f"{row[key]:.3f}"
        ax.axhline(
          scale * row[key], color=color, ls=DASHED, lw=1.1, label=f"start {start}"
        )
    ax.set_ylabel(f"{benchmark}, {ylabel}")

  panels = []
  for name, tries in benchmarks(rows).items():
    ks = zip(sorted({1, tries[-1]}), (BLUE, ORANGE), strict=False)
    curves = [(f"pass@{k}", f"pass@{k}", color) for k, color in ks]
    panels.append((name, "pass@k (%)", curves, 100))
  for name in graded(rows):
    panels.append((name, "score", SCORES, 1))
    panels.append((name, "wins (%)", WIN_RATES, 100))
  return [lambda ax, panel=panel: draw(ax, *panel) for panel in panels]


def _pass_at_k(rows: list[Row]) -> list[Draw]:
  """pass@k over k, of the start model and of the last evaluation."""

  def draw(ax: Axes, benchmark: str) -> None:
    tries = benchmarks(rows)[benchmark]
    for name, row in start_and_last(rows, benchmark):
      keys = [f"eval/{benchmark}/pass@{k}" for k in tries]
      points = [(x, row, key) for x, key in enumerate(keys) if key in row]
      color, ls = (GREY, "--") if name == "start" else (BLUE, "-")
      _interval_curve(ax, points, color, name, ls)
    ax.set_xticks(range(len(tries)), [str(k) for k in tries])
    ax.set_xlim(-0.3, len(tries) - 0.7)
    ax.set_ylabel(f"{benchmark}, pass@k (%)")

  several = [name for name, tries in benchmarks(rows).items() if len(tries) > 1]
  return [lambda ax, name=name: draw(ax, name) for name in several]


def _diversity(rows: list[Row]) -> list[Draw]:
  """Likeness of a problem's answers and repetition inside one, over the steps."""
  if rows[-1]["step"] == 0:
    return []
  curves = (
    ("self_bleu", "Self-BLEU", BLUE),
    ("distinct_2", "distinct-2", GREEN),
    ("repetition", "repetition", ORANGE),
  )
  return [
    draw
    for name in [*benchmarks(rows), *graded(rows)]
    for draw in _lines(
      f"{name} (%)",
      *((f"eval/{name}/{key}", label, color) for key, label, color in curves),
      scale=100,
    )(rows)
  ]


def _step_time(rows: list[Row]) -> list[Draw]:
  """Seconds of a step, its phases stacked; what no phase has timed is the rest."""
  timed = [row for row in rows if "time/step_s" in row]
  if not timed:
    return []
  colors = {"rollout": BLUE, "reward": ORANGE, "update": GREEN, "measure": PURPLE}
  names = [name for name in colors if any(f"time/{name}_s" in row for row in timed)]
  steps, total = series(timed, "time/step_s")
  phases = [[row.get(f"time/{name}_s", 0) for row in timed] for name in names]
  tops = np.cumsum([np.zeros_like(total), *phases], axis=0)
  tops = [*tops, np.maximum(total, tops[-1])]

  def draw(ax: Axes) -> None:
    edges = [*(steps - 0.5), steps[-1] + 0.5]
    for i, name in enumerate([*names, "rest"]):
      color = colors.get(name, GREY)
      ax.stairs(tops[i + 1], edges, baseline=tops[i], fill=True, fc=color, label=name)
    # Compilation makes a few steps so long that the others would not be seen.
    ax.set_ylim(0, 1.5 * np.quantile(total, 0.95))
    ax.set_ylabel("time per step (s)")

  return [draw]


def _step_axis(ax: Axes, last_step: float) -> None:
  # The same range in every figure of a run, so that they can be read across.
  pad = max(0.5, 0.02 * last_step)
  ax.set_xlim(-pad, last_step + pad)
  ax.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))


def _window(rows: list[Row]) -> int:
  """Odd number of steps to average over; 1 (no smoothing) for a short run."""
  last_step = rows[-1]["step"]
  return 1 if last_step < 30 else 2 * max(1, round(last_step / 50)) + 1


def _smoothed(steps: np.ndarray, values: np.ndarray, window: int) -> np.ndarray:
  """Mean of what was measured within a window of steps centred on each point."""
  sums = np.concatenate([[0.0], np.cumsum(values)])
  low = np.searchsorted(steps, steps - window // 2, side="left")
  high = np.searchsorted(steps, steps + window // 2, side="right")
  return (sums[high] - sums[low]) / (high - low)


def percent(row: Row, key: str) -> str:
  return f"{100 * row[key]:.1f}"


# The figures of the report ------------------------------------------------------

CHARTS = (
  Chart(
    "reward",
    "Reward and held-out scores",
    "The training reward should rise. On held-out problems the curve should leave the "
    "dashed line of the start model by more than its band (95 % interval).",
    _lines("mean reward", ("reward/mean", "training reward", GREEN)),
    _held_out,
  ),
  Chart(
    "pass_at_k",
    "pass@k, start and final",
    "Right at least once in k tries. A gain at k = 1 that turns into a loss at large k "
    "means that the policy has become narrower, not more able.",
    _pass_at_k,
    xlabel="k, tries per problem",
  ),
  Chart(
    "diversity",
    "Diversity of the answers to a problem",
    "Self-BLEU near 100 %: all answers to a problem are alike. Repetition inside one "
    "answer grows where a policy goes round in circles.",
    _diversity,
  ),
  Chart(
    "entropy",
    "Entropy of the policy",
    "How undecided the policy is about the next token. A slow decline is normal; a "
    "fall towards zero is collapse: all answers to a prompt become the same.",
    _lines("entropy (nats per token)", ("policy/entropy", "entropy", BLUE)),
  ),
  Chart(
    "kl_to_start",
    "KL to the start model",
    "How far the policy has moved from where it began. For the same accuracy, less is "
    "better; a sudden rise usually comes before trouble.",
    _lines("KL (nats per token)", ("policy/kl_to_start", "KL to start", PURPLE)),
  ),
  Chart(
    "response_length",
    "Response length and truncation",
    "Where wrong answers are longer, the length-weighted baseline differs from the "
    "mean. Few should be cut off, and fewer defeat the verifier (unscorable).",
    _lines(
      "length (tokens)",
      ("response_length/correct_mean", "right", GREEN),
      ("response_length/wrong_mean", "wrong", VERMILION),
      ("response_length/mean", "all", INK),
    ),
    _lines(
      "responses (%)",
      ("response_length/truncated_fraction", "truncated", ORANGE),
      ("reward/unscorable_fraction", "unscorable", GREY),
      scale=100,
    ),
  ),
  Chart(
    "baseline",
    "What the OPO baseline changes",
    "Below zero, the long answers of a group are the worse ones. Groups whose rewards "
    "are all equal teach nothing; many of them: prompts too easy or too hard.",
    _lines("reward", ("baseline/opo_minus_mean", "OPO minus group mean", BLUE)),
    _lines(
      "groups (%)",
      ("groups/zero_advantage_fraction", "with zero advantage", ORANGE),
      scale=100,
    ),
  ),
  Chart(
    "on_policy_gap",
    "Sampler and learner: log-prob difference",
    "With one update a batch this is float rounding, below the dashed bound; above it, "
    "the two are not the same policy. Exact equality is drawn at 1e-9.",
    _lines(
      "|Δ log-prob| (nats)",
      ("onpolicy/logprob_diff_max", "largest token", VERMILION),
      ("onpolicy/logprob_diff_mean", "mean over tokens", BLUE),
      log_bound=GAP_BOUND,
    ),
  ),
  Chart(
    "gradient_norm",
    "Gradient norm",
    "It should stay in one range; lone spikes are harmless, a trend upwards is not.",
    _lines("global norm of the gradient", ("grad_norm", "gradient norm", BLUE)),
  ),
  Chart(
    "time",
    "Time and throughput",
    "Where a step spends its time, evaluation left out. A growing rest is overhead of "
    "the host; a step that leaves the picture at the top is usually compilation.",
    _step_time,
    _lines("tokens / s", ("throughput/tokens_per_s", "throughput", SKY)),
  ),
  Chart(
    "sft",
    "Before RL: supervised warm start",
    "Not RL: imitation of given answers before the first RL step, which makes the "
    "start model of the other figures. The loss should fall and level off.",
    _lines("supervised loss (nats per token)", ("loss", "warm start loss", PURPLE)),
    xlabel="warm start step (not RL)",
  ),
)


# Gradient variance --------------------------------------------------------------

# Estimator -> (label, colour, dashes) in the figure of `variance_figure`.
VARIANCE_CURVES = {
  "reinforce": ("no baseline", GREY, "-"),
  "opo_loo": ("length (OPO)", BLUE, "-"),
  "opo_fitted_loo": ("length, fitted power", SKY, "-"),
  "energy_loo": ("logit energy", GREEN, "-"),
  "exact_loo": ("exact |s|²", VERMILION, "-"),
  "exact_all": ("floor: exact, all responses", VERMILION, ":"),
}


def variance_figure(rows: list[Row], out: str | Path) -> Path:
  """Draws what `variance.json` holds, a row of panels for each policy.

  Left the error of each leave-one-out baseline beside that of the mean, over the size
  of the group; then the squared norm of each response's score over its length and over
  its logit energy, with the line fitted within prompts.

  Args:
    rows: `policies` of the file.
    out: picture to write; its suffix (.png, .svg, .pdf) decides the format.
  """
  out = Path(out)
  out.parent.mkdir(parents=True, exist_ok=True)
  with matplotlib.rc_context(STYLE):
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
  ax.set_ylim(0, 2)  # a wide interval may leave the picture
  ax.set_xticks(range(len(sizes)), sizes)
  ax.set_title(
    f"step {row['step']}, reward {row['reward/mean']:.2f}", loc="left", fontsize=10.5
  )
  ax.set(xlabel="K, responses per group", ylabel="error beside the mean's")


def _norm_over(ax: Axes, row: Row, column: int, name: str) -> None:
  points, fit = np.array(row["points"]), row["fits"][name]["within"]
  for reward, label, color in ((0, "wrong", VERMILION), (1, "right", GREEN)):
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
