"""Evaluation by scores: how good answers are, and how often better than the start's.

Where an answer is more or less good, pass@k has nothing to count. What counts then is
the mean score, and how often somebody who judges would rather have this policy's answer
than the start policy's to the same question.
"""

from collections.abc import Sequence

import numpy as np

from opo_jax.evaluation.statistics import Response, by_problem, means, of_texts


def win_rate(scores: np.ndarray, against: np.ndarray) -> np.ndarray:
  """How often an answer scores more than one of the other policy's, per question.

  Every answer is held against every one of the other's; a tie is half a win.

  Args:
    scores: [G, K], of K answers to each of G questions; NaN is unscorable.
    against: [G, J].

  Returns:
    [G] between 0 and 1; NaN where one side has no scorable answer.

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
  """Every figure of every question: metric -> {question id: value}.

  Args:
    responses: to some questions.
    start: the start policy's to the same questions; none: there are no win rates.

  Returns:
    `reward_score` and `reward_win_rate` over the start policy, of the rewards, and
    `true_score` and `true_win_rate`, of the truth where it is known; and what
    `evaluation.of_texts` gives. A question without a scorable answer has no score.

  >>> answers = [
  ...   Response("a", i, "so", "", None, reward, 2, True)
  ...   for i, reward in enumerate((2.0, 3.0))
  ... ]
  >>> figures = per_problem(answers, answers)
  >>> figures["reward_score"], figures["reward_win_rate"]
  ({'a': 2.5}, {'a': 0.5})
  """
  against = by_problem(start)
  figures: dict[str, dict[str, float]] = {}
  for question, rows in by_problem(responses).items():
    values, theirs = {}, _scores(against.get(question, []))
    for who, scores in _scores(rows).items():
      if not np.isnan(scores).all():
        values[f"{who}_score"] = float(np.nanmean(scores))
        rate = float(win_rate(scores[None], theirs[who][None])[0])
        if not np.isnan(rate):
          values[f"{who}_win_rate"] = rate
    for name, value in (values | of_texts(rows)).items():
      figures.setdefault(name, {})[question] = value
  return figures


def summary(
  responses: Sequence[Response], start: Sequence[Response] = ()
) -> dict[str, float]:
  """The means over questions of `per_problem`.

  Returns:
    Each metric, and of scores and win rates `_low` and `_high`: 95 % over questions.
  """
  return means(per_problem(responses, start))


def _scores(rows: Sequence[Response]) -> dict[str, np.ndarray]:
  """Who judges -> a score of each response, NaN where there is none."""
  return {
    "reward": np.array([row.reward for row in rows], float),
    "true": np.array([row.truth for row in rows], float),
  }
