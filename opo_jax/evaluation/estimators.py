"""Estimators over the samples of one problem, and a bootstrap interval over problems.

pass@k and maj@k are exact: the mean over all subsets of k samples. NumPy and plain
Python alone.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
  """The unbiased estimate of P(at least one of k samples is correct).

      1 - C(n - c, k) / C(n, k)                https://arxiv.org/abs/2107.03374

  Args:
    num_samples: n, at least k.
    num_correct: c, the correct ones among them.
    k: at least 1.

  Raises:
    ValueError: a number out of its range.

  >>> pass_at_k(8, 1, 8), pass_at_k(4, 1, 2)
  (1.0, 0.5)
  """
  if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
    raise ValueError(
      f"Expected 0 <= correct <= samples and 1 <= k <= samples, got {num_correct}"
      f" correct of {num_samples} samples and k = {k}."
    )
  num_wrong = num_samples - num_correct
  return 1.0 - math.comb(num_wrong, k) / math.comb(num_samples, k)


def majority_at_k(
  answers: Sequence[str | None], correct: Sequence[bool], k: int
) -> float:
  """The unbiased estimate of P(the most frequent answer of k samples is correct).

  The exact mean over all C(n, k) subsets of the samples. Answers that tie for the first
  place win equally often; None casts no vote, and a subset without any vote counts as
  incorrect. Answers are equal if their strings are: pass normalised ones.
  Self-consistency, https://arxiv.org/abs/2203.11171.

  Args:
    answers: the final answer of each of n samples.
    correct: whether each is correct. Where equal answers differ in this, the answer
      counts as correct in proportion.
    k: 1 to n.

  Raises:
    ValueError: k out of its range.

  >>> majority_at_k(["4", "4", "5"], [True, True, False], 3)
  1.0
  >>> majority_at_k(["4", "5"], [True, False], 2)  # a tie
  0.5
  """
  if not 1 <= k <= len(answers) == len(correct):
    raise ValueError(
      f"Expected 1 <= k <= samples, got k = {k} for {len(answers)} answers and"
      f" {len(correct)} verdicts."
    )
  votes: dict[str, list[bool]] = {}
  for answer, is_correct in zip(answers, correct, strict=True):
    if answer is not None:
      votes.setdefault(answer, []).append(is_correct)
  counts = tuple(sorted(map(len, votes.values())))
  chances = _winning_chances(counts, len(answers), k)
  return math.fsum(
    chances[len(verdicts)] * sum(verdicts) / len(verdicts)
    for verdicts in votes.values()
  )


@functools.lru_cache(maxsize=2**14)
def _winning_chances(counts: tuple[int, ...], n: int, k: int) -> dict[int, float]:
  """P(an answer wins a random subset of k), by how often it occurs in the n samples.

  Fix an answer with `own` samples and let v of them be in the subset. `ways[j, t]`
  counts the choices of t further samples, from the answers processed so far, in which
  no answer has more than v votes and exactly j have v: the answer ties with j others
  and wins with probability 1 / (1 + j). Abstentions fill the k - v - t other places.

      counts 2 3 (own) 1, k 4, v 2      ways after the answer with 2 samples:
                                            t = 0   1   2
                                        j = 0   1   2   .
                                        j = 1   .   .   1    both samples: a tie
  """
  num_abstentions = n - sum(counts)
  chances = {}
  for own in set(counts):
    others = list(counts)
    others.remove(own)
    won = 0.0
    for v in range(1, min(own, k) + 1):
      width = k - v + 1
      ways = np.zeros((k // v, width))
      ways[0, 0] = 1.0
      for count in others:
        more = np.zeros_like(ways)
        for u in range(min(count, v, width - 1) + 1):  # votes of this other answer
          rest = math.comb(count, u) * ways[:, : width - u]
          if u < v:
            more[:, u:] += rest
          else:
            more[1:, u:] += rest[:-1]
        ways = more
      fill = [math.comb(num_abstentions, k - v - t) for t in range(width)]
      shares = 1.0 / np.arange(1, len(ways) + 1)
      won += math.comb(own, v) * float(shares @ ways @ np.array(fill, float))
    chances[own] = won / math.comb(n, k)
  return chances


def bootstrap_interval(
  per_problem: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
  """The percentile bootstrap interval of the mean over problems.

  The random generator is local and seeded: training and other intervals leave the
  result alone. On the differences of two policies, problem by problem, this is the
  paired bootstrap.

  Args:
    per_problem: one value for each problem.
    confidence: probability mass inside of the interval.
    resamples: number of bootstrap samples of the problems.

  >>> low, high = bootstrap_interval([0.0, 0.5, 0.5, 1.0] * 25)
  >>> low < 0.5 < high, round(high - low, 1)  # 4 x 0.354 / sqrt(100) wide
  (True, 0.1)
  """
  values = np.asarray(per_problem, np.float64)
  rng = np.random.default_rng(0)
  means = rng.choice(values, (resamples, len(values))).mean(axis=1)
  tail = 50.0 * (1.0 - confidence)
  low, high = np.percentile(means, [tail, 100.0 - tail])
  return float(low), float(high)
