"""Runs beside each other: what differs, by how much, and whether that is noise.

The first run is what the others are held against. Evaluations are paired problem by
problem, curves step by step; both differences come with intervals. Reads what training
and `make eval` left behind, and imports no JAX.
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
  markdown,
  per_problem,
  read_responses,
)
from opo_jax.evaluation import graded as judging
from opo_jax.reports import plots
from opo_jax.reports.report import write_page

# What is compared step by step: metric, title, digits, factor.
CURVES = (
  Column("reward/mean", "reward", 3, 1),
  Column("response_length/mean", "length", 1, 1),
  Column("response_length/truncated_fraction", "truncated %", 1, 100),
  Column("policy/entropy", "entropy", 3, 1),
  Column("policy/kl_to_start", "KL to start", 4, 1),
  Column("grad_norm", "gradient norm", 3, 1),
)
# Curves are compared over the last part of the steps that two runs have in common.
LAST_PART = 0.25


@dataclasses.dataclass(frozen=True)
class Difference:
  """A figure of a run, and how far it lies from that of the first run.

  Attributes:
    value: over all problems or steps of this run that were measured.
    difference: over those that both runs have; None for the first run itself, and
      where the two have none in common.
    low, high: its 95 % interval; None where there is too little to say.
    count: problems or steps in common.
  """

  value: float
  difference: float | None = None
  low: float | None = None
  high: float | None = None
  count: int = 0

  @property
  def is_clear(self) -> bool:
    """Whether the interval leaves out zero."""
    return self.low is not None and (self.low > 0 or self.high < 0)


# Line of a table -> metric -> how it differs.
Lines = dict[str, dict[str, Difference]]


def compare(run_dirs: Sequence[Path], out: Path) -> Path:
  """Writes the self-contained compare.html, and compare.json, .md and .png.

  Args:
    run_dirs: two runs or more; the first is the one the others are held against.
    out: directory to write to; made if it is missing.

  Returns:
    The path of compare.html.

  Raises:
    ValueError: fewer than two runs, more than there are colours, the same one twice,
      or one that holds neither metrics nor an evaluation.
  """
  runs = _read(run_dirs)
  first, *_ = runs
  apart = [label for label, run in runs.items() if run.judge != runs[first].judge]
  scores = score_differences(
    {label: run.answers for label, run in runs.items()}, judged_apart=apart
  )
  curves = curve_differences(
    {label: run.rows for label, run in runs.items()}, judged_apart=apart
  )
  settings = _differing({label: run.settings for label, run in runs.items()})
  tables = [
    _table(name, columns(_metrics(lines)), lines) for name, lines in scores.items()
  ]
  if curves:
    shown = [column for column in CURVES if column.metric in _metrics(curves)]
    counts = {found.count for line in curves.values() for found in line.values()} - {0}
    name = "training, the last quarter of the steps in common"
    if counts:
      name += f" ({' to '.join(map(str, sorted({min(counts), max(counts)})))} steps)"
    tables.append(_table(name, shown, curves))

  out.mkdir(parents=True, exist_ok=True)
  values = {
    "runs": {label: str(run.path) for label, run in runs.items()},
    "scores": scores,
    "curves": curves,
    "settings": settings,
    "judged_apart": apart,
  }
  text = json.dumps(values, indent=2, ensure_ascii=False, default=dataclasses.asdict)
  (out / "compare.json").write_text(text + "\n", encoding="utf-8")
  text = "\n\n".join(map(_markdown, tables))
  (out / "compare.md").write_text(text + "\n", encoding="utf-8")
  colors = dict(zip(runs, plots.RUN_COLORS, strict=False))
  return write_page(
    out / "compare.html",
    "compare.html.jinja",
    first=first,
    colors=colors,
    tables=tables,
    settings=settings,
    judged_apart=apart,
    not_evaluated=[label for label, run in runs.items() if not run.answers],
    image=_figure(runs, colors, out / "compare.png"),
  )


def score_differences(
  answers: dict[str, dict[str, dict[str, dict[str, dict[str, float]]]]],
  *,
  judged_apart: Sequence[str] = (),
) -> dict[str, Lines]:
  """How evaluations differ from the first run's, problem by problem.

  Args:
    answers: run -> policy -> benchmark -> what `per_problem` of `evaluation`, or of
      `judging`, gives of its responses. The last policy of a run is its result.
    judged_apart: runs whose rewards come from another judge than the first run's. A
      score by one reward model says nothing beside that of another: no difference.

  Returns:
    Benchmark -> the first run's start policy, if there is one, and every run's result.
    The interval is that of the mean difference, by resampling the problems in common.
  """
  first, *_ = answers
  chosen = {label: list(kept.values())[-1] for label, kept in answers.items() if kept}
  start = answers[first].get("start")
  if start and len(answers[first]) > 1:
    chosen = {f"{first}, start": start} | chosen
  base = chosen.get(first, {})
  benchmarks = dict.fromkeys(name for kept in chosen.values() for name in kept)
  return {
    benchmark: {
      label: {
        metric: _difference(
          values,
          base.get(benchmark, {}).get(metric)
          if label != first and not (label in judged_apart and _is_reward(metric))
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
  rows: dict[str, list[plots.Row]], *, judged_apart: Sequence[str] = ()
) -> Lines:
  """How the end of training differs from the first run's, step by step.

  Args:
    rows: run -> what `plots.read_metrics` gives.
    judged_apart: as of `score_differences`.

  Returns:
    Run -> metric of `CURVES` -> the difference over the last quarter of the steps that
    both runs have measured.
  """
  first, *_ = rows
  curves = {
    label: {
      column.metric: dict(zip(*plots.series(kept, column.metric), strict=True))
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
      if label == first:  # its value stands for the steps that others are held to
        for other in curves.values():
          shared = shared & other.get(metric, {}).keys() or shared
      steps = sorted(shared) or sorted(values)
      last = steps[-math.ceil(LAST_PART * len(steps)) :]
      beside = label != first and not (label in judged_apart and _is_reward(metric))
      lines[label][metric] = _difference(
        {step: values[step] for step in last},
        base if beside else None,
        interval_over_steps,
      )
  return lines


def _is_reward(metric: str) -> bool:
  return metric.startswith(("reward/", "reward_"))


def interval_over_steps(differences: Sequence[float]) -> tuple[float, float] | None:
  """The 95 % interval of the mean of neighbouring steps, which are not independent.

  Blocks of sqrt(n) consecutive steps are resampled together (the circular block
  bootstrap). It says how sure the mean of *these two* runs is, and nothing of what
  another seed would give.

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
  rows: list[plots.Row]
  answers: dict[str, dict[str, dict[str, dict[str, float]]]]
  settings: dict[str, Any]
  judge: str  # where its rewards come from


def _read(run_dirs: Sequence[Path]) -> dict[str, _Run]:
  """Label -> run; the directory's name where that is enough."""
  paths = [Path(path) for path in run_dirs]
  if not 2 <= len(paths) <= len(plots.RUN_COLORS):
    raise ValueError(
      f"{len(paths)} runs to compare; give two to {len(plots.RUN_COLORS)}, as many as"
      ' there are colours (make compare RUNS="runs/a runs/b").'
    )
  if len({path.resolve() for path in paths}) < len(paths):
    raise ValueError("The same run is there twice; give each once.")
  names = [path.resolve().name for path in paths]
  unique = len(set(names)) == len(names)
  return {
    name if unique else str(path): _read_run(path)
    for name, path in zip(names, paths, strict=True)
  }


def _read_run(path: Path) -> _Run:
  rows = plots.read_metrics(path) if (path / "metrics.jsonl").exists() else []
  results = plots.read_json(path / "eval" / "results.json")
  answers, start = {}, {}
  for policy, scores in results.get("policies", {}).items():
    directory = path / "eval" / policy.replace(" ", "_")
    answers[policy] = {}
    for file in sorted(directory.glob("*.responses.jsonl")):
      benchmark = file.name.removesuffix(".responses.jsonl")
      responses = read_responses(file)
      if policy == "start":
        start[benchmark] = responses
      # What `make eval` took for scores is none of right and wrong here, either.
      answers[policy][benchmark] = (
        judging.per_problem(responses, start.get(benchmark, ()))
        if any(key.endswith("/reward_score") for key in scores)
        else per_problem(responses)
      )
  if not rows and not answers:
    raise ValueError(
      f"{path} holds neither metrics.jsonl nor eval/results.json; train it, or evaluate"
      f" it (make eval RUN={path})."
    )
  config = plots.read_json(path / "config.json")
  settings = results.get("settings", {})
  judge = _judge(path, settings.get("reward") or config.get("reward", {}))
  return _Run(path, rows, answers, config | {"evaluated": settings}, judge)


def _judge(path: Path, reward: dict[str, Any]) -> str:
  """A name of what gave a run's rewards; equal where their scores mean the same."""
  verifier = reward.get("verifier", "")
  if verifier != "reward_model":
    return verifier
  # Its fingerprint, which `make eval` writes down; else its place.
  return reward.get("scored_by") or reward.get("model") or str(path.resolve())


def _differing(settings: dict[str, dict[str, Any]]) -> dict[str, dict[str, str]]:
  """Setting -> run -> value, of those that differ among the runs that have them."""

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
  # What was trained with stands once, not again under what was evaluated with.
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
  """Value, difference with its interval, and whether that is clear of zero."""
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
  """The curves as a picture beside the page, and in it; "" where no run was trained."""
  trained = {label: run.path for label, run in runs.items() if run.rows}
  if not trained:
    return ""
  plots.compare_figure(
    trained, path, curves=tuple(plots.CURVES), colors=[colors[k] for k in trained]
  )
  return base64.b64encode(path.read_bytes()).decode("ascii")
