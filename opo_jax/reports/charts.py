"""The figures of one run's report: a `Chart` each, listed in `CHARTS`.

A chart draws only what the run measured: a missing metric is absent, never zero.
Imports neither JAX nor `Config`, so that a report can be made on a laptop from a copied
directory.
"""

import io
from collections.abc import Callable

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from opo_jax.reports import style
from opo_jax.reports.run_files import Row, benchmarks, graded, series, start_and_last
from opo_jax.reports.style import (
  BLUE,
  DASHED,
  GREEN,
  GREY,
  INK,
  ORANGE,
  PURPLE,
  SKY,
  VERMILION,
)

# The gap between sampler's and learner's log-probs that float rounding explains.
GAP_BOUND = 1e-4
# Smaller gaps, above all exact zeros, are drawn here: a log axis would drop them.
GAP_FLOOR = 1e-9

Draw = Callable[[Axes], None]
# Rows -> the panels to draw: one, one for each benchmark, or none.
Panel = Callable[[list[Row]], list[Draw]]

# Metric, label and colour of the curves of graded benchmarks.
SCORES = (("reward_score", "reward", BLUE), ("true_score", "true score", ORANGE))
WIN_RATES = (("reward_win_rate", "by reward", BLUE), ("true_win_rate", "true", ORANGE))


class Chart:
  """A figure of the report: panels stacked over a common x axis."""

  def __init__(
    self, name: str, title: str, caption: str, *panels: Panel, xlabel: str = "RL step"
  ):
    self.name, self.title, self.caption = name, title, caption
    self.panels, self.xlabel = panels, xlabel


def render(chart: Chart, rows: list[Row]) -> bytes | None:
  """Renders a chart as PNG; None if the rows hold nothing to draw."""
  draws = [draw for panel in chart.panels for draw in panel(rows)]
  if not draws:
    return None
  with matplotlib.rc_context(style.STYLE):
    size = 5.6, max(4.2, 2.1 * len(draws))  # inches: two side by side at 1200 px
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(draws), 1, sharex=True, squeeze=False).ravel()
    for ax, draw in zip(axes, draws, strict=True):
      style.step_axis(ax, rows[-1]["step"])
      draw(ax)
      # Above the axes, so that it covers no curve.
      ax.legend(loc="lower left", bbox_to_anchor=(-0.01, 1), borderaxespad=0.2, ncols=5)
    axes[-1].set_xlabel(chart.xlabel)
    figure.align_ylabels()
    image = io.BytesIO()
    figure.savefig(image, format="png")
  return image.getvalue()


def _lines(
  ylabel: str, *curves: tuple[str, str, str], scale: float = 1, log_bound: float = 0
) -> Panel:
  """A panel of curves over steps, each a (metric, label, colour).

  The y axis includes zero. With a bound it is logarithmic, and nothing is smoothed.
  """

  def panel(rows: list[Row]) -> list[Draw]:
    measured = [curve for curve in curves if any(curve[0] in row for row in rows)]

    def draw(ax: Axes) -> None:
      lowest = np.inf
      for key, label, color in measured:
        steps, values = series(rows, key)
        values = np.maximum(values, GAP_FLOOR) if log_bound else scale * values
        window = 1 if log_bound else style.smoothing_window(rows)
        style.curve(ax, steps, values, color, window, label)
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


def _held_out(rows: list[Row]) -> list[Draw]:
  """Panels of pass@1 and the largest pass@k, or of the scores, of each benchmark."""
  if rows[-1]["step"] == 0:
    return []  # the start policy alone is a single point, which the table shows

  def draw(ax: Axes, benchmark: str, ylabel: str, curves, scale: float) -> None:
    for metric, label, color in curves:
      key = f"eval/{benchmark}/{metric}"
      points = [(row["step"], row, key) for row in rows if key in row]
      if not points:
        continue
      style.interval_curve(ax, points, color, label, scale=scale)
      step, row, _ = points[0]
      if step == 0:
        start = f"{100 * row[key]:.1f} %" if scale == 100 else f"{row[key]:.3f}"
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
  """Panels of pass@k over k, of the start policy and of the last evaluation."""

  def draw(ax: Axes, benchmark: str) -> None:
    tries = benchmarks(rows)[benchmark]
    for name, row in start_and_last(rows, benchmark):
      keys = [f"eval/{benchmark}/pass@{k}" for k in tries]
      points = [(x, row, key) for x, key in enumerate(keys) if key in row]
      color, ls = (GREY, "--") if name == "start" else (BLUE, "-")
      style.interval_curve(ax, points, color, name, ls)
    ax.set_xticks(range(len(tries)), [str(k) for k in tries])
    ax.set_xlim(-0.3, len(tries) - 0.7)
    ax.set_ylabel(f"{benchmark}, pass@k (%)")

  several = [name for name, tries in benchmarks(rows).items() if len(tries) > 1]
  return [lambda ax, name=name: draw(ax, name) for name in several]


def _diversity(rows: list[Row]) -> list[Draw]:
  """Panels of the similarity of a problem's responses and repetition within one."""
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
  """A panel of the seconds of a step, phases stacked; `rest` is in no phase."""
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
    # Compilation makes a few steps so long that they would hide the others.
    ax.set_ylim(0, 1.5 * np.quantile(total, 0.95))
    ax.set_ylabel("time per step (s)")

  return [draw]


CHARTS = (
  Chart(
    "reward",
    "Reward and held-out scores",
    "The training reward should rise. On held-out problems the curve should leave the "
    "dashed line of the start policy by more than its band (95 % interval).",
    _lines("mean reward", ("reward/mean", "training reward", GREEN)),
    _held_out,
  ),
  Chart(
    "pass_at_k",
    "pass@k, start and final",
    "The probability that at least one of k samples is correct. A gain at k = 1 with a "
    "loss at large k means that the policy became narrower, not more able.",
    _pass_at_k,
    xlabel="k, samples per problem",
  ),
  Chart(
    "diversity",
    "Diversity of the responses to a problem",
    "Self-BLEU near 100 %: all responses to a problem are alike. Repetition within a "
    "response grows where the policy loops.",
    _diversity,
  ),
  Chart(
    "entropy",
    "Entropy of the policy",
    "The entropy of the next-token distribution. A slow decline is normal; a fall "
    "towards zero is collapse: all responses to a prompt become the same.",
    _lines("entropy (nats per token)", ("policy/entropy", "entropy", BLUE)),
  ),
  Chart(
    "kl_to_start",
    "KL to the start policy",
    "The distance of the policy from its start. At equal accuracy less is better; a "
    "sudden rise usually precedes instability.",
    _lines("KL (nats per token)", ("policy/kl_to_start", "KL to start", PURPLE)),
  ),
  Chart(
    "response_length",
    "Response length and truncation",
    "Where incorrect responses are longer, the length-weighted baseline differs from "
    "the mean. Few should be truncated, and fewer unscorable by the verifier.",
    _lines(
      "length (tokens)",
      ("response_length/correct_mean", "correct", GREEN),
      ("response_length/wrong_mean", "incorrect", VERMILION),
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
    "OPO baseline against group mean",
    "Below zero, longer responses of a group earn less. A group of equal rewards has "
    "zero advantage and no gradient; many of them: prompts too easy or too hard.",
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
    "With one update per batch this is float rounding, below the dashed bound; above "
    "it, the two are not the same policy. Exact equality is drawn at 1e-9.",
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
    "It should stay in one range; single spikes are harmless, an upward trend is not.",
    _lines("global norm of the gradient", ("grad_norm", "gradient norm", BLUE)),
  ),
  Chart(
    "time",
    "Time and throughput",
    "Seconds per step by phase, without evaluation. A growing rest is host overhead; "
    "a step beyond the top of the figure usually compiled.",
    _step_time,
    _lines("tokens / s", ("throughput/tokens_per_s", "throughput", SKY)),
  ),
  Chart(
    "sft",
    "Supervised fine-tuning before RL",
    "SFT on demonstrations before the first RL step; it gives the start policy of the "
    "other figures. The loss should fall and level off.",
    _lines("SFT loss (nats per token)", ("loss", "SFT loss", PURPLE)),
    xlabel="SFT step",
  ),
)
