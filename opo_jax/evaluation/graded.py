"""Evaluation of graded responses: mean scores, and win rates over the start policy.

A graded reward is real-valued, not correct or incorrect, so that pass@k has nothing to
count. The mean score and the win rate take its place: how often a judge prefers this
policy's response to the start policy's response to the same question.
"""

from collections.abc import Sequence

import numpy as np

from opo_jax.evaluation.responses import Response, by_problem
from opo_jax.evaluation.summary import mean_over_problems, response_statistics


def win_rate(scores: np.ndarray, against: np.ndarray) -> np.ndarray:
  """The fraction of pairs in which a response outscores the other policy's.

  Pairs every response with every one of the other policy; a tie is half a win.

  Args:
    scores: [G, K], of K responses to each of G questions; NaN is unscorable.
    against: [G, J].

  Returns:
    [G] between 0 and 1; NaN where one side has no scorable response.

  >>> win_rate(np.array([[1.0, 0.0]]), np.array([[0.0, 0.5]]))  # 1, 1; a half, 0
  array([0.625])
  """
  ours, theirs = scores[:, :, None], against[:, None, :]
  counted = ~np.isnan(ours) & ~np.isnan(theirs)
  wins = np.where(counted, (ours > theirs) + 0.5 * (ours == theirs), 0.0)
  number = counted.sum((1, 2))
  return np.where(number, wins.sum((1, 2)) / np.maximum(number, 1), np.nan)


def per_problem(
  responses: Sequence[Response], start: Sequence[Response] = ()
) -> dict[str, dict[str, float]]:
  """Every metric of every question: metric -> {question id: value}.

  Args:
    responses: to some questions.
    start: the start policy's to the same questions; without them, no win rates.

  Returns:
    `reward_score` and `reward_win_rate` over the start policy, from the rewards;
    `true_score` and `true_win_rate`, from the true scores where they are known; and
    what `evaluation.response_statistics` returns. A question without a scorable
    response has no score.

  >>> responses = [
  ...   Response("a", i, "so", "", None, reward, 2, True)
  ...   for i, reward in enumerate((2.0, 3.0))
  ... ]
  >>> metrics = per_problem(responses, responses)
  >>> metrics["reward_score"], metrics["reward_win_rate"]
  ({'a': 2.5}, {'a': 0.5})
  """
  against = by_problem(start)
  metrics: dict[str, dict[str, float]] = {}
  for question, rows in by_problem(responses).items():
    values, theirs = {}, _scores(against.get(question, []))
    for judge, scores in _scores(rows).items():
      if not np.isnan(scores).all():
        values[f"{judge}_score"] = float(np.nanmean(scores))
        rate = float(win_rate(scores[None], theirs[judge][None])[0])
        if not np.isnan(rate):
          values[f"{judge}_win_rate"] = rate
    for name, value in (values | response_statistics(rows)).items():
      metrics.setdefault(name, {})[question] = value
  return metrics


def summary(
  responses: Sequence[Response], start: Sequence[Response] = ()
) -> dict[str, float]:
  """The means over questions of `per_problem`.

  Returns:
    Each metric, and for scores and win rates `_low` and `_high`: the 95 % interval over
    questions.
  """
  return mean_over_problems(per_problem(responses, start))


def _scores(rows: Sequence[Response]) -> dict[str, np.ndarray]:
  """Judge -> the score of each response, NaN where it has none."""
  return {
    "reward": np.array([row.reward for row in rows], float),
    "true": np.array([row.true_score for row in rows], float),
  }
