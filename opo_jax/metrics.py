"""Metrics of a step: times of its phases, rewards and lengths of its responses.

A value that was not measured is absent; a value that is not finite stops the run.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np


class Timers:
  """Wall-clock seconds of the calling thread, by phase of one step.

  Phases that follow one another without a gap add up to the step. In a profile each is
  marked by its name.
  """

  def __init__(self):
    self._start = time.perf_counter()
    self.seconds: dict[str, float] = {}

  @contextlib.contextmanager
  def phase(self, name: str) -> Iterator[None]:
    start = time.perf_counter()
    with jax.profiler.TraceAnnotation(name):
      yield
    spent = time.perf_counter() - start
    self.seconds[name] = self.seconds.get(name, 0.0) + spent

  def metrics(self) -> dict[str, float]:
    """`time/<phase>_s`, and `time/step_s` since this object was made."""
    row = {f"time/{name}_s": seconds for name, seconds in self.seconds.items()}
    return row | {"time/step_s": time.perf_counter() - self._start}


def check_finite(row: dict[str, Any], step: int) -> None:
  """Stops at the first value that is NaN or infinite.

  Raises:
    FloatingPointError: names the step and the metrics.
  """
  bad = [name for name, value in row.items() if not math.isfinite(value)]
  if bad:
    raise FloatingPointError(
      f"Step {step}: {', '.join(bad)} not finite, and nothing of this step was kept. A"
      " smaller --optimizer.learning-rate or --optimizer.max-grad-norm may help."
    )


def describe_responses(
  rewards: np.ndarray, lengths: np.ndarray, finished: np.ndarray
) -> dict[str, float]:
  """Rewards and lengths of one step's responses.

  Args:
    rewards: [N] after shaping; NaN is masked out of every mean of rewards.
    lengths: [N] response tokens.
    finished: [N] not cut off.

  Returns:
    Metrics; those of right (reward > 0.5) or wrong answers are absent where there is
    none or a reward is below 0 or above 1, as scores of a reward model are, and the
    correlation where rewards or lengths do not vary.
  """
  scorable = ~np.isnan(rewards)
  judged = scorable & ((rewards >= 0) & (rewards <= 1))[scorable].all()
  right = judged & (rewards > 0.5)
  wrong = judged & ~right
  row = {
    "response_length/mean": float(lengths.mean()),
    "response_length/cv": float(lengths.std() / lengths.mean()),
    "response_length/truncated_fraction": float(1.0 - finished.mean()),
    "rollout/tokens": int(lengths.sum()),
  }
  if scorable.any():
    row["reward/mean"] = float(rewards[scorable].mean())
  if right.any():
    row["response_length/correct_mean"] = float(lengths[right].mean())
  if wrong.any():
    row["response_length/wrong_mean"] = float(lengths[wrong].mean())
  if scorable.any() and np.ptp(lengths[scorable]) and np.ptp(rewards[scorable]):
    correlation = np.corrcoef(lengths[scorable], rewards[scorable])[0, 1]
    row["response_length/reward_correlation"] = float(correlation)
  return row
