"""Evaluation: pass@k with its interval, and the measurement of a policy.

The numbers are pure functions of NumPy arrays. `evaluate` takes functions: how to
sample and how to verify are its caller's business.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from opo_jax.rollouts import Rollouts

KS = (1, 2, 4, 8, 16)


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
  """The unbiased estimate of P(at least one of k samples is right).

      1 - C(n - c, k) / C(n, k)                https://arxiv.org/abs/2107.03374

  Args:
    num_samples: n, at least k.
    num_correct: c of them are right.
    k: at least 1.

  Raises:
    ValueError: numbers out of their range.

  >>> pass_at_k(8, 1, 8), pass_at_k(4, 1, 2)
  (1.0, 0.5)
  """
  if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
    raise ValueError(
      f"Expected 0 <= correct <= samples and 1 <= k <= samples, got {num_correct}"
      f" correct of {num_samples} samples and k = {k}."
    )
  wrong = num_samples - num_correct
  return 1.0 - math.comb(wrong, k) / math.comb(num_samples, k)


def bootstrap_interval(
  per_problem: Sequence[float], *, confidence: float = 0.95, resamples: int = 2000
) -> tuple[float, float]:
  """The interval of the mean over problems, by resampling problems.

  Its random numbers are its own: neither training nor another interval changes them.

  Args:
    per_problem: one value for each problem.
    confidence: mass inside.
    resamples: of the set of problems, with replacement.

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


def evaluate(
  sample: Callable[[Sequence[Sequence[int]]], Rollouts],
  verify: Callable[[Rollouts], np.ndarray],
  prompts: Sequence[Sequence[int]],
  *,
  samples_per_problem: int,
) -> dict[str, float]:
  """Samples responses to problems and says how good they are.

  Args:
    sample: prompts -> rollouts, `samples_per_problem` consecutive rows to each.
    verify: rollouts -> rewards [N] on the host; above 0.5 is right, NaN unscorable.
    prompts: token ids, one list a problem.
    samples_per_problem: n of pass@k.

  Returns:
    `pass@k`, `pass@k_low`, `pass@k_high` (95 % over problems) for the k of `KS` up to
    n, `response_length`, `truncated_fraction`, `unscorable_fraction`. An unscorable
    sample is left out, and so is a problem with fewer than k scorable ones.

  >>> from types import SimpleNamespace
  >>> answers = SimpleNamespace(lengths=np.array([3, 5, 4, 4]), finished=np.ones(4))
  >>> result = evaluate(
  ...   sample=lambda prompts: answers,
  ...   verify=lambda rollouts: np.array([1.0, 0.0, 0.0, 0.0]),
  ...   prompts=[[7, 8], [9]],
  ...   samples_per_problem=2,
  ... )
  >>> result["pass@1"], result["pass@2"], result["response_length"]
  (0.25, 0.5, 4.0)
  """
  rollouts = sample(prompts)
  rewards = verify(rollouts).reshape(len(prompts), samples_per_problem)
  result = {
    "response_length": float(np.mean(rollouts.lengths)),
    "truncated_fraction": float(1.0 - np.mean(rollouts.finished)),
    "unscorable_fraction": float(np.isnan(rewards).mean()),
  }
  scorable = [row[~np.isnan(row)] for row in rewards]
  for k in KS:
    per_problem = [
      pass_at_k(len(row), int((row > 0.5).sum()), k)
      for row in scorable
      if len(row) >= k
    ]
    if per_problem:
      low, high = bootstrap_interval(per_problem)
      result |= {
        f"pass@{k}": float(np.mean(per_problem)),
        f"pass@{k}_low": low,
        f"pass@{k}_high": high,
      }
  return result
