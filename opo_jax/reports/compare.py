"""Compares runs: paired differences to the first run, with intervals.

Evaluations are paired problem by problem, curves step by step. Reads the files that
training and `make eval` wrote, and imports no JAX.
"""

import base64
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opo_jax.evaluation import (
  Column,
  bootstrap_interval,
  columns,
  graded,
  markdown,
  per_problem,
  read_responses,
)
from opo_jax.reports import plots, style
from opo_jax.reports.report import write_page
from opo_jax.reports.run_files import Row, read_json, read_metrics, series

# The curves compared step by step: metric, title, digits, factor.
CURVES = (
  Column("reward/mean", "reward", 3, 1),
  Column("response_length/mean", "length", 1, 1),
  Column("response_length/truncated_fraction", "truncated %", 1, 100),
  Column("policy/entropy", "entropy", 3, 1),
  Column("policy/kl_to_start", "KL to start", 4, 1),
  Column("grad_norm", "gradient norm", 3, 1),
)
# Curves are compared over this last fraction of the steps that two runs share.
LAST_PART = 0.25


@dataclasses.dataclass(frozen=True)
class Difference:
  """A metric of a run, and its difference to that of the first run.

  Attributes:
    value: the mean over all measured problems or steps of this run.
    difference: the mean over those that both runs share; None for the first run itself,
      and where they share none.
    low, high: its 95 % interval; None for too few steps.
    count: problems or steps that both runs share.
  """

  value: float
  difference: float | None = None
  low: float | None = None
  high: float | None = None
  count: int = 0

  @property
  def is_clear(self) -> bool:
    """Whether the interval excludes zero."""
    return self.low is not None and (self.low > 0 or self.high < 0)


# Line of a table -> metric -> its difference.
Lines = dict[str, dict[str, Difference]]


def compare(run_dirs: Sequence[Path], out: Path) -> Path:
  """Writes the self-contained compare.html, and compare.json, .md and .png.

  Args:
    run_dirs: two runs or more; the others are compared with the first.
    out: directory to write to; created if it is missing.

  Returns:
    The path of compare.html.

  Raises:
    ValueError: fewer than two runs, more runs than colours, the same run twice, or a
      run with neither metrics nor an evaluation.
  """
  runs = _read(run_dirs)
  first, *_ = runs
  other_judge = [label for label, run in runs.items() if run.judge != runs[first].judge]
  scores = score_differences(
    {label: run.evaluations for label, run in runs.items()}, other_judge=other_judge
  )
  curves = curve_differences(
    {label: run.rows for label, run in runs.items()}, other_judge=other_judge
  )
  settings = _differing({label: run.settings for label, run in runs.items()})
  tables = [
    _table(name, columns(_metrics(lines)), lines) for name, lines in scores.items()
  ]
  if curves:
    shown = [column for column in CURVES if column.metric in _metrics(curves)]
    counts = {found.count for line in curves.values() for found in line.values()} - {0}
    name = "training, the last quarter of the shared steps"
    if counts:
      name += f" ({' to '.join(map(str, sorted({min(counts), max(counts)})))} steps)"
    tables.append(_table(name, shown, curves))

  out.mkdir(parents=True, exist_ok=True)
  values = {
    "runs": {label: str(run.path) for label, run in runs.items()},
    "scores": scores,
    "curves": curves,
    "settings": settings,
    "other_judge": other_judge,
  }
  text = json.dumps(values, indent=2, ensure_ascii=False, default=dataclasses.asdict)
  (out / "compare.json").write_text(text + "\n", encoding="utf-8")
  text = "\n\n".join(map(_markdown, tables))
  (out / "compare.md").write_text(text + "\n", encoding="utf-8")
  colors = dict(zip(runs, style.RUN_COLORS, strict=False))
  return write_page(
    out / "compare.html",
    "compare.html.jinja",
    first=first,
    colors=colors,
    tables=tables,
    settings=settings,
    other_judge=other_judge,
    not_evaluated=[label for label, run in runs.items() if not run.evaluations],
    image=_figure(runs, colors, out / "compare.png"),
  )


def score_differences(
  evaluations: dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]],
  *,
  other_judge: Sequence[str] = (),
) -> dict[str, Lines]:
  """Differences of evaluations to the first run's, paired problem by problem.

  Args:
    evaluations: run -> policy -> benchmark -> `evaluation.per_problem`, or
      `evaluation.graded.per_problem`, of its responses. The last policy of a run is its
      result.
    other_judge: runs whose rewards come from another judge than the first run's. The
      scores of two reward models are not comparable: their difference is None.

  Returns:
    Benchmark -> the first run's start policy, if it was evaluated, and every run's
    result. The interval of the mean difference resamples the shared problems.
  """
  first, *_ = evaluations
  chosen = {
    label: list(kept.values())[-1] for label, kept in evaluations.items() if kept
  }
  start = evaluations[first].get("start")
  if start and len(evaluations[first]) > 1:
    chosen = {f"{first}, start": start} | chosen
  base = chosen.get(first, {})
  benchmarks = dict.fromkeys(name for kept in chosen.values() for name in kept)
  return {
    benchmark: {
      label: {
        metric: _difference(
          values,
          base.get(benchmark, {}).get(metric)
          if label != first and not (label in other_judge and _is_reward(metric))
          else None,
          bootstrap_interval,
        )
        for metric, values in kept[benchmark].items()
      }
      for label, kept in chosen.items()
      if benchmark in kept
    }
    for benchmark in benchmarks
  }


def curve_differences(
  rows: dict[str, list[Row]], *, other_judge: Sequence[str] = ()
) -> Lines:
  """Differences of the end of training to the first run's, paired step by step.

  Args:
    rows: run -> `run_files.read_metrics`.
    other_judge: see `score_differences`.

  Returns:
    Run -> metric of `CURVES` -> the difference over the last quarter of the steps that
    both runs measured.
  """
  first, *_ = rows
  curves = {
    label: {
      column.metric: dict(zip(*series(kept, column.metric), strict=True))
      for column in CURVES
      if any(column.metric in row for row in kept)
    }
    for label, kept in rows.items()
    if kept
  }
  lines: Lines = {}
  for label, metrics in curves.items():
    lines[label] = {}
    for metric, values in metrics.items():
      base = curves.get(first, {}).get(metric, {})
      shared = values.keys() & base.keys()
      if label == first:  # its value covers the steps that the others share with it
        for other in curves.values():
          shared = shared & other.get(metric, {}).keys() or shared
      steps = sorted(shared) or sorted(values)
      last = steps[-math.ceil(LAST_PART * len(steps)) :]
      beside = label != first and not (label in other_judge and _is_reward(metric))
      lines[label][metric] = _difference(
        {step: values[step] for step in last},
        base if beside else None,
        interval_over_steps,
      )
  return lines


def _is_reward(metric: str) -> bool:
  return metric.startswith(("reward/", "reward_"))


def interval_over_steps(differences: Sequence[float]) -> tuple[float, float] | None:
  """The 95 % interval of the mean over steps, whose neighbours are correlated.

  The circular block bootstrap resamples blocks of sqrt(n) consecutive steps. The
  interval is about *these two* runs, not about other seeds.

  Returns:
    None for fewer than eight steps.

  >>> low, high = interval_over_steps([1.0] * 30)
  >>> low, high
  (1.0, 1.0)
  """
  values = np.asarray(differences, np.float64)
  n, size = len(values), math.isqrt(max(len(values) - 1, 0)) + 1
  if n < 8:
    return None
  starts = np.random.default_rng(0).integers(n, size=(2000, -(-n // size), 1))
  steps = ((starts + np.arange(size)) % n).reshape(2000, -1)[:, :n]
  low, high = np.percentile(values[steps].mean(axis=1), [2.5, 97.5])
  return float(low), float(high)


def _difference(values, base, interval) -> Difference:
  value = float(np.mean(list(values.values())))
  common = [key for key in values if key in base] if base else []
  if not common:
    return Difference(value)
  differences = [values[key] - base[key] for key in common]
  low, high = interval(differences) or (None, None)
  return Difference(value, float(np.mean(differences)), low, high, len(common))


# Reading -----------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Run:
  path: Path
  rows: list[Row]
  evaluations: dict[str, dict[str, dict[str, dict[str, float]]]]
  settings: dict[str, Any]
  judge: str  # what its rewards come from


def _read(run_dirs: Sequence[Path]) -> dict[str, _Run]:
  """Label -> run. The label is the directory's name if all differ, else its path."""
  paths = [Path(path) for path in run_dirs]
  if not 2 <= len(paths) <= len(style.RUN_COLORS):
    raise ValueError(
      f"{len(paths)} runs to compare; give two to {len(style.RUN_COLORS)}, the number"
      ' of colours (make compare RUNS="runs/a runs/b").'
    )
  if len({path.resolve() for path in paths}) < len(paths):
    raise ValueError("The same run is given twice; give each once.")
  names = [path.resolve().name for path in paths]
  unique = len(set(names)) == len(names)
  return {
    name if unique else str(path): _read_run(path)
    for name, path in zip(names, paths, strict=True)
  }


def _read_run(path: Path) -> _Run:
  rows = read_metrics(path) if (path / "metrics.jsonl").exists() else []
  results = read_json(path / "eval" / "results.json")
  evaluations, start = {}, {}
  for policy, scores in results.get("policies", {}).items():
    directory = path / "eval" / policy.replace(" ", "_")
    evaluations[policy] = {}
    for file in sorted(directory.glob("*.responses.jsonl")):
      benchmark = file.name.removesuffix(".responses.jsonl")
      responses = read_responses(file)
      if policy == "start":
        start[benchmark] = responses
      # Graded responses are neither correct nor incorrect, as in `make eval`.
      evaluations[policy][benchmark] = (
        graded.per_problem(responses, start.get(benchmark, ()))
        if any(key.endswith("/reward_score") for key in scores)
        else per_problem(responses)
      )
  if not rows and not evaluations:
    raise ValueError(
      f"{path} holds neither metrics.jsonl nor eval/results.json; train it, or evaluate"
      f" it (make eval RUN={path})."
    )
  config = read_json(path / "config.json")
  settings = results.get("settings", {})
  judge = _judge(path, settings.get("reward") or config.get("reward", {}))
  return _Run(path, rows, evaluations, config | {"evaluated": settings}, judge)


def _judge(path: Path, reward: dict[str, Any]) -> str:
  """Names the judge of a run's rewards; equal names mean comparable scores."""
  verifier = reward.get("verifier", "")
  if verifier != "reward_model":
    return verifier
  # Its fingerprint, which `make eval` records; else its path.
  return reward.get("scored_by") or reward.get("model") or str(path.resolve())


def _differing(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
  """Setting -> run -> value, of the settings that differ between runs."""

  def flat(values, prefix=""):
    for key, value in values.items():
      if isinstance(value, dict):
        yield from flat(value, f"{prefix}{key}.")
      else:
        yield f"{prefix}{key}", json.dumps(value, ensure_ascii=False)

  named = {label: dict(flat(values)) for label, values in settings.items()}
  keys = dict.fromkeys(key for values in named.values() for key in values)
  kept = {
    key: {label: values[key] for label, values in named.items() if key in values}
    for key in keys
  }
  # A setting of training is not repeated under those of the evaluation.
  return {
    key: values
    for key, values in kept.items()
    for own in [key.removeprefix("evaluated.")]
    if len(set(values.values())) > 1 and (key == own or kept.get(own) != values)
  }


# Showing -----------------------------------------------------------------------------


def _metrics(lines: Lines) -> list[str]:
  return list(dict.fromkeys(metric for line in lines.values() for metric in line))


def _cell(found: Difference | None, column: Column) -> tuple[str, str, bool]:
  """The value, the difference with its interval, and whether it excludes zero."""
  if found is None:
    return "", "", False

  def text(value, sign=""):
    return f"{column.factor * value:{sign}.{column.digits}f}"

  difference = "" if found.difference is None else text(found.difference, "+")
  if found.low is not None:
    difference += f" [{text(found.low, '+')}, {text(found.high, '+')}]"
  return text(found.value), difference, found.is_clear


def _table(name: str, shown: Sequence[Column], lines: Lines) -> dict[str, Any]:
  """A line for each metric, a column for each run."""
  cells = [
    (column.title, [_cell(line.get(column.metric), column) for line in lines.values()])
    for column in shown
  ]
  return {"name": name, "runs": list(lines), "lines": cells}


def _markdown(table: dict[str, Any]) -> str:
  rows = [["", *table["runs"]]]
  for title, cells in table["lines"]:
    rows.append([title, *(f"{v} ({d})" if d else v for v, d, _ in cells)])
  return f"{table['name']}\n\n{markdown(rows)}"


def _figure(runs: dict[str, _Run], colors: dict[str, str], path: Path) -> str:
  """Writes the figure of the curves; returns it as base64, "" without trained runs."""
  trained = {label: run.path for label, run in runs.items() if run.rows}
  if not trained:
    return ""
  plots.compare_figure(
    trained, path, curves=tuple(plots.CURVES), colors=[colors[k] for k in trained]
  )
  return base64.b64encode(path.read_bytes()).decode("ascii")
