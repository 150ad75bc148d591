"""Metrics of a benchmark: first of each problem, then the mean over problems.

`per_problem` maps metric -> {problem id: value}, which pairs two policies; `summarise`
takes the means and adds bootstrap intervals.
"""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np

from opo_jax.evaluation import diversity
from opo_jax.evaluation.estimators import bootstrap_interval, majority_at_k, pass_at_k
from opo_jax.evaluation.responses import Response, by_problem

# The k of pass@k and maj@k.
KS = (1, 2, 4, 8, 16, 32, 64)


def per_problem(responses: Sequence[Response]) -> dict[str, dict[str, float]]:
  """Every metric of every problem: metric -> {problem id: value}.

  pass@k, maj@k and mean@n ignore unscorable samples; a problem with fewer than k
  scorable ones has no pass@k and no maj@k.

  Returns:
    `pass@k`, and `maj@k` where final answers were extracted, for the k of `KS` up to n
    (maj@k from 4: a majority of two is a coin flip); `mean@n`, the mean reward; what
    `response_statistics` returns; and, of two samples or more with extracted answers,
    `unique_answers`, the number of different final answers.

  >>> samples = [("4", 1.0), ("5", 0.0), ("4", 1.0), (None, 0.0)]
  >>> metrics = per_problem(
  ...   [Response("p", i, "so", "4", a, r, 3, True) for i, (a, r) in enumerate(samples)]
  ... )
  >>> metrics["pass@2"]["p"], metrics["maj@4"]["p"], metrics["unique_answers"]["p"]
  (0.8333333333333334, 1.0, 2.0)
  """
  problems = by_problem(responses)
  num_samples = max(map(len, problems.values()), default=0)
  has_answers = any(response.answer is not None for response in responses)
  metrics: dict[str, dict[str, float]] = {}
  for problem, rows in problems.items():
    values = _scores(rows, num_samples, has_answers) | response_statistics(rows)
    if has_answers and len(rows) > 1:
      answers = {row.answer for row in rows if row.answer is not None}
      values["unique_answers"] = float(len(answers))
    for name, value in values.items():
      metrics.setdefault(name, {})[problem] = value
  return metrics


def _scores(rows, num_samples, has_answers) -> dict[str, float]:
  """pass@k, maj@k and mean@n of one problem, over its scorable samples."""
  rows = [row for row in rows if row.reward is not None]
  correct = [row.reward > 0.5 for row in rows]
  answers = [row.answer for row in rows]
  n, num_correct = len(rows), sum(correct)
  values = {f"pass@{k}": pass_at_k(n, num_correct, k) for k in KS if k <= n}
  if has_answers:
    values |= {
      f"maj@{k}": majority_at_k(answers, correct, k) for k in KS if 4 <= k <= n
    }
  if rows:
    values[f"mean@{num_samples}"] = math.fsum(row.reward for row in rows) / n
  return values


def response_statistics(rows: Sequence[Response]) -> dict[str, float]:
  """Statistics of one problem's responses that do not depend on correctness.

  Returns:
    `response_length`, `truncated_fraction`, `unscorable_fraction`, `repetition`,
    `distinct_1`, `distinct_2`, and, of two responses or more, `self_bleu`.

  >>> row = Response("a", 0, "7", "7", "7", 1.0, 2, True)
  >>> response_statistics([row])["response_length"]
  2.0
  """
  texts = [row.response for row in rows]
  values = {
    "response_length": math.fsum(row.length for row in rows) / len(rows),
    "truncated_fraction": sum(not row.finished for row in rows) / len(rows),
    "unscorable_fraction": sum(row.reward is None for row in rows) / len(rows),
    "repetition": math.fsum(map(diversity.repetition, texts)) / len(rows),
    "distinct_1": diversity.distinct_n(texts, 1),
    "distinct_2": diversity.distinct_n(texts, 2),
  }
  if len(rows) > 1:
    values["self_bleu"] = diversity.self_bleu(texts)
  return values


def summarise(responses: Sequence[Response]) -> dict[str, float]:
  """The means over problems of `per_problem`, with intervals of the scores.

  Returns:
    Each metric, and for pass@k, maj@k and mean@n its `_low` and `_high`: the 95 %
    interval over problems. A metric that no problem has is absent.

  >>> import dataclasses
  >>> row = Response("a", 0, "7", "7", "7", 1.0, 2, True)
  >>> other = dataclasses.replace(row, id="b", reward=0.0)
  >>> result = summarise([row, other])
  >>> result["pass@1"], result["pass@1_low"], result["pass@1_high"]
  (0.5, 0.0, 1.0)
  """
  return mean_over_problems(per_problem(responses))


def mean_over_problems(metrics: dict[str, dict[str, float]]) -> dict[str, float]:
  """The mean over problems of each metric, and the interval of each score.

  Args:
    metrics: metric -> problem id -> value.

  >>> metrics = {"pass@1": {"a": 1.0, "b": 0.0}, "repetition": {"a": 0.5}}
  >>> result = mean_over_problems(metrics)
  >>> result["pass@1"], result["pass@1_high"], result["repetition"]
  (0.5, 1.0, 0.5)
  """

  def order(name):
    kind, _, number = name.partition("@")
    place = ("pass", "maj", "mean").index(kind) if number else 3
    return place, int(number or 0)

  result = {}
  for name in sorted(metrics, key=order):
    values = list(metrics[name].values())
    result[name] = float(np.mean(values))
    if "@" in name or name.endswith(("_score", "_win_rate")):
      result[f"{name}_low"], result[f"{name}_high"] = bootstrap_interval(values)
  return result


def pass_rates(responses: Sequence[Response]) -> list[dict[str, Any]]:
  """The pass rate of each problem: the lines of `<benchmark>.problems.jsonl`.

  Returns:
    `id`, `num_samples`, `num_correct` and `pass_rate` of each problem, in order, over
    its scorable responses; a problem without any is absent.

  >>> rewards = (0.0, 1.0)
  >>> pass_rates([Response("a", i, "", "7", "7", rewards[i], 2, True) for i in (0, 1)])
  [{'id': 'a', 'num_samples': 2, 'num_correct': 1, 'pass_rate': 0.5}]
  """
  samples, correct = Counter(), Counter()
  for row in responses:
    if row.reward is not None:
      samples[row.id] += 1
      correct[row.id] += row.reward > 0.5
  return [
    {"id": name, "num_samples": n, "num_correct": c, "pass_rate": c / n}
    for name, n in samples.items()
    for c in [correct[name]]
  ]
